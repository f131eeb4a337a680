"""Sharpness-aware minimization in front of any PyTorch optimizer.

One step of SAM is a protocol of the weights, whatever the optimizer:

1. *ascent*: the closure computes gradients at the weights ``w``;
2. *perturb*: ``w`` is copied aside, then moved in place to ``w + e``;
3. *descent*: the closure computes gradients at ``w + e``;
4. *restore*: ``w`` is copied back in place, bit for bit, whatever happened in between;
5. the optimizer, with AGC if it is attached, acts on the descent gradient at ``w``.

The model, the optimizer, its state and its schedules stay the user's own.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agc.config import SAM, check_rule
from agc.errors import (
    ConfigError,
    FormatError,
    MissingGradientError,
    NonFiniteError,
    OrderError,
    ParameterError,
)
from agc.plan import perturbed_names

__all__ = ["SamStats", "SharpnessAware", "Verification", "verify_sam"]

Closure = Callable[..., Tensor]


@dataclass(frozen=True)
class SamStats:
    """What the last step did, as device scalars until somebody reads them (SAM-12).

    Attributes
    ----------
    norm : Tensor
        Norm of the ascent gradient (the largest, if there were several micro-batches).
    loss, perturbed_loss : Tensor
        Mean loss at ``w`` (of the examples of the ascent pass) and at ``w + e``.
    """

    norm: Tensor
    loss: Tensor
    perturbed_loss: Tensor

    @property
    def sharpness(self) -> Tensor:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss


class SharpnessAware:
    """Sharpness-aware minimization of a model.

    Parameters
    ----------
    model : nn.Module
        The model, or its DistributedDataParallel wrapper, or a module sharded with ``fully_shard``.
    rule : SAM
        The configuration.

    Raises
    ------
    ParameterError
        If ``model`` is not a module.
    SelectorError
        If a name pattern matches nothing, or nothing is left to perturb.
    ConfigError
        If ``rule`` is not a SAM, or ``scope="local"`` is asked of a fully sharded model, whose gradients
        are always reduced.

    Notes
    -----
    Memory: one copy of the perturbed weights during the second pass, nothing between steps. The state
    is one counter (SAM-13).

    The model refuses to be saved while its weights are perturbed. It can be copied and pickled otherwise,
    and a copy knows nothing of this object.

    Examples
    --------
    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> sam = SharpnessAware(model, SAM(rho=0.05))
    >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> loss = sam.step(optimizer, closure)
    """

    def __init__(self, model: nn.Module, rule: SAM) -> None:
        check_rule(rule, SAM)
        if not isinstance(model, nn.Module):
            raise ParameterError(
                f"SharpnessAware needs a torch.nn.Module, got {type(model).__name__}"
            )
        named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
        chosen = set(perturbed_names([name for name, _ in named], rule))
        self.model = model
        self.rule = rule
        self._parameters = [p for name, p in named if name in chosen]
        self._count = 0
        self._backup: list[tuple[Tensor, Tensor]] | None = None
        self._stats: SamStats | None = None
        self._lock = threading.Lock()
        if rule.scope == "local" and any(_is_sharded(p) for p in self._parameters):
            raise ConfigError(
                "scope='local' needs gradients that are not reduced, and the gradients of a fully "
                "sharded model always are; use SAM(scope='global')"
            )
        model.register_state_dict_pre_hook(_Refusal(self))

    @property
    def count(self) -> int:
        """Steps taken: what schedules of rho and ``every`` go by."""
        return self._count

    @property
    def is_perturbed(self) -> bool:
        """Whether the model's weights are at ``w + e`` right now."""
        return self._backup is not None

    def stats(self) -> SamStats | None:
        """Return the numbers of the last step that perturbed, or None before the first."""
        return self._stats

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Closure,
        *,
        batch: Sequence[Tensor] | None = None,
        scaler: Any = None,
    ) -> Tensor:
        """Compute the sharpness-aware gradient and let the optimizer act on it.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Any optimizer of the model's parameters.
        closure : callable
            PyTorch's contract: ``zero_grad``, forward, backward, return the loss. Called twice. With
            ``batch``, it is given the tensors to use: ``closure(inputs, targets)``.
        batch : sequence of Tensor, each of shape (examples, ...), optional
            The batch; needed for ``fraction`` below 1 and for ``microbatches`` above 1. The loss must
            be a mean over examples.
        scaler : torch.amp.GradScaler, optional
            If given, the closure calls ``scaler.scale(loss).backward()`` and returns the unscaled loss;
            this method calls ``scaler.step(optimizer)`` and ``scaler.update()``.

        Returns
        -------
        Tensor
            The clean loss, at ``w``, of the ascent pass (SAM-12); detached.

        Raises
        ------
        ConfigError
            If ``fraction`` or ``microbatches`` needs a batch and there is none, or the closure takes none.
        ParameterError
            If the optimizer holds none of the model's parameters.
        MissingGradientError
            If the closure leaves no gradient on any perturbed parameter.
        NonFiniteError
            If ``rule.nonfinite`` is ``"raise"`` and the norm of an ascent gradient is not finite.
        OrderError
            If a step is under way, in this thread or another.

        Notes
        -----
        The policies ``skip_step`` and ``raise`` read one number from the device after both passes were
        queued (SAM-5); with a scaler, ``skip_step`` leaves the decision to the scaler and reads nothing.
        """
        self._check_optimizer(optimizer)
        self._check_batch(closure, batch)
        if not self._lock.acquire(blocking=False):
            raise OrderError("a step of this SharpnessAware is already under way")
        try:
            if self.is_perturbed:
                raise OrderError("step() inside perturbed(): leave the block first")
            if _needs_closure(optimizer):
                return self._step_with_closure(optimizer, closure, batch, scaler)
            loss, norm = self._gradients(closure, batch)
            if norm is None or self._may_step(norm, scaler):
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
            self._count += 1
            return loss
        finally:
            self._lock.release()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Hold the weights at ``w + e``, from the gradients that are there now, inside the block.

        The gradients are cleared at the start, so that the block's backward leaves the descent
        gradient; the weights are restored bit for bit at the end, also after an exception.

        If the norm of the ascent gradient is not finite, ``nonfinite="skip_step"`` cannot keep the
        optimizer from acting: all gradients are NaN after the block, as a GradScaler and other code that
        skips bad steps looks for. Without such code, check them before ``optimizer.step()``, or use
        :meth:`step`, ``"skip_perturb"`` or ``"raise"``.

        Raises
        ------
        NonFiniteError
            After the block, if ``rule.nonfinite`` is ``"raise"`` and that norm is not finite.
        MissingGradientError
            If no perturbed parameter has a gradient: call backward first.
        OrderError
            If the weights are already perturbed.
        ConfigError
            If the rule has ``fraction`` or ``microbatches``, which only :meth:`step` can do.
        """
        if self.rule.fraction != 1 or self.rule.microbatches != 1:
            raise ConfigError(
                f"fraction={self.rule.fraction} and microbatches={self.rule.microbatches} need "
                "step(optimizer, closure, batch=...); perturbed() takes the gradients that are there"
            )
        if self.is_perturbed:
            raise OrderError("perturbed() inside perturbed(): the weights are already perturbed")
        direction = self._ascent_gradients()
        norm = self._norm(direction)
        try:
            self._perturb(direction, norm)
            for parameter in self.model.parameters():
                parameter.grad = None
            yield
        finally:
            self._restore()
        if self.rule.nonfinite == "skip_step":
            self._poison(self._everywhere(norm))
        else:
            self._may_step(norm, None)

    def state_dict(self) -> dict[str, int]:
        """Return the counter (SAM-13); the optimizer's state is saved by the optimizer.

        Raises
        ------
        OrderError
            If the weights are perturbed.
        """
        self._refuse_while_perturbed()
        return {"version": 1, "count": self._count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from :meth:`state_dict`.

        Raises
        ------
        FormatError
            If this is not such a state.
        """
        if state.get("version") != 1 or not isinstance(state.get("count"), int):
            raise FormatError(f"this is not a state of SharpnessAware: {dict(state)!r}")
        self._count = state["count"]

    # --- one step, part by part -----------------------------------------------------------------

    def _gradients(
        self, closure: Closure, batch: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Leave the descent gradient on the parameters; return the clean loss and the ascent norm."""
        if not self.rule.perturbs(self._count):
            return _call(closure, batch).detach(), None
        parts = _split(batch, self.rule.microbatches)
        passes = [self._two_passes(closure, part) for part in parts[:1]]
        sizes = [1 if part is None else len(part[0]) for part in parts]
        if len(parts) > 1:
            total = sum(sizes)
            sums = self._weighted_gradients(sizes[0] / total)
            for part, size in zip(parts[1:], sizes[1:], strict=True):
                passes.append(self._two_passes(closure, part))
                for name, gradient in self._weighted_gradients(size / total).items():
                    sums[name] = sums[name] + gradient if name in sums else gradient
            for name, parameter in self.model.named_parameters():
                parameter.grad = sums.get(name)
        seen = [self._ascent_size(size) for size in sizes]
        loss = sum(n / sum(seen) * one.loss for n, one in zip(seen, passes, strict=True))
        perturbed = sum(
            n / sum(sizes) * one.perturbed_loss for n, one in zip(sizes, passes, strict=True)
        )
        # max() passes NaN on, so one number says whether every norm is finite.
        norm = torch.stack([one.norm for one in passes]).max()
        self._stats = SamStats(norm, torch.as_tensor(loss), torch.as_tensor(perturbed))
        return self._stats.loss, norm

    def _two_passes(self, closure: Closure, batch: Sequence[Tensor] | None) -> SamStats:
        first = batch
        if batch is not None and self.rule.fraction < 1:
            first = [tensor[: self._ascent_size(len(tensor))] for tensor in batch]
        # Statistics come from the clean pass, unless that saw only a part of the batch (SAM-12).
        discard_first = first is not batch
        random = _random_state(self._parameters)
        with self._unsynchronized(), _keep_buffers(self.model if discard_first else None):
            loss = _call(closure, first).detach()
        direction = self._ascent_gradients()
        norm = self._norm(direction)
        try:
            self._perturb(direction, norm)
            del direction
            _set_random_state(random)  # the same dropout masks in both passes
            with _keep_buffers(None if discard_first else self.model):
                perturbed_loss = _call(closure, batch).detach()
        finally:
            self._restore()
        return SamStats(norm, loss, perturbed_loss)

    def _ascent_size(self, examples: int) -> int:
        """Return how many examples the ascent pass sees (SAM-7)."""
        return math.ceil(self.rule.fraction * examples)

    def _ascent_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Perturbed set of this step: every chosen parameter that has a gradient now (SAM-4)."""
        found = [(p, p.grad) for p in self._parameters if p.grad is not None]
        if not found:
            raise MissingGradientError(
                "no perturbed parameter has a gradient after the first pass; the closure must call "
                "backward, and only/exclude must leave parameters that take part in the loss"
            )
        return [(p, g.to_dense() if g.is_sparse else g) for p, g in found]

    def _norm(self, direction: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Global norm of ``T g``, in at least float32 and without a copy of the gradients (SAM-1, SAM-10)."""
        with torch.no_grad():
            norms = [
                _full_norm(parameter, self._pieces(parameter, gradient))
                for parameter, gradient in direction
            ]
        home = norms[0].device
        # Divided by the largest, so that squaring the norms of tensors cannot overflow.
        stacked = torch.stack([norm.to(home) for norm in norms])
        largest = stacked.max()
        safe = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        return torch.linalg.vector_norm(stacked / safe) * safe

    def _perturb(self, direction: list[tuple[nn.Parameter, Tensor]], norm: Tensor) -> None:
        """Copy the weights aside and move them to ``w + e``; not at all if the norm is 0 or not finite."""
        factor = self.rule.radius(self._count) / (norm + self.rule.eps)
        factor = factor.clamp(max=torch.finfo(torch.float32).max)  # the norm may be subnormal
        usable = (norm > 0) & norm.isfinite()
        factor = torch.where(usable, factor, 0.0)
        # Detached tensors throughout, so autograd does not record this.
        self._backup = [(_local(p), _local(p).clone()) for p, _ in direction]
        for parameter, gradient in direction:
            weight, local = _local(parameter), _local(gradient)
            # 0 * inf is NaN: a poisoned gradient must not reach the weights even for one pass.
            local.masked_fill_(~usable.to(local.device), 0)
            scale = factor.to(weight.device)
            if not self._is_scaled(parameter) and weight.dtype in (torch.float32, torch.float64):
                weight.addcmul_(local.to(weight.dtype), scale.to(weight.dtype))
                continue
            wide = _wide(weight.dtype)
            for w, g in _pieces(weight, local):
                e = g.to(wide) * scale.to(wide)
                if self._is_scaled(parameter):
                    e = e * (w.abs().to(e.real.dtype) + self.rule.eta) ** 2
                w.copy_(w.to(wide) + e)

    def _pieces(self, parameter: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """Yield numbers that have the norm of this process's part of ``T g``, in pieces."""
        weight, local = _local(parameter), _local(gradient)
        for w, g in _pieces(weight, local):
            if self._is_scaled(parameter):
                # As wide as the norm: in half precision the product would leave the range.
                size = g.abs() if g.is_complex() else g
                g = w.abs().double().add_(self.rule.eta).mul_(size.double())
            yield g

    def _restore(self) -> None:
        backup, self._backup = self._backup, None
        if backup is None:
            return
        with torch.no_grad():
            for weight, copy in backup:
                weight.copy_(copy)

    def _is_scaled(self, parameter: Tensor) -> bool:
        return self.rule.adaptive and parameter.ndim >= 2

    def _may_step(self, norm: Tensor, scaler: Any) -> bool:
        """Apply the policy for a norm that is not finite (SAM-5)."""
        if self.rule.nonfinite == "skip_perturb":
            return True
        norm = self._everywhere(norm)
        if scaler is not None and self.rule.nonfinite == "skip_step":
            self._poison(norm)
            return True
        value = norm.item()
        if math.isfinite(value):
            return True
        if self.rule.nonfinite == "raise":
            raise NonFiniteError(
                f"the norm of the ascent gradient is {value}; the weights are unchanged. "
                "SAM(nonfinite='skip_step') skips such steps"
            )
        return False

    def _everywhere(self, norm: Tensor) -> Tensor:
        """Return the norm, or NaN if another replica's own norm is not finite: all act alike (SAM-5)."""
        group = getattr(self.model, "process_group", None)
        if group is None or self.rule.scope != "local":
            return norm
        bad = (~norm.isfinite()).to(norm.dtype)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX, group)
        return torch.where((bad > 0) & norm.isfinite(), torch.nan, norm)

    def _poison(self, norm: Tensor) -> None:
        """Make all gradients NaN if the norm is not finite, without waiting for the device."""
        bad = ~norm.isfinite()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                values = gradient._values() if gradient.is_sparse else gradient
                values.masked_fill_(bad.to(values.device), torch.nan)

    def _step_with_closure(
        self, optimizer: torch.optim.Optimizer, closure: Closure, batch: Any, scaler: Any
    ) -> Tensor:
        """Drive an optimizer such as LBFGS, which evaluates the closure itself."""
        if scaler is not None:
            raise ConfigError(
                f"{type(optimizer).__name__} evaluates the closure itself, which no GradScaler supports"
            )
        losses: list[Tensor] = []

        def sharpness_aware() -> Tensor:
            loss, norm = self._gradients(closure, batch)
            losses.append(loss)
            if norm is not None and not self._may_step(norm, None):
                raise NonFiniteError(
                    f"{type(optimizer).__name__} cannot skip a step from inside its closure, and the "
                    "norm of the ascent gradient is not finite; the weights are unchanged"
                )
            return loss

        optimizer.step(sharpness_aware)
        self._count += 1
        return losses[0]

    def _weighted_gradients(self, weight: float) -> dict[str, Tensor]:
        return {
            name: p.grad.detach() * weight
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }

    def _unsynchronized(self) -> AbstractContextManager[Any]:
        """Keep DDP from reducing the ascent gradient, unless its scope is global (SAM-9)."""
        no_sync = getattr(self.model, "no_sync", None)
        if self.rule.scope == "local" and callable(no_sync):
            context: AbstractContextManager[Any] = no_sync()
            return context
        return nullcontext()

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:
            return  # a wrapper that does not say what it holds
        held = {id(p) for group in groups for p in group["params"]}
        if not any(id(p) in held for p in self.model.parameters()):
            raise ParameterError(
                f"{type(optimizer).__name__} holds none of the model's parameters; make it from those of "
                "the model that SharpnessAware was given"
            )

    def _check_batch(self, closure: Closure, batch: Sequence[Tensor] | None) -> None:
        needs = self.rule.fraction != 1 or self.rule.microbatches != 1
        if batch is None:
            if needs:
                raise ConfigError(
                    f"fraction={self.rule.fraction} and microbatches={self.rule.microbatches} take "
                    "parts of the batch: call step(optimizer, closure, batch=(inputs, targets)) with "
                    "a closure that uses the tensors it is given"
                )
            return
        try:
            inspect.signature(closure).bind(*batch)
        except TypeError:
            raise ConfigError(
                f"the closure ignores the batch: it must take the {len(batch)} tensors of batch, for "
                "example def closure(inputs, targets)"
            ) from None
        sizes = {len(tensor) for tensor in batch}
        if len(sizes) != 1:
            raise ConfigError(
                f"the tensors of batch must share their first axis, got {[len(t) for t in batch]}"
            )
        if min(sizes) < self.rule.microbatches:
            raise ConfigError(
                f"microbatches={self.rule.microbatches} is more than the {min(sizes)} examples"
            )

    def _refuse_while_perturbed(self) -> None:
        if self.is_perturbed:
            raise OrderError(
                "the weights are perturbed: save after step(), or outside the perturbed() block"
            )


class _Refusal:
    """What a model asks before it is saved. Its copies are nobody's: those of the model are free."""

    def __init__(self, owner: SharpnessAware | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, *_: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            owner._refuse_while_perturbed()

    def __reduce__(self) -> tuple[type[_Refusal], tuple[()]]:
        self()  # a pickle of the model has its weights too
        return _Refusal, ()


# --- probe ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_sam` saw.

    Attributes
    ----------
    passes : int
        Forward passes of the model in one step.
    perturbation : float
        Distance of the weights in the last pass from those in the first; should be rho.
    cosine : float
        Cosine between that displacement and the first gradient; should be 1 (for ASAM: above 0).
    gradient_error : float
        Relative distance between the gradient that the optimizer received and the gradient at the
        displaced weights; should be about rounding error.
    restored : bool
        Whether the optimizer saw the weights that the step began with, bit for bit.
    """

    passes: int
    perturbation: float
    cosine: float
    gradient_error: float
    restored: bool

    @property
    def ok(self) -> bool:
        """Whether this was SAM: two passes, moved uphill, right gradient, weights restored."""
        return (
            self.passes >= 2
            and self.perturbation > 0
            and self.cosine > 0
            and self.gradient_error < 1e-3
            and self.restored
        )


def verify_sam(
    step: Callable[[], Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[], Any],
) -> Verification:
    """Tell whether a training step really takes its gradient at the perturbed weights (SAM-14).

    Works on any implementation, since it only watches the model and the optimizer. One step is taken
    and undone on the weights; the optimizer's own state is left advanced, so probe a scratch copy or before
    training.

    Parameters
    ----------
    step : callable
        Performs one complete training step of the SAM under test on ``model`` with ``optimizer``.
    model : nn.Module
        The model; deterministic, or with the same random numbers in every pass.
    optimizer : torch.optim.Optimizer
        The optimizer that moves the weights (for a wrapper, the one inside).
    gradient : callable
        Clears and recomputes the plain gradients of the same batch at the current weights.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    visited: list[list[Tensor]] = []
    received: list[list[Tensor]] = []
    seen: list[list[Tensor]] = []

    def snapshot() -> list[Tensor]:
        return [p.detach().clone() for p in parameters]

    def at_step(*_: Any) -> None:
        received.append([_gradient_or_zero(p) for p in parameters])
        seen.append(snapshot())

    with ExitStack() as hooks:
        for handle in (
            model.register_forward_pre_hook(lambda *_: visited.append(snapshot())),
            optimizer.register_step_pre_hook(at_step),
        ):
            hooks.callback(handle.remove)
        start = snapshot()
        step()
    passes = list(visited)

    def gradient_at(point: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(parameters, point, strict=True):
                parameter.copy_(value)
        gradient()
        return _flatten([_gradient_or_zero(p) for p in parameters])

    last = passes[-1] if passes else start
    uphill = gradient_at(start)
    wanted = gradient_at(last)
    gradient_at(start)
    moved = _flatten(last) - _flatten(start)
    got = _flatten(received[-1]) if received else torch.zeros_like(wanted)
    length = float(moved.norm() * uphill.norm())
    return Verification(
        passes=len(passes),
        perturbation=float(moved.norm()),
        cosine=float(moved @ uphill) / length if length else 0.0,
        gradient_error=float((got - wanted).norm() / wanted.norm().clamp_min(1e-300)),
        restored=bool(seen)
        and all(torch.equal(a, b) for a, b in zip(seen[-1], start, strict=True)),
    )


# --- helpers ----------------------------------------------------------------------------------------


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _gradient_or_zero(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()


def _call(closure: Closure, batch: Sequence[Tensor] | None) -> Tensor:
    with torch.enable_grad():
        return torch.as_tensor(closure() if batch is None else closure(*batch))


def _split(batch: Sequence[Tensor] | None, parts: int) -> list[Sequence[Tensor] | None]:
    """Split along the first axis into contiguous parts whose sizes differ by at most one (SAM-8)."""
    if batch is None or parts == 1:
        return [batch]
    pieces = [torch.tensor_split(tensor, parts) for tensor in batch]
    return [list(piece) for piece in zip(*pieces, strict=True)]


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether ``optimizer.step`` cannot be called without a closure, as LBFGS's cannot."""
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        return True
    return isinstance(optimizer, torch.optim.LBFGS)


@contextmanager
def _keep_buffers(model: nn.Module | None) -> Iterator[None]:
    """Undo every change of the model's buffers, running statistics of any normalisation among them."""
    if model is None:
        yield
        return
    places = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in kept:
                buffer.copy_(copy)
        for buffers, name, buffer in places:
            if buffers.get(name) is not buffer:  # the model bound the name to another tensor
                buffers[name] = buffer


def _random_state(parameters: Sequence[Tensor]) -> dict[Any, Tensor]:
    states: dict[Any, Tensor] = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: Mapping[Any, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype to compute the perturbation in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


_PIECE = 1 << 20
"""Elements that may be copied at a time."""


def _pieces(weight: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape into pieces along their first axis, so that temporaries stay small."""
    if weight.dim() == 0 or weight.numel() <= _PIECE:
        yield weight, gradient
        return
    rows = max(1, _PIECE * len(weight) // weight.numel())
    yield from zip(weight.split(rows), gradient.split(rows), strict=True)


def _full_norm(parameter: Tensor, pieces: Iterator[Tensor]) -> Tensor:
    """Norm of a whole parameter from the pieces that this process has, in float64."""
    norms = []
    for piece in pieces:
        real = torch.view_as_real(piece) if piece.is_complex() else piece
        norms.append(torch.linalg.vector_norm(real, dtype=torch.float64))
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    return _reduce_norm(norm, parameter) if _is_sharded(parameter) else norm


def _reduce_norm(norm: Tensor, parameter: Any) -> Tensor:
    """Norm of a DTensor from those of all processes' parts; replicas hold the same numbers."""
    import torch.distributed as dist  # here, because most programs are not distributed

    mesh = parameter.device_mesh
    total = norm.square().to(mesh.device_type)
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            dist.all_reduce(total, group=mesh.get_group(axis))
    return total.sqrt()


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor; any other tensor, detached, as it is."""
    detached = tensor.detach()
    return detached.to_local() if _is_sharded(detached) else detached
