"""The conformance backend: problems in NumPy arrays, carried out by this adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agc import AGC, Plan
from agc.backend import (
    Backend,
    Examples,
    Layer,
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
    Optimizer,
    Outcome,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    Task,
    TrainStep,
    Unavailable,
    Unsupported,
)
from agc.reference import RowSparse
from agc_jax.clip import adaptive_clip_gradients
from agc_jax.optimizer import AdaptiveGradClipState, adaptive_grad_clip, stats
from agc_jax.sam import sam_value_and_grad
from agc_jax.units import plan, units

__all__ = ["JaxBackend"]

Array = npt.NDArray[Any]


class JaxBackend(Backend):
    """AGC in JAX, as the conformance suite asks for it."""

    name: ClassVar[str] = "jax"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "flax"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        # Eight devices for the sharded scenario. In a process that has already used JAX it is too late: there
        # are as many as there are, and the scenario says so if they do not suffice.
        try:
            jax.config.update("jax_num_cpu_devices", 8)
        except RuntimeError as error:
            if "initialized" not in str(error):
                raise
        try:
            self._devices = jax.devices(device)
        except RuntimeError as error:
            raise Unavailable(f"JAX {jax.__version__} sees no {device} device: {error}") from None
        self.device = device

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {name: version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        return "cpu" if self.device == "cpu" else str(self._devices[0].device_kind)

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_jax.adaptive_clip_gradients`."""
        with self._scope(problem):
            return self._clip(problem)

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the Flax NNX layer and return its plan."""
        if layer.kind not in _LAYERS:
            raise Unsupported(_ABSENT.get(layer.kind, f"Flax has no layer {layer.kind!r}"))
        return plan(nnx.eval_shape(lambda: _LAYERS[layer.kind](dict(layer.sizes))), rule)

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Array]]:
        """Chain AGC with ``optax.sgd`` and return the weights after each jitted step."""
        with self._scope(problem):
            tx = optax.chain(adaptive_grad_clip(problem.declared_rule), optax_sgd(optimizer))
            params = self._tree(problem.parameters)
            state = tx.init(params)

            @jax.jit  # type: ignore[untyped-decorator]
            def step(params: Any, state: Any, gradients: Any) -> Any:
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            steps: list[Mapping[str, Array]] = []
            for one in gradients:
                params, state = step(params, state, self._tree(one))
                steps.append({name: np.asarray(value) for name, value in params.items()})
            return steps

    def scenario(self, name: str, problem: Problem, settings: Mapping[str, Any]) -> Outcome:
        """Clip in one of the settings of real training."""
        with self._scope(problem):
            if name == "compiled":
                return self._clip(problem, compiled=True)
            if name == "sharded":
                return self._sharded(problem, int(settings["shards"]))
            if name == "optimizer":
                return self._through(problem, [self._tree(problem.gradients)])
            if name == "idle":
                idle = dict.fromkeys(problem.gradients)
                return self._through(
                    problem, [self._tree(problem.gradients)], idle=self._tree(idle)
                )
            if name == "accumulate":
                return self._through(problem, [self._tree(one) for one in settings["micro"]])
            if name == "unscale":
                return self._unscaled(problem, float(settings["scale"]))
        return super().scenario(name, problem, settings)

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute by :func:`agc_jax.sam_value_and_grad`."""
        from agc_jax import sam_backend  # it builds on this module

        with self._place(problem):
            return sam_backend.sharpen(problem)

    def sharpness_trajectory(
        self,
        problem: SharpnessProblem,
        optimizer: Optimizer,
        batches: Sequence[Examples],
        *,
        restart: int | None = None,
    ) -> list[Mapping[str, Array]]:
        """Chain SAM, AGC and ``optax.sgd`` and return the weights after each jitted step."""
        from agc_jax import sam_backend

        with self._place(problem):
            return sam_backend.sharpness_trajectory(problem, optimizer, batches, restart)

    def sharpness_scenario(
        self, name: str, problem: SharpnessProblem, settings: Mapping[str, Any]
    ) -> SharpnessOutcome:
        """Compute a sharpness-aware gradient in one of the settings of real training."""
        from agc_jax import sam_backend

        with self._place(problem):
            return sam_backend.sharpness_scenario(name, problem, settings, self._devices)

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run :func:`agc_jax.nfnet`, compiled."""
        from agc_jax import model_backend  # it builds on this module

        with self._exactly(problem):
            return model_backend.model_forward(problem)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run :func:`agc_jax.nfnet` forward and backward, and clip."""
        from agc_jax import model_backend

        with self._exactly(problem):
            return model_backend.model_gradients(problem)

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train by :func:`agc_jax.sgd_nfnet`, or AGC chained with ``optax.sgd``."""
        from agc_jax import model_backend

        with self._exactly(problem):
            yield from model_backend.model_training(problem, recipe)

    def train(self, task: Task) -> Iterator[TrainStep]:
        """Train the suite's network, in Flax NNX: SAM if it is asked for, AGC, then ``optax.sgd``."""
        with jax.default_device(self._devices[0]):
            yield from _train(task)

    def _clip(self, problem: Problem, *, compiled: bool = False) -> Outcome:
        rule = problem.declared_rule
        params, gradients = self._tree(problem.parameters), self._tree(problem.gradients)

        def clip(gradients: Any, params: Any, step: Any) -> Any:
            return adaptive_clip_gradients(gradients, params, rule, step=step)

        function = jax.jit(clip) if compiled else clip
        clipped, found = function(gradients, params, problem.step)
        return Outcome(_arrays(clipped), found.parameters(plan(params, rule)))

    def _through(self, problem: Problem, micro: Sequence[Any], idle: Any = None) -> Outcome:
        """Clip by the transformation, behind optax's own accumulation if there are several gradients."""
        rule = problem.declared_rule
        tx: Any = optax.chain(adaptive_grad_clip(rule), optax.identity())
        if len(micro) > 1:
            # Its running mean rounds at every step; the sum of these gradients is exact.
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

    def _unscaled(self, problem: Problem, scale: float) -> Outcome:
        """Clip behind Flax's loss scaler: the gradient of a loss that is linear in the parameters."""
        rule = problem.declared_rule
        params, scaled = self._tree(problem.parameters), self._tree(problem.gradients)

        def loss(params: Any) -> jax.Array:
            # Divided by a power of two, which rounds nothing, since the scaler multiplies by it.
            terms = jax.tree.map(lambda g, p: jnp.vdot(g / scale, p), scaled, params)
            return jnp.asarray(sum(jax.tree.leaves(terms)))

        @jax.jit  # type: ignore[untyped-decorator]
        def step(params: Any) -> Any:
            scaler = DynamicScale(scale=jnp.float32(scale))
            _, _, _, gradients = scaler.value_and_grad(loss)(params)
            return adaptive_clip_gradients(gradients, params, rule, step=problem.step)

        clipped, found = step(params)
        return Outcome(_arrays(clipped), found.parameters(plan(params, rule)))

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
        clipped, found = jax.jit(lambda g, p, step: adaptive_clip_gradients(g, p, rule, step=step))(
            gradients, params, problem.step
        )
        return Outcome(_arrays(clipped), found.parameters(plan(params, rule)))

    def _tree(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        if any(isinstance(value, RowSparse) for value in arrays.values()):
            raise Unsupported("JAX has no row-sparse gradients")
        device = self._devices[0]
        return {
            name: None if value is None else jax.device_put(np.asarray(value), device)
            for name, value in arrays.items()
        }

    @contextmanager
    def _place(self, problem: SharpnessProblem) -> Iterator[None]:
        """Compute on this device, and in float64 where the weights are."""
        wide = any(value.dtype == np.float64 for value in problem.parameters.values())
        with jax.default_device(self._devices[0]), jax.enable_x64(wide):
            yield

    @contextmanager
    def _exactly(self, problem: ModelProblem) -> Iterator[None]:
        """Compute on this device, in float64 where a model is, and in float32 without shortcuts."""
        wide = problem.dtype == "float64"
        with (
            jax.default_device(self._devices[0]),
            jax.enable_x64(wide),
            jax.default_matmul_precision("highest"),
        ):
            yield

    def _scope(self, problem: Problem) -> AbstractContextManager[Any]:
        """Switch on float64 where a problem needs it; JAX would round it to float32 otherwise."""
        arrays = [*problem.parameters.values(), *problem.gradients.values()]
        dtypes = {array.dtype.name for array in arrays if isinstance(array, np.ndarray)}
        if dtypes & {"float64", "complex128", "int64"}:
            return jax.enable_x64(True)  # type: ignore[no-any-return]
        return nullcontext()


def _arrays(tree: Mapping[str, Any]) -> dict[str, Array | None]:
    return {name: None if value is None else np.asarray(value) for name, value in tree.items()}


def optax_sgd(optimizer: Optimizer) -> optax.GradientTransformation:
    """SGD from optax's own parts; the decay stands behind AGC in either form (AGC-7)."""
    momentum = optimizer.momentum or None
    sgd = optax.sgd(optimizer.lr, momentum, nesterov=optimizer.nesterov)
    if not optimizer.weight_decay:
        return sgd
    if optimizer.decoupled:
        return optax.chain(sgd, optax.add_decayed_weights(-optimizer.lr * optimizer.weight_decay))
    return optax.chain(optax.add_decayed_weights(optimizer.weight_decay), sgd)


def _received() -> optax.GradientTransformation:
    """Keep what the optimizer behind AGC receives, gradients and weights, as this transformation's state."""

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params), params

    return optax.GradientTransformation(
        init, lambda updates, _, params: (updates, (updates, params))
    )


def _at_step(state: Any, step: int) -> Any:
    """Return the state as it is after so many steps."""

    def move(node: Any) -> Any:
        if isinstance(node, AdaptiveGradClipState):
            return node._replace(steps=jnp.full_like(node.steps, step))
        return node

    return jax.tree.map(move, state, is_leaf=lambda node: isinstance(node, AdaptiveGradClipState))


# --- training on real images ------------------------------------------------------------------------


class _Network(nnx.Module):  # type: ignore[misc]
    """The network of :class:`agc.backend.Task`."""

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


def _train(task: Task) -> Iterator[TrainStep]:
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
            found = {}
            for name in task.weights:
                layer, kind = name.split(".")
                found[name] = _out_first(np.asarray(tree[layer][_FLAX[kind]][...]))
            return found

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


# --- layers ------------------------------------------------------------------------------------------

Sizes = dict[str, int]


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def _conv(axes: str, *, transpose: bool = False) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in axes)
        if transpose:
            return nnx.ConvTranspose(s["i"], s["o"], kernel, rngs=_rngs())
        groups = s.get("g", 1)
        return nnx.Conv(s["i"], s["o"], kernel, feature_group_count=groups, rngs=_rngs())

    return build


def _stacked(s: Sizes) -> Any:
    @nnx.vmap  # type: ignore[untyped-decorator]
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(s["i"], s["o"], rngs=rngs)

    return make(_rngs().split(s["l"]))


class _Unknown(nnx.Module):  # type: ignore[misc]
    """A layer of a type that the table does not know, with one parameter."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        setattr(self, name, nnx.Param(jnp.ones(shape)))


_LAYERS: Final[dict[str, Callable[[Sizes], Any]]] = {
    "dense": lambda s: nnx.Linear(s["i"], s["o"], rngs=_rngs()),
    "conv1d": _conv("w"),
    "conv2d": _conv("hw"),
    "conv3d": _conv("thw"),
    "grouped_conv2d": _conv("hw"),
    "depthwise_conv2d": lambda s: nnx.Conv(
        s["c"], s["c"] * s["m"], (s["h"], s["w"]), feature_group_count=s["c"], rngs=_rngs()
    ),
    "conv_transpose1d": _conv("w", transpose=True),
    "conv_transpose2d": _conv("hw", transpose=True),
    "embedding": lambda s: nnx.Embed(s["v"], s["d"], rngs=_rngs()),
    "attention": lambda s: nnx.MultiHeadAttention(
        num_heads=s["h"], in_features=s["i"], qkv_features=s["h"] * s["d"], rngs=_rngs()
    ),
    "einsum": lambda s: nnx.Einsum(
        "abi,ihd->abhd", (s["i"], s["h"], s["d"]), (s["h"], s["d"]), rngs=_rngs()
    ),
    "lstm": lambda s: nnx.OptimizedLSTMCell(s["i"], s["o"], rngs=_rngs()),
    "gru": lambda s: nnx.GRUCell(s["i"], s["o"], rngs=_rngs()),
    "rnn": lambda s: nnx.SimpleCell(s["i"], s["o"], rngs=_rngs()),
    "layer_norm": lambda s: nnx.LayerNorm(s["o"], rngs=_rngs()),
    "class_token": lambda s: _Unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _Unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _Unknown("table", (s["a"], s["b"], s["c"])),
    "stacked_dense": _stacked,
}
_ABSENT: Final = {
    "grouped_conv_transpose2d": "Flax has no grouped transposed convolution",
    "bilinear": "Flax has no bilinear layer",
    "hf_conv1d": "a layer of PyTorch models only",
}
