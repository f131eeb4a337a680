"""Groups of processes, for sharding and replicas."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

__all__ = ["enter", "leave", "together"]


def together(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``work(rank, count, *arguments)`` in so many processes, and wait for them.

    Where the system can, they are forked from a process that has imported this package once.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.set_forkserver_preload([work.__module__])
    torch.multiprocessing.start_processes(
        work, (count, *arguments), nprocs=count, start_method=method
    )


def enter(rank: int, count: int, folder: str, device: str) -> None:
    """Join a group of processes that meet in a folder."""
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
    )
    if device == "cuda":
        torch.cuda.set_device(rank)


def leave() -> NoReturn:
    """Wait for the whole group, then exit and skip the interpreter's shutdown.

    On a busy machine one of the group's threads may ask for the interpreter's lock during shutdown,
    which aborts the process.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
