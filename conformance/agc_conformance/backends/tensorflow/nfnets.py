"""NFNets: forward, gradients, training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc.config import AGC
from agc.nfnet import Variant
from agc_conformance.backend import (
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
)
from agc_conformance.backends.tensorflow.device import Device
from agc_tensorflow.clip import adaptive_clip_gradients
from agc_tensorflow.nfnet import NFNet, nfnet
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.recipe import sgd_nfnet
from agc_tensorflow.units import named_variables, plan
from agc_tensorflow.weights import from_neutral, to_neutral

__all__ = ["NFNets"]

Array = npt.NDArray[Any]
_RULE = AGC.profile("deepmind")


class NFNets(Device):
    """:func:`agc_tensorflow.nfnet`."""

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run the model eagerly."""
        with tf.device(self._place):
            program, images = _program_of(problem), tf.constant(problem.images)
            model = program.model
            logits = model(images, training=program.training).numpy()
            if not problem.outputs:
                return ModelForward(logits)
            outputs = {"stem": (x := model.stem(images))}
            for number, stage in enumerate(model.stages):
                for place, block in enumerate(stage.blocks):
                    outputs[f"stages.{number}.{place}"] = (x := block(x))
            return ModelForward(
                logits,
                {name: value.numpy() for name, value in outputs.items()},
                {kind: value.numpy() for kind, value in model.signals(images).items()},
            )

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run forward and backward, and clip by :func:`agc_tensorflow.adaptive_clip_gradients`."""
        with tf.device(self._place):
            program = _program_of(problem)
            loss, gradients = program.loss_and_gradients(*_batch(problem))
            weights = list(program.variables.values())
            clipped = adaptive_clip_gradients(gradients, weights, _RULE, model=program.model)
            return ModelGradients(
                float(loss),
                program.named(gradients),
                program.named(clipped),
                plan(program.model, _RULE),
            )

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Apply :func:`agc_tensorflow.sgd_nfnet`, or ``AdaptiveGradClip(SGD)``, in a graph."""
        with tf.device(self._place):
            program = _program_of(problem)
            with _floatx(problem.dtype):
                if recipe.optimizer == "nfnet":
                    optimizer = sgd_nfnet(program.model, recipe.rates[0])
                else:
                    sgd = keras.optimizers.SGD(recipe.rates[0], momentum=recipe.momentum)
                    optimizer = AdaptiveGradClip(sgd, _RULE, model=program.model)
            weights = list(program.variables.values())
            optimizer.build(weights)

            @tf.function(autograph=False)  # type: ignore[untyped-decorator]
            def update(gradients: Sequence[tf.Tensor]) -> None:
                optimizer.apply(gradients, weights)

            for rate in recipe.rates:
                optimizer.learning_rate = rate
                loss, gradients = program.loss_and_gradients(*_batch(problem))
                update(gradients)
                yield ModelStep(float(loss), to_neutral(program.model))


class _Program:
    """A model with its loss and gradients, in a graph that is traced once."""

    def __init__(
        self, variant: str | Variant, classes: int, dtype: str, stochastic_depth: float | None
    ) -> None:
        keras.utils.set_random_seed(0)
        self.training = stochastic_depth is not None
        self.model: NFNet = nfnet(
            variant, classes, dropout=0.0, stochastic_depth=stochastic_depth, dtype=dtype
        )
        self.variables = named_variables(self.model)
        self.loss_and_gradients = tf.function(self._loss_and_gradients, autograph=False)

    def _loss_and_gradients(self, images: tf.Tensor, labels: tf.Tensor, smoothing: float) -> Any:
        weights = list(self.variables.values())
        with tf.GradientTape() as tape:
            logits = self.model(images, training=self.training)
            targets = tf.one_hot(labels, logits.shape[1], dtype=logits.dtype)
            targets = (1 - smoothing) * targets + smoothing / logits.shape[1]
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        return loss, tape.gradient(loss, weights)

    def named(self, tensors: Sequence[Any]) -> dict[str, Array]:
        """Return arrays by canonical name; Keras' layout is the neutral one."""
        return {n: np.array(t.numpy()) for n, t in zip(self.variables, tensors, strict=True)}


_program = lru_cache(maxsize=4)(_Program)


def _program_of(problem: ModelProblem) -> _Program:
    classes = len(problem.parameters["head.bias"])
    program = _program(problem.variant, classes, problem.dtype, problem.stochastic_depth)
    from_neutral(program.model, problem.parameters)
    return program


@contextmanager
def _floatx(dtype: str) -> Iterator[None]:
    """Make Keras keep the learning rate in the dtype of the model instead of float32."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def _batch(problem: ModelProblem) -> tuple[tf.Tensor, tf.Tensor, float]:
    return tf.constant(problem.images), tf.constant(problem.labels), problem.smoothing
