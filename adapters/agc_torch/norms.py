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

__all__ = ["Groups", "all_norms", "all_shares", "grouped", "kind", "on_host", "wide"]

_BLOCK: Final = 64
"""Elements whose squares are added in float32.

Twice as many would let the norm of a row of equal values be 2 ULP off, instead of 1.
"""
_FEW: Final = 4
"""A row whose energy sits in at most this many blocks is summed again in float64."""
_LONG: Final = 512
"""Elements of a row from which rounding in its blocks averages out."""
_SMALL: Final = 4096
"""Tensors up to this size are cheap to copy."""
_CACHE_BLOCK: Final = 1 << 17
"""Elements that fill a megabyte in float64."""
_TINY: Final = 1e-12
"""Norm below which squares leave float32."""


def on_host(device: torch.device) -> bool:
    """Tell whether reading a value is free: on the CPU, outside compiled code."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of norms, limits and scales: the widest that a device has."""
    return torch.float64 if _has_float64(device) else torch.float32


def _has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none, nor have many of Intel's."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return bool(device.type != "mps")


def all_norms(
    views: list[View],
    sources: list[Tensor],
    lower: float,
    groups: Groups | None = None,
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
    groups : Groups, optional
        What :func:`grouped` says of views like these.

    Returns
    -------
    Tensor of float64, shape (units,)
        Unit after unit, view after view.
    """
    device, mesh = views[0].home
    if mesh is not None:
        return sum_over(mesh, all_shares(views, sources, groups), range(mesh.ndim)).sqrt()
    if not on_host(device):
        return torch.cat(_device_norms(views, sources)).to(wide(device))
    groups = grouped(views) if groups is None else groups
    if groups.stretches:
        flat = _in_stretches(views, sources, groups)
    else:
        flat = torch.cat(_host_norms(views, sources, groups))
    if groups.safe or not flat.numel():
        return flat
    return _redo_out_of_range(flat, views, sources, lower)


def all_shares(views: list[View], sources: list[Tensor], groups: Groups | None = None) -> Tensor:
    """Return what is here of the squared norms of all units, of tensors on one mesh.

    Parameters and shapes are as for :func:`all_norms`.
    """
    device = views[0].home[0]
    if on_host(device):
        norms = _host_norms(views, sources, grouped(views) if groups is None else groups)
    else:
        norms = _device_norms(views, sources)
    # Wide before they are squared, which would leave float32.
    squares = torch.cat(norms).to(wide(device)).square().split([len(own) for own in norms])
    return torch.cat([view.gather(own) for view, own in zip(views, squares, strict=True)])


def _device_norms(views: list[View], sources: list[Tensor]) -> list[Tensor]:
    """Norms of what is here of each view's units, on an accelerator or in compiled code."""
    whole = _whole_norms(views, sources)
    return [
        whole[index] if index in whole else _unit_norms(view, sources[index])
        for index, view in enumerate(views)
    ]


def _host_norms(views: list[View], sources: list[Tensor], groups: Groups) -> list[Tensor]:
    """Norms of what is here of each view's units, on a CPU."""
    norms_by_view: dict[int, Tensor] = {}
    for group in groups.members:
        split = _group_norms(views, sources, group).split(group.units)
        norms_by_view.update(zip(group.indices, split, strict=True))
    return [norms_by_view[index] for index in range(len(views))]


def _in_stretches(views: list[View], sources: list[Tensor], groups: Groups) -> Tensor:
    """Norms of all units, without a tensor for each view."""
    norms = [_group_norms(views, sources, group) for group in groups.members]
    if len(norms) == 1:
        return norms[0]
    return torch.cat([own.view(groups.stretches, -1) for own in norms], 1).view(-1)


class _Rows(NamedTuple):
    """How a tensor lies in memory if its units are rows: the rows' sizes and strides, row last.

    It is in order if its memory is its rows, one after the other.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    in_order: bool

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


class _Group(NamedTuple):
    """Tensors on the host whose norms are taken together.

    Attributes
    ----------
    kind : (int, int)
        What they share; see :func:`kind`.
    indices : list of int
        Their places in the list of views.
    units : list of int
        How many each of them has.
    rows : list of _Rows
        Empty if units are not rows, or short ones of large tensors.
    in_order, alike : bool
        Whether all stand in memory row after row; differ in the size of their first axis alone.
    """

    kind: tuple[int, int]
    indices: list[int]
    units: list[int]
    rows: list[_Rows]
    in_order: bool
    alike: bool


class Groups(NamedTuple):
    """Tensors on the host by what stays from step to step.

    Attributes
    ----------
    members : list of _Group
    stretches : int
        1 if views follow each other group after group, 2 if the first half of them does and the
        second does likewise, such as weights and then gradients; 0 otherwise.
    safe : bool
        Whether float64 holds the square of any element, and all are squared there.
    """

    members: list[_Group]
    stretches: int
    safe: bool


_COPIED, _EXACT, _IN_BLOCKS = range(3)


def kind(view: View) -> tuple[int, int]:
    """Return what a tensor on the host shares with those whose norms are taken together.

    That is how they are taken, and the length of rows or the number of their blocks.
    """
    tensor = view.source
    rows = _rows(view.axes, tensor.stride())
    if rows is not None:
        length = rows.shape[-1]
        if 0 < tensor.numel() <= _SMALL:
            return _COPIED, length
        if length >= _LONG and tensor.dtype == torch.float32 and not view.exact:
            return _IN_BLOCKS, _blocks(length)
    return _EXACT, 0


def grouped(views: list[View]) -> Groups:
    """Group tensors on the host by what stays from step to step."""
    indices: dict[tuple[int, int], list[int]] = {}
    for index, view in enumerate(views):
        indices.setdefault(kind(view), []).append(index)
    groups = [_group(own, mine, [views[index] for index in mine]) for own, mine in indices.items()]
    return Groups(
        groups,
        next((count for count in (1, 2) if _follow(groups, count)), 0),
        all(group.kind[0] != _IN_BLOCKS for group in groups)
        and all(view.source.dtype != torch.float64 for view in views),
    )


def _group(own: tuple[int, int], indices: list[int], views: list[View]) -> _Group:
    rows = [] if own[0] == _EXACT else [_rows(v.axes, v.source.stride()) for v in views]
    known = [each for each in rows if each is not None]
    return _Group(
        own,
        indices,
        [math.prod(view.axes.view[axis] for axis in view.axes.keep) for view in views],
        known,
        all(each.in_order for each in known),
        len({view.source.shape[1:] for view in views}) == 1
        and all(view.source.dim() for view in views),
    )


def _follow(groups: list[_Group], stretches: int) -> bool:
    """Tell whether groups cut into equal stretches list the views in order, units alike."""
    order: list[list[int]] = [[] for _ in range(stretches)]
    for group in groups:
        share, rest = divmod(len(group.indices), stretches)
        cut = [slice(n * share, (n + 1) * share) for n in range(stretches)]
        if rest or any(group.units[part] != group.units[cut[0]] for part in cut):
            return False
        for own, part in zip(order, cut, strict=True):
            own += group.indices[part]
    flat = [index for own in order for index in own]
    return flat == list(range(len(flat)))


@lru_cache(maxsize=8192)
def _rows(axes: UnitAxes, strides: tuple[int, ...]) -> _Rows | None:
    """Return how units lie in memory, if they are one stretch of it each."""
    length = 1
    for axis in sorted(axes.reduce, key=lambda axis: strides[axis]):
        if axes.view[axis] != 1 and strides[axis] != length:
            return None
        length *= axes.view[axis]
    shape = (*(axes.view[axis] for axis in axes.keep), length)
    distances = (*(strides[axis] for axis in axes.keep), 1)
    return _Rows(shape, distances, _dense(shape, distances) and _dense(axes.view, strides))


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether elements follow each other in memory, the last axis fastest."""
    distance = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != distance:
            return False
        distance *= size
    return True


def _blocks(length: int) -> int:
    """Return the number of blocks in a row; the last one may be shorter."""
    return -(-length // _BLOCK)


def _unit_norms(view: View, tensor: Tensor) -> Tensor:
    """L2 norm of every unit of a tensor, flat, on an accelerator or in compiled code."""
    axes = view.axes
    if not axes.reduce:  # an empty tuple would mean all axes
        return tensor.abs().flatten()
    return vector_norm(tensor, 2, axes.reduce, dtype=_accumulator(view, tensor)).flatten()


def _group_norms(views: list[View], sources: list[Tensor], group: _Group) -> Tensor:
    """Norms of the units of a group, view after view, in float64."""
    tensors = [sources[index] for index in group.indices]
    how, length = group.kind
    if how == _COPIED:
        return vector_norm(_copied(tensors, group).view(-1, length), 2, -1, dtype=torch.float64)
    if how == _EXACT:
        pairs = zip(group.indices, tensors, strict=True)
        return torch.cat([_exact_norms(tensor, views[index].axes) for index, tensor in pairs])
    return _long_row_norms(tensors, group)


def _long_row_norms(tensors: list[Tensor], group: _Group) -> Tensor:
    """Norms of rows of equally many blocks, in float64."""
    table = tensors[0].new_empty(sum(group.units), group.kind[1])
    for tensor, rows, norms in zip(tensors, group.rows, table.split(group.units), strict=True):
        _block_norms_(norms, tensor, rows)
    squares = table.double().square_()
    whole = squares.sum(-1)
    # Negative if the energy is spread over fewer than _FEW equal blocks (participation ratio).
    spread_U = whole.sub(vector_norm(squares, 2, -1), alpha=math.sqrt(_FEW))
    whole.sqrt_()
    if not float(spread_U.min()) >= 0:  # which holds for NaN
        inexact_U = spread_U < 0
        for tensor, rows, norms, redo in zip(
            tensors,
            group.rows,
            whole.split(group.units),
            inexact_U.split(group.units),
            strict=True,
        ):
            if redo.any():
                norms[redo] = rows.exact(tensor, redo)
    return whole


def _copied(tensors: list[Tensor], group: _Group) -> Tensor:
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
    if rows.in_order and not rest:  # with fewer views
        vector_norm(tensor.view(-1, blocks, _BLOCK), 2, -1, out=norms)
        return
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
