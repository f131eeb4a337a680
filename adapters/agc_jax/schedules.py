"""Thresholds and rho at a step of the optimizer, traced or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agc import Schedule
from agc.errors import ConfigError

__all__ = ["value_at"]


def value_at(
    name: str,
    value: float | Callable[[Any], Any],
    step: int | jax.Array | None,
    dtype: Any = float,
) -> float | jax.Array:
    """Return a number, or what a schedule says of a step (AGC-10, SAM-11).

    Parameters
    ----------
    name : str
        What the value is, for messages.
    value : float or callable
        A number, a :class:`agc.Schedule` or any other function of the step.
    step : int or integer array
        Traced or not; it is given to other functions than a :class:`agc.Schedule` as it is.
    dtype : dtype, default the widest that JAX is set to
        Of the value of a :class:`agc.Schedule`.

    Returns
    -------
    float or scalar array
        An array if it is traced, which may then be anything, or if it comes from a
        :class:`agc.Schedule`.

    Raises
    ------
    ConfigError
        If what a schedule returns is no scalar, or is known and is not a finite number above 0.
    """
    if isinstance(value, Schedule):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        return _interpolate(value, jnp.asarray(step, dtype))
    return _call(name, value, step) if callable(value) else value


def _interpolate(schedule: Schedule, step: jax.Array) -> jax.Array:
    """Return the value at a step, without the loop that ``jnp.interp`` has."""
    steps, values = (jnp.asarray(row, step.dtype) for row in zip(*schedule.points, strict=True))
    right = jnp.searchsorted(steps, step, side="right", method="compare_all")
    # Before the first point and after the last one both are the same.
    left, right = jnp.maximum(right - 1, 0), jnp.minimum(right, len(steps) - 1)
    part = (step - steps[left]) / jnp.maximum(steps[right] - steps[left], 1)
    return values[left] + part * (values[right] - values[left])


def _call(name: str, schedule: Callable[[Any], Any], step: Any) -> float | jax.Array:
    try:
        value = schedule(step)
        array = jnp.asarray(value, float)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: the schedule {schedule!r} must return a number for a traced step: {error}"
        ) from error
    if array.shape != ():
        raise ConfigError(
            f"{name}: the schedule {schedule!r} must return a scalar, got the shape {array.shape}"
        )
    if isinstance(value, jax.core.Tracer):
        return array
    if not 0 < float(value) < math.inf:
        raise ConfigError(
            f"{name}: the schedule returned {value!r}; it must return a finite number > 0"
        )
    return float(value)
