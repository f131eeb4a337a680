"""The conformance backend: problems in NumPy arrays, carried out by this adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

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
from agc.errors import NonFiniteError
from agc.reference import RowSparse
from agc_tensorflow.clip import adaptive_clip_gradients
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.sam import sam_value_and_gradients
from agc_tensorflow.stats import Stats
from agc_tensorflow.units import plan, variable_key

__all__ = ["TensorFlowBackend"]

Array = npt.NDArray[Any]


class TensorFlowBackend(Backend):
    """AGC in TensorFlow, as the conformance suite asks for it."""

    name: ClassVar[str] = "tensorflow"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "keras"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        kinds = {"cpu": "CPU", "cuda": "GPU"}
        if device not in kinds:
            raise Unavailable(f"tensorflow runs on cpu and cuda here, not on {device!r}")
        if not tf.config.list_physical_devices(kinds[device]):
            raise Unavailable(f"TensorFlow {tf.__version__} sees no {device} device")
        if device == "cpu":
            _split_cpu()
        self.device = device
        self._place = f"/{kinds[device]}:0"

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        if self.device == "cpu":
            return "cpu"
        details = tf.config.experimental.get_device_details(
            tf.config.list_physical_devices("GPU")[0]
        )
        return str(details.get("device_name", "gpu"))

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_tensorflow.adaptive_clip_gradients`, eagerly."""
        return self._clip(problem, lambda clip: clip())

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the Keras layer and return its plan."""
        build = _LAYERS.get(layer.kind)
        if build is None:
            raise Unsupported(_ABSENT.get(layer.kind, f"Keras has no layer {layer.kind!r}"))
        with tf.device(self._place):
            return plan(build(dict(layer.sizes)), rule)

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Array]]:
        """Step ``AdaptiveGradClip(SGD)`` and return the weights after each step."""
        inner = keras_sgd(optimizer)
        with tf.device(self._place):
            variables = _keras_variables(problem.parameters)
            wrapped = AdaptiveGradClip(inner, problem.declared_rule, model=variables)
            steps: list[Mapping[str, Array]] = []
            for one in gradients:
                given = [_tensor(one.get(name)) for name in variables]
                wrapped.apply(given, list(variables.values()))
                steps.append({name: np.array(v.numpy()) for name, v in variables.items()})
        return steps

    def scenario(self, name: str, problem: Problem, settings: Mapping[str, Any]) -> Outcome:
        """Clip in one of the settings of real training."""
        if name == "compiled":
            return self._clip(problem, _in_graph)
        if name == "optimizer":
            return self._receive(problem, [problem.gradients])
        if name == "accumulate":
            micro = settings["micro"]
            return self._receive(problem, micro, gradient_accumulation_steps=len(micro))
        if name == "unscale":
            return self._receive(problem, [problem.gradients], scale=float(settings["scale"]))
        if name == "idle":
            raise Unsupported("Keras refuses a step in which no variable has a gradient")
        if name == "sharded":
            raise Unsupported(
                "MirroredStrategy replicates parameters; Keras on TensorFlow shards none"
            )
        return super().scenario(name, problem, settings)

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute by :func:`agc_tensorflow.sam_value_and_gradients`, eagerly."""
        from agc_tensorflow import sam_backend  # it builds on this module

        with tf.device(self._place):
            return sam_backend.sharpen(problem)

    def sharpness_trajectory(
        self,
        problem: SharpnessProblem,
        optimizer: Optimizer,
        batches: Sequence[Examples],
        *,
        restart: int | None = None,
    ) -> list[Mapping[str, Array]]:
        """Step SAM, ``AdaptiveGradClip`` and SGD and return the weights after each step."""
        from agc_tensorflow import sam_backend

        with tf.device(self._place):
            return sam_backend.sharpness_trajectory(problem, optimizer, batches, restart)

    def sharpness_scenario(
        self, name: str, problem: SharpnessProblem, settings: Mapping[str, Any]
    ) -> SharpnessOutcome:
        """Compute a sharpness-aware gradient in one of the settings of real training."""
        from agc_tensorflow import sam_backend

        if name == "replicas":  # which have devices of their own
            return sam_backend.sharpness_scenario(name, problem, settings)
        with tf.device(self._place):
            return sam_backend.sharpness_scenario(name, problem, settings)

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run :func:`agc_tensorflow.nfnet`, eagerly."""
        from agc_tensorflow import model_backend  # it builds on this module

        with tf.device(self._place):
            return model_backend.model_forward(problem)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run :func:`agc_tensorflow.nfnet` forward and backward, and clip."""
        from agc_tensorflow import model_backend

        with tf.device(self._place):
            return model_backend.model_gradients(problem)

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train by :func:`agc_tensorflow.sgd_nfnet`, or ``AdaptiveGradClip`` around SGD."""
        from agc_tensorflow import model_backend

        with tf.device(self._place):
            yield from model_backend.model_training(problem, recipe)

    def train(self, task: Task) -> Iterator[TrainStep]:
        """Train the suite's network in a compiled step: SAM if it is asked for, ``AdaptiveGradClip(SGD)``."""
        with tf.device(self._place):
            yield from _train(task)

    def _clip(self, problem: Problem, run: Callable[[Callable[[], Any]], Any]) -> Outcome:
        with tf.device(self._place):
            variables = {
                name: tf.Variable(value, name="weight")
                for name, value in problem.parameters.items()
            }
            gradients = [_tensor(problem.gradients.get(name)) for name in variables]

            def clip() -> tuple[list[Any], Stats]:
                clipped: tuple[list[Any], Stats] = adaptive_clip_gradients(  # type: ignore[assignment]
                    gradients,
                    list(variables.values()),
                    problem.declared_rule,
                    model=variables,
                    step=problem.step,
                    return_stats=True,
                )
                return clipped

            clipped, stats = run(clip)
            return Outcome(
                {name: to_array(value) for name, value in zip(variables, clipped, strict=True)},
                stats.parameters(),
            )

    def _receive(
        self,
        problem: Problem,
        batches: Sequence[Mapping[str, Any]],
        *,
        scale: float | None = None,
        **options: Any,
    ) -> Outcome:
        """Apply gradients by a wrapped optimizer and return what the inner one received."""
        with tf.device(self._place):
            variables = _keras_variables(problem.parameters)
            recorder = _SGD(0.0, **options)
            clipper = AdaptiveGradClip(recorder, problem.declared_rule, model=variables)
            outer: Any = clipper
            if scale is not None:
                outer = keras.optimizers.LossScaleOptimizer(clipper, initial_scale=scale)
            for one in batches:
                outer.apply(
                    [_tensor(one.get(name)) for name in variables], list(variables.values())
                )
            received = {
                name: to_array(recorder.received.get(variable_key(variable)))
                for name, variable in variables.items()
            }
        return Outcome(received, clipper.stats().parameters())


class _SGD(keras.optimizers.SGD):  # type: ignore[misc]
    """Stochastic gradient descent that remembers what it received, and has coupled weight decay too."""

    def __init__(self, learning_rate: float, *, coupled_decay: float = 0.0, **options: Any) -> None:
        super().__init__(learning_rate, name="sgd", **options)
        self.coupled_decay = coupled_decay
        self.received: dict[object, Any] = {}
        self.found: dict[object, Any] = {}  # the weights, before the step

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.received[variable_key(variable)] = gradient
        self.found[variable_key(variable)] = tf.identity(tf.convert_to_tensor(variable))
        if self.coupled_decay:
            gradient = gradient + self.coupled_decay * variable
        super().update_step(gradient, variable, learning_rate)


def _split_cpu() -> None:
    """Let TensorFlow see two CPUs, for replicas; not if it has begun to work with one."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    except RuntimeError as error:
        if "initialized" not in str(error):
            raise


def _in_graph(clip: Callable[[], Any]) -> Any:
    """Run inside a ``tf.function``, where a policy's error comes as TensorFlow's own."""
    try:
        return tf.function(clip, autograph=False).get_concrete_function()()
    except tf.errors.InvalidArgumentError as error:
        if NonFiniteError.__name__ in str(error):
            raise NonFiniteError(str(error)) from error
        raise


def _tensor(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, RowSparse):
        return tf.IndexedSlices(
            tf.constant(value.values),
            tf.constant(np.asarray(value.indices, np.int64)),
            tf.constant(np.asarray(value.shape, np.int64)),
        )
    return tf.constant(value)


def to_array(value: Any) -> Any:
    if isinstance(value, tf.IndexedSlices):
        shape = tuple(int(size) for size in value.dense_shape)
        return RowSparse(value.indices.numpy(), value.values.numpy(), shape)
    return None if value is None else np.array(value.numpy())


def _keras_variables(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {
        name: keras.Variable(value, dtype=value.dtype.name, name="weight")
        for name, value in arrays.items()
    }


def keras_sgd(optimizer: Optimizer) -> _SGD:
    decay = "weight_decay" if optimizer.decoupled else "coupled_decay"
    return _SGD(
        optimizer.lr,
        momentum=float(optimizer.momentum),
        nesterov=optimizer.nesterov,
        **({decay: optimizer.weight_decay} if optimizer.weight_decay else {}),
    )


Sizes = dict[str, int]


def _built(layer: Any, *shape: int) -> Any:
    layer.build((None, *shape))
    return layer


def _unknown(name: str, shape: tuple[int, ...]) -> Any:
    """Return a layer of a type that the table does not know, with one variable."""
    layer = keras.layers.Layer()
    layer.add_weight(shape=shape, name=name)
    layer.built = True
    return layer


def _conv(rank: int) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in "thw"[3 - rank :]) if rank > 1 else (s["w"],)
        make = getattr(keras.layers, f"Conv{rank}D")
        return _built(make(s["o"], kernel, groups=s.get("g", 1)), *kernel, s["i"])

    return build


def _conv_transpose(rank: int) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in "hw") if rank > 1 else (s["w"],)
        make = getattr(keras.layers, f"Conv{rank}DTranspose")
        return _built(make(s["o"], kernel), *kernel, s["i"])

    return build


def _depthwise(s: Sizes) -> Any:
    layer = keras.layers.DepthwiseConv2D((s["h"], s["w"]), depth_multiplier=s["m"])
    return _built(layer, s["h"], s["w"], s["c"])


def _attention(s: Sizes) -> Any:
    layer = keras.layers.MultiHeadAttention(s["h"], s["d"], output_shape=s["o"])
    layer.build((None, 2, s["i"]), (None, 2, s["i"]))
    return layer


def _recurrent(name: str) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        # Without bias: the two bias vectors of a GRU are one array, of two units.
        return _built(getattr(keras.layers, name)(s["o"], use_bias=False), 2, s["i"])

    return build


_LAYERS: Final[dict[str, Callable[[Sizes], Any]]] = {
    "dense": lambda s: _built(keras.layers.Dense(s["o"]), s["i"]),
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "conv3d": _conv(3),
    "grouped_conv2d": _conv(2),
    "depthwise_conv2d": _depthwise,
    "conv_transpose1d": _conv_transpose(1),
    "conv_transpose2d": _conv_transpose(2),
    "embedding": lambda s: _built(keras.layers.Embedding(s["v"], s["d"])),
    "attention": _attention,
    "einsum": lambda s: _built(
        keras.layers.EinsumDense("abi,ihd->abhd", (None, s["h"], s["d"]), bias_axes="hd"), 2, s["i"]
    ),
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "rnn": _recurrent("SimpleRNN"),
    "layer_norm": lambda s: _built(keras.layers.LayerNormalization(), s["o"]),
    "class_token": lambda s: _unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _unknown("table", (s["a"], s["b"], s["c"])),
}
_ABSENT: Final = {
    "grouped_conv_transpose2d": "Keras has no grouped transposed convolution",
    "bilinear": "Keras has no bilinear layer",
    "hf_conv1d": "a layer of PyTorch models only",
    "stacked_dense": "Keras stacks no layers in one array",
}


def _train(task: Task) -> Iterator[TrainStep]:
    """Train, translating the task's names and layout to Keras' and back."""
    model = _network(task)
    variables = dict(zip(task.weights, model.trainable_variables, strict=True))
    for name, variable in variables.items():
        variable.assign(_out_last(task.weights[name]))
    sgd = keras_sgd(task.optimizer)
    # Under the task's names, which are not the model's, the layers' types do not speak.
    rule = replace(task.rule, units={**task.rule.units, "*.weight": "... i o -> o"})
    optimizer = AdaptiveGradClip(sgd, rule, model=variables)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(images: tf.Tensor, labels: tf.Tensor) -> Any:
        weights = list(variables.values())
        seen: list[Any] = []  # weights of every pass

        def loss_fn(images: tf.Tensor, labels: tf.Tensor) -> Any:
            seen.append([tf.identity(tf.convert_to_tensor(v)) for v in weights])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images))
            return tf.reduce_mean(losses)

        if task.sharpness is None:
            with tf.GradientTape() as tape:
                loss = loss_fn(images, labels)
            gradients = tape.gradient(loss, weights)
        else:
            loss, gradients = sam_value_and_gradients(
                loss_fn,
                weights,
                task.sharpness,
                batch=(images, labels),
                step=optimizer.iterations,
                state=model.non_trainable_variables,
            )
        optimizer.apply(gradients, weights)
        received, found = (
            [kept[variable_key(v)] for v in weights] for kept in (sgd.received, sgd.found)
        )
        return loss, gradients, received, seen[-1], found

    def named(tensors: Sequence[Any]) -> dict[str, Array]:
        return {name: _out_first(t.numpy()) for name, t in zip(task.weights, tensors, strict=True)}

    for images, labels in task.batches:
        before = named(list(variables.values()))
        loss, gradients, clipped, perturbed, restored = step(images.transpose(0, 2, 3, 1), labels)
        yield TrainStep(
            float(loss),
            before,
            named(gradients),
            named(clipped),
            named(list(variables.values())),
            optimizer.plan,
            named(perturbed),
            named(restored),
        )


def _network(task: Task) -> Any:
    """Build the network of :class:`agc.backend.Task`."""
    _, channels, height, width = task.batches[0][0].shape
    outputs = [len(task.weights[f"{layer}.bias"]) for layer in ("conv1", "conv2", "head")]
    return keras.Sequential(
        [
            keras.Input((height, width, channels)),
            keras.layers.ZeroPadding2D(1),
            keras.layers.Conv2D(outputs[0], 3, activation="silu", name="conv1"),
            keras.layers.ZeroPadding2D(1),
            keras.layers.Conv2D(outputs[1], 3, strides=2, activation="silu", name="conv2"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(outputs[2], name="head"),
        ]
    )


def _out_last(array: Array) -> Array:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _out_first(array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
