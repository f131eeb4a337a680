"""Weights and gradients as the numerics see them: real, dense, and in this process.

A complex tensor is seen as pairs of real numbers, a row-sparse gradient as the rows that it has, a
``DTensor`` as this process's piece of it. :mod:`agc_torch.clip` knows nothing of these differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from agc.errors import DTypeError, ParameterError, ShapeError, UnitsError
from agc.plan import PlanEntry
from agc.units import UnitAxes

__all__ = ["Part", "Piece", "Place", "check", "is_dtensor", "parts", "sum_over"]

Place: TypeAlias = tuple[torch.device, Any]
_REAL: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parts(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[Part, Part]:
    """Return the weight and the gradient of one parameter as parts with the same units.

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
    made = _parts(entry, weight, gradient)
    if weight.dtype != gradient.dtype:
        kinds = [part.tensor.dtype for part in made]
        for part in made:
            part.exact = torch.float64 in kinds
    return made


def _parts(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[Part, Part]:
    axes = entry.axes
    if gradient.layout == torch.sparse_coo:
        return _sparse_parts(entry, weight, gradient)
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
        return Piece(weight, axes), Piece(gradient, axes)
    return Part(weight, axes), Part(gradient, axes)


def check(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> None:
    """Raise ShapeError or DTypeError unless a gradient belongs to its parameter and its plan."""
    if weight.shape != entry.shape or gradient.shape != entry.shape:
        raise ShapeError(
            f"parameter {entry.name!r} has shape {tuple(weight.shape)}, its gradient "
            f"{tuple(gradient.shape)}, and the plan says {entry.shape}"
        )
    for what, dtype in (("gradient", gradient.dtype), ("weight", weight.dtype)):
        if dtype in _REAL or dtype.is_complex:
            continue
        if entry.clipped or not dtype.is_floating_point:
            raise DTypeError(
                f"parameter {entry.name!r}: the {what} has dtype {dtype}; "
                "AGC supports float16, bfloat16, float32, float64 and complex"
            )


class Part:
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
    place : (device, mesh)
        Where the numbers are; the mesh is None unless they are spread over one.
    """

    exact = False

    def __init__(self, tensor: Tensor, axes: UnitAxes) -> None:
        if axes.view != axes.shape:
            tensor = tensor.view(axes.view)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
            axes = _axes(tensor.shape, (*axes.reduce, tensor.dim() - 1))
        self.tensor = self.source = tensor
        self.axes = axes
        self.count = axes.count or math.prod(axes.unit_shape)  # an empty tensor may be one unit
        self.place: Place = (tensor.device, None)

    def gather(self, norms: Tensor) -> Tensor:
        """Return what :func:`sum_over` adds up, from the norms of ``source``; flat, one a unit."""
        return norms

    def spread(self, values: Tensor) -> Tensor:
        """Return the units' values in a shape that broadcasts against ``tensor``."""
        return values.view(self.axes.unit_shape)


class Piece(Part):
    """The piece of a ``DTensor`` that this process holds, under any placements (AGC-8).

    Squared norms of pieces add up to those of the whole. Axes that a pattern splits are reduced only
    after the pieces are put in place: where one process ends, a group need not.
    """

    def __init__(self, tensor: Any, axes: UnitAxes) -> None:
        inner = _inner_axes(axes)
        late = [axis for axis, names in enumerate(inner) if not set(names) <= set(axes.reduce)]
        early = tuple(axis for axis in range(len(inner)) if axis not in late)
        local = tensor.to_local()
        super().__init__(local, _axes(local.shape, early))
        if any(placement.is_partial() for placement in tensor.placements):
            whole = tensor.redistribute(placements=[_reduced(p) for p in tensor.placements])
            self.source = Part(whole.to_local(), _axes(local.shape, early)).tensor
        self.place = (local.device, tensor.device_mesh)
        self._rows = [_rows(tensor, axis, local.device) for axis in late]
        self._local = [local.shape[axis] for axis in late]
        self._shape = [tensor.shape[axis] for axis in late]
        view = [name for axis in late for name in inner[axis]]
        self._view = [axes.view[name] for name in view]
        self._unit_shape = [axes.unit_shape[name] for name in view]
        self.count = axes.count
        # Replicas hold the same numbers: the first one speaks for all.
        self._speaks = all(
            place == 0 or _is_shard(placement)
            for place, placement in zip(
                tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
            )
        )

    def gather(self, norms: Tensor) -> Tensor:
        """Return this process's share of every unit's squared norm."""
        squares = norms.view(self._local).square()
        if not self._speaks:
            squares = torch.zeros_like(squares)
        for axis, rows in enumerate(self._rows):
            if rows is not None:
                shape = [*squares.shape[:axis], self._shape[axis], *squares.shape[axis + 1 :]]
                squares = squares.new_zeros(shape).index_copy_(axis, rows, squares)
        return squares.view(self._view).sum_to_size(self._unit_shape).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Return the values of the units that have something here."""
        values = values.view(self._unit_shape).expand(self._view).reshape(self._shape)
        for axis, rows in enumerate(self._rows):
            if rows is not None:
                values = values.index_select(axis, rows)
        return values.reshape(self.axes.unit_shape)


def sum_over(mesh: Any, gathered: Tensor) -> Tensor:
    """Return norms from what the pieces of all processes of a mesh gathered; one collective an axis."""
    import torch.distributed as dist  # here, because most programs are not distributed

    total = gathered.to(mesh.device_type)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total.to(gathered.device).sqrt()


def _sparse_parts(entry: PlanEntry, weight: Tensor, gradient: Tensor) -> tuple[Part, Part]:
    """Rows that a sparse gradient has, and the same rows of the weight; no other row is read."""
    values, axes = gradient.values(), entry.axes
    if entry.units.whole:
        return Part(weight, axes), Part(values, _axes(values.shape, tuple(range(values.dim()))))
    if gradient.sparse_dim() != 1 or 0 not in axes.keep or axes.view != axes.shape:
        raise UnitsError(
            f"parameter {entry.name!r}: the gradient of shape {entry.shape} is sparse in its first "
            f"{gradient.sparse_dim()} axes, but the rows are not units of '{entry.units}'; declare row "
            "units such as 'v d -> v', or make the gradient dense"
        )
    rows = weight.index_select(0, gradient.indices()[0])
    axes = _axes(values.shape, axes.reduce)
    return Part(rows, axes), Part(values, axes)


def _axes(shape: Sequence[int], reduce: tuple[int, ...]) -> UnitAxes:
    view = tuple(shape)
    keep = tuple(axis for axis in range(len(view)) if axis not in reduce)
    return UnitAxes(view, view, reduce, keep, math.prod(view[axis] for axis in keep))


def _inner_axes(axes: UnitAxes) -> list[list[int]]:
    """Axes of the view that each stored axis was split into."""
    found: list[list[int]] = []
    place = 0
    for size in axes.shape:
        found.append([])
        product = 0
        while place < len(axes.view) and product != size:
            product = max(product, 1) * axes.view[place]
            found[-1].append(place)
            place += 1
    if found:
        found[-1].extend(range(place, len(axes.view)))  # axes of size 1 that are left over
    return found


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over a mesh of processes."""
    # By name: importing torch.distributed.tensor takes longer than many a test.
    return type(tensor) not in (Tensor, torch.nn.Parameter) and any(
        kind.__name__ == "DTensor" for kind in type(tensor).__mro__
    )


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


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")  # Shard, and the strided one of FSDP2 over tensor parallelism


def _reduced(placement: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate() if placement.is_partial() else placement


def _rows(tensor: Any, axis: int, device: torch.device) -> Tensor | None:
    """Places along an axis of the whole that this process holds; None for all of them."""
    rows = None
    mesh = tensor.device_mesh
    for placement, parts, mine in zip(
        tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True
    ):
        if _is_shard(placement) and placement.dim == axis:
            rows = torch.arange(tensor.shape[axis], device=device) if rows is None else rows
            factor = getattr(placement, "split_factor", 1)
            bands = [_chunk(rows, factor, band) for band in range(factor)]
            rows = torch.cat([_chunk(band, parts, mine) for band in bands])
    return rows


def _chunk(rows: Tensor, parts: int, index: int) -> Tensor:
    """Part ``index`` of ``torch.chunk``, empty where that returns fewer."""
    size = -(-len(rows) // parts)
    return rows[index * size : (index + 1) * size]
