"""AGC: clipping by hand, inside a wrapped optimizer, and in the settings of real training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc.errors import NonFiniteError
from agc_conformance.backend import Gradient, Optimizer, Outcome, Problem, Unsupported
from agc_conformance.backends.tensorflow.arrays import (
    RecordingSGD,
    keras_sgd,
    keras_variables,
    to_array,
    to_tensor,
)
from agc_conformance.backends.tensorflow.device import Device
from agc_tensorflow.clip import adaptive_clip_gradients
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.stats import Stats
from agc_tensorflow.units import variable_key

__all__ = ["Clipping"]

Array = npt.NDArray[Any]


class Clipping(Device):
    """AGC by :mod:`agc_tensorflow`."""

    paths = ("compiled", "xla")

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_tensorflow.adaptive_clip_gradients`, eagerly."""
        return self._clip(problem, lambda clip: clip())

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Array]]:
        """Step ``AdaptiveGradClip(SGD)`` and return the weights after each step."""
        inner = keras_sgd(optimizer)
        with tf.device(self._place):
            variables = keras_variables(problem.parameters)
            wrapped = AdaptiveGradClip(inner, problem.declared_rule, model=variables)
            steps: list[Mapping[str, Array]] = []
            for of_step in gradients:
                given = [to_tensor(of_step.get(name)) for name in variables]
                wrapped.apply(given, list(variables.values()))
                steps.append({name: np.array(v.numpy()) for name, v in variables.items()})
        return steps

    def scenario_optimizer(self, problem: Problem) -> Outcome:
        """Clip inside the optimizer's ``apply``."""
        return self._receive(problem, [problem.gradients])

    def scenario_idle(self, problem: Problem) -> Outcome:
        """Raise Unsupported: Keras refuses such a step."""
        raise Unsupported("Keras refuses a step in which no variable has a gradient")

    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        """Clip behind Keras' own accumulation."""
        return self._receive(problem, micro, gradient_accumulation_steps=len(micro))

    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        """Clip inside ``LossScaleOptimizer``."""
        return self._receive(problem, [problem.gradients], scale=float(scale))

    def scenario_compiled(self, problem: Problem) -> Outcome:
        """Clip in a graph."""
        return self._clip(problem, _in_graph)

    def scenario_xla(self, problem: Problem) -> Outcome:
        """Clip in a graph that XLA compiles."""
        return self._clip(problem, partial(_in_graph, jit_compile=True))

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        """Raise Unsupported: Keras shards no parameters on TensorFlow."""
        raise Unsupported("MirroredStrategy replicates parameters; Keras on TensorFlow shards none")

    def _clip(self, problem: Problem, run: Callable[[Callable[[], Any]], Any]) -> Outcome:
        with tf.device(self._place):
            variables = {
                name: tf.Variable(value, name="weight")
                for name, value in problem.parameters.items()
            }
            gradients = [to_tensor(problem.gradients.get(name)) for name in variables]

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
        """Apply gradients by a wrapped optimizer and return those that the inner one received."""
        with tf.device(self._place):
            variables = keras_variables(problem.parameters)
            recorder = RecordingSGD(0.0, **options)
            clipper = AdaptiveGradClip(recorder, problem.declared_rule, model=variables)
            outer: Any = clipper
            if scale is not None:
                outer = keras.optimizers.LossScaleOptimizer(clipper, initial_scale=scale)
            for gradients in batches:
                outer.apply(
                    [to_tensor(gradients.get(name)) for name in variables], list(variables.values())
                )
            received = {
                name: to_array(recorder.received.get(variable_key(variable)))
                for name, variable in variables.items()
            }
        return Outcome(received, clipper.stats().parameters())


def _in_graph(clip: Callable[[], Any], *, jit_compile: bool | None = None) -> Any:
    """Run inside a ``tf.function``; turn TensorFlow's error into the policy's."""
    try:
        function = tf.function(clip, autograph=False, jit_compile=jit_compile)
        return function.get_concrete_function()()  # without TensorFlow's warnings of many traces
    except tf.errors.InvalidArgumentError as error:
        if NonFiniteError.__name__ in str(error):
            raise NonFiniteError(str(error)) from error
        raise
