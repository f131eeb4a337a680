"""Peak memory in PyTorch on the CPU, from its profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["peak_memory"]


def peak_memory(benchmark: Any, run: Callable[[], Any], setup: Callable[[], Any]) -> int:
    """Return the bytes that are held at most during a call, beyond those held before it.

    Parameters
    ----------
    benchmark : fixture
        Of pytest-benchmark, which keeps the result.
    run, setup : callable
        What is measured, and what comes before it: to allocate what the call may free, since the
        profiler does not know the size of anything older.
    """

    def measured() -> None:
        with record_function("measured"):
            run()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        benchmark.pedantic(measured, setup=setup, rounds=1)
    events = profiled.profiler.kineto_results.events()
    begin = min(event.start_ns() for event in events if event.name() == "measured")
    changes = [
        (event.start_ns() >= begin, event.nbytes())
        for event in events
        if event.name() == "[memory]"
    ]
    before = sum(size for inside, size in changes if not inside)
    held = torch.tensor([0, *(size for inside, size in changes if inside)]).cumsum(0)
    peak = int(held.max())
    assert peak > 0, "the profiler saw no allocation"
    assert before + int(held[-1]) >= 0, "more was freed than allocated"
    return peak
