"""Norms of units: accurate, as fast as memory, and all in one flat buffer (AGC-3).

Eager PyTorch on a CPU has no kernel that reads float32 and adds in float64 without a copy, and its
float32 norm adds up a whole row in one chain. So a CPU sums the squares of long float32 rows in
blocks of 64 and adds the blocks in float64: rounding of many blocks averages out. A row that is
mostly a few blocks is summed again in float64, as is everything else, as much as fits the cache at
a time. Accelerators reduce in trees and take the norm as it is. Compiled code is fused, and adds in
float64 right away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from agc.units import UnitAxes
from agc_torch.shards import sum_over
from agc_torch.views import View

__all__ = ["Group", "all_norms", "all_shares", "grouped", "on_host", "wide"]

_BLOCK: Final = 64
"""Elements whose squares are added in float32."""
_FEW: Final = 4
"""A row whose energy sits in at most this many blocks is summed again in float64."""
_LONG: Final = 512
"""Elements of a row from which rounding in its blocks averages out."""
_SMALL: Final = 4096
"""Tensors up to this size are cheap to copy."""
_CACHE_BLOCK: Final = 1 << 16
"""Elements that fill half a megabyte in float64."""
_TINY: Final = 1e-12
"""Norm below which squares leave float32."""


def on_host(device: torch.device) -> bool:
    """Tell whether reading a value is free: on the CPU, outside compiled code."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of norms, limits and scales; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_norms(
    views: list[View],
    sources: list[Tensor],
    lower: float,
    groups: list[Group] | None = None,
) -> Tensor:
    """Norms of all units of tensors that have one home, flat.

    Parameters
    ----------
    views : list of View
        Weights or gradients or both, not empty.
    sources : list of Tensor
        What each of them takes its norms of.
    lower : float
        The least that any norm is going to be compared with; what is less need not be accurate.
    groups : list of Group, optional
        What :func:`grouped` says of views like these.

    Returns
    -------
    Tensor of float64, shape (units,)
        Unit after unit, view after view.
    """
    device, mesh = views[0].home
    if mesh is not None:
        return sum_over(mesh, all_shares(views, sources, groups), range(mesh.ndim)).sqrt()
    host = on_host(device)
    if groups is None:
        groups = grouped(views) if host else []
    if groups and len(groups[0].indices) == len(views):
        # As it stands: the usual case, of large tensors and of many small ones.
        norms = _row_norms(sources, groups[0])
        return norms if groups[0].safe else _redo_out_of_range(norms, views, sources, lower)
    flat = torch.cat(_norms_by_view(views, sources, groups)).to(wide(device))
    return _redo_out_of_range(flat, views, sources, lower) if host and flat.numel() else flat


def all_shares(
    views: list[View], sources: list[Tensor], groups: list[Group] | None = None
) -> Tensor:
    """Return what is here of the squared norms of all units, of tensors on one mesh.

    Parameters and shapes are as for :func:`all_norms`.
    """
    device = views[0].home[0]
    if groups is None:
        groups = grouped(views) if on_host(device) else []
    norms = _norms_by_view(views, sources, groups)
    # Wide before they are squared, which would leave float32.
    squares = torch.cat(norms).to(wide(device)).square().split([len(own) for own in norms])
    return torch.cat([view.gather(own) for view, own in zip(views, squares, strict=True)])


def _norms_by_view(views: list[View], sources: list[Tensor], groups: list[Group]) -> list[Tensor]:
    """Norms of what is here of each view's units."""
    norms_by_view = {} if on_host(views[0].home[0]) else _whole_norms(views, sources)
    for group in groups:
        norms = _row_norms([sources[index] for index in group.indices], group)
        split = norms.split([rows.units for rows in group.rows])
        norms_by_view.update(zip(group.indices, split, strict=True))
    return [
        norms_by_view[index] if index in norms_by_view else _unit_norms(view, sources[index])
        for index, view in enumerate(views)
    ]


class _Rows(NamedTuple):
    """How a tensor lies in memory if its units are rows: the rows' sizes and strides, row last."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    units: int

    def exact(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """Return the norms of the rows in a flat mask, in float64."""
        rows = tensor.as_strided(self.shape, self.strides)
        length = self.shape[-1]
        masked = (rows if mask.all() else rows[mask.view(self.shape[:-1])]).reshape(-1, length)
        norms = [
            torch.stack(
                [vector_norm(block.double(), 2, -1) for block in chunk.split(_CACHE_BLOCK, -1)], -1
            )
            for chunk in masked.split(max(1, _CACHE_BLOCK // length))
        ]
        return vector_norm(torch.cat(norms), 2, -1)


class Group(NamedTuple):
    """Tensors on the host whose norms are taken together.

    Attributes
    ----------
    indices : list of int
        Their places in the list of views.
    rows : list of _Rows
    small : bool
        Whether they are copied.
    in_order : bool
        Whether all of them are small, and stand in memory row after row.
    alike : bool
        Whether they differ in the size of their first axis alone.
    safe : bool
        Whether float64 holds the square of any of their elements.
    """

    indices: list[int]
    rows: list[_Rows]
    small: bool
    in_order: bool
    alike: bool
    safe: bool


def grouped(views: list[View]) -> list[Group]:
    """Group tensors on the host by size and length of rows: by what stays from step to step."""
    groups: dict[tuple[bool, int], dict[int, _Rows]] = {}
    for index, view in enumerate(views):
        tensor = view.source
        layout = _layout(view.axes, tensor.stride())
        if layout is not None:
            length = layout[0][-1]
            if 0 < tensor.numel() <= _SMALL:
                groups.setdefault((True, length), {})[index] = _Rows(*layout)
            elif length >= _LONG and tensor.dtype == torch.float32 and not view.exact:
                groups.setdefault((False, _blocks(length)), {})[index] = _Rows(*layout)
    return [
        Group(
            list(group),
            list(group.values()),
            small,
            small and all(_in_order(views[index].source, rows) for index, rows in group.items()),
            len({views[index].source.shape[1:] for index in group}) == 1
            and all(views[index].source.dim() for index in group),
            small and all(views[index].source.dtype != torch.float64 for index in group),
        )
        for (small, _), group in groups.items()
    ]


def _in_order(tensor: Tensor, rows: _Rows) -> bool:
    """Tell whether a tensor's memory is its rows, one after the other."""
    distance = 1
    for size, stride in zip(reversed(rows.shape), reversed(rows.strides), strict=True):
        if size != 1 and stride != distance:
            return False
        distance *= size
    return bool(tensor.is_contiguous())


@lru_cache(maxsize=8192)
def _layout(
    axes: UnitAxes, strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Return shape, strides and number of rows, if units are one stretch of memory each."""
    length = 1
    for axis in sorted(axes.reduce, key=lambda axis: strides[axis]):
        if axes.view[axis] != 1 and strides[axis] != length:
            return None
        length *= axes.view[axis]
    sizes = tuple(axes.view[axis] for axis in axes.keep)
    return (*sizes, length), (*(strides[axis] for axis in axes.keep), 1), math.prod(sizes)


def _blocks(length: int) -> int:
    """Return the number of blocks in a row; the last one may be shorter."""
    return -(-length // _BLOCK)


def _unit_norms(view: View, tensor: Tensor) -> Tensor:
    """L2 norm of every unit of a tensor, flat."""
    axes = view.axes
    if on_host(tensor.device):
        return _exact_norms(tensor, axes)
    if not axes.reduce:  # an empty tuple would mean all axes
        return tensor.abs().flatten()
    return vector_norm(tensor, 2, axes.reduce, dtype=_accumulator(view, tensor)).flatten()


def _row_norms(tensors: list[Tensor], group: Group) -> Tensor:
    """Norms of rows of one length, or of equally many blocks, in float64."""
    length = group.rows[0].shape[-1]
    if group.small:
        return vector_norm(_copied(tensors, group).view(-1, length), 2, -1, dtype=torch.float64)
    counts = [rows.units for rows in group.rows]
    table = tensors[0].new_empty(sum(counts), _blocks(length))
    for tensor, rows, norms in zip(tensors, group.rows, table.split(counts), strict=True):
        _block_norms_(norms, tensor, rows)
    squares = table.double().square_()
    whole = squares.sum(-1)
    # True if the energy is spread over fewer than _FEW equal blocks (participation ratio).
    inexact_U = vector_norm(squares, 2, -1) > whole / math.sqrt(_FEW)
    whole.sqrt_()
    if inexact_U.any():
        for tensor, rows, norms, redo in zip(
            tensors, group.rows, whole.split(counts), inexact_U.split(counts), strict=True
        ):
            if redo.any():
                norms[redo] = rows.exact(tensor, redo)
    return whole


def _copied(tensors: list[Tensor], group: Group) -> Tensor:
    """Return the elements of small tensors, row after row."""
    if group.in_order and group.alike:  # which is one call without a view of each
        return torch.cat(tensors)
    if group.in_order:
        flat: Tensor = torch._utils._flatten_dense_tensors(tensors)
        return flat
    rows = zip(tensors, group.rows, strict=True)
    return torch.cat([t.as_strided(r.shape, r.strides).reshape(-1) for t, r in rows])


def _block_norms_(norms: Tensor, tensor: Tensor, rows: _Rows) -> None:
    """Write the norms of all blocks, a row of them for a row."""
    (*sizes, length), (*strides, _) = rows.shape, rows.strides
    blocks, rest = divmod(length, _BLOCK)
    norms = norms.view(*sizes, _blocks(length))
    whole = tensor.as_strided((*sizes, blocks, _BLOCK), (*strides, _BLOCK, 1))
    if not rest:
        vector_norm(whole, 2, -1, out=norms)
        return
    vector_norm(whole, 2, -1, out=norms[..., :blocks])
    start = tensor.storage_offset() + blocks * _BLOCK
    last = tensor.as_strided((*sizes, 1, rest), (*strides, 1, 1), start)
    vector_norm(last, 2, -1, out=norms[..., blocks:])


def _exact_norms(tensor: Tensor, axes: UnitAxes) -> Tensor:
    """Norms of units of any dtype and layout, in float64."""
    blocks: Sequence[Tensor] = [tensor]
    outer = 0
    if tensor.numel() > _CACHE_BLOCK:
        distances = [
            stride * (size > 1) for size, stride in zip(axes.view, tensor.stride(), strict=True)
        ]
        outer = distances.index(max(distances))  # a block is contiguous in memory
        blocks = tensor.split(max(1, _CACHE_BLOCK * axes.view[outer] // tensor.numel()), outer)
    # Fused convert-and-sum; sequential, and fast only if the innermost axis is reduced.
    fused = tensor.dtype != torch.float64 and bool(axes.reduce)
    fused = fused and min(range(tensor.dim()), key=tensor.stride) in axes.reduce
    norms = []
    for block in blocks:
        if fused:
            norms.append(vector_norm(block, 2, axes.reduce, keepdim=True, dtype=torch.float64))
        else:
            squares = block.double().square()
            norms.append(
                squares.sum(axes.reduce, keepdim=True).sqrt() if axes.reduce else squares.sqrt()
            )
    if len(norms) == 1:
        return norms[0].flatten()
    return (
        torch.cat(norms, outer) if outer in axes.keep else vector_norm(torch.stack(norms), 2, 0)
    ).flatten()


def _whole_norms(views: list[View], sources: list[Tensor]) -> dict[int, Tensor]:
    """Norms of tensors that are one unit, such as biases, by index: one call for a dtype."""
    alike: dict[torch.dtype, list[int]] = {}
    if torch.compiler.is_compiling():
        return {}
    for index, view in enumerate(views):
        if not view.axes.keep:
            alike.setdefault(sources[index].dtype, []).append(index)
    norms_by_view: dict[int, Tensor] = {}
    for batch in alike.values():
        tensors = [sources[index] for index in batch]
        # Adds up in float64 without a copy, if all tensors have one dtype.
        norms = torch._foreach_norm(tensors, 2, wide(tensors[0].device))
        norms_by_view.update(zip(batch, (norm.view(1) for norm in norms), strict=True))
    return norms_by_view


def _accumulator(view: View, tensor: Tensor) -> torch.dtype:
    """Return the dtype to add squares in, where that is not done in blocks."""
    # An accelerator would make a float64 copy of the whole tensor first; compiled code does not.
    if view.exact or tensor.dtype == torch.float64 or tensor.device.type == "cpu":
        return torch.float64
    return wide(tensor.device) if torch.compiler.is_compiling() else torch.float32


def _redo_out_of_range(
    flat: Tensor, views: list[View], sources: list[Tensor], lower: float
) -> Tensor:
    """Take once more, in float64, norms whose squares float32 could not hold."""
    least, most = (float(bound) for bound in flat.aminmax())
    if most < math.inf and (lower >= _TINY or least >= _TINY):
        return flat
    inexact_U = ~((flat < torch.inf) & (flat.clamp(min=lower) >= _TINY))
    sizes = [view.count for view in views]
    columns = zip(views, sources, flat.split(sizes), inexact_U.split(sizes), strict=True)
    for view, source, norms, redo in columns:
        if redo.any():
            norms.copy_(_exact_norms(source, view.axes))
    return flat
