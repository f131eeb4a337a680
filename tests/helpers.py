"""What tests of all frameworks measure with: NumPy arrays, or what NumPy reads."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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


def uneven(random: Any, values: Any, spread: float = 1.0) -> Array:
    """Return values times a scale for each index of each axis, so that a wrong axis shows."""
    shape = np.shape(values)
    for axis, size in enumerate(shape):
        scales = np.exp(spread * random.standard_normal(size))
        values = values * scales.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return np.asarray(values)


def draw(
    shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float64, *, small: bool = False
) -> tuple[Array, Array]:
    """Return uneven weights and gradients; small ones are such that only some units are clipped."""
    random = np.random.RandomState(seed)
    spread, scale = (1.0, 0.03) if small else (1.5, 1.0)
    w, g = (uneven(random, random.standard_normal(shape), spread) for _ in range(2))
    return w.astype(dtype), (scale * g).astype(dtype)


def script_of_models(name: str) -> Any:
    """Import ``docs/models/<name>.py``, which judges units by what layers compute."""
    path = Path(__file__).parents[1] / "docs" / "models" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"models_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module
