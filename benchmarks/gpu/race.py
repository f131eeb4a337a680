"""Contestants that take turns, and the clocks that time them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np

from benchmarks.common import over_turns

__all__ = [
    "Clock",
    "Contestant",
    "Crash",
    "CudaClock",
    "DoesNotApply",
    "Effort",
    "Entry",
    "HostClock",
    "Outcome",
    "Reading",
    "race",
    "relative",
]

_WARMUPS: Final = 2
"""Calls at the start of a turn that are not timed: the last contestant left its own caches."""
_LONGEST: Final = 300
"""Characters of an error that are kept."""

Outcome = dict[str, Any]
"""What became of a contestant: times and facts, or an ``error``, or why it is ``absent``."""

Key = TypeVar("Key", bound=Hashable)


class DoesNotApply(Exception):
    """A contestant or a stage has nothing to do on this device."""


class Crash(Exception):
    """A contestant has left the process, or its GPU, in a state in which no other can be timed."""


class Reading(NamedTuple):
    """Milliseconds of one call.

    Attributes
    ----------
    device : float
        From its start to the end of its work on the device.
    host : float
        From its start to its return.
    """

    device: float
    host: float


class Clock(Protocol):
    """Times one call at a time, with an idle device before it."""

    def read(self, run: Callable[[], Any]) -> Reading:
        """Time a call."""

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Return the bytes that a call has allocated at most, or None if nobody knows."""

    def check(self) -> None:
        """Raise Crash if the device is lost, as it is after an illegal access to its memory."""


class HostClock:
    """Waits for what a call returns, as JAX needs it; on a CPU there is nothing to wait for."""

    def __init__(self, wait: Callable[[Any], Any] = lambda result: result) -> None:
        self._wait = wait

    def read(self, run: Callable[[], Any]) -> Reading:
        start = time.perf_counter()
        result = run()
        returned = time.perf_counter()
        self._wait(result)
        return Reading(1e3 * (time.perf_counter() - start), 1e3 * (returned - start))

    def peak(self, run: Callable[[], Any]) -> int | None:
        self._wait(run())
        return None

    def check(self) -> None:
        """Do nothing: nobody knows."""


class CudaClock:
    """Times the device by CUDA events on the current stream."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def read(self, run: Callable[[], Any]) -> Reading:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return Reading(start.elapsed_time(end), 1e3 * host)

    def peak(self, run: Callable[[], Any]) -> int | None:
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        run()
        self._cuda.synchronize()
        return int(self._cuda.max_memory_allocated() - before)

    def check(self) -> None:
        try:
            self._cuda.synchronize()
        except RuntimeError as error:
            raise Crash(f"the GPU is lost: {error}") from error


@dataclass(frozen=True)
class Contestant:
    """Somebody who does the work.

    Attributes
    ----------
    run : callable
        The work.
    prepare : callable
        Called before every run, outside the clock.
    check : callable
        Called after a first, untimed run; returns facts about the result, such as its error.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    check: Callable[[], Outcome] = dict


Entry = Callable[[], Contestant]
"""Makes a contestant; raises :class:`DoesNotApply` if there is none on this device."""


class Effort(NamedTuple):
    """How often each contestant has its turn, and how many calls of a turn are timed."""

    turns: int
    rounds: int


def race(
    entries: Mapping[Key, Entry],
    clock: Clock,
    effort: Effort,
    watch: Callable[[Key], Any] = lambda _: None,
) -> dict[Key, Outcome]:
    """Let contestants take turns, so that a slow moment of the machine hits them all.

    A contestant that fails is out, with its error; the others go on. ``watch`` is told who is next.

    Raises
    ------
    Crash
        If the others cannot go on.

    Returns
    -------
    dict
        ``device_ms`` and ``host_ms``, each with ``median``, ``low`` and ``high`` (10th and 90th
        percentile) of all calls and the medians of the ``turns``; ``peak_bytes`` where known; and
        what the contestant's check says.
    """
    outcomes: dict[Key, Outcome] = {}
    racing: dict[Key, Contestant] = {}
    for key, make in entries.items():
        watch(key)
        try:
            contestant = make()
            contestant.prepare()
            contestant.run()  # compiles
            facts = contestant.check()
            contestant.prepare()
            outcomes[key] = {**facts, "peak_bytes": clock.peak(contestant.run)}
            racing[key] = contestant
        except DoesNotApply as reason:
            outcomes[key] = {"absent": str(reason)}
        except Crash:
            raise
        except Exception as error:  # whatever a peer, a compiler or a driver has to say
            clock.check()
            outcomes[key] = _failed(error)
    readings: dict[Key, list[list[Reading]]] = {key: [] for key in racing}
    for _ in range(effort.turns):
        for key, contestant in list(racing.items()):
            watch(key)
            try:
                readings[key].append(_turn(contestant, clock, effort.rounds))
            except Exception as error:  # likewise
                clock.check()
                outcomes[key] = _failed(error)
                del racing[key]
    for key in racing:
        outcomes[key] |= _summary(readings[key])
    return outcomes


def relative(outcome: Outcome, base: Outcome) -> float | None:
    """Return the device time of one as a multiple of the other's, turn by turn; None if unknown."""
    if "device_ms" not in outcome or "device_ms" not in base:
        return None
    return over_turns(outcome["device_ms"]["turns"], base["device_ms"]["turns"])


def _turn(contestant: Contestant, clock: Clock, rounds: int) -> list[Reading]:
    readings = []
    for _ in range(_WARMUPS + rounds):
        contestant.prepare()
        readings.append(clock.read(contestant.run))
    return readings[_WARMUPS:]


def _summary(turns: list[list[Reading]]) -> Outcome:
    summary: Outcome = {"rounds": sum(map(len, turns))}
    for index, name in enumerate(Reading._fields):
        columns = [[reading[index] for reading in turn] for turn in turns]
        low, middle, high = np.quantile(np.concatenate(columns), (0.1, 0.5, 0.9)).tolist()
        medians = [statistics.median(column) for column in columns]
        summary[f"{name}_ms"] = {"median": middle, "low": low, "high": high, "turns": medians}
    return summary


def _failed(error: Exception) -> Outcome:
    return {"error": f"{type(error).__name__}: {error}"[:_LONGEST]}
