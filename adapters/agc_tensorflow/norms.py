"""The numerics of one tensor: sums of squares by unit, and scaling by unit.

TensorFlow adds up long columns one after the other in float32, which is wrong by hundreds of units in the
last place, and goes through memory once for every operation. Here eight squares are added in pairs in
float32 and the rest in float64, accurate however long a unit is; and in a graph on the CPU these two kernels
are compiled by XLA, so that each reads its tensor once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import tensorflow as tf

from agc import Units

__all__ = ["Fold", "fold", "in_xla", "scale_units", "splits_groups", "sum_of_squares"]

_LEVELS: Final = 3
"""How often squares are added in pairs in float32: eight to one."""
_RUN: Final = 1 << _LEVELS
_SMALL: Final = 1 << 14
"""Below this many elements a branch or a compiled kernel costs more than it saves."""


@dataclass(frozen=True)
class Fold:
    """Axes of a parameter with neighbours of one kind merged: fewer axes, same units.

    Attributes
    ----------
    view : tuple of int
        Shape to reduce; -1 for the rows of a sparse gradient.
    reduce : tuple of int
        Axes of the view that the norm runs over.
    """

    view: tuple[int, ...]
    reduce: tuple[int, ...]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of one value a unit, for broadcasting."""
        return tuple(1 if axis in self.reduce else size for axis, size in enumerate(self.view))

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.unit_shape)


@lru_cache(maxsize=4096)
def fold(units: Units, shape: tuple[int, ...], rows: bool = False) -> Fold:
    """Merge the axes of a shape; with ``rows``, the first axis holds any number of them."""
    axes = units.bind(shape)
    view: list[int] = []
    reduced: list[bool] = []
    for axis, size in enumerate(axes.view):
        kind = axis in axes.reduce
        size = -1 if rows and axis == 0 else size
        if size == 1:
            continue
        if view and reduced[-1] == kind:
            view[-1] = -1 if view[-1] < 0 else view[-1] * size
        else:
            view.append(size)
            reduced.append(kind)
    if not view:
        return Fold((1,), (0,))
    return Fold(tuple(view), tuple(axis for axis, kind in enumerate(reduced) if kind))


def sum_of_squares(x: tf.Tensor, fold: Fold, *, wide: bool) -> tf.Tensor:
    """Sum the squared magnitudes of every unit (AGC-3).

    Parameters
    ----------
    x : tensor, floating point or complex
        Any shape that the fold is for.
    fold : Fold
        Its units.
    wide : bool
        Whether to square in float64, for numbers whose squares float32 cannot hold.

    Returns
    -------
    tensor of float64, shape (units,)
        The sums.
    """
    run = _sum_compiled if _compiles(fold) else _sum
    return run(tf.reshape(x, fold.view), fold.reduce, wide or x.dtype in _WIDE)


def scale_units(
    gradient: tf.Tensor,
    fold: Fold,
    scale: tf.Tensor,
    mask: tf.Tensor,
    touched: tf.Tensor,
    *,
    wide: bool,
    zero: bool,
) -> tf.Tensor:
    """Multiply units by their scales where the mask says so; the others keep their bits (AGC-2).

    Parameters
    ----------
    gradient : tensor, floating point or complex
        Any shape that the fold is for.
    fold : Fold
        Its units.
    scale : tensor of float64, shape (units,)
        Factors.
    mask : tensor of bool, shape (units,)
        Units to multiply.
    touched : scalar tensor of int
        Their number.
    wide : bool
        Whether to multiply in float64.
    zero : bool
        Whether a scale of 0 makes zeros of NaN and infinities too.

    Returns
    -------
    tensor
        Shaped like the fold's view, in the gradient's dtype.
    """
    wide = wide or gradient.dtype in _WIDE
    scale = tf.reshape(tf.cast(scale, tf.float64 if wide else tf.float32), fold.unit_shape)
    if gradient.dtype.is_complex:
        scale = tf.cast(scale, tf.complex128 if wide else tf.complex64)
    mask = tf.reshape(mask, fold.unit_shape)
    view = tf.reshape(gradient, fold.view)
    if not _branches(fold):
        return _select(view, scale, mask, zero)
    run = _select_compiled if _compiles(fold) else _select
    return tf.cond(touched > 0, lambda: run(view, scale, mask, zero), lambda: view)


def in_xla() -> bool:
    """Tell whether the code being traced will be compiled by XLA (``jit_compile=True``)."""
    from tensorflow.python.ops import control_flow_util  # TensorFlow has no public name for it

    return not tf.executing_eagerly() and bool(
        control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    )


def splits_groups() -> bool:
    """Tell whether a grouped convolution has to be one convolution a group: on the CPU outside XLA.

    There TensorFlow has no gradient of grouped convolutions in float64 and float16, nor in float32 and
    bfloat16 without oneDNN.
    """
    return not in_xla() and not _accelerators()


_WIDE: Final = (tf.float64, tf.complex128)


def _sum(view: tf.Tensor, reduce: tuple[int, ...], wide: bool) -> tf.Tensor:
    parts = [tf.math.real(view), tf.math.imag(view)] if view.dtype.is_complex else [view]
    parts = [tf.cast(part, tf.float64 if wide else tf.float32) for part in parts]
    if not reduce:
        sums = [tf.cast(tf.square(part), tf.float64) for part in parts]
    else:
        axis = max(reduce, key=lambda axis: view.shape[axis] or 0)
        sums = [_sum_along(piece, axis, reduce) for part in parts for piece in _pieces(part, axis)]
    return tf.reshape(tf.add_n(sums), [-1])


def _pieces(array: tf.Tensor, axis: int) -> list[tf.Tensor]:
    """Cut off what is left of an axis when it is taken in runs."""
    length = array.shape[axis] or 0
    rest = length % _RUN
    return tf.split(array, [length - rest, rest], axis) if 0 < rest < length else [array]


def _sum_along(array: tf.Tensor, axis: int, reduce: tuple[int, ...]) -> tf.Tensor:
    """Sum squares over axes; along one of them eight in pairs first, so that few roundings come together."""
    squares = tf.square(array)
    if (array.shape[axis] or 1) % _RUN == 0:
        for _ in range(_LEVELS):
            low, high = tf.split(squares, 2, axis)
            # A snapshot keeps the graph optimizer from making one long sum of the pairs again.
            squares = tf.raw_ops.Snapshot(input=low + high)
    return tf.reduce_sum(tf.cast(squares, tf.float64), reduce)


def _select(view: tf.Tensor, scale: tf.Tensor, mask: tf.Tensor, zero: bool) -> tf.Tensor:
    times = tf.math.multiply_no_nan if zero else tf.multiply
    scaled = tf.cast(times(tf.cast(view, scale.dtype), scale), view.dtype)
    # A select, because multiplying by 1 would flush subnormal numbers.
    return tf.where(mask, scaled, view)


# Compiled once for every shape, however many tensors have it.
_sum_compiled: Final[Any] = tf.function(_sum, jit_compile=True, autograph=False)
_select_compiled: Final[Any] = tf.function(_select, jit_compile=True, autograph=False)


def _branches(fold: Fold) -> bool:
    """Tell whether looking at a value to skip work is worth it: for large tensors on the CPU."""
    return math.prod(fold.view) >= _SMALL and not in_xla() and not _accelerators()


def _compiles(fold: Fold) -> bool:
    """Tell whether to compile a kernel: for large tensors in graphs that are not compiled anyway."""
    return _branches(fold) and not tf.executing_eagerly() and bool(tf.test.is_built_with_xla())


@lru_cache(maxsize=1)
def _accelerators() -> bool:
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())
