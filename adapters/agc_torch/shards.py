"""Tensors cut over a mesh of processes (``DTensor``): the local shard, sums over all (AGC-8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "gathered",
    "held_rows",
    "is_dtensor",
    "is_first_replica",
    "local",
    "norm_over",
    "shard_axes",
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


def is_first_replica(tensor: Any) -> bool:
    """Tell whether this process is the one that counts, of those that hold the same shard."""
    return all(
        place == 0 or _is_shard(placement)
        for place, placement in zip(
            tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
        )
    )


def held_rows(tensor: Any, axis: int, device: torch.device) -> Tensor | None:
    """Return the indices along an axis that this process holds; None for all of them."""
    rows = None
    mesh = tensor.device_mesh
    for placement, shards, mine in zip(
        tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True
    ):
        if _is_shard(placement) and placement.dim == axis:
            rows = torch.arange(tensor.shape[axis], device=device) if rows is None else rows
            factor = getattr(placement, "split_factor", 1)
            bands = [_shard(rows, factor, band) for band in range(factor)]
            rows = torch.cat([_shard(band, shards, mine) for band in bands])
    return rows


def norm_over(mesh: Any, squares: Tensor, axes: Iterable[int]) -> Tensor:
    """Return norms from squares that are added up along axes of a mesh; one collective an axis.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.
    squares : Tensor
        This process's share of the squared norms; it may be overwritten.
    axes : iterable of int
        Axes of the mesh along which the shares differ.
    """
    import torch.distributed as dist  # here, because most programs are not distributed

    total = squares.to(mesh.device_type)
    for axis in axes:
        if mesh.size(axis) > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total.to(squares.device).sqrt()


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")  # Shard, and the strided one of FSDP2 over tensor parallelism


def _shard(rows: Tensor, shards: int, index: int) -> Tensor:
    """Return shard ``index`` of ``torch.chunk``, empty where that returns fewer."""
    size = -(-len(rows) // shards)
    return rows[index * size : (index + 1) * size]
