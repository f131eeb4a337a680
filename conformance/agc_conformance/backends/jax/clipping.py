"""AGC: clipping by hand, as a transformation, and in the settings of real training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agc.reference import RowSparse
from agc_conformance.backend import Gradient, Optimizer, Outcome, Problem, Unsupported
from agc_conformance.backends.jax.device import Device
from agc_jax.clip import adaptive_clip_gradients
from agc_jax.optimizer import AdaptiveGradClipState, adaptive_grad_clip, stats
from agc_jax.units import plan

__all__ = ["Clipping", "optax_sgd"]

Array = npt.NDArray[Any]


class Clipping(Device):
    """AGC by :mod:`agc_jax`."""

    paths = ("compiled", "as_on_tpu")

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_jax.adaptive_clip_gradients`."""
        with self.place(_all_arrays(problem)):
            return self._clip(problem)

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Array]]:
        """Chain AGC with ``optax.sgd`` and return the weights after each jitted step."""
        with self.place(_all_arrays(problem)):
            tx = optax.chain(adaptive_grad_clip(problem.declared_rule), optax_sgd(optimizer))
            params = self._tree(problem.parameters)
            state = tx.init(params)

            @jax.jit  # type: ignore[untyped-decorator]
            def step(params: Any, state: Any, gradients: Any) -> Any:
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            steps: list[Mapping[str, Array]] = []
            for of_step in gradients:
                params, state = step(params, state, self._tree(of_step))
                steps.append({name: np.asarray(value) for name, value in params.items()})
            return steps

    def scenario_optimizer(self, problem: Problem) -> Outcome:
        """Clip by the transformation."""
        with self.place(_all_arrays(problem)):
            return self._through(problem, [self._tree(problem.gradients)])

    def scenario_idle(self, problem: Problem) -> Outcome:
        """Update once without gradients, then clip."""
        with self.place(_all_arrays(problem)):
            idle = dict.fromkeys(problem.gradients)
            return self._through(problem, [self._tree(problem.gradients)], idle=idle)

    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        """Clip behind ``optax.MultiSteps``."""
        with self.place(_all_arrays(problem)):
            return self._through(problem, [self._tree(gradients) for gradients in micro])

    def scenario_compiled(self, problem: Problem) -> Outcome:
        """Clip under ``jax.jit``."""
        with self.place(_all_arrays(problem)):
            return self._clip(problem, compiled=True)

    def scenario_as_on_tpu(self, problem: Problem) -> Outcome:
        """Clip under ``jax.jit`` in float32, as is lowered for a TPU."""

        def tpu(*arguments: Any, default: Any, **branches: Any) -> Any:
            return branches.get("tpu", default)(*arguments)

        with self.place(_all_arrays(problem)), patch.object(jax.lax, "platform_dependent", tpu):
            return self._clip(problem, compiled=True)

    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        """Clip behind Flax's loss scaler, with a loss that is linear in the parameters."""
        with self.place(_all_arrays(problem)):
            return self._unscale(problem, float(scale))

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        """Clip arrays that are split over a mesh of devices."""
        with self.place(_all_arrays(problem)):
            return self._sharded(problem, shards)

    def _clip(self, problem: Problem, *, compiled: bool = False) -> Outcome:
        rule = problem.declared_rule
        params, gradients = self._tree(problem.parameters), self._tree(problem.gradients)

        def clip(gradients: Any, params: Any, step: Any) -> Any:
            return adaptive_clip_gradients(gradients, params, rule, step=step)

        function = jax.jit(clip) if compiled else clip
        clipped, telemetry = function(gradients, params, problem.step)
        return Outcome(_arrays(clipped), telemetry.parameters(plan(params, rule)))

    def _through(self, problem: Problem, micro: Sequence[Any], idle: Any = None) -> Outcome:
        """Clip by the transformation; several gradients are accumulated by optax."""
        rule = problem.declared_rule
        tx: Any = optax.chain(adaptive_grad_clip(rule), optax.identity())
        if len(micro) > 1:
            # MultiSteps' running mean rounds at every step; the sum of these gradients is exact.
            tx = optax.chain(optax.scale(1 / len(micro)), tx)
            tx = optax.MultiSteps(tx, len(micro), use_grad_mean=False)
        params = self._tree(problem.parameters)
        state = tx.init(params)
        if idle is not None:
            _, state = jax.jit(tx.update)(idle, state, params)
        state = _at_step(state, problem.step)
        for gradients in micro:
            clipped, state = jax.jit(tx.update)(gradients, state, params)
        return Outcome(_arrays(clipped), stats(state).parameters(plan(params, rule)))

    def _unscale(self, problem: Problem, scale: float) -> Outcome:
        rule = problem.declared_rule
        params, scaled = self._tree(problem.parameters), self._tree(problem.gradients)

        def loss(params: Any) -> jax.Array:
            # The scaler multiplies by the scale; dividing by it, a power of two, rounds nothing.
            terms = jax.tree.map(lambda g, p: jnp.vdot(g / scale, p), scaled, params)
            return jnp.asarray(sum(jax.tree.leaves(terms)))

        @jax.jit  # type: ignore[untyped-decorator]
        def step(params: Any) -> Any:
            scaler = DynamicScale(scale=jnp.float32(scale))
            _, _, _, gradients = scaler.value_and_grad(loss)(params)
            return adaptive_clip_gradients(gradients, params, rule, step=problem.step)

        clipped, telemetry = step(params)
        return Outcome(_arrays(clipped), telemetry.parameters(plan(params, rule)))

    def _sharded(self, problem: Problem, shards: int) -> Outcome:
        if len(self._devices) < shards:
            raise Unsupported(
                f"{shards} shards need as many devices, there are {len(self._devices)}"
            )
        rule = problem.declared_rule
        mesh = jax.make_mesh(
            (shards,), ("shard",), axis_types=(AxisType.Auto,), devices=self._devices[:shards]
        )

        def spread(tree: Any) -> Any:
            def place(leaf: Any) -> Any:
                split = leaf.ndim > 0 and leaf.shape[0] % shards == 0
                spec = PartitionSpec("shard") if split else PartitionSpec()
                return jax.device_put(leaf, NamedSharding(mesh, spec))

            return jax.tree.map(place, tree)

        params = spread(self._tree(problem.parameters))
        gradients = spread(self._tree(problem.gradients))
        clipped, telemetry = jax.jit(
            lambda g, p, step: adaptive_clip_gradients(g, p, rule, step=step)
        )(gradients, params, problem.step)
        return Outcome(_arrays(clipped), telemetry.parameters(plan(params, rule)))

    def _tree(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        if any(isinstance(value, RowSparse) for value in arrays.values()):
            raise Unsupported("JAX has no row-sparse gradients")
        device = self._devices[0]
        return {
            name: None if value is None else jax.device_put(np.asarray(value), device)
            for name, value in arrays.items()
        }


def _all_arrays(problem: Problem) -> list[Any]:
    return [*problem.parameters.values(), *problem.gradients.values()]


def _arrays(tree: Mapping[str, Any]) -> dict[str, Array | None]:
    return {name: None if value is None else np.asarray(value) for name, value in tree.items()}


def optax_sgd(optimizer: Optimizer) -> optax.GradientTransformation:
    """Return SGD of optax's own parts; AGC comes before weight decay of either form (AGC-7)."""
    momentum = optimizer.momentum or None
    sgd = optax.sgd(optimizer.lr, momentum, nesterov=optimizer.nesterov)
    if not optimizer.weight_decay:
        return sgd
    if optimizer.decoupled:
        return optax.chain(sgd, optax.add_decayed_weights(-optimizer.lr * optimizer.weight_decay))
    return optax.chain(optax.add_decayed_weights(optimizer.weight_decay), sgd)


def _at_step(state: Any, step: int) -> Any:
    """Return the state as it is after ``step`` steps."""

    def move(node: Any) -> Any:
        if isinstance(node, AdaptiveGradClipState):
            return node._replace(steps=jnp.full_like(node.steps, step))
        return node

    return jax.tree.map(move, state, is_leaf=lambda node: isinstance(node, AdaptiveGradClipState))
