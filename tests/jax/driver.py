"""JAX with Flax NNX, as the contract speaks with it.

Arrays are put on the device: ``jnp.asarray`` compiles a program for every shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.test_util import check_grads

import agc_jax
from agc import AGC
from agc import nfnet as core
from agc_conformance.backends.jax.backend import JaxBackend
from agc_conformance.nfnets.golden import SMOOTHING
from agc_jax.nfnet import Activation, WSConv2d
from tests.contract.driver import Driver, Optimizer, Outputs, SamProblem, Sharpened
from tests.helpers import Array


def loss_and_logits(
    model: Any, images: jax.Array, labels: jax.Array, masks: core.Masks | None = None
) -> tuple[Any, Any]:
    logits = model(images, masks=masks)
    wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(wanted, SMOOTHING)).mean()
    return loss, logits


run = nnx.jit(lambda layer, x, **options: layer(x, **options))
signals = nnx.jit(lambda model, images: model.signals(images))
standardised = nnx.jit(lambda conv: conv.standardised())


@nnx.jit
def everything(
    model: Any, images: jax.Array, labels: jax.Array, masks: core.Masks | None = None
) -> tuple[Any, ...]:
    """Compute all of Outputs in one program, most of which they share.

    Features and signals take no masks.
    """
    derive = nnx.value_and_grad(loss_and_logits, has_aux=True)
    (loss, logits), gradients = derive(model, images, labels, masks)
    maps = (model.features(images), model.signals(images)) if masks is None else ({}, {})
    return loss, logits, gradients, *maps


@nnx.jit
def train(model: Any, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    (loss, _), gradients = nnx.value_and_grad(loss_and_logits, has_aux=True)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


def values_of(tree: Any) -> dict[str, Any]:
    """Return the values of a model, or of an ``nnx.State``, by name."""
    state = nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def blank(leaf: Any) -> jax.Array:
    """Return what is quicker to make than initial values."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


@contextmanager
def optimized(value: bool) -> Iterator[None]:
    """Choose between fast code and fast compilation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not value)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def nfnet(variant: Any, *arguments: Any, dtype: str, seed: int = 0, **options: Any) -> Any:
    mixed = {"dtype": jnp.bfloat16} if dtype == "mixed_bfloat16" else {}
    stored = jnp.float32 if mixed else jnp.dtype(dtype)
    rngs = nnx.Rngs(seed)
    return agc_jax.nfnet(variant, *arguments, rngs=rngs, param_dtype=stored, **mixed, **options)


class JaxOptimizer(Optimizer):
    def __init__(self, model: Any, tx: optax.GradientTransformation) -> None:
        self.model = model
        self.inner = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(self, images: Array, labels: Array) -> float:
        return float(train(self.model, self.inner, images, labels))

    def update(self, gradient: float) -> None:
        params = nnx.state(self.model, nnx.Param)
        full = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
        self.inner.update(self.model, full)

    def total(self) -> Any:
        return agc_jax.stats(self.inner.opt_state).total()

    def has_momentum(self) -> bool:
        state = jax.tree.leaves(self.inner.opt_state)
        weight = max(jax.tree.leaves(nnx.state(self.model, nnx.Param)), key=lambda leaf: leaf.size)
        return any(leaf.shape == weight.shape for leaf in state)


class JaxDriver(Driver):
    adapter = agc_jax
    norm_names = ("scale", "bias", "mean", "var")
    sam_modes = ("traced",)
    backend = JaxBackend

    def nfnet(self, variant: Any, *arguments: Any, dtype: str, seed: int, **options: Any) -> Any:
        model = nfnet(variant, *arguments, dtype=dtype, seed=seed, **options)
        model.eval()
        return model

    def blank(self, variant: Any, *arguments: Any, dtype: str = "float32", **options: Any) -> Any:
        with jax.enable_x64(True):
            shapes = nnx.eval_shape(lambda: nfnet(variant, *arguments, dtype=dtype, **options))
            graph, state = nnx.split(shapes)
            model = nnx.merge(graph, jax.tree.map(blank, state))
        model.eval()
        return model

    def abstract(self, variant: Any, **options: Any) -> Any:
        return nnx.eval_shape(lambda: nfnet(variant, dtype="float32", **options))

    def two_layers(self) -> Any:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))

    def own_layer(self, shape: tuple[int, ...]) -> type[Any]:
        class Own(nnx.Module):
            def __init__(self) -> None:
                self.table = nnx.Param(jnp.zeros(shape))

        return Own

    def parameters(self, model: Any) -> Mapping[str, Any]:
        return values_of(model)

    def layers(self, model: Any) -> list[Any]:
        return [layer for _, layer in nnx.iter_modules(model)]

    def conv(
        self, conv: Any, ws_eps: str, dtype: str, values: Mapping[str, Array], **options: Any
    ) -> Any:
        made = WSConv2d(conv, ws_eps, **options, param_dtype=jnp.dtype(dtype))
        for name, value in values.items():
            setattr(made, name, nnx.Param(jax.device_put(value)))
        return made

    def standardised(self, conv: Any) -> Array:
        return np.asarray(standardised(conv))

    def _norms(self, twin: Any) -> dict[str, Any]:
        state = nnx.to_flat_state(nnx.state(twin, (nnx.Param, nnx.BatchStat)))
        named = {".".join(map(str, path)): leaf for path, leaf in state}
        return {self.canonical(n): leaf for n, leaf in named.items() if ".norm." in n}

    def norms(self, twin: Any) -> dict[str, Array]:
        return {name: np.asarray(leaf[...]) for name, leaf in self._norms(twin).items()}

    def set_norms(self, twin: Any, values: Mapping[str, Array]) -> None:
        for name, leaf in self._norms(twin).items():
            leaf[...] = jax.device_put(values[name])

    def standardised_in_bfloat16(self, conv: Any, gradient: Array) -> tuple[Array, Array, Array]:
        graph, state = nnx.split(conv)

        @jax.jit
        def both(state: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
            value, back = jax.vjp(lambda s: nnx.merge(graph, s).standardised(jnp.bfloat16), state)
            return value, nnx.to_pure_dict(back(gradient)[0])

        value, back = both(state, jnp.asarray(gradient, jnp.bfloat16))
        return np.asarray(value), np.asarray(back["weight"]), np.asarray(back["gain"])

    def activation(self, name: str, x: Array) -> Array:
        return np.asarray(jax.jit(Activation(name))(x))

    def integer(self, value: int) -> jax.Array:
        return jnp.int32(value)

    def rule_takers(self) -> list[Callable[[AGC], Any]]:
        tree = {"kernel": jnp.ones((3, 2))}
        return [
            partial(agc_jax.plan, tree),
            partial(agc_jax.adaptive_clip_gradients, tree, tree),
            agc_jax.adaptive_grad_clip,
            partial(agc_jax.adaptive_grad_clip, clipping=0.1),
        ]

    def limited_step(
        self,
        rule: AGC,
        max_norm: float,
        weights: Mapping[str, Array],
        gradients: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        clip = agc_jax.adaptive_grad_clip(rule)
        tx = optax.chain(clip, optax.clip_by_global_norm(max_norm), optax.sgd(1.0))
        params, grads = (jax.device_put(dict(tree)) for tree in (weights, gradients))
        updates, _ = tx.update(grads, tx.init(params), params)
        return jax.tree.map(np.asarray, optax.apply_updates(params, updates))

    def logged(
        self, rule: AGC, weights: Mapping[str, Array], gradients: Mapping[str, Array]
    ) -> dict[str, float]:
        params, grads = (jax.device_put(dict(tree)) for tree in (weights, gradients))
        stats = agc_jax.adaptive_clip_gradients(grads, params, rule)[1]
        return stats.to_dict(plan=agc_jax.plan(params, rule))

    def run(self, layer: Any, x: Array, train: bool = False, **options: Any) -> Array:
        layer.train() if train else layer.eval()
        return np.asarray(run(layer, jax.device_put(x), **options))

    def call(self, model: Any, method: str, x: Array) -> Any:
        return getattr(model, method)(jnp.asarray(x))

    def signals(self, model: Any, images: Array) -> Mapping[str, Array]:
        return {name: np.asarray(value) for name, value in signals(model, images).items()}

    def outputs(
        self,
        model: Any,
        images: Array,
        labels: Array,
        mode: str | None = None,
        masks: core.Masks | None = None,
    ) -> Outputs:
        model.eval() if masks is None else model.train()
        large = model.options.variant.name == "F0"  # takes longer to run than to compile
        with optimized(large or not jax.config.read("jax_disable_most_optimizations")):
            loss, logits, gradients, *maps = jax.tree.map(
                np.asarray, everything(model, *jax.device_put((images, labels)), masks)
            )
        return Outputs(loss, logits, values_of(gradients), *maps)

    def shapes(self, model: Any, images: Array, labels: Array) -> Outputs:
        loss, logits, gradients, *maps = nnx.eval_shape(everything, model, images, labels)
        return Outputs(loss, logits, values_of(gradients), *maps)

    def check_gradients(self, conv: Any, images: Array) -> None:
        graph, state = nnx.split(conv)
        apply = jax.jit(lambda state: nnx.merge(graph, state)(images))
        check_grads(apply, (state,), 2, ["rev"], 1e-3, 1e-3, 1e-7)

    def export(self, model: Any, folder: Path) -> Callable[[Array], Array]:
        shape = jax.export.symbolic_shape("n, {}, {}, 3".format(*self.exported_sizes[0][1:]))
        program = jax.export.export(jax.jit(model))(jax.ShapeDtypeStruct(shape, jnp.float32))
        (folder / "program").write_bytes(program.serialize())
        loaded = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
        return jax.jit(loaded.call)

    def optimizer(self, model: Any, lr: float, way: str | None = None, **options: Any) -> Optimizer:
        return JaxOptimizer(model, agc_jax.sgd_nfnet(model, lr, **options))

    def sharpen(self, problem: SamProblem, mode: str = "eager") -> Sharpened:
        weights, batch = jax.device_put((dict(problem.weights), tuple(problem.batch)))
        function = agc_jax.sam_value_and_grad(
            partial(problem.loss, jnp),
            problem.rule,
            batch_argnums=range(1, 1 + len(batch)) if batch else None,
            return_stats=True,
        )
        function = jax.jit(function) if mode == "traced" else function
        step = {} if problem.step is None else {"step": problem.step}
        value, gradients, stats = function(weights, *batch, **step)
        # JAX's gradients of complex weights are conjugates of the steepest ascent.
        ascent = {name: np.asarray(gradient).conj() for name, gradient in gradients.items()}
        return Sharpened(float(value), float(stats.perturbed_loss), float(stats.norm), ascent)

    def verify_sam(self, problem: SamProblem) -> Any:
        sam = partial(agc_jax.sam_value_and_grad, rule=problem.rule)
        make = jax.value_and_grad if problem.rule is None else sam
        loss = partial(problem.loss, jnp)
        return agc_jax.verify_sam(make, loss, problem.weights, *problem.batch)
