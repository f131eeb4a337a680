"""TensorFlow's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc.cli.frameworks import Contest
from agc.nfnet import Options
from agc_tensorflow.train import trainer

__all__ = ["classifier", "contest", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_tensorflow.NFNet(options)
    agc_tensorflow.from_neutral(model, arrays)
    run = tf.function(lambda images: model(images, training=False), autograph=False)
    return lambda images: run(tf.constant(images)).numpy()


def contest(options: Options, images: Any, labels: Any) -> Contest:
    """Return steps to be timed; see :meth:`agc.cli.frameworks.Framework.contest`."""
    x, y = tf.constant(images), tf.constant(labels)

    def step(model: agc_tensorflow.NFNet, rule: AGC) -> Callable[[], float]:
        optimizer = agc_tensorflow.sgd_nfnet(model, 1e-3, rule=rule)
        variables = model.trainable_variables

        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def update() -> tf.Tensor:
            with tf.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
                loss = tf.reduce_mean(losses)
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        return lambda: float(update())

    model, plain, none = (*(agc_tensorflow.NFNet(options) for _ in range(2)), AGC(clipping=None))
    agc_tensorflow.from_neutral(plain, agc_tensorflow.to_neutral(model))
    return Contest(
        {"tensorflow": str(tf.__version__), "device": tf.config.list_logical_devices()[0].name},
        {
            "twin": step(model.batch_normalised(), none),
            "plain": step(plain, none),
            "clipped": step(model, AGC.profile("deepmind")),
        },
    )
