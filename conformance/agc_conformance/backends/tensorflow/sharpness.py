"""SAM as a function of the loss, and under ``fit``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc_conformance.backend import (
    Examples,
    Optimizer,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    Unsupported,
)
from agc_conformance.backends.tensorflow.arrays import keras_sgd, to_array
from agc_conformance.backends.tensorflow.device import Device
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.sam import SharpnessAwareModel, sam_value_and_gradients
from agc_tensorflow.units import variable_key

__all__ = ["Sharpness", "mirrored"]

Array = npt.NDArray[Any]
Run = Callable[[Callable[[], Any]], Any]


class Sharpness(Device):
    """SAM by both entry points of :mod:`agc_tensorflow`."""

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute by :func:`agc_tensorflow.sam_value_and_gradients`, eagerly."""
        with tf.device(self._place):
            return _sharpen(problem, lambda compute: compute())

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute in a graph."""
        with tf.device(self._place):
            return _sharpen(problem, lambda compute: tf.function(compute, autograph=False)())

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Train one step with a loss scaler; return the gradients of the inner optimizer."""
        with tf.device(self._place):
            return _scaled(problem, float(scale))

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Run under MirroredStrategy; as in Keras, replicas divide the loss by their number."""
        return _replicas(problem, replicas)  # the strategy chooses the devices

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Raise Unsupported: TensorFlow keeps no gradients between steps."""
        raise Unsupported("in TensorFlow gradients are values: none is left from an earlier step")

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Differentiate by the optimizer's variables only; the loss depends on the others too."""
        with tf.device(self._place):
            return _fixed(problem, frozen, absent)

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Keep the number in a variable that the loss assigns to, as layers keep statistics."""
        with tf.device(self._place):
            return _stateful(problem)

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Train by ``fit``'s own step, or in float64 by a custom loop.

        Keras does not add up losses in float64.
        """
        with tf.device(self._place):
            return _trajectory(task)


def _sharpen(problem: SharpnessProblem, run: Run) -> SharpnessOutcome:
    variables = _variables(problem)

    def compute() -> Any:
        return sam_value_and_gradients(
            _loss_function(list(problem.examples.curvatures), variables),
            list(variables.values()),
            problem.rule,
            batch=_batch(problem.examples),
            step=problem.step,
            return_stats=True,
        )

    loss, gradients, stats = run(compute)
    plain = not problem.rule.perturbs(problem.step)
    return SharpnessOutcome(
        {name: to_array(g) for name, g in zip(variables, gradients, strict=True)},
        {name: to_array(v) for name, v in variables.items()},
        float(loss),
        None if plain else float(stats.perturbed_loss),
        None if plain else float(stats.norm),
        _skipped(gradients),
    )


def _trajectory(task: SharpnessTask) -> list[Mapping[str, Array]]:
    float64 = any(value.dtype == np.float64 for value in task.problem.parameters.values())
    make = _Loop if float64 else _Fit
    training = make(task.problem, task.optimizer)
    steps: list[Mapping[str, Array]] = []
    for index, examples in enumerate(task.batches):
        if index == task.restart:
            with tempfile.TemporaryDirectory() as folder:
                saved = training.checkpoint().write(str(Path(folder) / "training"))
                training = make(task.problem, task.optimizer)
                training.checkpoint().read(saved).assert_existing_objects_matched()
        training.step(_batch(examples))
        steps.append({name: to_array(v) for name, v in training.variables.items()})
    return steps


class _Loop:
    """A custom training loop: SAM, then the optimizer with AGC in it."""

    def __init__(self, problem: SharpnessProblem, optimizer: Optimizer) -> None:
        self.variables = _variables(problem)
        self.rule = problem.rule
        self.used = list(problem.examples.curvatures)
        self.optimizer = _optimizer(problem, optimizer, self.variables)
        self.optimizer.build(list(self.variables.values()))

    def step(self, batch: Sequence[Any]) -> None:
        variables = list(self.variables.values())
        _, gradients = sam_value_and_gradients(
            _loss_function(self.used, self.variables),
            variables,
            self.rule,
            batch=batch,
            step=int(self.optimizer.iterations),
        )
        if not _skipped(gradients):
            self.optimizer.apply(gradients, variables)

    def checkpoint(self) -> Any:
        # A list: checkpoints do not accept the names of an optimizer's variables.
        kept = [*self.variables.values(), *self.optimizer.variables]
        return tf.train.Checkpoint(variables=[variable.value for variable in kept])


class _Fit(_Loop):
    """A model under ``fit``."""

    def __init__(self, problem: SharpnessProblem, optimizer: Optimizer) -> None:
        model = _Quadratic(problem)
        self.variables = model.weights_by_name
        self.model = SharpnessAwareModel(model, problem.rule)
        self.optimizer = _optimizer(problem, optimizer, self.variables)
        self.optimizer.build(list(self.variables.values()))
        self.model.compile(self.optimizer, loss=_mean)

    def step(self, batch: Sequence[Any]) -> None:
        self.model.train_on_batch(list(batch), np.zeros(len(batch[0])))


def _mean(_: Any, losses: Any) -> Any:
    return tf.reduce_mean(losses)


class _Quadratic(keras.Model):  # type: ignore[misc]
    """The loss of :class:`agc_conformance.backend.Examples`: one number for each example."""

    def __init__(self, problem: SharpnessProblem) -> None:
        super().__init__(name="quadratic")
        self.weights_by_name = {
            name: self.add_weight(shape=value.shape, dtype=value.dtype.name, name=name)
            for name, value in problem.parameters.items()
        }
        for name, value in problem.parameters.items():
            self.weights_by_name[name].assign(value)
        self.used = list(problem.examples.curvatures)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return _losses([self.weights_by_name[name] for name in self.used], inputs)


def _losses(variables: Sequence[Any], batch: Sequence[Any]) -> Any:
    half = len(batch) // 2
    losses = []
    for variable, a, c in zip(variables, batch[:half], batch[half:], strict=True):
        away = tf.cast(variable.value, c.dtype) - c
        losses.append(tf.reduce_sum(0.5 * a * away**2, axis=tuple(range(1, len(c.shape)))))
    return tf.add_n(losses)


def _loss_function(used: Sequence[str], variables: Mapping[str, Any]) -> Callable[..., Any]:
    chosen = [variables[name] for name in used]
    return lambda *batch: tf.reduce_mean(_losses(chosen, batch))


def _variables(problem: SharpnessProblem) -> dict[str, Any]:
    return {
        name: keras.Variable(value, dtype=value.dtype.name, name=name)
        for name, value in problem.parameters.items()
    }


def _batch(examples: Examples) -> list[Any]:
    arrays = [*examples.curvatures.values(), *examples.centers.values()]
    return [tf.constant(array) for array in arrays]


def _optimizer(
    problem: SharpnessProblem, optimizer: Optimizer, variables: Mapping[str, Any]
) -> Any:
    inner = keras_sgd(optimizer)
    if problem.clipping is None:
        return inner
    return AdaptiveGradClip(inner, problem.clipping, model=dict(variables))


def _skipped(gradients: Sequence[Any]) -> bool:
    """Tell whether the step is to be skipped: every gradient is NaN."""
    present = [tf.reduce_all(tf.math.is_nan(g)) for g in gradients if g is not None]
    return bool(tf.reduce_all(tf.stack(present)))


def _fixed(
    problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
) -> SharpnessOutcome:
    variables = _variables(problem)
    for name in frozen:
        variables[name].trainable = False
    moving = [name for name in variables if name not in {*frozen, *absent}]
    loss, gradients = sam_value_and_gradients(
        _loss_function(list(problem.examples.curvatures), variables),
        [variables[name] for name in moving],
        problem.rule,
        batch=_batch(problem.examples),
        step=problem.step,
    )
    return SharpnessOutcome(
        {**dict.fromkeys(variables), **dict(zip(moving, map(to_array, gradients), strict=True))},
        {name: to_array(v) for name, v in variables.items()},
        float(loss),
    )


def _stateful(problem: SharpnessProblem) -> SharpnessOutcome:
    variables, batch = _variables(problem), _batch(problem.examples)
    quadratic = _loss_function(list(problem.examples.curvatures), variables)
    state = keras.Variable(1.0, trainable=False, name="state")

    def loss(*part: Any) -> Any:
        unscaled = quadratic(*part)
        value = tf.cast(state.value, unscaled.dtype) * unscaled
        state.assign(2 * state.value)
        return value

    for _ in range(2):
        value, gradients = sam_value_and_gradients(
            loss, list(variables.values()), problem.rule, batch=batch, step=problem.step
        )
    return SharpnessOutcome(
        {name: to_array(g) for name, g in zip(variables, gradients, strict=True)},
        {name: to_array(v) for name, v in variables.items()},
        float(value),
    )


def _scaled(problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
    recorder = keras_sgd(Optimizer(lr=0.0))
    model = _Quadratic(problem)
    wrapped = SharpnessAwareModel(model, problem.rule)
    scaler = keras.optimizers.LossScaleOptimizer(recorder, initial_scale=scale)
    wrapped.compile(scaler, loss=_mean, run_eagerly=True)
    batch = _batch(problem.examples)
    loss = wrapped.train_on_batch(batch, np.zeros(len(batch[0])))[0]
    return SharpnessOutcome(
        {
            name: to_array(recorder.received.get(variable_key(variable)))
            for name, variable in model.weights_by_name.items()
        },
        {name: to_array(variable) for name, variable in model.weights_by_name.items()},
        float(loss),
        skipped=not recorder.received,
    )


@cache
def mirrored(replicas: int) -> Any:
    """Return the only strategy of this process: TensorFlow mixes up the collectives of two."""
    names = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    kind = "GPU" if any(name.startswith("GPU") for name in names) else "CPU"
    devices = [name for name in names if name.startswith(kind)]
    if len(devices) < replicas:
        raise Unsupported(
            f"{replicas} replicas need as many devices; TensorFlow has {len(devices)}"
        )
    return tf.distribute.MirroredStrategy(devices[:replicas])


def _replicas(problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
    strategy = mirrored(replicas)
    with strategy.scope():
        variables = _variables(problem)
    chosen = [variables[name] for name in problem.examples.curvatures]
    batch = _batch(problem.examples)
    share = len(problem.examples) // replicas

    def one_replica() -> Any:
        context = tf.distribute.get_replica_context()
        start = context.replica_id_in_sync_group * share
        loss, gradients = sam_value_and_gradients(
            lambda *part: tf.reduce_mean(_losses(chosen, part)) / replicas,
            list(variables.values()),
            problem.rule,
            batch=[tensor[start : start + share] for tensor in batch],
            step=problem.step,
        )
        return context.all_reduce(tf.distribute.ReduceOp.SUM, [loss, *gradients])

    results = tf.function(lambda: strategy.run(one_replica), autograph=False)()
    loss, *gradients = (strategy.experimental_local_results(value)[0] for value in results)
    return SharpnessOutcome(
        {name: to_array(g) for name, g in zip(variables, gradients, strict=True)},
        {name: np.array(v.value.values[0]) for name, v in variables.items()},
        float(loss),
        skipped=_skipped(gradients),
    )
