"""Sums of squares by unit (AGC-3), added up as fits the platform that the program is lowered for.

* CPU and GPU: in float64, or where there are many, short runs in float32 and the sums of the runs
  in float64. That goes as fast as memory does, also where float64 is 64 times slower than float32,
  and its error does not grow with the fan-in.
* TPU: in float32, the widest that the hardware has.

Letters at the end of a name: U units, KU units of K parameters that have equally many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agc.units import UnitAxes

__all__ = ["SAFE_EPS", "sums_of_squares"]

SAFE_EPS: Final = 1e-8
"""Floor of norms from which on what float32 cannot hold does not matter."""
_RUN: Final = 64
"""Squares added up in float32, which XLA does in vector lanes or in pairs."""
_MANY: Final = 512
"""Fan-in from which rounding errors of the runs average out."""
_LARGE: Final = 1 << 15
"""Squares in an array from which on their number matters at all."""


def sums_of_squares(
    arrays: Sequence[jax.Array], axes: UnitAxes, wide: np.dtype[Any], *, eps: float
) -> jax.Array:
    """Sum the squared magnitudes of every unit of K arrays.

    Parameters
    ----------
    arrays : sequence of K arrays of one shape and dtype, floating point or complex
        What to sum.
    axes : UnitAxes
        Their units.
    wide : dtype
        What to add up in: float64, or float32 on a TPU.
    eps : float
        Floor of the norms that follow, which says whether short runs may be added up in float32.

    Returns
    -------
    array of ``wide``, shape (K, U)
        The sums.
    """
    if jnp.iscomplexobj(arrays[0]):
        real, imaginary = (
            sums_of_squares([part(array) for array in arrays], axes, wide, eps=eps)
            for part in (lax.real, lax.imag)
        )
        return lax.add(real, imaginary)
    count = len(arrays)
    if count > 1:
        stacked = lax.concatenate([lax.reshape(array, (1, *axes.view)) for array in arrays], 0)
        sums_KU = _sum(stacked, wide, tuple(axis + 1 for axis in axes.reduce))
        return lax.reshape(sums_KU, (count, axes.count))
    runs = eps >= SAFE_EPS and arrays[0].dtype != np.float64 and wide == np.float64
    if runs and (split := _split_into_runs(axes)) is not None:
        sums_U = _sum_of_runs(arrays[0], wide, split)
    else:
        sums_U = _sum(lax.reshape(arrays[0], axes.view), wide, axes.reduce)
    return lax.reshape(sums_U, (1, axes.count))


def _sum(array: jax.Array, wide: np.dtype[Any], reduce: tuple[int, ...]) -> jax.Array:
    return lax.reduce_sum(lax.square(lax.convert_element_type(array, wide)), reduce)


def _sum_of_runs(array: jax.Array, wide: np.dtype[Any], split: _Split) -> jax.Array:
    """Sum of squares in runs of float32, and of the runs in the wide dtype."""
    shape, inside, between = split
    # Without the barrier XLA moves the reshape behind the product, where its fused kernel for sums
    # of squares no longer sees it.
    runs = lax.optimization_barrier(lax.reshape(array, shape))
    sums = _sum(runs, np.dtype(np.float32), inside)
    left = [axis for axis in range(len(shape)) if axis not in inside]
    return lax.reduce_sum(
        lax.convert_element_type(sums, wide), [left.index(axis) for axis in between]
    )


_Split: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""A shape, its axes inside a run, and its axes from run to run."""


@lru_cache(maxsize=4096)
def _split_into_runs(axes: UnitAxes) -> _Split | None:
    """Split the reduced axes into runs of elements that lie next to each other.

    Returns None if the sizes leave only short runs, or there are too few to be worth it.
    """
    view, reduce = axes.view, axes.reduce
    if axes.fan_in < _MANY or math.prod(view) < _LARGE:
        return None
    axis, length = max(reduce), 1
    while axis in reduce and length * view[axis] <= _RUN:
        length *= view[axis]
        axis -= 1
    factor = 1
    if axis in reduce:
        factor = max(size for size in range(1, _RUN // length + 1) if view[axis] % size == 0)
    if factor * length < _RUN // 4:
        return None
    if factor == 1:
        return view, tuple(a for a in reduce if a > axis), tuple(a for a in reduce if a <= axis)
    shape = (*view[:axis], view[axis] // factor, factor, *view[axis + 1 :])
    inside = (axis + 1, *(a + 1 for a in reduce if a > axis))
    return shape, inside, tuple(a for a in reduce if a <= axis)
