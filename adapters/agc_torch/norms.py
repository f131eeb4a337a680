"""Norms of units: accurate, as fast as memory, and all in one flat buffer (AGC-3).

Eager PyTorch on a CPU has no kernel that reads float32 and adds in float64 without a copy, and its
float32 norm adds up a whole row in one chain. So a CPU sums the squares of long float32 rows in blocks
of 32 and adds the blocks in float64: rounding of many blocks averages out. A row that is mostly one
block is taken once more in float64, as is everything else, a piece that fits its cache at a time.
Accelerators reduce in trees and take the norm as it is. Compiled code is fused, and adds in float64
right away.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from agc.units import UnitAxes
from agc_torch.parts import Part, sum_over

__all__ = ["all_norms", "on_host", "wide"]

_BLOCK: Final = 32
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
    rows: list[_Rows] = []
    for index, part in enumerate(parts):
        if index not in found:
            found[index] = _unit_norms(part.source, part.axes, rows)
    _sharpen(rows)
    flat = torch.cat([part.gather(found[index]) for index, part in enumerate(parts)])
    flat = flat.to(wide(device))
    if mesh is not None:
        return sum_over(mesh, flat)
    if on_host(device) and flat.numel():
        _repair(flat, parts, lower)
    return flat


class _Rows(NamedTuple):
    """Norms that were taken in blocks, shape (units,), and what is needed to take them again."""

    norms: Tensor
    peaks: Tensor  # the largest block of each
    tensor: Tensor
    shape: tuple[int, ...]  # of the tensor as rows: (..., length)
    strides: tuple[int, ...]


def _unit_norms(tensor: Tensor, axes: UnitAxes, rows: list[_Rows]) -> Tensor:
    """L2 norm of every unit of a real tensor of the shape ``axes.view``, flat.

    Norms that may not be accurate yet are appended to ``rows``.
    """
    if not on_host(tensor.device):
        if not axes.reduce:  # an empty tuple would mean all axes
            return tensor.abs().flatten()
        return vector_norm(tensor, 2, axes.reduce, dtype=_accumulator(tensor)).flatten()
    length = _row_length(axes, tensor.stride())
    if tensor.dtype == torch.float32 and length >= _LONG:
        rows.append(_block_norms(tensor, axes, length))
        return rows[-1].norms
    return _exact_norms(tensor, axes)


@lru_cache(maxsize=8192)
def _row_length(axes: UnitAxes, strides: tuple[int, ...]) -> int:
    """Return how many elements a unit has if they are one stretch of memory; 0 if they are not."""
    length = 1
    for axis in sorted(axes.reduce, key=lambda axis: strides[axis]):
        if axes.view[axis] != 1 and strides[axis] != length:
            return 0
        length *= axes.view[axis]
    return length


def _block_norms(tensor: Tensor, axes: UnitAxes, length: int) -> _Rows:
    """Norms of float32 units that are one long stretch of memory each."""
    sizes = [axes.view[axis] for axis in axes.keep]
    strides = [tensor.stride(axis) for axis in axes.keep]
    blocks, rest = divmod(length, _BLOCK)
    norms = vector_norm(tensor.as_strided((*sizes, blocks, _BLOCK), (*strides, _BLOCK, 1)), 2, -1)
    if rest:
        start = tensor.storage_offset() + blocks * _BLOCK
        last = vector_norm(tensor.as_strided((*sizes, 1, rest), (*strides, 1, 1), start), 2, -1)
        norms = torch.cat((norms, last), -1)
    whole = vector_norm(norms, 2, -1, dtype=torch.float64)
    return _Rows(whole.flatten(), norms.amax(-1).flatten(), tensor, (*sizes, length), (*strides, 1))


def _sharpen(found: list[_Rows]) -> None:
    """Take once more, in float64, the norms of rows that are mostly one block."""
    if not found:
        return
    doubt = torch.cat([one.peaks for one in found]) > _PEAK * torch.cat(
        [one.norms for one in found]
    )
    if not doubt.any():
        return
    for one, again in zip(found, doubt.split([len(one.norms) for one in found]), strict=True):
        if again.any():
            rows = one.tensor.as_strided(one.shape, one.strides)
            chosen = rows[again.view(one.shape[:-1])]
            pieces = chosen.split(max(1, _PIECE // chosen.shape[-1]))
            one.norms[again] = torch.cat([vector_norm(piece.double(), 2, -1) for piece in pieces])


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
