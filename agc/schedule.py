"""Values that change with the step: schedules, their form as data, and their checked value."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final

from agc.checks import check_not_negative, check_number, check_positive, check_step
from agc.errors import ConfigError

__all__ = [
    "SCHEDULE",
    "Schedule",
    "WarmupCosine",
    "WarmupDecay",
    "schedule_from_data",
    "schedule_to_data",
    "schedule_value",
]

SCHEDULE: Final = "@schedule"
"""Key of a schedule's points in data."""


@dataclass(frozen=True)
class Schedule:
    """A value that changes with the optimizer step: straight lines between the points given.

    Parameters
    ----------
    points : sequence of (int, float)
        Steps, strictly ascending from 0 or later, and the value at each. Before the first and after
        the last point the value stays what it is there.

    Raises
    ------
    ConfigError
        If there is no point, a step is not an ascending non-negative integer, or a value is not a
        finite number above 0.

    Notes
    -----
    Unlike an arbitrary callable, a schedule can be written to a file and is evaluated inside the
    compiled step by every adapter (AGC-10).

    Examples
    --------
    >>> warm_up = Schedule([(0, 0.04), (1000, 0.01)])
    >>> warm_up(500)
    0.025
    """

    points: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        try:
            points = tuple((step, value) for step, value in self.points)
        except (TypeError, ValueError):
            raise ConfigError(
                f"Schedule points must be pairs (step, value), got {self.points!r}"
            ) from None
        if not points:
            raise ConfigError("Schedule needs at least one point, for example [(0, 0.01)]")
        last = -1
        for step, value in points:
            if isinstance(step, bool) or not isinstance(step, Integral) or step <= last:
                raise ConfigError(
                    "Schedule steps must be ascending integers from 0 on, "
                    f"got {[step for step, _ in points]}"
                )
            last = int(step)
            check_positive("Schedule value", value)
        points = tuple((int(step), float(value)) for step, value in points)
        object.__setattr__(self, "points", points)

    def __call__(self, step: int) -> float:
        """Return the value at a step (a Python integer)."""
        steps = [point for point, _ in self.points]
        right = bisect_right(steps, step)
        if right == 0:
            return self.points[0][1]
        start, low = self.points[right - 1]
        if right == len(steps):
            return low
        end, high = self.points[right]
        return low + (high - low) * ((step - start) / (end - start))


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Learning rate: linear from 0 to the peak, then half a cosine to the end.

    Parameters
    ----------
    peak : float
        Largest value, at least 0.
    steps : float
        Steps at which ``end`` is reached; in training, how many there are.
    warmup : float, default 0
        Steps of warm-up, at most ``steps``; may be a fraction, as DeepMind's 1563.92 for NFNets.
    end : float, default 0
        Value that the cosine leads to.

    Raises
    ------
    ConfigError
        If a number is outside these bounds.

    Examples
    --------
    >>> rate = WarmupCosine(peak=1.6, steps=112_602, warmup=5 * 1_281_167 / 4096)
    >>> rate(0), round(rate(1564), 6)
    (0.0, 1.6)
    """

    peak: float
    steps: float
    warmup: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", check_not_negative("peak", self.peak))
        object.__setattr__(self, "steps", check_positive("steps", self.steps))
        within = f"a number from 0 to the {self.steps:g} steps"
        check_number("warmup", self.warmup, within, lambda warmup: 0 <= warmup <= self.steps)
        check_not_negative("end", self.end)

    def __call__(self, step: int) -> float:
        """Return the value at a step, counted from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        span = max(1, self.steps - self.warmup)
        angle = math.pi * min(step - self.warmup, span) / span
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(angle))


@dataclass(frozen=True, kw_only=True)
class WarmupDecay:
    """Decay of an average of the weights: ``min(decay, (1 + step) / (10 + step))``.

    Parameters
    ----------
    decay : float
        Largest value, in [0, 1).
    warmup : bool, default True
        Whether the decay rises with the step, from 0.1; otherwise it is constant.

    Raises
    ------
    ConfigError
        If the decay is not in [0, 1).
    """

    decay: float
    warmup: bool = True

    def __post_init__(self) -> None:
        check_number("decay", self.decay, "a number in [0, 1)", lambda decay: 0 <= decay < 1)

    def __call__(self, step: int) -> float:
        """Return the decay of the update at a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


def schedule_to_data(name: str, value: Any) -> Any:
    """Return a value or schedule as JSON data; raise ConfigError for an anonymous callable."""
    if isinstance(value, Schedule):
        return {SCHEDULE: [list(point) for point in value.points]}
    if callable(value):
        raise ConfigError(
            f"{name} is the callable {value!r}, which cannot be written as data; "
            "use agc.Schedule([(step, value), ...]) instead"
        )
    return value


def schedule_from_data(data: Mapping[str, Any]) -> Schedule:
    """Read a schedule back from :func:`schedule_to_data`; raise ConfigError for anything else."""
    if set(data) != {SCHEDULE}:
        raise ConfigError(f"a schedule is written as {{{SCHEDULE!r}: points}}, got {data!r}")
    return Schedule(data[SCHEDULE])


def schedule_value(name: str, schedule: Callable[[Any], Any], step: Any) -> float:
    """Return a schedule's value at a step; raise ConfigError unless it is finite and above 0."""
    step = check_step(step)
    value = schedule(step)
    try:
        # float() also accepts arrays of one element, which are fine, and text, which is not.
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"{name}: the schedule returned {value!r} at step {step}; it must return a finite number > 0"
        )
    return number
