"""Gradients and weights as the numerics see them: paired, checked, with few axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from agc import Units
from agc.checks import check_inexact, check_shapes, rows_are_not_units
from agc.plan import PlanEntry
from agc_tensorflow.devices import in_xla
from agc_tensorflow.units import Variable

__all__ = ["Fold", "Gradient", "RowsView", "StackedView", "View", "check_pair", "fold", "view_of"]

Gradient: TypeAlias = Any
"""A tensor, ``tf.IndexedSlices`` or None."""


@dataclass(frozen=True)
class Fold:
    """Axes of a parameter with neighbours that are reduced alike merged: fewer axes, same units.

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

    def stacked(self, number: int) -> Fold:
        """Return the fold of so many tensors, stacked along a new first axis."""
        return Fold((number, *self.view), tuple(axis + 1 for axis in self.reduce))


@lru_cache(maxsize=4096)
def fold(units: Units, shape: tuple[int, ...], rows: bool = False) -> Fold:
    """Merge the axes of a shape; with ``rows``, the first axis holds any number of them."""
    axes = units.bind(shape)
    view: list[int] = []
    reduced: list[bool] = []
    for axis, size in enumerate(axes.view):
        in_norm = axis in axes.reduce
        size = -1 if rows and axis == 0 else size
        if size == 1:
            continue
        if view and reduced[-1] == in_norm:
            view[-1] = -1 if view[-1] < 0 else view[-1] * size
        else:
            view.append(size)
            reduced.append(in_norm)
    if not view:
        return Fold((1,), (0,))
    return Fold(tuple(view), tuple(axis for axis, in_norm in enumerate(reduced) if in_norm))


class View:
    """A dense gradient with its weight.

    Attributes
    ----------
    entry : PlanEntry
        The parameter's entry in the plan.
    places : list of int
        Its index among the parameters; of stacked ones, all of theirs.
    gradient, weight : tensor
        What the norms are taken of.
    fold, weight_fold : Fold
        Their units.
    count : int or scalar tensor
        Values in the flat vectors of units, for each place.
    units : int or scalar tensor
        Of these, the first ones, which hold a unit.
    """

    def __init__(
        self, place: int, entry: PlanEntry, gradient: tf.Tensor, weight: tf.Tensor
    ) -> None:
        self.places, self.entry = [place], entry
        self.gradient, self.weight = gradient, weight
        self.fold = self.weight_fold = fold(entry.units, entry.shape)
        self.count: Any = entry.count
        self.units: Any = entry.count

    def only_units(self, squares: tf.Tensor) -> tf.Tensor:
        """Return squared norms with zeros where there is no unit."""
        return squares

    def with_values(self, values: tf.Tensor) -> list[Gradient]:
        """Return a gradient of the same kind with other values, for each place."""
        return [values]


class StackedView(View):
    """Dense gradients with their weights, alike in all but the place, as one tensor.

    Parameters
    ----------
    views : sequence of View
        They have one shape, fold, dtype and threshold.
    """

    def __init__(self, views: Sequence[View]) -> None:
        first = views[0]
        self.entry, self.count, self.units = first.entry, first.count, first.units
        self.places = [place for view in views for place in view.places]
        self.gradient = tf.stack([view.gradient for view in views])
        self.weight = tf.stack([view.weight for view in views])
        self.fold = self.weight_fold = first.fold.stacked(len(views))

    def with_values(self, values: tf.Tensor) -> list[Gradient]:
        """Return one of the values' rows for each place."""
        return list(tf.unstack(values, len(self.places)))


class RowsView(View):
    """A row-sparse gradient with the same rows of its weight; no other row is read (AGC-9)."""

    def __init__(
        self, place: int, entry: PlanEntry, gradient: tf.IndexedSlices, weight: tf.Tensor
    ) -> None:
        if not _fits_rows(entry):
            raise rows_are_not_units(
                f"parameter {entry.name!r}: the gradient",
                entry.shape,
                entry.units,
                cure="give the model, whose embedding layers have row units, ",
            )
        self.places, self.entry = [place], entry
        self.dense_shape = gradient.dense_shape
        self.indices, self.gradient, rows = _coalesce(gradient)
        self.fold = fold(entry.units, entry.shape, rows=True)
        if entry.axes.keep:  # rows are units
            per_row = fold(entry.units, (1, *entry.shape[1:])).count
            self.weight, self.weight_fold = tf.gather(weight, self.indices), self.fold
            self.count = tf.size(self.indices) * per_row
            self.units = rows * per_row
        else:
            self.weight, self.weight_fold = weight, fold(entry.units, entry.shape)
            self.count = self.units = 1

    def only_units(self, squares: tf.Tensor) -> tf.Tensor:
        """Return squared norms with zeros in the places after the last row."""
        if isinstance(self.count, int):
            return squares
        return tf.where(tf.range(self.count) < self.units, squares, tf.constant(0, tf.float64))

    def with_values(self, values: tf.Tensor) -> list[Gradient]:
        """Return the same rows with other values."""
        return [tf.IndexedSlices(values, self.indices, self.dense_shape)]


def view_of(
    place: int, entry: PlanEntry, gradient: Gradient, variable: Variable, *, densify: bool
) -> View | None:
    """Return how the numerics see a gradient and its variable; None if it is not clipped.

    Parameters
    ----------
    place : int
        The parameter's index among all of them.
    entry : PlanEntry
        Its entry in the plan.
    gradient : tensor or tf.IndexedSlices
        Any dtype that is floating point or complex.
    variable : keras.Variable or tf.Variable
        Its parameter.
    densify : bool
        Whether row-sparse gradients whose rows are not units are made dense instead of refused.

    Raises
    ------
    ShapeError, DTypeError
        As :func:`check_pair`.
    UnitsError
        If the gradient is row-sparse and its rows are not units.
    """
    weight = variable.value if isinstance(variable, keras.Variable) else variable
    gradient = check_pair(entry, weight, gradient)
    if not entry.clipped:
        return None
    if densify and isinstance(gradient, tf.IndexedSlices) and not _fits_rows(entry):
        gradient = _dense(gradient, entry)
    made = RowsView if isinstance(gradient, tf.IndexedSlices) else View
    return made(place, entry, gradient, tf.convert_to_tensor(weight))


def check_pair(entry: PlanEntry, weight: Any, gradient: Gradient) -> Gradient:
    """Return the gradient as a tensor or IndexedSlices if it fits its variable."""
    sparse = isinstance(gradient, tf.IndexedSlices)
    if not sparse:
        gradient = tf.convert_to_tensor(gradient)
    values = gradient.values if sparse else gradient
    given = values.shape[1:] if sparse else values.shape
    wanted = entry.shape[1:] if sparse else entry.shape
    if tuple(weight.shape) != entry.shape or not given.is_compatible_with(wanted):
        shape = (entry.shape[0], *given) if sparse and entry.shape else tuple(given)
        check_shapes(entry.name, weight=weight.shape, gradient=shape, plan=entry.shape)
    for what, dtype in (("gradient", values.dtype), ("weight", tf.as_dtype(weight.dtype))):
        if not (dtype.is_floating or dtype.is_complex):
            check_inexact(f"parameter {entry.name!r}: the {what}", dtype.name, inexact=False)
    return gradient


def _fits_rows(entry: PlanEntry) -> bool:
    """Tell whether a row-sparse gradient can be clipped: rows are units, or all is one unit."""
    axes = entry.axes
    return not axes.keep or (0 in axes.keep and axes.view == axes.shape)


def _dense(gradient: tf.IndexedSlices, entry: PlanEntry) -> tf.Tensor:
    indices = tf.reshape(gradient.indices, [-1])
    return tf.math.unsorted_segment_sum(gradient.values, indices, entry.shape[0])


def _coalesce(gradient: tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Add up rows that appear more than once; return indices, values and how many differ.

    XLA knows no arrays whose size depends on their values, so there the rows come first, and the
    rest are zeros for the first row.
    """
    indices, values = tf.reshape(gradient.indices, [-1]), gradient.values
    if not in_xla():
        rows, row_of = tf.unique(indices)
        count = tf.size(rows)
        return rows, tf.math.unsorted_segment_sum(values, row_of, count), count
    size = tf.size(indices)
    order = tf.argsort(indices)
    indices = tf.gather(indices, order)
    new = tf.concat(
        [tf.ones_like(indices[:1]), tf.cast(indices[1:] != indices[:-1], indices.dtype)], 0
    )
    row_of = tf.cumsum(new) - 1
    count = tf.cast(tf.reduce_sum(new), tf.int32)
    rows = tf.math.unsorted_segment_max(indices, row_of, size)
    rows = tf.where(tf.range(size) < count, rows, rows[:1])
    return rows, tf.math.unsorted_segment_sum(tf.gather(values, order), row_of, size), count
