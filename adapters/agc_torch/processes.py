"""Processes that train together: their group, sums over them, and a model spread over them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from agc.errors import ConfigError
from agc.training import Hosts
from agc_torch.nfnet import NFNet

__all__ = ["ENGINES", "join", "mean_", "replicate", "shard"]

ENGINES: Final = ("ddp", "fsdp2")
"""How a model is spread over processes: a copy in each, or a part of each parameter."""

_LAUNCHED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(name: str | None) -> tuple[Hosts, torch.device]:
    """Join the processes that torchrun or the like has started; return them, and the device.

    The group is left when Python ends. One that is there already is used, and left alone.

    Parameters
    ----------
    name : str, optional
        The device. ``"cuda"``, also if None and there is a GPU, is the one of ``LOCAL_RANK``.

    Raises
    ------
    ConfigError
        If there is no such device, or the processes do not find each other.
    """
    made = dist.is_available() and dist.is_initialized()
    if not (made or all(key in os.environ for key in _LAUNCHED)):
        return Hosts(), _device(name)
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}"
    device = _device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not made:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            where = ", ".join(f"{key}={os.environ[key]}" for key in _LAUNCHED)
            raise ConfigError(f"the processes did not find each other ({where}): {error}") from None
        atexit.register(_leave)

    def total(numbers: list[float]) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return [float(number) for number in sums.tolist()]

    return Hosts(dist.get_rank(), dist.get_world_size(), total), device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r}: PyTorch cannot use it: {error}") from None
    return device


def mean_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their means over all processes, in one exchange."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    pairs = zip(parts, tensors, strict=True)
    torch._foreach_copy_(list(tensors), [part.view(tensor.shape) for part, tensor in pairs])


def replicate(model: NFNet) -> Any:
    """Return a model whose backward pass leaves the mean gradient of all processes."""
    for parameter in model.parameters():
        if parameter.is_contiguous():  # strides of a 1 x 1 kernel need not be its gradient's
            parameter.data = parameter.data.flatten().view(parameter.shape)
    replica = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Buckets are laid out anew after the first backward pass, and so is the order in which several
    # processes are added up: done here, it does not depend on where a training was resumed.
    some = next(model.parameters())
    images = some.new_zeros(1, model.options.in_channels, 32, 32)
    replica(images).sum().backward()
    model.zero_grad()
    return replica


def shard(model: NFNet) -> None:
    """Spread parameters over all processes, in place, block by block.

    FSDP2 leaves scalars whole: their gradients have to be averaged by :func:`mean_`.
    """
    # Here, because they take longer to import than PyTorch itself.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # No unsharded copy outlives a pass, so none can be older than its parameter.
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    blocks: Iterable[Any] = (block for stage in model.stages for block in stage)
    for module in (*blocks, model):
        fully_shard(module, ignored_params=scalars, **settings)
