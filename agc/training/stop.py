"""Signals that end a training after the step that is under way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["stop_signals"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether SIGTERM or SIGINT has come; for the main thread only.

    A second signal does what it would have done without this.
    """
    came = False

    def receive(*_: object) -> None:
        nonlocal came
        came = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, receive) for number in _SIGNALS
    }
    try:
        yield lambda: came
    finally:
        restore()
