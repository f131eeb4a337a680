"""Thresholds and rho at a step of the optimizer, in graphs and outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from agc import Schedule
from agc.schedule import schedule_value

__all__ = ["Step", "value_at"]

Step: TypeAlias = Any
"""A Python integer, or an integer tensor or variable."""


def value_at(
    name: str, value: float | Callable[[Any], Any], step: Step, dtype: tf.DType
) -> tf.Tensor:
    """Return a number, or what a schedule says of a step (AGC-10, SAM-11).

    Parameters
    ----------
    name : str
        What the value is, for messages.
    value : float or callable
        A number, a :class:`agc.Schedule` or any other function of the step.
    step : int, integer tensor or variable
        The step; inside a graph a tensor is not read.
    dtype : DType
        Of the result; a schedule inside a graph is evaluated in it.

    Returns
    -------
    scalar tensor
        NaN where a schedule inside a graph, which cannot raise, returns no finite number above 0.

    Raises
    ------
    ConfigError
        If the step was read, and what the schedule returns is not a finite number above 0.
    """
    if not callable(value):
        return tf.constant(value, dtype)  # tf.cast would round a Python number to float32 first
    if isinstance(step, keras.Variable):
        step = step.value
    if not isinstance(step, int):
        step = tf.convert_to_tensor(step)
    if not tf.is_symbolic_tensor(step):
        return tf.constant(schedule_value(name, value, int(step)), dtype)
    if isinstance(value, Schedule):
        return _interpolate(value, tf.cast(step, dtype))
    number = value(step)
    number = tf.cast(number, dtype) if tf.is_tensor(number) else tf.constant(number, dtype)
    valid = (number > 0) & tf.math.is_finite(number)
    return tf.where(valid, number, tf.constant(math.nan, dtype))


def _interpolate(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    """Return :meth:`agc.Schedule.__call__` of a tensor, by the same formula."""
    (start, low), *rest = schedule.points
    value = tf.constant(low, step.dtype)
    for end, high in rest:
        line = low + (high - low) * ((step - start) / (end - start))
        value = tf.where(
            step >= end, tf.constant(high, step.dtype), tf.where(step >= start, line, value)
        )
        start, low = end, high
    return value
