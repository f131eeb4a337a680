"""TensorFlow with Keras, as the contract speaks with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc import nfnet as core
from agc_conformance.backend import Backend, Outcome, Problem, Unsupported
from agc_conformance.backends.tensorflow.backend import TensorFlowBackend
from agc_conformance.nfnets.golden import SMOOTHING
from agc_tensorflow.nfnet import Activation, WSConv2D
from agc_tensorflow.units import named_variables
from tests.contract.driver import Driver, Optimizer, Outputs, SamProblem, Sharpened
from tests.helpers import Array

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "graph": partial(tf.function, autograph=False),  # as in Keras' fit
    "xla": partial(tf.function, autograph=False, jit_compile=True),
}


def mean_loss(logits: tf.Tensor, labels: Array) -> tf.Tensor:
    classes = logits.shape[1]
    one_hot = tf.one_hot(labels, classes, dtype=logits.dtype)
    smoothed = (1 - SMOOTHING) * one_hot + SMOOTHING / classes
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(smoothed, logits))


def numpy_of(values: Mapping[str, tf.Tensor]) -> dict[str, Array]:
    return {name: value.numpy() for name, value in values.items()}


@contextmanager
def floatx(dtype: str) -> Iterator[None]:
    """Set Keras' default dtype, which learning rates have: 0.1 in float32 is another number."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    yield
    keras.config.set_floatx(before)


class KerasOptimizer(Optimizer):
    def __init__(self, model: Any, lr: float, way: str | None, options: dict[str, Any]) -> None:
        self.model, self.variables = model, model.trainable_variables
        with floatx(self.variables[0].dtype):
            self.inner = agc_tensorflow.sgd_nfnet(model, lr, **options)
            self.inner.build(self.variables)
        self.apply = WRAPPERS[way or "eager"](self._apply)

    def step(self, images: Array, labels: Array) -> float:
        with tf.GradientTape() as tape:
            loss = mean_loss(self.model(images), labels)
        gradients = tape.gradient(loss, [variable.value for variable in self.variables])
        self.apply(gradients)
        return float(loss)

    def update(self, gradient: float) -> None:
        self.apply([tf.fill(v.shape, tf.cast(gradient, v.dtype)) for v in self.variables])

    def _apply(self, gradients: list[tf.Tensor]) -> None:
        self.inner.apply(gradients, self.variables)

    def total(self) -> Any:
        return self.inner.stats().total()

    def has_momentum(self) -> bool:
        return len(self.inner.variables) > 2  # iteration and learning rate


def variables_and_loss(problem: SamProblem) -> tuple[dict[str, Any], Callable[..., Any], Any]:
    """Return variables, a function of the batch that reads them, and the batch."""
    variables = {
        name: keras.Variable(value, dtype=value.dtype.name, name=name)
        for name, value in problem.weights.items()
    }

    def loss(*batch: Any) -> Any:
        return problem.loss(keras.ops, {n: v.value for n, v in variables.items()}, *batch)

    return variables, loss, [*map(tf.constant, problem.batch)]


class XlaBackend(TensorFlowBackend):
    """Clips under XLA, which cannot raise."""

    def clip(self, problem: Problem) -> Outcome:
        if problem.rule.nonfinite == "raise":
            raise Unsupported("XLA drops assertions")
        return self.scenario_xla(problem)


class GraphBackend(TensorFlowBackend):
    """Clips inside a graph."""

    def clip(self, problem: Problem) -> Outcome:
        return self.scenario_compiled(problem)


class TensorFlowDriver(Driver):
    adapter = agc_tensorflow
    norm_names = ("gamma", "beta", "moving_mean", "moving_variance")
    modes = ("eager", "graph", "xla")
    dtypes = ("float64", "float32", "mixed_bfloat16", "bfloat16")
    ways = ("eager", "graph")
    exported_sizes = ((3, 32, 32), (1, 20, 27))
    sam_modes = ("eager", "traced")
    backend = TensorFlowBackend
    clip_ways = ("eager", "eager branches", "graph", "compiled kernels", "xla")
    accurate_ways = ("eager", "graph", "xla")

    def nfnet(self, variant: Any, *arguments: Any, dtype: str, seed: int, **options: Any) -> Any:
        keras.utils.set_random_seed(seed)
        return agc_tensorflow.nfnet(variant, *arguments, dtype=dtype, **options)

    def abstract(self, variant: Any, **options: Any) -> Any:
        with keras.StatelessScope(initialize_variables=False):  # nothing is stored
            return agc_tensorflow.nfnet(variant, **options)

    def two_layers(self) -> Any:
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])

    def own_layer(self, shape: tuple[int, ...]) -> type[Any]:
        class Own(keras.layers.Layer):
            def __init__(self) -> None:
                super().__init__(name="own")
                self.table = self.add_weight(shape=shape, name="table")
                self.built = True

        return Own

    def parameters(self, model: Any) -> Mapping[str, Any]:
        # Variables of an abstract model have no storage to be told apart by, but they have paths.
        return {v.path.partition("/")[2].replace("/", "."): v for v in model.weights}

    def layers(self, model: Any) -> list[Any]:
        return [*model._flatten_layers()]

    def conv(
        self, conv: Any, ws_eps: str, dtype: str, values: Mapping[str, Array], **options: Any
    ) -> Any:
        made = WSConv2D(conv, ws_eps, **options, dtype=dtype)
        made.build(None)
        for name, value in values.items():
            getattr(made, name).assign(tf.constant(value))
        return made

    def standardised(self, conv: Any) -> Array:
        return conv.standardised().numpy()

    def _norms(self, twin: Any) -> dict[str, Any]:
        named = {n: v for n, v in self.parameters(twin).items() if ".norm." in n}
        return {self.canonical(name): variable for name, variable in named.items()}

    def norms(self, twin: Any) -> dict[str, Array]:
        return numpy_of(self._norms(twin))

    def set_norms(self, twin: Any, values: Mapping[str, Array]) -> None:
        for name, variable in self._norms(twin).items():
            variable.assign(values[name])

    def standardised_in_bfloat16(self, conv: Any, gradient: Array) -> tuple[Array, Array, Array]:
        variables = [conv.weight.value, conv.gain.value]
        with tf.GradientTape() as tape:
            value = conv.standardised(tf.bfloat16)
        back = tape.gradient(value, variables, tf.cast(gradient, tf.bfloat16))
        return value.numpy(), back[0].numpy(), back[1].numpy()

    def activation(self, name: str, x: Array) -> Array:
        return Activation(name)(tf.constant(x)).numpy()

    @contextmanager
    def clipping(self, way: str) -> Iterator[Backend]:
        backends = {"graph": GraphBackend, "compiled kernels": GraphBackend, "xla": XlaBackend}
        with pytest.MonkeyPatch.context() as patch:
            if way in ("eager branches", "compiled kernels"):  # as large tensors are clipped
                patch.setattr("agc_tensorflow.norms._SMALL", 0)
            yield backends.get(way, TensorFlowBackend)()

    def integer(self, value: int) -> tf.Tensor:
        return tf.constant(value, tf.int64)

    def rule_takers(self) -> list[Callable[[AGC], Any]]:
        arrays = [tf.Variable([3.0], name="w")]
        return [
            partial(agc_tensorflow.plan, arrays),
            partial(agc_tensorflow.adaptive_clip_gradients, arrays, arrays),
            partial(agc_tensorflow.AdaptiveGradClip, "sgd"),
        ]

    def limited_step(
        self,
        rule: AGC,
        max_norm: float,
        weights: Mapping[str, Array],
        gradients: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        variables = [tf.Variable(value, name=name) for name, value in weights.items()]
        inner = keras.optimizers.SGD(1.0, global_clipnorm=max_norm)
        optimizer = agc_tensorflow.AdaptiveGradClip(inner, rule)
        optimizer.apply([tf.constant(gradients[name]) for name in weights], variables)
        return {name: v.numpy() for name, v in zip(weights, variables, strict=True)}

    def logged(
        self, rule: AGC, weights: Mapping[str, Array], gradients: Mapping[str, Array]
    ) -> dict[str, float]:
        variables = [tf.Variable(value, name=name) for name, value in weights.items()]
        grads = [tf.constant(gradients[name]) for name in weights]
        _, stats = agc_tensorflow.adaptive_clip_gradients(grads, variables, rule, return_stats=True)
        return stats.to_dict()

    def run(self, layer: Any, x: Array, train: bool = False, **options: Any) -> Array:
        options |= {"training": True} if train else {}
        return layer(tf.constant(x), **options).numpy()

    def call(self, model: Any, method: str, x: Array) -> Any:
        return getattr(model, method)(x)

    def signals(self, model: Any, images: Array) -> Mapping[str, Array]:
        return numpy_of(model.signals(images))

    def outputs(
        self,
        model: Any,
        images: Array,
        labels: Array,
        mode: str | None = None,
        masks: core.Masks | None = None,
    ) -> Outputs:
        named = named_variables(model)

        def derive(images: tf.Tensor, masks: Any) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                logits = model(images, training=masks is not None, masks=masks)
                loss = mean_loss(logits, labels)
            return logits, loss, tape.gradient(loss, [v.value for v in named.values()])

        x = tf.constant(images)
        logits, loss, gradients = WRAPPERS[mode or "eager"](derive)(x, masks)
        by_name = numpy_of(dict(zip(named, gradients, strict=True)))
        maps: tuple[Any, Any] = ({}, {})
        if masks is None:
            maps = (numpy_of(model.features(x)), numpy_of(model.signals(x)))
        return Outputs(float(loss), logits.numpy(), by_name, *maps)

    def check_gradients(self, conv: Any, images: Array) -> None:
        """Compare slopes in a random direction, for the images as well."""
        x = tf.Variable(images)
        variables = [x, *(variable.value for variable in conv.weights)]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(conv(x)))
        random = np.random.default_rng(1)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            values = variable.numpy()
            # Where weights are small, so must be the step.
            direction = np.abs(values) * random.standard_normal(values.shape)
            sums = []
            for step in (1e-6, -1e-6):
                variable.assign(values + step * direction)
                sums.append(tf.reduce_sum(tf.sin(conv(x))))
            variable.assign(values)
            slope = float(sums[0] - sums[1]) / 2e-6
            assert slope == pytest.approx(float((gradient * direction).numpy().sum()), rel=1e-6)

    def export(self, model: Any, folder: Path) -> Callable[[Array], Array]:
        model(np.zeros((1, *self.exported_sizes[0][1:], 3), "float32"))  # as Keras wants
        model.export(folder / "saved", verbose=False)
        loaded = tf.saved_model.load(folder / "saved")
        return lambda images: loaded.serve(images).numpy()

    def optimizer(self, model: Any, lr: float, way: str | None = None, **options: Any) -> Optimizer:
        return KerasOptimizer(model, lr, way, options)

    def sharpen(self, problem: SamProblem, mode: str = "eager") -> Sharpened:
        variables, loss, batch = variables_and_loss(problem)

        def compute(step: Any) -> Any:
            return agc_tensorflow.sam_value_and_gradients(
                loss,
                list(variables.values()),
                problem.rule,
                batch=batch or None,
                step=step,
                return_stats=True,
            )

        step: Any = problem.step
        if mode == "traced":
            compute, step = tf.function(compute, autograph=False), tf.constant(step, tf.int64)
        value, found, stats = compute(step)
        gradients = {name: g.numpy() for name, g in zip(variables, found, strict=True)}
        return Sharpened(float(value), float(stats.perturbed_loss), float(stats.norm), gradients)

    def verify_sam(self, problem: SamProblem) -> Any:
        named, loss, batch = variables_and_loss(problem)
        variables = list(named.values())

        def gradients_of(function: Callable[[], Any]) -> Any:
            if problem.rule is not None:
                return agc_tensorflow.sam_value_and_gradients(function, variables, problem.rule)[1]
            with tf.GradientTape() as tape:
                value = function()
            return tape.gradient(value, [variable.value for variable in variables])

        return agc_tensorflow.verify_sam(gradients_of, lambda: loss(*batch), variables)
