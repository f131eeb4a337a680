"""Thresholds and rho at a step of the optimizer, on the step's device where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from agc import Schedule
from agc.errors import ConfigError
from agc.schedule import schedule_value
from agc_torch.norms import on_host, wide

__all__ = ["Step", "is_recorded", "value_at"]

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
        If the step was read, and what the schedule returns is not a finite number above 0; or if a
        CUDA graph is being recorded, which would repeat that number for ever.
    """
    if not callable(value):
        return value
    if isinstance(step, Tensor):
        if isinstance(value, Schedule) and not on_host(step.device):
            return _interpolate(value, step.to(wide(step.device)))
        if torch.compiler.is_compiling():
            traced: Tensor = value(step)
            return traced
    if is_recorded():
        raise ConfigError(
            f"{name} is a function of the step, and a CUDA graph would repeat its value of now for ever; "
            "only an agc.Schedule goes on in a graph, and only of a step on the GPU: set "
            "capturable=True in all param_groups of the optimizer that AGC is attached to, before "
            "the steps that warm up, or give adaptive_clip_grad_ such a tensor"
        )
    if isinstance(step, Tensor):
        step = int(step)
    return schedule_value(name, value, step)


def is_recorded() -> bool:
    """Tell whether a CUDA graph is being recorded: what the host does is not part of it."""
    # CUDA that nothing has used yet would be started by the question.
    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())


def _interpolate(schedule: Schedule, step: Tensor) -> Tensor:
    value = torch.full_like(step, schedule.points[0][1])
    for (start, low), (end, high) in pairwise(schedule.points):
        value = value + (high - low) * ((step - start) / (end - start)).clamp(0, 1)
    return value
