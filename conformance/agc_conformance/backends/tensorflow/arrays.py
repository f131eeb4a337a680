"""NumPy arrays to TensorFlow and back, row-sparse gradients too, and an optimizer that records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc.reference import RowSparse
from agc_conformance.backend import Optimizer
from agc_tensorflow.units import variable_key

__all__ = ["RecordingSGD", "keras_sgd", "keras_variables", "to_array", "to_tensor"]

Array = npt.NDArray[Any]


def to_tensor(value: Any) -> Any:
    """Return a tensor; row-sparse becomes ``IndexedSlices``."""
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
    """Return a copy of a tensor or variable; ``IndexedSlices`` become row-sparse."""
    if isinstance(value, tf.IndexedSlices):
        shape = tuple(int(size) for size in value.dense_shape)
        return RowSparse(value.indices.numpy(), value.values.numpy(), shape)
    return None if value is None else np.array(value.numpy())


def keras_variables(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Return Keras variables that all have the same name, as those of layers may."""
    return {
        name: keras.Variable(value, dtype=value.dtype.name, name="weight")
        for name, value in arrays.items()
    }


class RecordingSGD(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD that records the gradients it receives, and has coupled weight decay too."""

    def __init__(self, learning_rate: float, *, coupled_decay: float = 0.0, **options: Any) -> None:
        super().__init__(learning_rate, name="sgd", **options)
        self.coupled_decay = coupled_decay
        self.received: dict[object, Any] = {}
        self.weights_before: dict[object, Any] = {}

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Record the gradient and the weights, then update."""
        self.received[variable_key(variable)] = gradient
        self.weights_before[variable_key(variable)] = tf.identity(tf.convert_to_tensor(variable))
        if self.coupled_decay:
            gradient = gradient + self.coupled_decay * variable
        super().update_step(gradient, variable, learning_rate)


def keras_sgd(optimizer: Optimizer) -> RecordingSGD:
    """Return Keras' SGD, with decay in either form."""
    decay = "weight_decay" if optimizer.decoupled else "coupled_decay"
    return RecordingSGD(
        optimizer.lr,
        momentum=float(optimizer.momentum),
        nesterov=optimizer.nesterov,
        **({decay: optimizer.weight_decay} if optimizer.weight_decay else {}),
    )
