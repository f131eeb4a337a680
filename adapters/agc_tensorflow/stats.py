"""Telemetry: what one clipping did, on the device until somebody reads it.

Letters at the end of a name: U units, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import keras
import tensorflow as tf

from agc import AGC, reference
from agc.errors import ConfigError

__all__ = ["IDLE", "AGCLogger", "Stats", "stats_table"]

IDLE: Final = (0.0, 0.0, 0.0, 0.0, 1.0)
"""Telemetry of a parameter that AGC did not act on."""


class Stats(tf.experimental.ExtensionType):  # type: ignore[misc]
    """What one clipping did, on the device until somebody reads it (AGC-11).

    The properties are device scalars; :meth:`total` and :meth:`parameters` bring numbers to the
    host. It may be returned from a ``tf.function``.

    Attributes
    ----------
    names : tuple of str
        The parameters.
    table : tensor of float64, shape (parameters, 5)
        By parameter: units, clipped units, units that are not finite, largest ratio, smallest
        scale. A parameter that AGC did not act on has no units.
    """

    names: tuple[str, ...]
    table: tf.Tensor

    @property
    def units(self) -> tf.Tensor:
        """Number of units looked at."""
        return tf.reduce_sum(self.table[:, 0])

    @property
    def clipped(self) -> tf.Tensor:
        """Number of units that were scaled down."""
        return tf.reduce_sum(self.table[:, 1])

    @property
    def nonfinite(self) -> tf.Tensor:
        """Number of units that fell under the non-finite policy (AGC-4)."""
        return tf.reduce_sum(self.table[:, 2])

    @property
    def max_ratio(self) -> tf.Tensor:
        """Largest ``norm(G_i) / max(norm(W_i), eps)`` of the finite units; 0 if there are none."""
        return tf.maximum(tf.reduce_max(self.table[:, 3]), 0)  # of an empty table it is -inf

    @property
    def min_scale(self) -> tf.Tensor:
        """Smallest factor applied to a finite unit; 1 if none was clipped."""
        return tf.minimum(tf.reduce_min(self.table[:, 4]), 1)

    def total(self) -> reference.Stats:
        """Return the numbers of all parameters together."""
        columns = (self.units, self.clipped, self.nonfinite, self.max_ratio, self.min_scale)
        return _host_stats([float(column) for column in columns])

    def parameters(self) -> dict[str, reference.Stats]:
        """Return the numbers of every parameter that AGC acted on, by name."""
        rows = zip(self.names, self.table.numpy().tolist(), strict=True)
        return {name: _host_stats(row) for name, row in rows if row[0]}

    def to_dict(self, prefix: str = "agc/", *, parameters: bool = True) -> dict[str, float]:
        """Return the numbers as flat floats for a logger, the same keys in every framework.

        Parameters
        ----------
        prefix : str
            What every key starts with.
        parameters : bool
            Whether the numbers of every parameter are among them.

        Returns
        -------
        dict of str to float
            As :func:`agc.reference.to_floats`.
        """
        return reference.to_floats(self.total(), self.parameters() if parameters else {}, prefix)


class AGCLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Put the telemetry of the last update into the logs of every epoch, for later callbacks.

    ``History``, ``CSVLogger``, ``TensorBoard`` and others write what is in the logs; put it before
    them in ``callbacks``.

    Parameters
    ----------
    prefix : str
        What every key starts with.
    parameters : bool
        Whether the numbers of every parameter are among them.

    Examples
    --------
    >>> import agc_tensorflow
    >>> from agc import AGC
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(agc_tensorflow.AdaptiveGradClip("sgd", AGC(), model=model), loss="mse")
    >>> logs = model.fit(tf.ones((4, 3)), tf.ones((4, 1)), callbacks=[AGCLogger()], verbose=0)
    >>> logs.history["agc/units"]
    [2.0]
    """

    def __init__(self, prefix: str = "agc/", *, parameters: bool = False) -> None:
        super().__init__()
        self.prefix, self.parameters = prefix, parameters

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Add the numbers.

        Raises
        ------
        ConfigError
            If the model is not compiled with an ``AdaptiveGradClip``.
        """
        optimizer = self.model.optimizer
        while not isinstance(getattr(optimizer, "rule", None), AGC):
            outer, optimizer = optimizer, getattr(optimizer, "inner_optimizer", None)
            if optimizer is None:
                raise ConfigError(
                    f"AGCLogger needs a model that is compiled with AdaptiveGradClip, got {type(outer).__name__}"
                )
        if logs is not None:
            logs.update(optimizer.stats().to_dict(self.prefix, parameters=self.parameters))


def stats_table(
    units: Sequence[Any],
    places: tf.Tensor,
    floor: tf.Tensor,
    norm: tf.Tensor,
    scale: tf.Tensor,
    clipped: tf.Tensor,
    finite: tf.Tensor,
) -> tf.Tensor:
    """Return telemetry by parameter, from values by unit (AGC-11); see :class:`Stats`.

    Parameters
    ----------
    units : sequence of int or scalar tensor
        Units of each parameter.
    places : tensor of int, shape (units,)
        Index of the parameter that each unit belongs to.
    floor, norm, scale : tensor of float64, shape (units,)
        Floored norm of the weights, norm of the gradient, and factor.
    clipped, finite : tensor of bool, shape (units,)
        Whether the unit is scaled, and whether its norms are finite.

    Returns
    -------
    tensor of float64, shape (parameters, 5)
    """
    parameters = len(units)
    zero, one = tf.constant(0, tf.float64), tf.constant(1, tf.float64)
    ratio_U = tf.where(finite & (norm > 0), norm / floor, zero)
    flags_U = tf.cast(tf.stack([clipped, ~finite], 1), tf.float64)
    flags_P = tf.math.unsorted_segment_sum(flags_U, places, parameters)
    largest_P = tf.maximum(tf.math.unsorted_segment_max(ratio_U, places, parameters), zero)
    smallest_P = tf.minimum(tf.math.unsorted_segment_min(scale, places, parameters), one)
    looked_at_P = tf.cast(tf.stack(units), tf.float64)
    return tf.concat([looked_at_P[:, None], flags_P, largest_P[:, None], smallest_P[:, None]], 1)


def _host_stats(row: Sequence[float]) -> reference.Stats:
    units, clipped, nonfinite, max_ratio, min_scale = row
    return reference.Stats(int(units), int(clipped), int(nonfinite), max_ratio, min_scale)
