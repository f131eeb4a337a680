"""TensorFlow's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

import agc_tensorflow
from agc.nfnet import Options
from agc_tensorflow.train import trainer

__all__ = ["classifier", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_tensorflow.NFNet(options)
    agc_tensorflow.from_neutral(model, arrays)
    run = tf.function(lambda images: model(images, training=False), autograph=False)
    return lambda images: run(tf.constant(images)).numpy()
