"""Weights and gradients as the numerics see them: real, dense, and in this process.

A complex tensor is seen as pairs of real numbers, a row-sparse gradient as the rows that it has, a
``DTensor`` as the shard that this process holds. :mod:`agc_torch.clip` knows nothing of these
differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from agc.checks import check_inexact, check_shapes, rows_are_not_units
from agc.errors import DTypeError, ParameterError, UnitsError
from agc.plan import PlanEntry
from agc.units import UnitAxes
from agc_torch.shards import Held, is_dtensor, summed

__all__ = ["Home", "ShardUnits", "ShardView", "View", "check_pair", "layout", "views"]

Home: TypeAlias = tuple[torch.device, Any]
"""Where the numbers of a view are: the device, and the mesh that they are spread over or None."""
_PLAIN: Final = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_OR_NONE: Final = frozenset({Tensor, type(None)})
_REAL: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layout(parameters: list[Tensor], gradients: list[Tensor | None]) -> list[list[Any]] | None:
    """Return what the way to clip tensors depends on, with the parameters' addresses first.

    A gradient has its parameter's shape and device, and an address stands for a device and a dtype.
    None if a tensor has no strides, or no memory of its own.
    """
    types = list(map(type, gradients))
    if not (_PLAIN_OR_NONE.issuperset(types) and _PLAIN.issuperset(map(type, parameters))):
        return None
    given = [gradient for gradient in gradients if gradient is not None]
    try:
        return [
            list(map(Tensor.data_ptr, parameters)),
            list(map(Tensor.stride, parameters)),
            types,
            [gradient.dtype for gradient in given],
            list(map(Tensor.size, given)),
            list(map(Tensor.stride, given)),
        ]
    except RuntimeError:
        return None


def views(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[View, View]:
    """Return the weight and the gradient of one parameter as views with the same units.

    Parameters
    ----------
    entry : PlanEntry
        What the plan says of the parameter.
    weight, gradient : Tensor, same shape
        Dense, or ``DTensor``; the gradient may be a coalesced sparse COO tensor (AGC-9).

    Raises
    ------
    UnitsError
        If the gradient is sparse and its rows are not units.
    ParameterError
        If one of the two is a ``DTensor`` and the other is not.
    """
    pair = _views(entry, weight, gradient)
    if weight.dtype != gradient.dtype:
        exact = torch.float64 in [view.tensor.dtype for view in pair]
        for view in pair:
            view.exact = exact
    return pair


def _views(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[View, View]:
    axes = entry.axes
    if gradient.layout == torch.sparse_coo:
        pair = _sparse_views(entry, weight, gradient)
        pair[1].steady = False
        return pair
    if gradient.layout != torch.strided:
        raise UnitsError(
            f"parameter {entry.name!r}: a gradient of layout {gradient.layout} is not supported; "
            "make it dense or sparse COO"
        )
    weight, gradient = _opened(entry, weight), _opened(entry, gradient, written=True)
    if is_dtensor(weight) != is_dtensor(gradient):
        raise ParameterError(
            f"parameter {entry.name!r}: either the parameter or its gradient is a DTensor, but not both"
        )
    if is_dtensor(weight):
        return ShardView(weight, axes), ShardView(gradient, axes)
    return View(weight, axes), View(gradient, axes)


def check_pair(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> None:
    """Raise ShapeError or DTypeError unless a gradient belongs to its parameter and its plan."""
    if weight.shape != entry.shape or gradient.shape != entry.shape:
        check_shapes(entry.name, weight=weight.shape, gradient=gradient.shape, plan=entry.shape)
    for what, dtype in (("gradient", gradient.dtype), ("weight", weight.dtype)):
        if dtype in _REAL or dtype.is_complex:
            continue
        what = f"parameter {entry.name!r}: the {what}"
        check_inexact(what, dtype, inexact=dtype.is_floating_point)
        if entry.clipped:
            raise DTypeError(
                f"{what} has dtype {dtype}; "
                "AGC supports float16, bfloat16, float32, float64 and complex"
            )


class View:
    """A tensor that is whole in this process.

    Attributes
    ----------
    tensor : Tensor
        Real numbers, shaped like ``axes.view``; writing to it writes to the gradient.
    source : Tensor
        What the norms are taken of: ``tensor`` itself, unless that is a sum not yet reduced.
    axes : UnitAxes
        Which axes of ``tensor`` are reduced and kept.
    count : int
        Number of units.
    exact : bool
        Whether squares are added in float64 whatever the dtype: the other of the two is float64.
    home : (device, mesh)
        Where the numbers are; the mesh is None unless they are spread over one.
    steady : bool
        Whether the shape is the same in every step: not of the rows of a sparse gradient.
    """

    exact = False
    steady = True
    _unit_shape: tuple[int, ...] | None = None

    def __init__(self, tensor: Tensor, axes: UnitAxes) -> None:
        if axes.view != axes.shape:
            tensor = tensor.view(axes.view)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
            axes = _axes(tensor.shape, (*axes.reduce, tensor.dim() - 1))
        self.tensor = self.source = tensor
        self.axes = axes
        self.count = axes.count or math.prod(axes.unit_shape)  # an empty tensor may be one unit
        self.home: Home = (tensor.device, None)

    def release(self) -> None:
        """Let go of the tensors; the view is good for others of the same shape and strides."""
        del self.tensor, self.source

    def gather(self, squares: Tensor) -> Tensor:
        """Return what a mesh's processes add up, from the squared norms of ``source``; flat."""
        return squares

    def spread(self, values: Tensor) -> Tensor:
        """Return the units' values in a shape that broadcasts against ``tensor``."""
        if self._unit_shape is None:
            self._unit_shape = self.axes.unit_shape
        return values.view(self._unit_shape)


class ShardView(View):
    """The shard of a ``DTensor`` that this process holds, under any placements (AGC-8).

    Attributes
    ----------
    units : ShardUnits
        Where the tensor's units are in the shard.
    """

    def __init__(self, tensor: Any, axes: UnitAxes) -> None:
        self.units = ShardUnits(axes, Held.of(tensor))
        shard = tensor.to_local()
        local = _axes(shard.shape, self.units.early)
        super().__init__(shard, local)
        if (whole := summed(tensor)) is not tensor:
            self.source = View(whole.to_local(), local).tensor
        self.home = (shard.device, tensor.device_mesh)
        self.count = axes.count

    @cached_property
    def _rows(self) -> list[Tensor | None]:
        return self.units.rows(self.home[0])

    def gather(self, squares: Tensor) -> Tensor:
        """Return this process's share of every unit's squared norm."""
        return self.units.gather(squares, self._rows)

    def spread(self, values: Tensor) -> Tensor:
        """Return the values of the units that have something here."""
        return self.units.spread(values, self._rows).view(self.axes.unit_shape)


@dataclass(frozen=True)
class ShardUnits:
    """Where the units of a tensor are in the shard of it that a process holds.

    Squared norms of shards add up to those of the whole. Axes that a pattern splits are reduced
    only after the shards are put at their indices: a group of units may go on in the next process.
    So the local units, of which a shard has norms, may be several to a unit.

    Attributes
    ----------
    axes : UnitAxes
        Of the whole tensor.
    held : Held
        Which shard it is.
    """

    axes: UnitAxes
    held: Held

    @cached_property
    def _late(self) -> list[tuple[int, list[int]]]:
        """The stored axes that name local units, each with the axes of the view inside it."""
        inner = enumerate(_inner_axes(self.axes))
        return [(axis, names) for axis, names in inner if not set(names) <= set(self.axes.reduce)]

    @property
    def early(self) -> tuple[int, ...]:
        """The stored axes that are reduced in the shard."""
        late = [axis for axis, _ in self._late]
        return tuple(axis for axis in range(len(self.axes.shape)) if axis not in late)

    @cached_property
    def _view(self) -> list[int]:
        return [name for _, names in self._late for name in names]

    def rows(self, device: torch.device) -> list[Tensor | None]:
        """Return the indices that the shard has along each axis that names local units."""
        return [self.held.rows(axis, self.axes.shape[axis], device) for axis, _ in self._late]

    def gather(self, squares: Tensor, rows: list[Tensor | None]) -> Tensor:
        """Return this process's shares of all units, flat, from those of its local units."""
        sizes = [self.axes.shape[axis] for axis, _ in self._late]
        local = [n if mine is None else len(mine) for n, mine in zip(sizes, rows, strict=True)]
        squares = squares.view(local)
        if not self.held.first:
            squares = torch.zeros_like(squares)
        for axis, mine in enumerate(rows):
            if mine is not None:
                shape = [*squares.shape[:axis], sizes[axis], *squares.shape[axis + 1 :]]
                squares = squares.new_zeros(shape).index_copy_(axis, mine, squares)
        squares = squares.view([self.axes.view[name] for name in self._view])
        return squares.sum_to_size([self.axes.unit_shape[name] for name in self._view]).flatten()

    def spread(self, values: Tensor, rows: list[Tensor | None]) -> Tensor:
        """Return the values of the local units from those of all units."""
        values = values.view([self.axes.unit_shape[name] for name in self._view])
        values = values.expand([self.axes.view[name] for name in self._view])
        values = values.reshape([self.axes.shape[axis] for axis, _ in self._late])
        for axis, mine in enumerate(rows):
            if mine is not None:
                values = values.index_select(axis, mine)
        return values

    def numbers(self) -> Tensor:
        """Return which unit each local unit belongs to, flat, on the CPU."""
        cpu = torch.device("cpu")
        return self.spread(torch.arange(self.axes.count, device=cpu), self.rows(cpu)).flatten()


def _sparse_views(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[View, View]:
    """Rows that a sparse gradient has, and the same rows of the weight; no other row is read."""
    values, axes = gradient.values(), entry.axes
    if entry.units.whole:
        return View(weight, axes), View(values, _axes(values.shape, tuple(range(values.dim()))))
    what = f"parameter {entry.name!r}: the gradient"
    if gradient.sparse_dim() != 1:
        raise UnitsError(
            f"{what} of shape {entry.shape} is sparse in its first {gradient.sparse_dim()} axes, which "
            "no units allow; make it sparse in the first axis alone, or dense"
        )
    if 0 not in axes.keep or axes.view != axes.shape:
        raise rows_are_not_units(what, entry.shape, entry.units)
    rows = weight.index_select(0, gradient.indices()[0])
    axes = _axes(values.shape, axes.reduce)
    return View(rows, axes), View(values, axes)


def _axes(shape: Sequence[int], reduce: tuple[int, ...]) -> UnitAxes:
    view = tuple(shape)
    keep = tuple(axis for axis in range(len(view)) if axis not in reduce)
    return UnitAxes(view, view, reduce, keep, math.prod(view[axis] for axis in keep))


def _inner_axes(axes: UnitAxes) -> list[list[int]]:
    """Axes of the view that each stored axis was split into."""
    inner: list[list[int]] = []
    axis = 0
    for size in axes.shape:
        inner.append([])
        product = 0
        while axis < len(axes.view) and product != size:
            product = max(product, 1) * axes.view[axis]
            inner[-1].append(axis)
            axis += 1
    if inner:
        inner[-1].extend(range(axis, len(axes.view)))  # axes of size 1 that are left over
    return inner


def _opened(entry: PlanEntry, tensor: Tensor, *, written: bool = False) -> Tensor:
    """Return the plain tensor that a wrapper subclass stands for, such as a quantised weight.

    Raises
    ------
    ParameterError
        If there is none; a gradient must share its memory with it.
    """
    if not hasattr(tensor, "__tensor_flatten__") or is_dtensor(tensor):
        return tensor
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if len(inner) == 1 and (inner[0].shape, inner[0].dtype) == (tensor.shape, tensor.dtype):
        return _opened(entry, inner[0], written=written)
    failure: Exception | None = None
    if not written:
        try:
            plain = tensor.dequantize()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            plain, failure = None, error
        if isinstance(plain, Tensor) and plain.shape == tensor.shape:
            return plain
    raise ParameterError(
        f"parameter {entry.name!r}: the {'gradient' if written else 'weight'} of shape "
        f"{tuple(tensor.shape)} is a {type(tensor).__name__}, which is no plain tensor"
        f"{'' if written else ' and cannot be read by dequantize()'}; leave it out with AGC(exclude="
        f"[{entry.name!r}])"
    ) from failure
