"""Tensors cut over a mesh of processes (``DTensor``): the local shard, sums over all (AGC-8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Held",
    "gathered",
    "held_rows",
    "is_dtensor",
    "local",
    "norm_over",
    "shard_axes",
    "sum_over",
    "summed",
]


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over a mesh of processes."""
    # By name: importing torch.distributed.tensor takes longer than many a test.
    return type(tensor) not in (Tensor, torch.nn.Parameter) and any(
        kind.__name__ == "DTensor" for kind in type(tensor).__mro__
    )


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a ``DTensor``; any other tensor, detached, as it is."""
    detached: Any = tensor.detach()
    return detached.to_local() if is_dtensor(detached) else detached


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a ``DTensor``, from all processes; any other tensor, detached, as it is."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if is_dtensor(detached) else detached


def summed(tensor: Any) -> Any:
    """Return a ``DTensor`` whose partial sums are added up in every process."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import (
        Replicate,
    )  # here, because most programs are not distributed

    return tensor.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in tensor.placements]
    )


def shard_axes(tensor: Any) -> tuple[int, ...]:
    """Return the axes of the mesh that a ``DTensor`` is cut along; on the others it is repeated."""
    return tuple(i for i, placement in enumerate(tensor.placements) if _is_shard(placement))


class Held(NamedTuple):
    """Which part of a ``DTensor`` a process holds: numbers alone, so that two can be compared.

    Attributes
    ----------
    cuts : tuple of (axis, bands, shards, index)
        Cuts of the tensor, one after the other: the axis is in so many bands, each of which is cut
        into shards, and shard ``index`` of each is here.
    first : bool
        Whether this process is the one that counts, of those that hold the same shard.
    """

    cuts: tuple[tuple[int, int, int, int], ...]
    first: bool

    @classmethod
    def of(cls, tensor: Any) -> Held:
        """Return what this process holds of a ``DTensor``."""
        mesh, cuts, first = tensor.device_mesh, [], True
        for placement, shards, mine in zip(
            tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True
        ):
            if _is_shard(placement):
                cuts.append((placement.dim, getattr(placement, "split_factor", 1), shards, mine))
            else:
                first = first and mine == 0
        return cls(tuple(cuts), first)

    def rows(self, axis: int, size: int, device: torch.device) -> Tensor | None:
        """Return the indices along an axis of a given size that are here; None for all of them."""
        rows = None
        for cut, bands, shards, mine in self.cuts:
            if cut == axis:
                rows = torch.arange(size, device=device) if rows is None else rows
                rows = torch.cat(
                    [_shard(_shard(rows, bands, band), shards, mine) for band in range(bands)]
                )
        return rows


def held_rows(tensor: Any, axis: int, device: torch.device) -> Tensor | None:
    """Return the indices along an axis that this process holds; None for all of them."""
    return Held.of(tensor).rows(axis, tensor.shape[axis], device)


def norm_over(mesh: Any, squares: Tensor, axes: Iterable[int]) -> Tensor:
    """Return norms from squares that are added up along axes of a mesh, as :func:`sum_over`."""
    return sum_over(mesh, squares, axes).sqrt()


def sum_over(mesh: Any, shares: Tensor, axes: Iterable[int]) -> Tensor:
    """Return what all processes' shares add up to along axes of a mesh; one collective an axis.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.
    shares : Tensor
        This process's share; it may be overwritten.
    axes : iterable of int
        Axes of the mesh along which the shares differ.
    """
    import torch.distributed as dist  # here, because most programs are not distributed

    total = shares.to(mesh.device_type)
    for axis in axes:
        if mesh.size(axis) > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total.to(shares.device)


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")  # Shard, and the strided one of FSDP2 over tensor parallelism


def _shard(rows: Tensor, shards: int, index: int) -> Tensor:
    """Return shard ``index`` of ``torch.chunk``, empty where that returns fewer."""
    size = -(-len(rows) // shards)
    return rows[index * size : (index + 1) * size]
