"""Clipping inside ``optimizer.step()``: the optimizer stays the user's own object.

:func:`attach` registers hooks on the optimizer, and nothing else changes: its class, its state and
its ``state_dict`` are as they were. The hooks clip right before the update, so everything that
PyTorch does earlier (unscaling, accumulation, reduction across replicas) is done, and everything
that the optimizer does (weight decay, momentum) comes after (AGC-7).
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from agc import AGC, Plan
from agc.checks import short_repr
from agc.errors import ConfigError, FormatError, ParameterError, ShapeError
from agc.plan import PlanEntry
from agc_torch.clip import Memory, clip_, limit_norm_, whole
from agc_torch.stats import Stats
from agc_torch.units import Model, named_parameters, place_of, resolve

__all__ = ["Handle", "attach", "attached"]


def attach(
    optimizer: Optimizer, model: Model, rule: AGC, *, max_norm: float | None = None
) -> Handle:
    """Clip inside every ``optimizer.step()`` from now on (AGC-1 to AGC-12).

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimizer: foreach, fused, with closures, inside LR schedulers, behind a ``GradScaler``.
        It may have some of the model's parameters only (one optimizer for matrices, one for the
        rest). Of a wrapper (Accelerate's, Lookahead, SAM, ``PostLocalSGDOptimizer``), AGC takes the
        optimizer inside.
    model : Module, mapping of name to tensor, or iterable of (name, tensor)
        Whose parameters these are; a module's layer types settle the units.
    rule : AGC
        The configuration.
    max_norm : float, optional
        After AGC, scale all gradients of the optimizer together down to this norm (Brock et al.
        2021, equation 1). ``clip_grad_norm_`` called before the step would come before AGC, which
        AGC-7 forbids. If their norm is not finite, the rule's ``nonfinite`` decides for all.

    Returns
    -------
    Handle
        Removes the hooks, shows the plan, reads the telemetry, and keeps the step count of
        schedules.

    Raises
    ------
    ParameterError
        If the optimizer has a parameter that is not the model's, AGC is attached to it already, or
        its ``step()`` would never run the hooks.
    ConfigError, SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc_torch.plan`; ConfigError also if ``max_norm`` is not a finite number above 0.

    Notes
    -----
    * A closure is wrapped: the gradients of each evaluation are clipped (LBFGS evaluates it many
      times).
    * Behind a ``GradScaler``, a fused optimizer receives gradients that are still scaled; the scale
      is taken into account. Every other optimizer receives unscaled ones.
    * A parameter that joins by ``add_param_group`` is clipped if it is the model's; otherwise the
      next step raises ParameterError.
    * A step in which no parameter has a gradient clips nothing, and counts as the optimizer counts
      it.
    * With ``capturable=True`` the step count stands on the parameters' device, so that a
      :class:`agc.Schedule` goes on in the replays of a CUDA graph. Optimizers without that option,
      such as SGD, may have it in their ``param_groups``. To record a schedule without it, or any
      other function of the step, raises ConfigError.
    * One step counts once, also of an optimizer whose ``step()`` calls that of its parent class.
    * Copying or pickling an optimizer drops its hooks, in PyTorch as such. Copy or pickle the
      handle together with the model and the optimizer, as in
      ``copy.deepcopy((model, optimizer, handle))``, or attach anew; :func:`attached` tells which
      optimizer clips. A model may keep its handle.

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
    return Handle(optimizer, model, rule, max_norm)


def attached(optimizer: Optimizer) -> Handle | None:
    """Return the handle of the AGC that clips inside an optimizer or what it wraps, or None.

    A copy of an optimizer has no hooks, so this is None for it.
    """
    for inner in _chain(optimizer):
        for hook in getattr(inner, "_optimizer_step_pre_hooks", {}).values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Handle):
                return owner
    return None


class Handle:
    """AGC attached to an optimizer; made by :func:`attach`.

    As a context manager it removes the hooks at the end of the block. ``copy.deepcopy`` and
    ``pickle`` of the handle, in one go with its model and optimizer, attach AGC to the copies; they
    look at the model at their first step.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer that clips; of a wrapper, the one inside.
    model : Module or mapping of name to tensor
    rule : AGC
    max_norm : float, optional
    """

    def __init__(
        self, optimizer: Optimizer, model: Model, rule: AGC, max_norm: float | None = None
    ) -> None:
        valid = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
        if max_norm is not None and not (valid and 0 < max_norm < math.inf):
            raise ConfigError(f"max_norm must be a finite number above 0, got {max_norm!r}")
        if attached(optimizer) is not None:
            raise ParameterError(
                f"AGC is attached to this {type(optimizer).__name__} already; remove() that handle first"
            )
        self.optimizer = _stepping(optimizer)
        # An iterator can be read only once.
        self.model: Model = (
            model if isinstance(model, (torch.nn.Module, Mapping)) else named_parameters(model)
        )
        self.rule, self.max_norm = rule, max_norm
        self._start()
        self._match()
        _check_in_backward(self.optimizer)
        self._register()

    def _start(self, steps: int = 0) -> None:
        self._steps = torch.tensor(steps, device=_step_device(self.optimizer))
        self._stats = Stats((), ())
        self._parameters: list[Tensor] = []
        self._pairs: list[tuple[PlanEntry, Tensor]] = []
        self._hooks: list[Any] = []
        self._running = self._nested = False
        self._memory = Memory()

    @property
    def plan(self) -> Plan:
        """What happens to every parameter; those that the optimizer lacks are marked."""
        if isinstance(self.model, torch.nn.Module) or not self._parameters:
            self._match()  # what is frozen may have changed
        mine = {entry.name for entry, _ in self._pairs}
        frozen = {entry.name: entry.inactive for entry in self._plan}
        return self._plan.marked(
            lambda name: frozen[name] if name in mine else "not in the optimizer"
        )

    @property
    def steps(self) -> int:
        """Steps taken, without those that a loss scaler skipped: what schedules go by."""
        return int(self._steps)

    def stats(self) -> Stats:
        """Return the telemetry of the last clipping; empty before the first (AGC-11)."""
        return self._stats

    def remove(self) -> None:
        """Stop clipping; the optimizer is as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the optimizer's own state: the step count."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read :meth:`state_dict`'s data back.

        Raises
        ------
        FormatError
            If this is not a handle's state.
        """
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if type(steps) is not int or steps < 0:
            raise FormatError(f"this is not the state of an AGC handle: {short_repr(state)}")
        self._steps.fill_(steps)  # the tensor that a CUDA graph goes on counting

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in ("optimizer", "model", "rule", "max_norm")}
        return {**kept, "steps": self.steps, "attached": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model that holds this handle may be half made as yet: it is looked at in the first
        # step.
        state = dict(state)
        hooked = state.pop("attached")
        steps = state.pop("steps")
        self.__dict__.update(state)
        self._start(steps)
        if hooked:
            self._register()

    def _register(self) -> None:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running and _inside_step(optimizer):
            self._nested = True  # a step() that calls its parent class's: clipped already
            return None
        self._running, self._nested = True, False
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
        device = _step_device(self.optimizer)
        if device is not None:  # parameters have moved, or capturable was set, since the last step
            self._steps = self._steps.to(device)
        parameters = _parameters(self.optimizer)
        same = len(parameters) == len(self._parameters)
        if not same or not all(map(operator.is_, parameters, self._parameters)):
            self._match()
        try:
            self._stats = self._clip_pairs()
        except ShapeError:
            if all(entry.shape == tensor.shape for entry, tensor in self._pairs):
                raise
            self._match()  # a parameter has been resized in place; nothing is clipped yet
            self._stats = self._clip_pairs()

    def _clip_pairs(self) -> Stats:
        # Both are there only while a GradScaler lets a fused optimizer unscale and skip by itself.
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        found_inf = getattr(self.optimizer, "found_inf", None)
        stats = clip_(
            self._pairs,
            self.rule,
            step=self._steps,
            grad_scale=grad_scale,
            found_inf=found_inf,
            missing=self._check_place,
            memory=self._memory,
        )
        if self.max_norm is not None:
            limit_norm_(
                self._whole, self.max_norm, self.rule, grad_scale=grad_scale, found_inf=found_inf
            )
        return stats

    def _check_place(self, entry: PlanEntry, tensor: Tensor) -> None:
        """Refuse a parameter without a gradient that the model replaced by one with a gradient."""
        now = place_of(self.model, entry.name)
        if now is tensor:
            return
        others = [now] if isinstance(now, Tensor) else now
        if not isinstance(now, Tensor):  # another kind of layer stands there
            mine = set(map(id, self._parameters))
            others = [other for other in now if id(other) not in mine]
        if any(other.grad is not None for other in others):
            raise ParameterError(
                f"the optimizer holds a parameter {entry.name!r} of shape {tuple(tensor.shape)} that is no "
                "longer the model's, so it never gets a gradient: the model's was replaced after the "
                "optimizer was made, by a new layer or by load_state_dict(assign=True); make the optimizer "
                "and attach AGC after that"
            )

    def _match(self) -> None:
        """Find the plan's entries for the optimizer's parameters."""
        parameters = _parameters(self.optimizer)
        plan, pairs = resolve(self.model, self.rule)
        entries = {id(tensor): (entry, tensor) for entry, tensor in pairs}
        for parameter in parameters:
            if id(parameter) not in entries:
                raise ParameterError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's; give attach the module that contains all of the optimizer's parameters "
                    "(made before the optimizer, and not copied, converted or replaced since, as "
                    "load_state_dict(assign=True) does), or clip by hand with adaptive_clip_grad_"
                )
        self._plan = plan
        self._parameters = parameters
        self._pairs = [entries[id(parameter)] for parameter in parameters]
        self._whole = [(whole(entry), tensor) for entry, tensor in self._pairs]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._nested and _inside_step(optimizer):
            return
        self._running = False
        # In place and on the device, if that is where it is needed: a CUDA graph repeats it.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self._steps += 1
        else:
            self._steps = self._steps.to(found_inf.device)
            self._steps += (found_inf == 0).long().view(())


def _step_device(optimizer: Optimizer) -> torch.device | None:
    """Return where steps are counted: on the host, unless a CUDA graph may repeat them."""
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("capturable") and group["params"]:
            device: torch.device = group["params"][0].device
            return device
    return None


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    groups = getattr(optimizer, "param_groups", ())
    return [parameter for group in groups for parameter in group["params"]]


# --- which optimizer steps ------------------------------------------------------------------------

_INNER: Final = ("optimizer", "base_optimizer", "_base_optimizer", "optim", "_optimizer")


def _chain(optimizer: Any) -> list[Any]:
    """Return an optimizer and those inside that have all of its parameters, outermost first."""
    chain: list[Any] = []
    wanted = {id(p) for p in _parameters(optimizer)}
    inner = optimizer
    while inner is not None and all(inner is not outer for outer in chain):
        if wanted <= {id(p) for p in _parameters(inner)}:
            chain.append(inner)
        candidates = (getattr(inner, name, None) for name in _INNER)
        inner = next((value for value in candidates if isinstance(value, Optimizer)), None)
    return chain


def _stepping(optimizer: Any) -> Optimizer:
    """Return the innermost optimizer with all parameters whose step runs hooks (AGC-7).

    What a wrapper does before that one's step, such as the ascent of SAM, is no business of AGC.
    """
    name = type(optimizer).__name__
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
        raise ParameterError(
            f"attach needs a torch.optim.Optimizer, got {name}; "
            "give the optimizer inside a wrapper, or clip with adaptive_clip_grad_"
        )
    if not getattr(optimizer, "_overlap_with_ddp", False):  # then it steps inside backward()
        for inner in reversed(_chain(optimizer)):
            if _runs_hooks(inner):
                return inner
    raise ParameterError(
        f"{name}.step() does not run the step hooks of torch.optim.Optimizer, so AGC would never act; give "
        f"the optimizer inside {name}, attach before its step is replaced, or clip by hand with "
        "adaptive_clip_grad_(model, rule) before each step"
    )


def _runs_hooks(optimizer: Any) -> bool:
    """Tell whether calling ``optimizer.step`` runs the hooks that are registered on it."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return False
    return _reaches_hooks(optimizer.step)


def _reaches_hooks(step: Any, depth: int = 4) -> bool:
    """Tell whether a step, maybe wrapped and put on the instance, runs the hooks."""
    if getattr(step, "hooked", False):
        return True
    inner = [getattr(step, name, None) for name in ("__func__", "__wrapped__", "func")]
    code, names = getattr(step, "__code__", None), getattr(step, "__globals__", {})
    inner += [names.get(name) for name in code.co_names] if code else []
    for cell in getattr(step, "__closure__", None) or ():
        try:
            inner.append(cell.cell_contents)
        except ValueError:  # a variable that has no value as yet
            continue
    return depth > 0 and any(_reaches_hooks(step, depth - 1) for step in inner if callable(step))


def _inside_step(optimizer: Optimizer) -> bool:
    """Tell whether the running step was called by another step of the same optimizer."""
    frame = sys._getframe(2)  # the wrapper that PyTorch puts around every step
    code, outer = frame.f_code, frame.f_back
    while outer is not None:
        if outer.f_code is code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def _check_in_backward(optimizer: Optimizer) -> None:
    """Refuse parameters that other optimizers update inside backward(), before a step."""
    for parameter in _parameters(optimizer):
        others = getattr(parameter, "_in_backward_optimizers", [])
        if others and all(other is not optimizer for other in others):
            raise ParameterError(
                f"a parameter of shape {tuple(parameter.shape)} is updated inside backward() by a "
                f"{type(others[0]).__name__} of its own, so {type(optimizer).__name__}.step() never sees its "
                "gradient; attach AGC to each of torch.distributed.optim._get_in_backward_optimizers(model)"
            )
