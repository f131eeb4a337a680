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
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from agc.checks import check_batch, check_batch_given, check_microbatches, check_rule, short_repr
from agc.config import SAM
from agc.errors import (
    ConfigError,
    FormatError,
    MissingGradientError,
    NonFiniteError,
    OrderError,
    ParameterError,
    SelectorError,
)
from agc.selectors import perturbed_names, with_ties
from agc_torch.ascent import Direction, Memory
from agc_torch.norms import wide
from agc_torch.passes import (
    Closure,
    call,
    forget_weights,
    random_state,
    refuse_static_graph,
    remember,
    remember_buffers,
    replicas_of,
    set_random_state,
    unsynchronized,
    watch,
    worst,
)
from agc_torch.schedules import is_recorded, value_at
from agc_torch.shards import is_dtensor, local
from agc_torch.units import named_parameters, ties, unwrap

__all__ = ["SamStats", "SharpnessAware"]

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class SamStats:
    """What the last step did, as device scalars until somebody reads them (SAM-12).

    Attributes
    ----------
    norm : Tensor
        Norm of the ascent gradient (the largest, if there were several micro-batches), unscaled if
        a GradScaler is known: one that :meth:`SharpnessAware.step` was given, or that a wrapper of
        the optimizer steps through.
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
        The model, bare or wrapped (``DistributedDataParallel``, ``torch.compile``), or a module
        sharded with ``fully_shard``. Patterns of the rule mean the names that AGC's plan shows,
        those of the bare model.
    rule : SAM
        The configuration.

    Raises
    ------
    ParameterError
        If ``model`` is not a module, or holds FSDP1's flat parameters.
    SelectorError
        If a name pattern matches nothing, or nothing is left to perturb.
    ConfigError
        If ``rule`` is not a SAM, or ``scope="local"`` is asked of a fully sharded model, whose
        gradients are always reduced, or of DistributedDataParallel with a static graph.

    Notes
    -----
    Memory: one copy of the perturbed weights, and two of the buffers, during the second pass;
    nothing between steps. The state is one counter (SAM-13).

    The perturbed set of a step is what the rule selects, is not frozen, is held by the step's
    optimizer, and has a gradient after the first pass (SAM-4).

    The model refuses to be saved, copied and pickled while its weights are perturbed. Otherwise it
    can be, also by a module that keeps its SharpnessAware as an attribute: the copy has its own,
    with the same count.

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
        self.__setstate__({"model": model, "rule": rule, "count": 0})
        self._select()
        if rule.scope == "local":
            if any(map(is_dtensor, self._selected)):
                raise ConfigError(
                    "scope='local' needs gradients that are not reduced, and the gradients of a fully "
                    "sharded model always are; use SAM(scope='global')"
                )
            refuse_static_graph([model])

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "rule": self.rule, "count": self._count}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # A model that keeps this object is half built when a copy comes here: it is looked at
        # later.
        self.model: nn.Module = state["model"]
        self.rule: SAM = state["rule"]
        self._count: int = state["count"]
        self._parameters: list[Tensor] = []
        self._selected: list[Tensor] = []
        self._replicas: tuple[Any, ...] | None = None
        self._backup: list[tuple[Tensor, Tensor]] | None = None
        self._refusal: Any = None
        self._stats: SamStats | None = None
        self._memory = Memory()
        self._lock = threading.Lock()

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
        optimizer: Optimizers,
        closure: Closure,
        *,
        batch: Sequence[Tensor] | None = None,
        scaler: Any = None,
    ) -> Tensor:
        """Compute the sharpness-aware gradient and let the optimizer act on it.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, or sequence of them
            Any optimizer of the model's parameters, or several that share them. What none of them
            holds is not perturbed.
        closure : callable
            PyTorch's contract: ``zero_grad``, forward, backward, return the loss. Called twice,
            each time without gradients from before. With ``batch``, it is given the tensors to use:
            ``closure(inputs, targets)``.
        batch : sequence of Tensor, each of shape (examples, ...), optional
            The batch; needed for ``fraction`` below 1 and for ``microbatches`` above 1. The loss
            must be a mean over examples.
        scaler : torch.amp.GradScaler, optional
            If given, the closure calls ``scaler.scale(loss).backward()`` and returns the unscaled
            loss; this method calls ``scaler.step(optimizer)`` and ``scaler.update()``.

        Returns
        -------
        Tensor
            The clean loss, at ``w``, of the ascent pass (SAM-12); detached, of shape ().

        Raises
        ------
        ConfigError
            If ``fraction`` or ``microbatches`` needs a batch and there is none, or the closure
            takes none; if the closure does not return a loss; if ``scope="local"`` meets
            DistributedDataParallel with a static graph.
        ShapeError
            If the closure returns more than one number.
        ParameterError
            If the optimizer holds none of the model's parameters, or none of those to perturb.
        MissingGradientError
            If the closure leaves no gradient on any perturbed parameter; with local scope on all
            processes, if it does so on one.
        NonFiniteError
            If ``rule.nonfinite`` is ``"raise"`` and the norm of an ascent gradient is not finite.
        OrderError
            If a step is under way, in this thread or another, or the optimizer accumulates
            gradients at present, so that its ``step`` does nothing.

        Notes
        -----
        The policies ``skip_step`` and ``raise`` read one number from the device after both passes
        were queued (SAM-5); with a scaler, ``skip_step`` leaves the decision to the scaler and
        reads nothing, unless replicas have perturbations of their own.

        Afterwards every parameter of the model has the gradient of the descent pass alone, also
        those that the optimizer does not hold; what they had before is cleared (SAM-4).
        """
        with self._under_way(optimizer, closure, batch) as (optimizers, reach):
            if any(map(_needs_closure, optimizers)):
                return self._step_with_closure(optimizers, closure, batch, scaler, reach)
            known = scaler if scaler is not None and scaler.is_enabled() else _scaler(optimizers)
            loss, ascent = self._gradients(closure, batch, reach, known)
            _refuse_accumulating(optimizers)
            if ascent is None or self._may_step(ascent, reach, poison=known is not None):
                for acting in optimizers:
                    if scaler is None:
                        acting.step()
                    else:
                        scaler.step(acting)
            if scaler is not None:
                scaler.update()
            self._count += 1
            return loss

    def gradients(
        self, optimizer: Optimizers, closure: Closure, *, batch: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Compute the sharpness-aware gradient for an optimizer that somebody else steps.

        Trainers clip, unscale and step by themselves: this takes the place of their backward pass,
        and counts as a step.

        Parameters
        ----------
        optimizer, closure, batch
            As in :meth:`step`; the closure scales its loss if the trainer does.

        Returns
        -------
        Tensor
            The clean loss, as :meth:`step` returns it.

        Raises
        ------
        ConfigError, ShapeError, ParameterError, MissingGradientError, NonFiniteError, OrderError
            As :meth:`step`.

        Notes
        -----
        If the norm of the ascent gradient is not finite, ``nonfinite="skip_step"`` makes all
        gradients NaN, as :meth:`perturbed` does: a GradScaler skips such a step, other optimizers
        do not.
        """
        with self._under_way(optimizer, closure, batch) as (optimizers, reach):
            loss, ascent = self._gradients(closure, batch, reach, _scaler(optimizers))
            _refuse_accumulating(optimizers)
            if ascent is not None:
                self._may_step(ascent, reach, poison=True)
            self._count += 1
            return loss

    @contextmanager
    def perturbed(self, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
        """Hold the weights at ``w + e``, from the gradients that are there now, inside the block.

        The gradients are cleared at the start, so that the block's backward leaves the descent
        gradient; the weights are restored bit for bit at the end, also after an exception, and so
        are the model's buffers, whose update of the clean pass is the only one (SAM-12). The random
        numbers are the block's own.

        Clear all gradients before the first pass: here nobody can tell what was left over.

        Parameters
        ----------
        *optimizers : torch.optim.Optimizer
            Those that will act. What none of them holds is not perturbed; without any, everything
            is that the rule selects, is not frozen, and has a gradient (SAM-4).

        Raises
        ------
        NonFiniteError
            After the block, if ``rule.nonfinite`` is ``"raise"`` and that norm is not finite.
        MissingGradientError
            If no perturbed parameter has a gradient: call backward first.
        OrderError
            If the weights are already perturbed, or an optimizer accumulates gradients at present.
        ConfigError
            If the rule has ``fraction`` or ``microbatches``, which only :meth:`step` can do; or if
            the scope is local, and the last pass through DistributedDataParallel was reduced.
        ParameterError
            If the optimizers hold none of the model's parameters, or none of those to perturb.

        Notes
        -----
        If the norm of the ascent gradient is not finite, ``nonfinite="skip_step"`` cannot keep the
        optimizer from acting: all gradients are NaN after the block, as a GradScaler and other code
        that skips bad steps looks for. Without such code, check them before ``optimizer.step()``,
        or use :meth:`step`, ``"skip_perturb"`` or ``"raise"``.
        """
        if self.rule.fraction != 1 or self.rule.microbatches != 1:
            raise ConfigError(
                f"fraction={self.rule.fraction} and microbatches={self.rule.microbatches} need "
                "step(optimizer, closure, batch=...); perturbed() takes the gradients that are there"
            )
        if self.is_perturbed:
            raise OrderError("perturbed() inside perturbed(): the weights are already perturbed")
        _refuse_accumulating(optimizers)
        reach = self._reach(optimizers)
        # DistributedDataParallel keeps this flag of its last forward pass.
        if any(getattr(ddp, "require_forward_param_sync", False) for ddp in self._local_replicas()):
            raise ConfigError(
                "scope='local', and the gradients that are there were reduced by DistributedDataParallel; "
                "run the first forward and backward inside 'with model.no_sync():', or use "
                "SAM(scope='global')"
            )
        ascent = self._ascent(reach)
        put_back = remember_buffers(self.model)
        try:
            self._perturb(ascent)
            reach.clear()
            yield
        finally:
            self._restore()
            put_back()
        self._may_step(ascent, reach, poison=True)

    def state_dict(self) -> dict[str, int]:
        """Return the counter (SAM-13); the optimizer's state is saved by the optimizer.

        Raises
        ------
        OrderError
            If the weights are perturbed.
        """
        if self.is_perturbed:
            raise OrderError(_PERTURBED)
        return {"version": 1, "count": self._count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from :meth:`state_dict`.

        Raises
        ------
        FormatError
            If this is not such a state.
        """
        count = state.get("count") if isinstance(state, Mapping) else None
        if type(count) is not int or count < 0 or state.get("version") != 1:
            raise FormatError(f"this is not a state of SharpnessAware: {short_repr(state)}")
        self._count = count

    # --- the stages of one step -----------------------------------------------------------------

    @contextmanager
    def _under_way(
        self, optimizer: Optimizers, closure: Closure, batch: Sequence[Tensor] | None
    ) -> Iterator[tuple[tuple[Any, ...], _Reach]]:
        """Check what a step is given, and refuse another one meanwhile."""
        optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
        if not optimizers:
            raise ParameterError("step() got an empty list of optimizers; give at least one")
        self._check_batch(closure, batch)
        if is_recorded():
            raise ConfigError(
                "a CUDA graph cannot record a whole step of SAM, which sets the generators of random "
                "numbers and counts on the host: record the closure's forward and backward pass, "
                "and call step() outside"
            )
        if not self._lock.acquire(blocking=False):
            raise OrderError("a step of this SharpnessAware is already under way")
        try:
            if self.is_perturbed:
                raise OrderError("step() inside perturbed(): leave the block first")
            reach = self._reach(optimizers)
            _refuse_accumulating(optimizers)
            yield optimizers, reach
        finally:
            self._lock.release()

    def _select(self) -> None:
        """Find the model's parameters as they are now, whatever was replaced or converted since."""
        forget_weights(self.model)  # parameters that are gathered would hide those that are trained
        parameters = list(unwrap(self.model).parameters())
        if len(parameters) == len(self._parameters) and all(
            map(operator.is_, parameters, self._parameters)
        ):
            return
        named = named_parameters(self.model)
        try:
            selected = perturbed_names(named, self.rule)
        except SelectorError as error:
            raise with_ties(error, ties(self.model)) from None
        self._selected = [named[name] for name in selected]
        self._parameters = parameters

    def _reach(self, optimizers: tuple[Any, ...]) -> _Reach:
        """Tell which parameters a step may perturb, and whose gradients are its own (SAM-4)."""
        self._select()
        held = _held(optimizers)
        selected, everything = self._selected, {id(p): p for p in self._parameters}
        if held is not None:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            if everything.keys().isdisjoint(held):
                raise ParameterError(
                    f"{names} holds none of the model's parameters; make it from those of "
                    "the model that SharpnessAware was given"
                )
            selected = [p for p in selected if id(p) in held]
            if not selected:
                raise ParameterError(
                    f"{names} holds none of the parameters that the rule perturbs: "
                    f"only={list(self.rule.only)}, exclude={list(self.rule.exclude)}; "
                    "select some that this optimizer moves"
                )
            everything |= held
        return _Reach([p for p in selected if p.requires_grad], list(everything.values()))

    def _gradients(
        self,
        closure: Closure,
        batch: Sequence[Tensor] | None,
        reach: _Reach,
        scaler: Any = None,
    ) -> tuple[Tensor, _Ascent | None]:
        """Leave the descent gradient on the parameters; return the clean loss and the ascent."""
        forget_weights(self.model)  # an optimizer may have moved them since
        if not self.rule.perturbs(self._count):
            reach.clear()
            return call(closure, batch), None
        microbatches = _split(batch, self.rule.microbatches)
        sizes = [1 if micro is None else len(micro[0]) for micro in microbatches]
        scale = None
        if scaler is not None:  # without a host sync
            scale = scaler.scale(torch.ones((), device=self._parameters[0].device))
        passes = [self._two_passes(closure, microbatches[0], reach, scale)]
        if len(microbatches) > 1:
            sums = reach.weighted(sizes[0] / sum(sizes))
            for micro, size in zip(microbatches[1:], sizes[1:], strict=True):
                passes.append(self._two_passes(closure, micro, reach, scale))
                for index, gradient in reach.weighted(size / sum(sizes)).items():
                    sums[index] = sums[index] + gradient if index in sums else gradient
            for index, parameter in enumerate(reach.everything):
                parameter.grad = sums.get(index)
        parts, ascents = zip(*passes, strict=True)
        loss = _mean([one.loss for one in parts], [self._ascent_size(size) for size in sizes])
        perturbed = _mean([one.perturbed_loss for one in parts], sizes)
        # max() passes NaN on, so one number says whether every norm is finite.
        norm = parts[0].norm if len(parts) == 1 else torch.stack([one.norm for one in parts]).max()
        self._stats = SamStats(norm, loss, perturbed)
        missing = any(ascent.missing for ascent in ascents)
        return self._stats.loss, _Ascent(None, norm, missing)

    def _two_passes(
        self,
        closure: Closure,
        batch: Sequence[Tensor] | None,
        reach: _Reach,
        scale: Tensor | None,
    ) -> tuple[SamStats, _Ascent]:
        first = batch
        if batch is not None and self.rule.fraction < 1:
            first = [tensor[: self._ascent_size(len(tensor))] for tensor in batch]
        # Both passes start from the same buffers and draw the same random numbers. What remains of
        # the buffers is the clean pass's, unless that saw only a part of the batch (SAM-12).
        random = random_state(self._parameters)
        put_back = remember_buffers(self.model)
        written = watch(self._parameters)
        try:
            with unsynchronized(self._local_replicas()):
                reach.clear()
                loss = call(closure, first)
            keep = [remember(written())]
            if first is batch:
                keep.append(remember_buffers(self.model))
        finally:
            put_back()
        ascent = self._ascent(reach)
        try:
            self._perturb(ascent, scale)
            set_random_state(random)
            reach.clear()
            perturbed_loss = call(closure, batch)
        finally:
            self._restore()
            for put_back in keep:
                put_back()
        norm = ascent.norm if scale is None else ascent.norm / scale.to(ascent.norm.device)
        return SamStats(norm, loss, perturbed_loss), ascent

    def _ascent_size(self, examples: int) -> int:
        """Return how many examples the ascent pass sees (SAM-7)."""
        return math.ceil(self.rule.fraction * examples)

    def _ascent(self, reach: _Reach) -> _Ascent:
        """Take the gradients that are there for the direction uphill."""
        given = [p for p in reach.candidates if p.grad is not None]
        direction = self._memory.direction(given, self.rule)
        norm = direction.norm(reach.candidates)
        # No host sync unless there is no gradient here; other processes may have one.
        missing = not direction and (norm is None or norm.item() == 0)
        if missing:
            if not self._local_replicas():
                raise MissingGradientError(_MISSING)
            # Replicas raise together, after the descent pass that all of them take part in.
            home = local(self._parameters[0]).device
            norm = torch.tensor(torch.nan, dtype=wide(home), device=home)
        return _Ascent(direction, norm, missing)

    def _perturb(self, ascent: _Ascent, scale: Tensor | None = None) -> None:
        """Copy the weights aside and move them to ``w + e``, unless the norm is 0 or not finite.

        ``scale`` is what the loss is multiplied by, so that ``eps`` is as well.
        """
        norm = ascent.norm
        eps = self.rule.eps if scale is None else self.rule.eps * scale.to(norm.device)
        factor = value_at("rho", self.rule.rho, self._count) / (norm + eps)
        factor = factor.clamp(max=torch.finfo(torch.float32).max)  # the norm may be subnormal
        usable = (norm > 0) & (norm < torch.inf)
        factor = torch.where(usable, factor, 0.0)
        self._refusal = unwrap(self.model).register_state_dict_pre_hook(_RefuseToSave())
        self._backup = []
        assert ascent.direction is not None
        ascent.direction.move_(factor, usable, self._backup)
        forget_weights(self.model)

    def _restore(self) -> None:
        backup, self._backup = self._backup, None
        if backup is None:
            return
        self._refusal.remove()
        with torch.no_grad():
            alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
            for weight, copy in backup:
                if type(weight) is Tensor:
                    alike.setdefault((weight.device, weight.dtype), []).append((weight, copy))
                else:
                    weight.copy_(copy)
            for group in alike.values():
                torch._foreach_copy_(*zip(*group, strict=True))  # many tensors a launch
        forget_weights(self.model)

    def _may_step(self, ascent: _Ascent, reach: _Reach, *, poison: bool = False) -> bool:
        """Apply the policy for a norm that is not finite (SAM-5).

        With ``poison`` a step is skipped by making its gradients NaN, for somebody else to see.
        """
        policy = self.rule.nonfinite
        if policy == "skip_perturb":
            # The descent gradient is everybody's, so without one all processes raise.
            if ascent.missing and all(p.grad is None for p in reach.candidates):
                raise MissingGradientError(_MISSING)
            return True
        norm = self._everywhere(ascent)
        poison = poison and policy == "skip_step"
        if poison:
            reach.poison(norm)
            if not self._local_replicas():
                return True
        value = norm.item()
        if value == -math.inf:
            raise MissingGradientError(f"on this or another replica, {_MISSING}")
        if poison or math.isfinite(value):
            return True
        if policy == "raise":
            raise NonFiniteError(
                f"the norm of the ascent gradient is {value}; the weights are unchanged. "
                "SAM(nonfinite='skip_step') skips such steps"
            )
        return False

    def _everywhere(self, ascent: _Ascent) -> Tensor:
        """Return the norm, or what all replicas with their own norms act on alike (SAM-5).

        That is NaN if one of their norms is not finite, and minus infinity if one has no gradient
        at all.
        """
        norm, replicas = ascent.norm, self._local_replicas()
        if not replicas:
            return norm
        bad = torch.full_like(norm, 2) if ascent.missing else (~norm.isfinite()).to(norm.dtype)
        bad = worst(bad, replicas)
        norm = torch.where((bad > 0) & norm.isfinite(), torch.nan, norm)
        return torch.where(bad == 2, -torch.inf, norm)

    def _local_replicas(self) -> tuple[Any, ...]:
        """Return the wrappers that must not reduce the ascent gradient (SAM-9)."""
        if self.rule.scope != "local":
            return ()
        if self._replicas is None:
            self._replicas = replicas_of(self.model, self._parameters)
        refuse_static_graph(self._replicas)
        return self._replicas

    def _step_with_closure(
        self, optimizers: tuple[Any, ...], closure: Closure, batch: Any, scaler: Any, reach: _Reach
    ) -> Tensor:
        """Drive an optimizer such as LBFGS, which evaluates the closure itself."""
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        if scaler is not None or _scaler(optimizers) is not None:
            raise ConfigError(f"{names} evaluates the closure itself, which no GradScaler supports")
        if len(optimizers) > 1:
            raise ConfigError(
                f"{names}: an optimizer that evaluates the closure itself has to be the only one"
            )
        losses: list[Tensor] = []

        def sharpness_aware() -> Tensor:
            loss, ascent = self._gradients(closure, batch, reach)
            losses.append(loss)
            if ascent is not None and not self._may_step(ascent, reach):
                raise NonFiniteError(
                    f"{names} cannot skip a step from inside its closure, and the "
                    "norm of the ascent gradient is not finite; the weights are unchanged"
                )
            return loss

        optimizers[0].step(sharpness_aware)
        self._count += 1
        return losses[0]

    def _check_batch(self, closure: Closure, batch: Sequence[Tensor] | None) -> None:
        rule = self.rule
        check_batch_given(
            rule.fraction,
            rule.microbatches,
            given=batch is not None,
            cure="call step(optimizer, closure, batch=(inputs, targets)) with a closure that uses the "
            "tensors it is given",
        )
        if batch is None:
            return
        check_batch(batch)
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
        check_microbatches(rule.microbatches, min(sizes))


@dataclass(frozen=True)
class _Reach:
    """What one step of SAM reaches.

    Attributes
    ----------
    candidates : list of Tensor
        What is perturbed if it has a gradient after the first pass.
    everything : list of Tensor
        Whose gradients are the step's own: the parameters of the model and of the optimizers.
    """

    candidates: list[Tensor]
    everything: list[Tensor]

    def clear(self) -> None:
        """Drop all gradients, so that a pass starts without any (SAM-4)."""
        for parameter in self.everything:
            parameter.grad = None

    def weighted(self, weight: float) -> dict[int, Tensor]:
        """Return the gradients that are there, times a number, by the parameter's place."""
        return {
            index: p.grad.detach() * weight
            for index, p in enumerate(self.everything)
            if p.grad is not None
        }

    def poison(self, norm: Tensor) -> None:
        """Make all gradients NaN if the norm is not finite, without a host sync."""
        bad = ~norm.isfinite()
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in (local(p.grad) for p in self.everything if p.grad is not None):
            values = gradient._values() if gradient.is_sparse else gradient
            if values.is_complex():
                values.masked_fill_(bad.to(values.device), torch.nan)
            else:
                alike.setdefault((values.device, values.dtype), []).append(values)
        factor = torch.where(bad, torch.nan, 1.0)
        for (device, dtype), group in alike.items():  # many tensors a launch
            torch._foreach_mul_(group, factor.to(device, dtype))


@dataclass(frozen=True)
class _Ascent:
    """The direction uphill: parameters and gradients, sharded alike, and the norm of all.

    ``missing`` says that this replica has no gradient at all; the norm is NaN then.
    """

    direction: Direction | None
    norm: Tensor
    missing: bool = False


class _RefuseToSave:
    """State-dict hook that refuses to save, copy or pickle a model with perturbed weights."""

    def __call__(self, *_: Any) -> NoReturn:
        raise OrderError(_PERTURBED)

    def __reduce__(self) -> NoReturn:
        self()  # a pickle of the model has its weights too


_PERTURBED: Final = "the weights are perturbed: save after step(), or outside the perturbed() block"
_MISSING: Final = (
    "no perturbed parameter has a gradient after the first pass; the closure must call backward, and "
    "only/exclude must leave parameters that take part in the loss, are not frozen and are in the optimizer"
)


# --- helpers --------------------------------------------------------------------------------------


def _chain(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer, the one that it wraps, and so on."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _held(optimizers: Iterable[Any]) -> dict[int, Tensor] | None:
    """Return the parameters that optimizers hold, by id; None if there are none, or unknown."""
    held: dict[int, Tensor] = {}
    for optimizer in optimizers:
        groups = next(
            (inner.param_groups for inner in _chain(optimizer) if hasattr(inner, "param_groups")),
            None,
        )
        if groups is None:
            return None
        held.update({id(p): p for group in groups for p in group["params"]})
    return held or None


def _refuse_accumulating(optimizers: Iterable[Any]) -> None:
    """Raise OrderError while a wrapper, as Accelerate's, makes ``step`` do nothing."""
    for inner in (inner for optimizer in optimizers for inner in _chain(optimizer)):
        if getattr(getattr(inner, "gradient_state", None), "sync_gradients", True) is False:
            raise OrderError(
                f"{type(inner).__name__} accumulates gradients at present, so its zero_grad() and step() do "
                "nothing, and both passes of SAM have to see all micro-batches: call step() outside "
                "accumulate(), once for all of them, with a closure that goes over them"
            )


def _scaler(optimizers: Iterable[Any]) -> Any:
    """Return the GradScaler that wrappers step through, as those of Accelerate and Lightning do."""
    owners = [inner for optimizer in optimizers for inner in _chain(optimizer)]
    # Lightning's optimizers, of a Trainer and of Fabric, leave scaling to their strategy.
    strategies = [getattr(owner, "_strategy", None) for owner in owners]
    owners += [
        getattr(strategy, name, None)
        for strategy in strategies
        for name in ("precision_plugin", "precision")
    ]
    scalers: list[Any] = [getattr(owner, "scaler", None) for owner in owners]
    working = (one for one in scalers if hasattr(one, "unscale_") and one.is_enabled())
    return next(working, None)


def _split(batch: Sequence[Tensor] | None, count: int) -> list[Sequence[Tensor] | None]:
    """Split into micro-batches of neighbours whose sizes differ by at most one (SAM-8)."""
    if batch is None or count == 1:
        return [batch]
    columns = [torch.tensor_split(tensor, count) for tensor in batch]
    return [list(micro) for micro in zip(*columns, strict=True)]


def _mean(values: list[Tensor], weights: list[int]) -> Tensor:
    """Return the mean of scalars, of each as many times as its weight says."""
    if len(values) == 1:
        return values[0]
    total = sum(weights)
    mean = sum(n / total * value for n, value in zip(weights, values, strict=True))
    return torch.as_tensor(mean)


def _needs_closure(optimizer: Any) -> bool:
    """Tell whether ``optimizer.step`` cannot be called without a closure, as LBFGS's cannot."""
    for inner in _chain(optimizer):
        if isinstance(inner, torch.optim.LBFGS):
            return True
        # A learning rate scheduler puts a function without self in front of the class's own step.
        step = getattr(type(inner), "step", None)
        try:
            if step is None:
                inspect.signature(inner.step).bind()
            else:
                inspect.signature(step).bind(inner)
        except TypeError:
            return True
    return False
