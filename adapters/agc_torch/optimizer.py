"""Clipping inside ``optimizer.step()``: the optimizer stays the user's own object.

:func:`attach` registers hooks on the optimizer, and nothing else changes: its class, its state and its
``state_dict`` are as they were. The hooks clip right before the update, so everything that PyTorch does
earlier (unscaling, accumulation, reduction across replicas) is done, and everything that the optimizer
does (weight decay, momentum) comes after (AGC-7).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agc import AGC, Plan
from agc.errors import ConfigError, FormatError, ParameterError
from agc.plan import PlanEntry
from agc_torch.clip import clip_
from agc_torch.stats import Stats
from agc_torch.units import Model, named_parameters, resolve

__all__ = ["Handle", "attach", "attached"]


def attach(optimizer: Optimizer, model: Model, rule: AGC) -> Handle:
    """Clip inside every ``optimizer.step()`` from now on (AGC-1 to AGC-12).

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer: foreach, fused, with closures, inside LR schedulers, behind a ``GradScaler``. It
        may have some of the model's parameters only (one optimizer for matrices, one for the rest).
    model : Module, mapping of name to tensor, or iterable of (name, tensor)
        Whose parameters these are; a module's layer types settle the units.
    rule : AGC
        The configuration.

    Returns
    -------
    Handle
        Removes the hooks, shows the plan, reads the telemetry, and keeps the step count of schedules.

    Raises
    ------
    ParameterError
        If the optimizer has a parameter that is not the model's, or AGC is attached to it already.
    ConfigError, SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc_torch.plan`.

    Notes
    -----
    * A closure is wrapped: the gradients of each evaluation are clipped (LBFGS evaluates it many times).
    * Behind a ``GradScaler``, a fused optimizer receives gradients that are still scaled; the scale is
      taken into account. Every other optimizer receives unscaled ones.
    * A parameter that joins by ``add_param_group`` is clipped if it is the model's; otherwise the next
      step raises ParameterError.
    * Copying or pickling an optimizer drops its hooks, in PyTorch as such. Copy or pickle the handle
      together with the model and the optimizer, as in ``copy.deepcopy((model, optimizer, handle))``, or
      attach anew; :func:`attached` tells which optimizer clips.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = attach(optimizer, model, AGC(clipping=0.01))
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> handle.stats().total().clipped
    3
    """
    return Handle(optimizer, model, rule)


def attached(optimizer: Optimizer) -> Handle | None:
    """Return the handle of the AGC that clips inside an optimizer; None if there is none.

    A copy of an optimizer has no hooks, so this is None for it.
    """
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Handle):
            return owner
    return None


class Handle:
    """AGC attached to an optimizer; made by :func:`attach`.

    As a context manager it removes the hooks at the end of the block. ``copy.deepcopy`` and ``pickle`` of
    the handle, in one go with its model and optimizer, attach AGC to the copies.
    """

    def __init__(self, optimizer: Optimizer, model: Model, rule: AGC) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ParameterError(
                f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}; "
                "give the optimizer inside a wrapper, or clip with adaptive_clip_grad_"
            )
        if attached(optimizer) is not None:
            raise ParameterError(
                f"AGC is attached to this {type(optimizer).__name__} already; remove() that handle first"
            )
        self.optimizer = optimizer
        # An iterator can be read only once.
        self.model: Model = (
            model if isinstance(model, (torch.nn.Module, Mapping)) else named_parameters(model)
        )
        self.rule = rule
        self._steps = torch.zeros((), dtype=torch.int64)
        self._stats: Stats | None = None
        self._pairs: list[tuple[PlanEntry, Tensor]] = []
        self._match(list(_parameters(optimizer)))
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def plan(self) -> Plan:
        """What happens to every parameter of the model; those not in the optimizer are not clipped."""
        return self._plan

    @property
    def steps(self) -> int:
        """Steps taken: what schedules are evaluated at. Steps that a loss scaler skipped do not count."""
        return int(self._steps)

    def stats(self) -> Stats | None:
        """Return the telemetry of the last clipping; None before the first (AGC-11)."""
        return self._stats

    def remove(self) -> None:
        """Stop clipping; the optimizer is as it was before."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the optimizer's own state: the step count."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read :meth:`state_dict`'s data back.

        Raises
        ------
        FormatError
            If this is not such data.
        """
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise FormatError(f"this is not the state of an AGC handle: {state!r}")
        self._steps = torch.tensor(steps)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        optimizer = copy.deepcopy(self.optimizer, memo)
        return _restore(optimizer, copy.deepcopy(self.model, memo), self.rule, self.state_dict())

    def __reduce__(self) -> tuple[Callable[..., Handle], tuple[Any, ...]]:
        return _restore, (self.optimizer, self.model, self.rule, self.state_dict())

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("grad_scaler") is not None:
            raise ConfigError(
                f"{type(optimizer).__name__}.step takes the GradScaler as an argument and unscales the "
                "gradients out of AGC's sight; detach AGC, and call scaler.unscale_(optimizer) and "
                "adaptive_clip_grad_(model, rule) before the step"
            )
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrap(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._wrap(kwargs["closure"])}
        self._clip()
        return None

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def clipped_closure() -> Any:
            loss = closure()
            self._clip()
            return loss

        return clipped_closure

    def _clip(self) -> None:
        parameters = list(_parameters(self.optimizer))
        if len(parameters) != len(self._parameters) or any(
            now is not known for now, known in zip(parameters, self._parameters, strict=True)
        ):
            self._match(parameters)
        # Both are there only while a GradScaler lets a fused optimizer unscale and skip by itself.
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._stats = clip_(
            self._pairs, self.rule, step=self._steps, grad_scale=grad_scale, found_inf=found_inf
        )

    def _match(self, parameters: list[Tensor]) -> None:
        """Find the plan's entries for the optimizer's parameters."""
        self._plan, pairs = resolve(self.model, self.rule)
        entries = {id(tensor): (entry, tensor) for entry, tensor in pairs}
        for parameter in parameters:
            if id(parameter) not in entries:
                raise ParameterError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's; give attach the module that contains all of the optimizer's parameters "
                    "(made before the optimizer, and not copied or converted since)"
                )
        self._parameters = parameters
        self._pairs = [entries[id(parameter)] for parameter in parameters]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self._steps += 1
        else:  # where the flag is, so that nobody waits for it
            self._steps = self._steps.to(found_inf.device) + (found_inf == 0).long().view(())


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _restore(optimizer: Optimizer, model: Model, rule: AGC, state: Mapping[str, Any]) -> Handle:
    handle = Handle(optimizer, model, rule)
    handle.load_state_dict(state)
    return handle
