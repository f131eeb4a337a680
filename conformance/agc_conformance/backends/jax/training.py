"""Training of the suite's network on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx

from agc import AGC, Plan
from agc.recipe import Recipe
from agc.training import Launch, Trainer
from agc_conformance.backend import TrainingTask, TrainStep, Unsupported
from agc_conformance.backends.jax.clipping import optax_sgd
from agc_conformance.backends.jax.device import Device
from agc_conformance.training.processes import Process, anew, free_addresses, started
from agc_conformance.training.within import Within
from agc_jax.optimizer import adaptive_grad_clip
from agc_jax.sam import sam_value_and_grad
from agc_jax.train import trainer
from agc_jax.units import plan, units

__all__ = ["Training"]

Array = npt.NDArray[Any]


class Training(Device):
    """A jitted step of Flax NNX and optax."""

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        """Train the suite's network in Flax NNX with SAM, if asked for, AGC and ``optax.sgd``."""
        with jax.default_device(self._devices[0]):
            yield from _train(task)

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Train as ``agc train`` does, with matrix products of float32 in full precision."""
        made = trainer(recipe, replace(launch, device=self.device))
        return Within(made, lambda: jax.default_matmul_precision("highest"))

    def processes(self, count: int) -> AbstractContextManager[Callable[[Recipe, Launch], Trainer]]:
        """Start processes that are told of each other, with a device each."""
        if self.device != "cpu":
            raise Unsupported("several processes are started on the CPU alone")
        (address,) = free_addresses(1)
        # What is asked is what they exchange: kernels that compile sooner will do.
        environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        told = {"device": "cpu", "coordinator": address, "processes": count}
        crew = [Process(environment, {**told, "process": number}) for number in range(count)]
        return started("agc_jax.train:trainer", crew)

    def elsewhere(self) -> Callable[[Recipe, Launch], Trainer]:
        """Make this backend there too."""
        if self.device != "cpu":
            raise Unsupported("another process is started on the CPU alone")
        return partial(anew, type(self), self.device)


class _Network(nnx.Module):  # type: ignore[misc]
    """The network of :class:`agc_conformance.backend.TrainingTask`."""

    def __init__(self, weights: Mapping[str, Array], rngs: nnx.Rngs) -> None:
        first, channels = weights["conv1.weight"].shape[:2]
        second, classes = len(weights["conv2.weight"]), len(weights["head.weight"])
        dtype = weights["conv1.weight"].dtype
        options = {"param_dtype": dtype, "padding": 1, "rngs": rngs}
        self.conv1 = nnx.Conv(channels, first, (3, 3), **options)
        self.conv2 = nnx.Conv(first, second, (3, 3), strides=2, **options)
        self.head = nnx.Linear(second, classes, param_dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nnx.silu(self.conv2(nnx.silu(self.conv1(images))))
        return self.head(hidden.mean((1, 2)))


def _train(task: TrainingTask) -> Iterator[TrainStep]:
    """Train, translating the task's names and layout to Flax's and back."""
    wide = next(iter(task.weights.values())).dtype == np.float64
    with jax.enable_x64(True) if wide else nullcontext():
        model = _Network(task.weights, nnx.Rngs(0))
        for name, weight in task.weights.items():
            layer, kind = name.split(".")
            box = getattr(getattr(model, layer), _FLAX[kind])
            box[...] = jnp.asarray(_out_last(weight))
        rule = _flax_rule(task.rule)
        tx = optax.chain(
            adaptive_grad_clip(rule, units=units(model)), _received(), optax_sgd(task.optimizer)
        )
        made = _task_plan(plan(model, rule))
        graph, params = nnx.split(model, nnx.Param)
        state = tx.init(params)

        def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        seen: list[Any] = []  # weights of every pass

        def watched(params: Any, *batch: jax.Array) -> jax.Array:
            jax.debug.callback(seen.append, jax.lax.stop_gradient(params), ordered=True)
            return loss(params, *batch)

        def gradient(params: Any, count: jax.Array, *batch: jax.Array) -> Any:
            if task.sharpness is None:
                return jax.value_and_grad(watched)(params, *batch)
            return sam_value_and_grad(watched, task.sharpness, batch_argnums=(1, 2))(
                params, *batch, step=count
            )

        @jax.jit  # type: ignore[untyped-decorator]
        def step(
            params: Any, state: Any, count: jax.Array, images: jax.Array, labels: jax.Array
        ) -> Any:
            value, gradients = gradient(params, count, images, labels)
            updates, state = tx.update(gradients, state, params)
            return value, gradients, optax.apply_updates(params, updates), state

        def named(tree: Any) -> dict[str, Array]:
            arrays = {}
            for name in task.weights:
                layer, kind = name.split(".")
                arrays[name] = _out_first(np.asarray(tree[layer][_FLAX[kind]][...]))
            return arrays

        for count, (images, labels) in enumerate(task.batches):
            before = named(params)
            value, gradients, params, state = step(
                params, state, count, jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels)
            )
            jax.effects_barrier()
            clipped, restored = state[1]
            yield TrainStep(
                float(value),
                before,
                named(gradients),
                named(clipped),
                named(params),
                made,
                named(seen[-1]),
                named(restored),
            )
            seen.clear()


def _received() -> optax.GradientTransformation:
    """Return a transformation whose state is what the optimizer receives: gradients and weights."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params), params

    return optax.GradientTransformation(
        init, lambda updates, _, params: (updates, (updates, params))
    )


_FLAX: Final = {"weight": "kernel", "bias": "bias"}


def _flax_rule(rule: AGC) -> AGC:
    """Return a rule on the task's names as one on Flax's."""
    if rule.units:
        raise Unsupported(
            "the rule declares units for the layout (o, i, h, w); Flax stores (h, w, i, o)"
        )
    exclude = [_flax_name(pattern) for pattern in rule.exclude]
    clipping = rule.clipping
    if isinstance(clipping, Mapping):
        clipping = {_flax_name(pattern): value for pattern, value in clipping.items()}
    return replace(rule, exclude=exclude, clipping=clipping)


def _flax_name(pattern: str) -> str:
    return pattern if pattern.startswith("@") else pattern.replace("weight", "kernel")


def _task_plan(made: Plan) -> Plan:
    """Return a plan under the task's names."""
    return Plan(
        tuple(replace(entry, name=entry.name.replace("kernel", "weight")) for entry in made)
    )


def _out_last(array: Array) -> Array:
    """``(o, i, h, w)`` to ``(h, w, i, o)``, ``(o, i)`` to ``(i, o)``."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def _out_first(array: Array) -> Array:
    """Undo :func:`_out_last`."""
    rank = array.ndim
    return array.transpose(rank - 1, rank - 2, *range(rank - 2)) if rank > 1 else array
