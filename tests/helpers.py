"""What tests of all frameworks measure with: NumPy arrays, or what NumPy reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def norm(arrays: Iterable[Any]) -> float:
    """Return the L2 norm of all arrays together."""
    return math.sqrt(sum(float(np.square(np.asarray(a, np.float64)).sum()) for a in arrays))


def relative(found: Any, expected: Any) -> float:
    """Return the L2 norm of the error, relative to that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def close(found: Any, expected: Any, limit: float) -> None:
    """Check shapes, and the largest error relative to the largest number that is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() <= limit
