"""Batches made ahead of their use, by threads: for frameworks that bring no loader of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from agc.checks import check_count

__all__ = ["feed"]

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Indexed(Protocol[B_co]):
    """What has an item for each index, as a sequence has."""

    def __getitem__(self, index: int, /) -> B_co:
        """Return an item."""
        ...


def feed(
    batches: Indexed[B], steps: Iterable[int], *, threads: int = 2
) -> Generator[B, None, None]:
    """Yield the batches of some steps in their order, while threads make the next ones.

    Threads share one Python: they run side by side while images are decoded and in the larger NumPy
    operations. For more, use the loader of PyTorch or TensorFlow, or grain's, over the same object.

    Parameters
    ----------
    batches : sequence
        :class:`agc.data.Batches` or :class:`agc.data.Evaluation`.
    steps : iterable of int
        Which ones: ``range(step, len(batches))`` to go on at a step.
    threads : int
        As many batches are being made at a time, and as many more are ready.

    Raises
    ------
    AGCError
        Whatever a batch raises, when it is its turn.
    """
    threads = check_count("threads", threads)
    coming: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for step in steps:
                coming.append(pool.submit(batches.__getitem__, step))
                if len(coming) > 2 * threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            # A reader that stops early waits only for what is being made.
            for future in coming:
                future.cancel()
