"""Replicas of a model under DistributedDataParallel, whichever object the user has in hand (SAM-9)."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from agc.errors import ConfigError

__all__ = ["refuse_static_graph", "replicas_of", "unsynchronized", "worst"]


def replicas_of(model: nn.Module, parameters: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return the wrappers that reduce the gradients of these parameters across processes.

    Parameters
    ----------
    model : Module
        The wrapper itself; or the bare model, or a part of it, or what contains it.
    parameters : iterable of Tensor
        Parameters of the model.

    Returns
    -------
    tuple
        Objects with ``no_sync``. Empty in a single process, and where nothing reduces by itself.

    Notes
    -----
    A wrapper leaves no trace on the module that it wraps, so it is looked for among all living objects. That
    takes about 0.1 s, for a bare model in several processes only.
    """
    if callable(getattr(model, "no_sync", None)):
        return (model,)
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ()
    wanted = set(map(id, parameters))
    # The type, because isinstance would wake objects that pretend to be of another class.
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return tuple(one for one in wrappers if wanted.intersection(map(id, one.parameters())))


def refuse_static_graph(replicas: Iterable[Any]) -> None:
    """Raise ConfigError if a wrapper cannot leave a gradient unreduced."""
    if any(getattr(one, "static_graph", False) for one in replicas):
        raise ConfigError(
            "scope='local' leaves the ascent gradient unreduced, which DistributedDataParallel("
            "static_graph=True) cannot; use static_graph=False, or SAM(scope='global')"
        )


@contextmanager
def unsynchronized(replicas: Sequence[Any]) -> Iterator[None]:
    """Keep gradients of the passes inside the block from being reduced."""
    with ExitStack() as stack:
        for one in replicas:
            stack.enter_context(one.no_sync())
        yield


def worst(code: Tensor, replicas: Sequence[Any]) -> Tensor:
    """Return the largest of all replicas' numbers; every replica has to call this."""
    groups = [getattr(one, "process_group", None) for one in replicas]
    # By name, so that all processes go through several groups in the same order.
    named = {group.group_name: group for group in groups if group is not None}
    code = code.clone()
    for name in sorted(named):
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX, named[name])
    return code
