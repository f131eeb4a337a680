"""Two passes of one model under the same conditions, at two points of weight space.

What a forward pass changes (buffers, random numbers) must not differ between the passes of SAM, and
what it keeps of the weights (copies in low precision, unsharded copies) must not outlive a change
of them. Replicas under DistributedDataParallel may have to leave the gradients of one pass
unreduced (SAM-9).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from agc.errors import ConfigError, ShapeError

__all__ = [
    "Closure",
    "call",
    "forget_weights",
    "random_state",
    "refuse_static_graph",
    "remember",
    "remember_buffers",
    "replicas_of",
    "set_random_state",
    "unsynchronized",
    "watch",
    "worst",
]

Closure = Callable[..., Tensor]


def call(closure: Closure, batch: Sequence[Tensor] | None) -> Tensor:
    """Call a closure and return a detached copy of its loss, a scalar.

    A copy, because a CUDA graph that the closure replays, or that ``torch.compile`` made of it,
    writes the loss of every pass into the same memory.

    Raises
    ------
    ConfigError
        If the closure returns anything but a loss.
    ShapeError
        If the loss has more than one element.
    """
    with torch.enable_grad():
        loss: Any = closure() if batch is None else closure(*batch)
    if isinstance(loss, Real):
        return torch.tensor(float(loss))
    if not isinstance(loss, Tensor):
        got = "None" if loss is None else type(loss).__name__
        if isinstance(loss, tuple):
            got = f"a {got} ({', '.join(type(item).__name__ for item in loss)})"
        raise ConfigError(
            f"the closure returned {got}; its last line must be 'return loss', the loss alone"
        )
    if loss.numel() != 1:
        raise ShapeError(
            f"the closure returned a loss of shape {tuple(loss.shape)}; it must return one number, the mean "
            "over the examples: return loss.mean()"
        )
    return loss.detach().reshape(()).clone()


def forget_weights(model: nn.Module) -> None:
    """Drop what PyTorch computed from a model's weights and would use again (SAM-15).

    These are autocast's low-precision copies, which live until the outermost autocast block ends;
    the values kept inside ``torch.nn.utils.parametrize.cached``; and the unsharded copies of
    ``fully_shard`` where it does not reshard after each pass.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in model.modules():
            # By protocol: fully_shard makes the class of such a module, and its base has moved.
            if hasattr(type(module), "set_reshard_after_backward"):
                module.reshard()


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """Return a function that undoes every later change of the model's buffers."""
    tables = [module._buffers for module in model.modules() if module._buffers]
    slots = [(table, name, buffer) for table in tables for name, buffer in table.items()]
    shared = {id(b): b for _, _, b in slots if b is not None and not is_lazy(b)}
    put_values_back = remember(list(shared.values()))

    def put_back() -> None:
        put_values_back()
        for table, name, buffer in slots:
            if table.get(name) is not buffer:  # the model bound the name to another tensor
                table[name] = buffer

    return put_back


def remember(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that writes the values that tensors have now into them."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)

    return put_back


def watch(parameters: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that tells which frozen parameters were written to since.

    Such are the weights of a teacher that follows the model: those that the second pass computes
    come from perturbed weights.
    """
    frozen = (p for p in parameters if not p.requires_grad and not p.is_inference())
    plain = (p for p in frozen if type(p) is nn.Parameter)  # others may have no address
    before = [(p, p._version, p.data_ptr()) for p in plain]
    return lambda: [
        p for p, version, place in before if (p._version, p.data_ptr()) != (version, place)
    ]


def random_state(parameters: Sequence[Tensor]) -> dict[Any, Tensor]:
    """Return the state of the generators that a pass over these parameters draws from."""
    states: dict[Any, Tensor] = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[Any, Tensor]) -> None:
    """Set the generators to what :func:`random_state` returned."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


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
    A wrapper leaves no trace on the module that it wraps, so it is looked for among all living
    objects. That takes about 0.1 s, for a bare model in several processes only.
    """
    if callable(getattr(model, "no_sync", None)):
        return (model,)
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ()
    wanted = set(map(id, parameters))
    # The type, because isinstance would wake objects that pretend to be of another class.
    wrappers = [it for it in gc.get_objects() if issubclass(type(it), DistributedDataParallel)]
    return tuple(ddp for ddp in wrappers if wanted.intersection(map(id, ddp.parameters())))


def refuse_static_graph(replicas: Iterable[Any]) -> None:
    """Raise ConfigError if a wrapper cannot leave a gradient unreduced."""
    if any(getattr(replica, "static_graph", False) for replica in replicas):
        raise ConfigError(
            "scope='local' leaves the ascent gradient unreduced, which DistributedDataParallel("
            "static_graph=True) cannot; use static_graph=False, or SAM(scope='global')"
        )


@contextmanager
def unsynchronized(replicas: Sequence[Any]) -> Iterator[None]:
    """Keep gradients of the passes inside the block from being reduced."""
    with ExitStack() as stack:
        for replica in replicas:
            stack.enter_context(replica.no_sync())
        yield


def worst(code: Tensor, replicas: Sequence[Any]) -> Tensor:
    """Return the largest of all replicas' numbers; every replica has to call this."""
    groups = [getattr(replica, "process_group", None) for replica in replicas]
    # By name, so that all processes go through several groups in the same order.
    named = {group.group_name: group for group in groups if group is not None}
    code = code.clone()
    for name in sorted(named):
        torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX, named[name])
    return code
