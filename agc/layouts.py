"""The two layouts of dense and convolution weights: outputs first, and outputs last.

PyTorch, Equinox and timm store outputs first (OI, OIW, OIHW, OIDHW); Flax, Haiku and Keras store
them last (IO, WIO, HWIO, DHWIO). Vectors and scalars are the same in both.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy.typing as npt

__all__ = ["Layout", "out_first", "out_first_axes", "out_last", "out_last_axes"]

Layout = Literal["out-first", "out-last"]

Array = npt.NDArray[Any]


def out_first(array: Array) -> Array:
    """Return an out-last array as out-first (HWIO to OIHW, IO to OI); a view.

    Examples
    --------
    >>> import numpy as np
    >>> out_first(np.zeros((5, 7, 3, 64))).shape
    (64, 3, 5, 7)
    """
    return array.transpose(out_first_axes(array.ndim))


def out_last(array: Array) -> Array:
    """Return an out-first array as out-last (OIHW to HWIO, OI to IO); a view.

    Examples
    --------
    >>> import numpy as np
    >>> out_last(np.zeros((64, 3, 5, 7))).shape
    (5, 7, 3, 64)
    """
    return array.transpose(out_last_axes(array.ndim))


def out_first_axes(rank: int) -> tuple[int, ...]:
    """Return the permutation of :func:`out_first`, for tensors of a framework."""
    return (rank - 1, rank - 2, *range(rank - 2)) if rank >= 2 else tuple(range(rank))


def out_last_axes(rank: int) -> tuple[int, ...]:
    """Return the permutation of :func:`out_last`, for tensors of a framework."""
    return (*range(2, rank), 1, 0) if rank >= 2 else tuple(range(rank))
