"""TensorFlow's part of ``agc classify``, ``demo`` and ``train``; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

import keras
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc.nfnet import SMOOTHING, Options
from agc_tensorflow.train import trainer

__all__ = ["classifier", "train", "trainer"]

_NEVER: Final = 1e30
"""A threshold that no gradient reaches."""


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_tensorflow.NFNet(options)
    agc_tensorflow.from_neutral(model, arrays)
    run = tf.function(lambda images: model(images, training=False), autograph=False)
    return lambda images: run(tf.constant(images)).numpy()


@cache
def _programs() -> tuple[keras.Model, Any, tf.Variable, Callable[..., Any]]:
    """Return model, optimizer, threshold and step; traced once for all thresholds and rates."""
    model = agc_tensorflow.nfnet("tiny", dropout=0.0, stochastic_depth=0.0)
    threshold = tf.Variable(_NEVER, dtype=tf.float64)
    rule = AGC.profile("deepmind", clipping=lambda _: threshold.read_value())
    optimizer = agc_tensorflow.sgd_nfnet(model, 0.0, rule=rule)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        targets = (1 - SMOOTHING) * tf.one_hot(labels, 10) + SMOOTHING / 10
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return model, optimizer, threshold, step


def train(
    initial: Mapping[str, Any],
    batches: Iterator[tuple[Any, Any]],
    rates: Sequence[float],
    clipping: float | None,
    test: tuple[Any, Any],
) -> Iterator[tuple[float, float]]:
    """Train ``tiny``; see :meth:`agc.cli.frameworks.Framework.train`."""
    model, optimizer, threshold, step = _programs()
    agc_tensorflow.from_neutral(model, initial)
    for variable in optimizer.variables:
        variable.assign(tf.zeros(variable.shape, variable.dtype))
    threshold.assign(_NEVER if clipping is None else clipping)
    for rate, (images, labels) in zip(rates, batches, strict=True):
        optimizer.learning_rate = rate
        loss = float(step(tf.constant(images), tf.constant(labels)))
        total = optimizer.stats().total()
        yield loss, total.clipped / total.units
        if not math.isfinite(loss):
            return
    images, labels = test
    yield float((model(images).numpy().argmax(-1) == labels).mean()), 0.0
