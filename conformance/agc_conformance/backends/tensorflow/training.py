"""Training of the suite's network on real images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc.recipe import Recipe
from agc.training import Launch, Trainer
from agc_conformance.backend import TrainingTask, TrainStep, Unsupported
from agc_conformance.backends.tensorflow.arrays import keras_sgd
from agc_conformance.backends.tensorflow.device import Device
from agc_conformance.training.processes import Process, anew, free_addresses, started
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.sam import sam_value_and_gradients
from agc_tensorflow.train import trainer
from agc_tensorflow.units import variable_key

__all__ = ["Training"]

Array = npt.NDArray[Any]


class Training(Device):
    """A custom training step, in a graph."""

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        """Train the suite's network in a compiled step of SAM, if asked for, AGC and SGD."""
        with tf.device(self._place):
            yield from _train(task)

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Train as ``agc train`` does."""
        return trainer(recipe, replace(launch, device=self._place[1:]))

    def processes(self, count: int) -> AbstractContextManager[Callable[[Recipe, Launch], Trainer]]:
        """Start workers, which ``TF_CONFIG`` tells of each other."""
        if self.device != "cpu":
            raise Unsupported("several processes are started on the CPU alone")
        cluster = {"worker": free_addresses(count)}
        tasks = ({"type": "worker", "index": index} for index in range(count))
        configs = (json.dumps({"cluster": cluster, "task": task}) for task in tasks)
        hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
        crew = [Process({**hidden, "TF_CONFIG": config}, {}) for config in configs]
        return started("agc_tensorflow.train:trainer", crew)

    def elsewhere(self) -> Callable[[Recipe, Launch], Trainer]:
        """Make this backend there too."""
        if self.device != "cpu":
            raise Unsupported("another process is started on the CPU alone")
        return partial(anew, type(self), self.device)


def _train(task: TrainingTask) -> Iterator[TrainStep]:
    """Train, translating the task's names and layout to Keras' and back."""
    model = _network(task)
    variables = dict(zip(task.weights, model.trainable_variables, strict=True))
    for name, variable in variables.items():
        variable.assign(_out_last(task.weights[name]))
    sgd = keras_sgd(task.optimizer)
    # The task's names are not the model's, so the layers' types do not tell the units.
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
        received, before = (
            [kept[variable_key(v)] for v in weights] for kept in (sgd.received, sgd.weights_before)
        )
        return loss, gradients, received, seen[-1], before

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


def _network(task: TrainingTask) -> Any:
    """Build the network of :class:`agc_conformance.backend.TrainingTask`."""
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
