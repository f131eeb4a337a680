"""Random numbers as a function of (seed, purpose, number of the item) (DATA-3).

The bits are those of Philox4x64-10 with the key (seed, purpose) and the item's number as the
counter's highest word. Only NumPy's raw bits are used, which are stable by policy; what is made of
them is written here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Purpose", "Stream", "integer"]

_UNIT: Final = 2.0**-53


class Purpose(IntEnum):
    """What random numbers are for, and what the items of each stream are."""

    ORDER = 0
    """Of the images; an item is an epoch."""
    CROP = 1
    """Crop and flip; an item is a source image."""
    MIX = 2
    """MixUp and CutMix; an item is an example."""
    RANDAUGMENT = 3
    """An item is what it is applied to: an example, or a source image before mixing."""
    STOCHASTIC_DEPTH = 4
    """Masks; an item is an example."""
    DROPOUT = 5
    """Masks; an item is an example."""
    INITIAL = 6
    """Initial values; an item is a parameter, by its place in the model."""


class Stream:
    """The random numbers of one purpose; not for several threads at once.

    Parameters
    ----------
    seed : int
        From 0 to 2^64 - 1.
    purpose : Purpose
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._philox = np.random.Philox(key=np.array([seed, purpose], np.uint64))
        self._start: Any = self._philox.state

    def raw(self, number: int, count: int) -> npt.NDArray[np.uint64]:
        """Return the first 64-bit words of an item."""
        self._start["state"]["counter"] = np.array([0, 0, 0, number], np.uint64)
        self._philox.state = self._start
        return np.asarray(self._philox.random_raw(count))

    def uniforms(self, number: int, count: int) -> npt.NDArray[np.float64]:
        """Return the first numbers of an item: multiples of 2^-53 in [0, 1)."""
        bits = self.raw(number, count) >> np.uint64(11)
        return bits.astype(np.float64) * _UNIT


def integer(uniform: float, count: int) -> int:
    """Return a uniform integer from 0 to ``count - 1``; 0 if ``count`` is 0."""
    return int(uniform * count)
