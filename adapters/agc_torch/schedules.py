"""Thresholds and rho at a step of the optimizer, on the step's device where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from agc import Schedule
from agc.schedule import schedule_value
from agc_torch.norms import on_host, wide

__all__ = ["Step", "value_at"]

Step: TypeAlias = int | Tensor


def value_at(name: str, value: float | Callable[[Any], Any], step: Step) -> float | Tensor:
    """Return a number, or what a schedule says of a step (AGC-10, SAM-11).

    Parameters
    ----------
    name : str
        What the value is, for messages.
    value : float or callable
        A number, a :class:`agc.Schedule` or any other function of the step.
    step : int or integer tensor
        A tensor on an accelerator stays there if the value is a :class:`agc.Schedule`; inside
        ``torch.compile`` it is traced. Everywhere else it is read.

    Returns
    -------
    float or scalar Tensor
        A tensor, of the dtype of norms, only where the step was not read.

    Raises
    ------
    ConfigError
        If the step was read, and what the schedule returns is not a finite number above 0.
    """
    if not callable(value):
        return value
    if isinstance(step, Tensor):
        if isinstance(value, Schedule) and not on_host(step.device):
            return _interpolate(value, step.to(wide(step.device)))
        if torch.compiler.is_compiling():
            traced: Tensor = value(step)
            return traced
        step = int(step)
    return schedule_value(name, value, step)


def _interpolate(schedule: Schedule, step: Tensor) -> Tensor:
    value = torch.full_like(step, schedule.points[0][1])
    for (start, low), (end, high) in pairwise(schedule.points):
        value = value + (high - low) * ((step - start) / (end - start)).clamp(0, 1)
    return value
