"""Norms of units: accurate, as fast as memory, and all in one flat buffer (AGC-3).

Eager PyTorch on a CPU has no kernel that reads float32 and adds in float64 without a copy, and its
float32 norm adds up a whole row in one chain. So a CPU sums the squares of long float32 rows in blocks
of 64 and adds the blocks in float64: rounding of many blocks averages out. A row that is mostly one
block is taken once more in float64, as is everything else, a piece that fits its cache at a time.
Accelerators reduce in trees and take the norm as it is. Compiled code is fused, and adds in float64
right away.
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
from agc_torch.parts import Part, sum_over

__all__ = ["all_norms", "on_host", "wide"]

_BLOCK: Final = 64
_PEAK: Final = 0.7  # share of a row's norm from which one block decides how accurate it is
_LONG: Final = 512  # elements of a row from which rounding in its blocks averages out
_SMALL: Final = 4096  # elements of a tensor up to which a copy of it is nothing
_PIECE: Final = 1 << 16  # elements, which in float64 fill half a megabyte
_TINY: Final = 1e-12  # norm below which squares leave float32


def on_host(device: torch.device) -> bool:
    """Tell whether looking at a value is free: on the CPU, outside compiled code."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype of norms, limits and scales; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def all_norms(parts: list[Part], lower: float) -> Tensor:
    """Norms of all units of tensors that are in one place, flat.

    Parameters
    ----------
    parts : list of Part
        Weights or gradients, not empty.
    lower : float
        The least that any norm is going to be compared with; what is less need not be accurate.

    Returns
    -------
    Tensor of float64, shape (units,)
        Unit after unit, part after part.
    """
    device, mesh = parts[0].place
    found = _whole_norms(parts)
    long: dict[int, _Rows] = {}
    for index, part in enumerate(parts):
        if index not in found:
            rows = _rows(part.source, part.axes)
            if rows is None:
                found[index] = _unit_norms(part.source, part.axes)
            else:
                long[index] = rows
    found.update(_block_norms(long))
    flat = torch.cat([part.gather(found[index]) for index, part in enumerate(parts)])
    flat = flat.to(wide(device))
    if mesh is not None:
        return sum_over(mesh, flat)
    if on_host(device) and flat.numel():
        _repair(flat, parts, lower)
    return flat


class _Rows(NamedTuple):
    """A tensor whose units are one stretch of memory each: rows, with any number of axes before."""

    tensor: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks in a row; the last one may be shorter."""
        return -(-self.shape[-1] // _BLOCK)

    def exact(self, mask: Tensor) -> Tensor:
        """Return the norms of the rows that a flat mask chooses, in float64."""
        rows = self.tensor.as_strided(self.shape, self.strides)
        length = self.shape[-1]
        chosen = (rows if mask.all() else rows[mask.view(self.shape[:-1])]).reshape(-1, length)
        norms = [
            torch.stack([vector_norm(p.double(), 2, -1) for p in some.split(_PIECE, -1)], -1)
            for some in chosen.split(max(1, _PIECE // length))
        ]
        return vector_norm(torch.cat(norms), 2, -1)


def _rows(tensor: Tensor, axes: UnitAxes) -> _Rows | None:
    """Return long float32 units on the host as rows; None if they are not that."""
    if tensor.dtype != torch.float32 or not on_host(tensor.device):
        return None
    found = _layout(axes, tensor.stride())
    return found and _Rows(tensor, *found)


@lru_cache(maxsize=8192)
def _layout(
    axes: UnitAxes, strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return shape and strides of the rows, if units are one long stretch of memory each."""
    length = 1
    for axis in sorted(axes.reduce, key=lambda axis: strides[axis]):
        if axes.view[axis] != 1 and strides[axis] != length:
            return None
        length *= axes.view[axis]
    if length < _LONG:
        return None
    sizes = (axes.view[axis] for axis in axes.keep)
    return (*sizes, length), (*(strides[axis] for axis in axes.keep), 1)


def _unit_norms(tensor: Tensor, axes: UnitAxes) -> Tensor:
    """L2 norm of every unit of a real tensor of the shape ``axes.view``, flat."""
    if on_host(tensor.device):
        return _exact_norms(tensor, axes)
    if not axes.reduce:  # an empty tuple would mean all axes
        return tensor.abs().flatten()
    return vector_norm(tensor, 2, axes.reduce, dtype=_accumulator(tensor)).flatten()


def _block_norms(long: dict[int, _Rows]) -> dict[int, Tensor]:
    """Norms of rows, in float64, by place in the list: rows of as many blocks all at once."""
    groups: dict[int, list[tuple[int, _Rows]]] = {}
    for index, rows in long.items():
        groups.setdefault(rows.blocks, []).append((index, rows))
    found: dict[int, Tensor] = {}
    for blocks, group in groups.items():
        counts = [math.prod(rows.shape[:-1]) for _, rows in group]
        table = group[0][1].tensor.new_empty(sum(counts), blocks)
        for (_, rows), norms in zip(group, table.split(counts), strict=True):
            _fill(norms.view(*rows.shape[:-1], blocks), rows)
        whole = vector_norm(table, 2, -1, dtype=torch.float64)
        doubt = table.amax(-1) > _PEAK * whole
        found.update(zip((index for index, _ in group), whole.split(counts), strict=True))
        if doubt.any():
            for (index, rows), again in zip(group, doubt.split(counts), strict=True):
                if again.any():
                    found[index][again] = rows.exact(again)
    return found


def _fill(norms: Tensor, rows: _Rows) -> None:
    """Write the norms of all blocks, shaped like the rows with blocks in place of elements."""
    (*sizes, length), (*strides, _) = rows.shape, rows.strides
    blocks, rest = divmod(length, _BLOCK)
    whole = rows.tensor.as_strided((*sizes, blocks, _BLOCK), (*strides, _BLOCK, 1))
    vector_norm(whole, 2, -1, out=norms[..., :blocks])
    if rest:
        start = rows.tensor.storage_offset() + blocks * _BLOCK
        last = rows.tensor.as_strided((*sizes, 1, rest), (*strides, 1, 1), start)
        vector_norm(last, 2, -1, out=norms[..., blocks:])


def _exact_norms(tensor: Tensor, axes: UnitAxes) -> Tensor:
    """Norms of units of any dtype and layout, in float64."""
    pieces: Sequence[Tensor] = [tensor]
    outer = 0
    if tensor.numel() > _PIECE:
        distances = [
            stride * (size > 1) for size, stride in zip(axes.view, tensor.stride(), strict=True)
        ]
        outer = distances.index(max(distances))  # pieces lie together in memory
        pieces = tensor.split(max(1, _PIECE * axes.view[outer] // tensor.numel()), outer)
    sums = []
    for piece in pieces:
        squares = piece.double().square()
        sums.append(squares.sum(axes.reduce, keepdim=True) if axes.reduce else squares)
    if len(sums) == 1:
        return sums[0].flatten().sqrt()
    total = torch.cat(sums, outer) if outer in axes.keep else torch.stack(sums).sum(0)
    return total.flatten().sqrt()


def _whole_norms(parts: list[Part]) -> dict[int, Tensor]:
    """Norms of tensors that are one unit, such as biases, by place in the list: one call for all."""
    batches: dict[torch.dtype, list[int]] = {}
    if torch.compiler.is_compiling():
        return {}
    for index, part in enumerate(parts):
        if not part.axes.keep and not (
            part.source.numel() > _SMALL and on_host(part.source.device)
        ):
            batches.setdefault(_accumulator(part.source), []).append(index)
    found: dict[int, Tensor] = {}
    for dtype, batch in batches.items():
        norms = torch._foreach_norm([parts[index].source for index in batch], 2, dtype)
        found.update(zip(batch, (norm.view(1) for norm in norms), strict=True))
    return found


def _accumulator(tensor: Tensor) -> torch.dtype:
    """Return the dtype to add squares in, where that is not done in blocks."""
    # An accelerator would make a float64 copy of the whole tensor first; compiled code does not.
    if tensor.dtype == torch.float64 or tensor.device.type == "cpu":
        return torch.float64
    return wide(tensor.device) if torch.compiler.is_compiling() else torch.float32


def _repair(flat: Tensor, parts: list[Part], lower: float) -> None:
    """Take once more, in float64, norms whose squares float32 could not hold."""
    if flat.max() < torch.inf and (lower >= _TINY or flat.min() >= _TINY):
        return
    doubt = ~((flat < torch.inf) & (flat.clamp(min=lower) >= _TINY))
    sizes = [part.count for part in parts]
    for part, norms, again in zip(parts, flat.split(sizes), doubt.split(sizes), strict=True):
        if again.any():
            norms.copy_(_exact_norms(part.source, part.axes))
