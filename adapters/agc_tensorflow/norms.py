"""Sums of squares by unit (AGC-3), and what is fast where.

TensorFlow adds up long columns one after the other in float32, which is wrong by hundreds of units
in the last place, and goes through memory once for every operation. Here eight squares (32 in some
compiled kernels) are added in float32, in pairs, and the rest in float64, accurate however long a
unit is; and in a graph on the CPU this kernel is compiled by XLA, so that it reads its tensor once.

What is done to one tensor is a function in a graph, which is traced once for every shape.
"""

from __future__ import annotations

import math
from typing import Any, Final

import tensorflow as tf

from agc_tensorflow.devices import has_accelerators, in_xla
from agc_tensorflow.views import Fold

__all__ = ["WIDE", "branches", "compiles", "is_large", "sum_of_squares"]

WIDE: Final = (tf.float64, tf.complex128)
"""Gradients and weights that are squared and scaled in float64."""
_LEVELS: Final = 3
"""How often squares are added in pairs in float32: eight to one."""
_LEVELS_OF_ROWS: Final = 5
"""The same in compiled kernels of large tensors whose units are rows in memory.

Of rows up to 1024 XLA then makes one kernel; with fewer levels it writes float64 between two.
"""
_LONG: Final = 512
"""Elements of a row above which that kernel no longer uses vector instructions.

Longer rows take two kernels: one adds the run, four squares at a time, the other the rest.
"""
_SMALL: Final = 1 << 14
"""Below this many elements a copy costs less than a branch, a compiled kernel, or an operation."""


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
    run: Any = _sum_compiled if compiles(fold) else _sum if tf.executing_eagerly() else _sum_traced
    return run(x, fold.view, fold.reduce, wide or x.dtype in WIDE)


def _sum(x: tf.Tensor, shape: tuple[int, ...], reduce: tuple[int, ...], wide: bool) -> tf.Tensor:
    view = tf.reshape(x, shape)
    reals = [tf.math.real(view), tf.math.imag(view)] if view.dtype.is_complex else [view]
    reals = [tf.cast(real, tf.float64 if wide else tf.float32) for real in reals]
    if not reduce:
        sums = [tf.cast(tf.square(real), tf.float64) for real in reals]
    else:
        axis = max(reduce, key=lambda axis: view.shape[axis] or 0)
        rows = axis == len(shape) - 1 and math.prod(shape) >= _SMALL and in_xla()
        levels = _LEVELS_OF_ROWS if rows else _LEVELS
        sums = [
            _sum_along(part, axis, reduce, levels)
            for real in reals
            for part in _parts(real, axis, 1 << levels)
        ]
    return tf.reshape(tf.add_n(sums), [-1])


def _parts(array: tf.Tensor, axis: int, run: int) -> list[tf.Tensor]:
    """Cut off what is left of an axis when it is taken in runs."""
    length = array.shape[axis] or 0
    rest = length % run
    return tf.split(array, [length - rest, rest], axis) if 0 < rest < length else [array]


def _sum_along(array: tf.Tensor, axis: int, reduce: tuple[int, ...], levels: int) -> tf.Tensor:
    """Sum squares over axes; along one of them a run in pairs first, for fewer roundings."""
    run, length = 1 << levels, array.shape[axis] or 1
    squares = tf.square(array)
    if length % run == 0 and levels == _LEVELS_OF_ROWS and length > _LONG:
        pieces = tf.reshape(array, (*array.shape[:-1], run // 4, 4, length // run))
        fours = _in_pairs([tf.square(piece) for piece in tf.unstack(pieces, axis=-2)])
        squares = tf.reduce_sum(fours, -2)  # XLA does not fuse two sums
    elif length % run == 0 and levels == _LEVELS_OF_ROWS:
        # XLA fuses squares of pieces, but not pieces of squares that are cut so often.
        squares = _in_pairs([tf.square(piece) for piece in tf.split(array, run, axis)])
    elif length % run == 0:
        for _ in range(levels):
            squares = _in_pairs(tf.split(squares, 2, axis))
    return tf.reduce_sum(tf.cast(squares, tf.float64), reduce)


def _in_pairs(terms: list[tf.Tensor]) -> tf.Tensor:
    """Add terms in pairs; there are a power of 2 of them."""
    while len(terms) > 1:
        half = len(terms) // 2
        # A snapshot keeps the graph optimizer from making one long sum of the pairs again.
        terms = [
            tf.raw_ops.Snapshot(input=a + b)
            for a, b in zip(terms[:half], terms[half:], strict=True)
        ]
    return terms[0]


# Traced and compiled once for every shape, however many tensors have it.
_sum_traced: Final[Any] = tf.function(_sum, autograph=False)
_sum_compiled: Final[Any] = tf.function(_sum, autograph=False, jit_compile=True)


def is_large(fold: Fold) -> bool:
    """Tell whether a tensor is to be handled by itself, and without a copy."""
    return math.prod(fold.view) >= _SMALL


def branches(fold: Fold) -> bool:
    """Tell whether reading a value to skip work is worth it: for large tensors on the CPU."""
    return is_large(fold) and not in_xla() and not has_accelerators()


def compiles(fold: Fold) -> bool:
    """Tell whether to compile a kernel: for large tensors in graphs that are not compiled."""
    return branches(fold) and not tf.executing_eagerly() and bool(tf.test.is_built_with_xla())
