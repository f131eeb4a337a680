"""The numerics: one norm per unit, one comparison for all units, scaling in place.

The norms of all units stand in one flat buffer for the weights and one for the gradients, so
limits, decisions and scales are a handful of small operations, whatever the number of parameters.
Then

* on the CPU reading a value is free, so only tensors that contain a clipped unit are written;
* on a GPU with Triton a few launches do all of it, and write clipped units only;
* processes that hold shards add up their squared norms in one buffer, and decide alike;
* elsewhere every gradient is multiplied by its scales (1 keeps its bits), without a host sync.

Letters at the end of a name: U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.linalg import vector_norm

from agc import AGC, Plan
from agc.checks import NO_GRADIENT
from agc.config import Clipping
from agc.errors import MissingGradientError, NonFiniteError
from agc.plan import WHOLE, PlanEntry
from agc_torch import fused
from agc_torch.norms import all_norms, all_shares, grouped, kind, on_host, wide
from agc_torch.schedules import Step, value_at
from agc_torch.shards import is_dtensor, sum_over
from agc_torch.stats import Stats, UnitNumbers
from agc_torch.units import Model, resolve
from agc_torch.views import Home, ShardView, View, check_pair, layout, views

__all__ = ["Memory", "adaptive_clip_grad_", "clip_", "limit_norm_", "whole"]

_REAL: Final = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_HALF: Final = (torch.float16, torch.bfloat16)
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the bytes of a number."""
_CHUNK: Final = 1 << 22
"""Elements clipped at a time, which are read again while they are in the cache."""
_COPY_BLOCK: Final = 1 << 16
"""Elements that a CPU copies at a time."""
_SMALLEST: Final = 2.0**-100
"""Factors down to here are accurate in float32."""


def adaptive_clip_grad_(
    model: Model, rule: AGC, *, plan: Plan | None = None, step: Step = 0
) -> Stats:
    r"""Clip the gradients of a model in place, as ``clip_grad_norm_`` does (AGC-1 to AGC-12).

    Parameters
    ----------
    model : Module, mapping of name to tensor, or iterable of (name, tensor)
        Whose ``.grad`` are clipped: dense, row-sparse (COO) or ``DTensor``; floating point or
        complex; in the parameter's dtype or another. A parameter without a gradient is left alone.
    rule : AGC
        The configuration.
    plan : Plan, optional
        A plan made before, by :func:`agc_torch.plan`: its units, thresholds and exclusions take the
        place of the rule's, and only ``eps``, ``div_eps`` and ``nonfinite`` are the rule's. A
        module's plan is remembered anyway.
    step : int or integer tensor, default 0
        The optimizer step, for schedules. Inside ``torch.compile`` give a tensor: it is traced, and
        does not recompile.

    Returns
    -------
    Stats
        Telemetry; reading it is a host sync, making it is not.

    Raises
    ------
    MissingGradientError
        If no parameter has a gradient.
    ShapeError, DTypeError, UnitsError, NonFiniteError
        If a gradient and its parameter differ in shape, have a dtype that AGC does not support, if
        a sparse gradient does not fit its units, or if a norm is not finite and
        ``nonfinite="raise"``. The message names the parameter; no gradient has been changed.
    ConfigError, SelectorError, AmbiguousUnitsError, ParameterError
        As :func:`agc_torch.plan`.

    Notes
    -----
    Call it where ``clip_grad_norm_`` would stand: after ``GradScaler.unscale_``, accumulation and
    reduction across replicas, before the optimizer's step (AGC-7). :func:`agc_torch.attach` does
    that by itself.

    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \epsilon)}{\|G_i\|} G_i
        \quad\text{if}\quad \|G_i\| > \lambda \max(\|W_i\|, \epsilon)

    References
    ----------
    Brock, De, Smith, Simonyan, arXiv:2102.06171, Eq. 3.

    Examples
    --------
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
    >>> layer.weight.grad = torch.tensor([[0.0, 1.0]])
    >>> stats = adaptive_clip_grad_(layer, AGC(clipping=0.01))
    >>> layer.weight.grad
    tensor([[0.0000, 0.0500]])
    >>> stats.total()
    Stats(units=1, clipped=1, nonfinite=0, max_ratio=0.2, min_scale=0.05)
    """
    pairs = resolve(model, rule, plan)[1]
    stats = clip_(pairs, rule, step=step, memory=_memory(model))
    if all(tensor.grad is None for _, tensor in pairs) and not _any_gradient(stats):
        raise MissingGradientError(NO_GRADIENT)
    return stats


def _any_gradient(stats: Stats) -> bool:
    """Tell whether another process has a gradient; a host sync."""
    total = stats.total()
    return total.max_ratio > 0 or total.nonfinite > 0


def clip_(
    pairs: Iterable[tuple[PlanEntry, Tensor]],
    rule: AGC,
    *,
    step: Step = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    missing: Callable[[PlanEntry, Tensor], None] | None = None,
    memory: Memory | None = None,
) -> Stats:
    """Clip parameters paired with their entries of a plan; see :func:`adaptive_clip_grad_`.

    Parameters
    ----------
    pairs : iterable of (PlanEntry, Tensor)
        What :func:`agc_torch.units.resolve` returns, or some of it.
    rule, step
        As in :func:`adaptive_clip_grad_`.
    grad_scale : scalar tensor, optional
        What the gradients are still multiplied by, if a fused optimizer is going to unscale them.
    found_inf : scalar tensor, optional
        Not 0 if that optimizer is going to skip the step; then ``nonfinite="raise"`` does not
        raise.
    missing : callable, optional
        Called with what has no gradient.
    memory : Memory, optional
        What was the same in the last step, for the same ``pairs``.

    Notes
    -----
    Whether a ``DTensor`` takes part is the same in all processes (AGC-5): where a trainable one has
    no gradient in this process, it stands for zeros, and counts as looked at.
    """
    with torch.no_grad():
        work = (memory or Memory()).work(pairs, missing)
        raises = rule.nonfinite == "raise" and not (found_inf is not None and found_inf.any())
        results = []
        try:
            for chunk in work.chunks:
                result = chunk.decide(rule, step, grad_scale)
                results.append((chunk, result))
                if not raises:
                    chunk.scale(result, zero=rule.nonfinite == "zero")
            if raises:
                _raise_nonfinite([result for _, result in results])
                for chunk, result in results:
                    chunk.scale(result, zero=False)
        finally:
            if memory is not None:
                work.release()
    return Stats(work.names, [result for _, result in results])


def limit_norm_(
    pairs: Iterable[tuple[PlanEntry, Tensor]],
    max_norm: float,
    rule: AGC,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Scale all gradients together down to ``max_norm`` (AGC-7; Brock et al. 2021, equation 1).

    Parameters
    ----------
    pairs : iterable of (PlanEntry, Tensor)
        The entries say one unit for each parameter, clipped or not; see :func:`whole`.
    max_norm : float
        The largest norm of all gradients taken together, over all processes that share them.
    rule : AGC
        Its policy decides what becomes of all gradients if their norm is not finite (AGC-4).
    grad_scale, found_inf : scalar tensor, optional
        As in :func:`clip_`.

    Raises
    ------
    NonFiniteError
        If the norm is not finite and ``nonfinite="raise"``.
    """
    with torch.no_grad():
        jobs = _jobs(pairs, None)
        gradients = [job.gradient for job in jobs]
        if not gradients:
            return
        groups: dict[Home, list[View]] = {}
        for gradient in gradients:
            groups.setdefault(gradient.home, []).append(gradient)
        device = gradients[0].home[0]
        norms = [
            vector_norm(all_norms(group, [view.source for view in group], 0.0)).to(device)
            for group in groups.values()
        ]
        norm = vector_norm(torch.stack(norms))
        if grad_scale is not None:
            norm = norm / grad_scale.to(device, non_blocking=True)
        bad = (norm < torch.inf).logical_not()
        if rule.nonfinite == "raise" and bad and not (found_inf is not None and found_inf.any()):
            names = [job.entry.name for job in jobs if not job.gradient.tensor.isfinite().all()]
            raise NonFiniteError(
                f"the norm of all gradients together, which max_norm limits, is {norm.item()}; not finite are "
                f"the gradients of {names}"
            )
        # clip_grad_norm_ would multiply finite gradients by 0 if another is infinite, and it adds
        # 1e-6 to the norm, which is much beside a small one.
        factor = torch.where(bad, torch.nan, (max_norm / norm).clamp(max=1.0))
        if on_host(device) and factor == 1:
            return
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in (gradient.tensor for gradient in gradients):
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for (device, _), tensors in alike.items():
            _multiply_(tensors, factor.to(device, non_blocking=True))
            if rule.nonfinite == "zero":
                _zero_(tensors, bad.to(device, non_blocking=True))


def _multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of one device and dtype by a number, many of them a launch."""
    if tensors[0].dtype in _HALF:  # whose product with the number rounded like them would be coarse
        seen = torch.zeros_like(factor, dtype=torch.float32)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, seen, factor.float())
    else:
        torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))


def _zero_(tensors: list[Tensor], where: Tensor) -> None:
    """Make tensors of one device and dtype 0 if a condition is true, whatever they hold.

    Their bits are multiplied: 0 times NaN would be NaN, and to fill takes a launch a tensor.
    """
    bits = _BITS[tensors[0].itemsize]
    torch._foreach_mul_([tensor.view(bits) for tensor in tensors], where.logical_not().to(bits))


def whole(entry: PlanEntry) -> PlanEntry:
    """Return the entry that takes a parameter as one unit, and as one that is clipped."""
    return replace(
        entry, units=WHOLE, count=min(1, math.prod(entry.shape)), clipping=1.0, excluded=False
    )


class _Job(NamedTuple):
    """One gradient to clip, and its parameter's place among the pairs."""

    place: int
    entry: PlanEntry
    weight: View
    gradient: View


def _jobs(
    pairs: Iterable[tuple[PlanEntry, Tensor]],
    missing: Callable[[PlanEntry, Tensor], None] | None,
) -> list[_Job]:
    """Return what there is to clip."""
    jobs = []
    for place, (entry, parameter) in enumerate(pairs):
        gradient = parameter.grad
        if gradient is None:
            if missing is not None:
                missing(entry, parameter)
            if not (entry.clipped and parameter.requires_grad and is_dtensor(parameter)):
                continue
            # Other processes may have one, and wait for this one.
            gradient = torch.zeros_like(parameter)
        check_pair(entry, parameter, gradient)
        if entry.clipped:
            if gradient.layout == torch.sparse_coo and not gradient.is_coalesced():
                parameter.grad = gradient = gradient.coalesce()
            jobs.append(_Job(place, entry, *views(entry, parameter, gradient)))
    return jobs


class Memory:
    """What is the same from step to step, so that it is found once.

    Shapes, strides and dtypes settle which tensors are clipped together and how each is seen. They
    are compared in every step, without Python code for each tensor; gradients are not kept from one
    step to the next.
    """

    def __init__(self) -> None:
        self._pairs: object = None
        self._parameters: list[Tensor] = []
        self._sharded = False
        self._missing: list[tuple[PlanEntry, Tensor]] = []
        self._layout: list[list[Any]] | None = None
        self._work = _Work([])

    def work(
        self,
        pairs: Iterable[tuple[PlanEntry, Tensor]],
        missing: Callable[[PlanEntry, Tensor], None] | None,
    ) -> _Work:
        """Return what there is to clip now."""
        if torch.compiler.is_compiling() or not isinstance(pairs, list):
            return _Work(_jobs(pairs, missing))
        if self._pairs is not pairs:
            self._pairs, self._layout = pairs, None
            self._parameters = [parameter for _, parameter in pairs]
            self._sharded = any(map(is_dtensor, self._parameters))
        parameters: list[Tensor] = self._parameters
        gradients = [parameter.grad for parameter in parameters]
        placed = _placed(parameters, gradients) if self._sharded else []
        if self._sharded:
            parameters, gradients = list(map(_here, parameters)), list(map(_here, gradients))
        now = layout(parameters, gradients)
        if now is not None:
            now = None if placed is None else [*now, placed]
        if now is not None and now == self._layout:
            if missing is not None:
                for pair in self._missing:
                    missing(*pair)
            if self._work.renew(parameters, gradients, now[0]):
                return self._work
        self._layout = None  # in case of an error
        jobs = _jobs(pairs, missing)
        self._work = _Work(jobs)
        for job in jobs:
            job.weight.release()
            job.gradient.release()
        self._missing = [pair for pair, grad in zip(pairs, gradients, strict=True) if grad is None]
        self._layout = now if _is_real(gradients) else None
        return self._work


_MEMORIES: Final[WeakKeyDictionary[torch.nn.Module, Memory]] = WeakKeyDictionary()


def _memory(model: object) -> Memory | None:
    """Return what is remembered of a module, as of an optimizer; of tensors by name, nothing."""
    if torch.compiler.is_compiling() or not isinstance(model, torch.nn.Module):
        return None
    if model not in _MEMORIES:
        _MEMORIES[model] = Memory()
    return _MEMORIES[model]


def _here(tensor: Any) -> Any:
    """Return this process's shard of a ``DTensor``; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _placed(parameters: list[Any], gradients: list[Any]) -> list[Any] | None:
    """Return how ``DTensor``s are placed; None if there is more to do than to clip what is there.

    That is to add up partial sums, or to stand in for a gradient that other processes may have.
    """
    placed: list[Any] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None and parameter.requires_grad and is_dtensor(parameter):
            return None
        for tensor in (parameter, gradient):
            if tensor is None or not is_dtensor(tensor):
                placed.append(None)
            elif any(placement.is_partial() for placement in tensor.placements):
                return None
            else:
                placed.append((tensor.device_mesh, tensor.placements, tensor.shape))
    return placed


def _is_real(gradients: list[Tensor | None]) -> bool:
    """Tell whether gradients are dense and real, so that any others like them are."""
    given = [gradient for gradient in gradients if gradient is not None]
    layouts, dtypes = {tensor.layout for tensor in given}, {tensor.dtype for tensor in given}
    return layouts <= {torch.strided} and dtypes <= _REAL


class _Work:
    """What there is to clip in a step.

    Attributes
    ----------
    chunks : list of _Chunk and _LaunchedChunk
    names : list of str
        Of the parameters.
    """

    def __init__(self, jobs: list[_Job]) -> None:
        self.chunks = list(_chunks(jobs))
        self.names = [job.entry.name for job in jobs]

    def renew(self, parameters: list[Tensor], gradients: list[Any], addresses: list[int]) -> bool:
        """Take the tensors of another step; return whether they are clipped as those before.

        Parameters
        ----------
        parameters, gradients : list of Tensor
            By their places among the pairs; laid out as in the step before.
        addresses : list of int
            Of the parameters.
        """
        return all(chunk.renew(parameters, gradients, addresses) for chunk in self.chunks)

    def release(self) -> None:
        """Let go of all tensors."""
        for chunk in self.chunks:
            chunk.release()


def _chunks(jobs: list[_Job]) -> Iterable[_Chunk | _LaunchedChunk]:
    """Group jobs that are clipped together.

    They have one home. Of whole tensors, without Triton they have one threshold too, and on a CPU
    they are as many as its cache holds.
    """
    launched: dict[torch.device, list[_Job]] = {}
    others = []
    for job in jobs:
        device, mesh = job.gradient.home
        if mesh is None and fused.available(device) and _parts(job) is not None:
            launched.setdefault(device, []).append(job)
        else:
            others.append(job)
    for device, group in launched.items():
        table = _table(group, device)
        if table is None:
            others += group
        else:
            yield _LaunchedChunk(group, table)
    for group in _by_home(others):
        shared = _shared(group)
        yield _Chunk(group) if shared is None else _SharedChunk(group, *shared)


def _by_home(jobs: list[_Job]) -> Iterable[list[_Job]]:
    groups: list[tuple[tuple[Home, Clipping], list[_Job]]] = []
    for job in jobs:
        # All jobs of a mesh share one collective.
        clipping = job.entry.clipping if job.gradient.home[1] is None else None
        key = job.gradient.home, clipping
        # A list: torch.compile of older releases takes no next() with a default.
        same = [group for known, group in groups if known == key]
        if same:
            same[0].append(job)
        else:
            groups.append((key, [job]))
    for ((device, mesh), _), group in groups:
        if mesh is not None:
            entries, rules = _thresholds(group)
            yield [
                job
                for rule in range(len(entries))
                for job, mine in zip(group, rules, strict=True)
                if mine == rule
            ]
            continue
        if not on_host(device):
            yield group
            continue
        group.sort(key=lambda job: (kind(job.gradient), job.gradient.tensor.numel()))
        chunk: list[_Job] = []
        left = _CHUNK
        for job in group:
            left -= job.gradient.tensor.numel()
            if left < 0 and chunk:
                yield chunk
                chunk, left = [], _CHUNK - job.gradient.tensor.numel()
            chunk.append(job)
        yield chunk


class _Chunk:
    """Jobs of one home, clipped by PyTorch's own operations.

    Those of one threshold follow each other.
    """

    def __init__(self, jobs: list[_Job]) -> None:
        self._jobs, self._counts = jobs, _counts(jobs)
        self._entries, self._sizes = _thresholds(jobs)[0], _sizes(jobs)
        self._written: Sequence[int] = range(len(jobs))
        self._places = [job.place for job in jobs]
        self._views = [job.weight for job in jobs] + [job.gradient for job in jobs]
        self._split = [i for i, v in enumerate(self._views) if v.axes.view != v.axes.shape]
        self._sources = [view.source for view in self._views]
        self._gradients = [job.gradient.tensor for job in jobs]
        self._wide = any(gradient.dtype == torch.float64 for gradient in self._gradients)
        self._device = self._views[0].home[0]
        self._host = on_host(self._device)
        self._groups = grouped(self._views) if self._host else None

    def renew(self, parameters: list[Tensor], gradients: list[Any], _: list[int]) -> bool:
        """Take the tensors of another step, which are plain."""
        sources = _taken(parameters, self._places) + _taken(gradients, self._places)
        for index in self._split:
            sources[index] = sources[index].view(self._views[index].axes.view)
        self._sources, self._gradients = sources, sources[len(self._jobs) :]
        return True

    def release(self) -> None:
        """Let go of all tensors."""
        self._sources = self._gradients = []

    def decide(self, rule: AGC, step: Step, grad_scale: Tensor | None) -> UnitNumbers:
        """Return norms and limits of all units (AGC-1)."""
        thresholds = _at(self._entries, step, self._device)
        # Of one threshold, unless a mesh has more, where no norm is taken again.
        least = thresholds[0] if isinstance(thresholds[0], float) else 0.0
        lower = min(least, 1.0) * rule.eps
        norms_U = all_norms(self._views, self._sources, lower, self._groups)
        floor_U, norm_U = norms_U.view(2, norms_U.numel() // 2).unbind()
        floor_U = floor_U.clamp(min=rule.eps)
        if grad_scale is not None:
            norm_U = norm_U / grad_scale.to(norm_U.device, non_blocking=True)
        if len(thresholds) == 1:
            limit_U = floor_U * thresholds[0]
        else:
            parts = zip(floor_U.split(self._sizes), thresholds, strict=True)
            limit_U = torch.cat([part * threshold for part, threshold in parts])
        return UnitNumbers(self._counts, floor_U, limit_U, norm_U, rule.div_eps)

    def scale(self, numbers: UnitNumbers, *, zero: bool) -> None:
        """Multiply every gradient by its scales, in place, with one rounding (AGC-2 to AGC-4)."""
        touched, finite = self._written, False
        sizes = [count for _, count in numbers.counts]
        if self._host:
            least, most = _slack(numbers)
            if least >= 0 and most < math.inf:
                return
            finite = math.isfinite(least) and math.isfinite(most)
            if not most < 0:  # some unit is not clipped
                untouched_U = (numbers.norm <= numbers.limit) & (numbers.floor < torch.inf)
                split = untouched_U.split(sizes)
                touched = [index for index in touched if not split[index].all()]
        if not finite:
            factor_U = numbers.factor
        elif most < 0:
            factor_U = numbers.quotient
        else:
            factor_U = numbers.finite_scale
        narrow_U = factor_U
        if self._host and (factor_U if finite else factor_U.nan_to_num(1.0)).min() >= _SMALLEST:
            # Float64 factors make a float64 copy of the gradient on a CPU. Only factors that
            # float32 cannot hold are worth that: of gradients 1e30 times too large.
            narrow_U = factor_U.float()
        narrow = narrow_U.split(sizes)
        wide = factor_U.split(sizes) if self._wide else narrow
        blocks: list[Tensor] = []
        factors: list[Tensor] = []
        for index in touched:
            gradient = self._gradients[index]
            factor = (wide if gradient.dtype == torch.float64 else narrow)[index]
            factor = self._jobs[index].gradient.spread(factor)
            if self._host and gradient.dtype != factor.dtype and gradient.numel() > _COPY_BLOCK:
                # Of two dtypes a CPU would copy the whole tensor.
                rows = max(1, _COPY_BLOCK * len(gradient) // gradient.numel())
                blocks += gradient.split(rows)
                factors += factor.expand(len(gradient), *factor.shape[1:]).split(rows)
            else:
                blocks.append(gradient)
                factors.append(factor)
        if self._host and blocks:  # the last read first, which the cache still has
            torch._foreach_mul_(blocks[::-1], factors[::-1])
        else:  # which a compiler fuses with what else reads them
            for block, factor in zip(blocks, factors, strict=True):
                block.mul_(factor)
        if zero:
            bad = numbers.bad.split(sizes)
            for index in touched:
                view = self._jobs[index].gradient
                self._gradients[index].masked_fill_(view.spread(bad[index]), 0)


def _slack(numbers: UnitNumbers) -> tuple[float, float]:
    """Return the least and the largest of what limits leave to norms.

    NaN, if there is one, is the least and the largest; a limit is infinite if its weight is.
    """
    if not numbers.norm.numel():
        return 0.0, 0.0
    least, most = (numbers.limit - numbers.norm).aminmax()
    return float(least), float(most)


def _taken(items: list[Any], places: list[int]) -> list[Any]:
    """Return the items at some places, without Python code for each."""
    taken = itemgetter(*places)(items)
    return list(taken) if len(places) > 1 else [taken]


class _Addresses:
    """Where the weights of some jobs start, and then their gradients."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._places = [job.place for job in jobs]
        self.now = [job.weight.tensor.data_ptr() for job in jobs]
        self.now += [job.gradient.tensor.data_ptr() for job in jobs]
        self._aligned = fused.aligned(self.now)

    def renew(self, gradients: list[Any], addresses: list[int]) -> bool:
        """Take the tensors of another step; return whether the kernels' loads fit them."""
        now = _taken(addresses, self._places)
        now += map(Tensor.data_ptr, _taken(gradients, self._places))
        if now == self.now:
            return True
        self.now = now
        return fused.aligned(now) == self._aligned


class _LaunchedChunk:
    """Jobs of one GPU, clipped by the kernels of a table."""

    def __init__(self, jobs: list[_Job], table: fused.Table) -> None:
        self._table, self._entries = table, _thresholds(jobs)[0]
        self._device = jobs[0].gradient.home[0]
        self._counts, self._addresses = _counts(jobs), _Addresses(jobs)

    def renew(self, _: list[Tensor], gradients: list[Any], addresses: list[int]) -> bool:
        """Take the tensors of another step; return whether the kernels' loads fit them."""
        return self._addresses.renew(gradients, addresses)

    def release(self) -> None:
        """Let go of nothing: a table needs addresses alone."""

    def decide(self, rule: AGC, step: Step, grad_scale: Tensor | None) -> UnitNumbers:
        """Return norms and limits of all units (AGC-1)."""
        self._decision = self._table.decide(
            self._table.upload(self._addresses.now),
            _at(self._entries, step, self._device),
            eps=rule.eps,
            div_eps=rule.div_eps,
            grad_scale=grad_scale,
        )
        return _numbers(self._counts, self._decision, rule)

    def scale(self, numbers: UnitNumbers, *, zero: bool) -> None:  # noqa: ARG002
        """Multiply clipped units by their scales, in place, with one rounding (AGC-2 to AGC-4)."""
        self._table.scale(self._decision, zero=zero)


class _SharedChunk(_Chunk):
    """Jobs of one mesh of processes, most of whose shards the kernels take (AGC-8).

    The processes add up what is laid out as in :class:`_Chunk`: one of them may have to do without
    kernels.
    """

    def __init__(self, jobs: list[_Job], launched: list[int], table: fused.SharedTable) -> None:
        super().__init__(jobs)
        self._table, self._addresses = table, _Addresses([jobs[index] for index in launched])
        # Neither read nor written is what has no element here.
        self._written = [
            index
            for index, job in enumerate(jobs)
            if index not in launched
            and any(
                t.numel() for t in (job.weight.source, job.gradient.source, job.gradient.tensor)
            )
        ]
        self._rest = [*self._written, *(len(jobs) + index for index in self._written)]
        own = [self._views[index] for index in self._rest]
        self._groups = grouped(own) if own and on_host(own[0].home[0]) else None

    def renew(self, parameters: list[Tensor], gradients: list[Any], addresses: list[int]) -> bool:
        """Take the shards of another step; return whether the kernels' loads fit them."""
        super().renew(parameters, gradients, addresses)
        return self._addresses.renew(gradients, addresses)

    def decide(self, rule: AGC, step: Step, grad_scale: Tensor | None) -> UnitNumbers:
        """Return norms and limits of all units (AGC-1), after one collective an axis."""
        mesh = self._views[0].home[1]
        addresses = self._table.upload(self._addresses.now)
        shares = self._table.shares(addresses)
        if self._rest:
            views, sources = (
                [self._views[i] for i in self._rest],
                [self._sources[i] for i in self._rest],
            )
            own = all_shares(views, sources, self._groups).split([view.count for view in views])
            shares_V = shares.split([view.count for view in self._views])
            for index, share in zip(self._rest, own, strict=True):
                shares_V[index].copy_(share)
        self._decision = self._table.decide(
            addresses,
            sum_over(mesh, shares, range(mesh.ndim)),
            _at(self._entries, step, self._device),
            eps=rule.eps,
            div_eps=rule.div_eps,
            grad_scale=grad_scale,
        )
        return _numbers(self._counts, self._decision, rule)

    def scale(self, numbers: UnitNumbers, *, zero: bool) -> None:
        """Multiply clipped units by their scales, in place, with one rounding (AGC-2 to AGC-4)."""
        self._table.scale(self._decision, zero=zero)
        if self._written:
            super().scale(numbers, zero=zero)


def _shared(jobs: list[_Job]) -> tuple[list[int], fused.SharedTable] | None:
    """Return the table of the shards of one mesh, and which jobs it takes; None for no such."""
    device, mesh = jobs[0].gradient.home
    if mesh is None or not fused.available(device):
        return None
    members: dict[int, fused.Member] = {}
    first = 0
    for index, job in enumerate(jobs):
        weight, gradient, parts = job.weight, job.gradient, _parts(job)
        if parts and isinstance(weight, ShardView) and isinstance(gradient, ShardView):
            members[index] = fused.Member(*parts, weight.units, gradient.units, first)
        first += gradient.count
    if not members:
        return None
    table = fused.shared_table(tuple(members.values()), tuple(_sizes(jobs)), device)
    return None if table is None else (list(members), table)


def _parts(job: _Job) -> tuple[fused.Part, fused.Part] | None:
    """Return what a table needs to know of a job, if the kernels take it."""
    pair = job.weight, job.gradient
    if not job.gradient.steady or any(view.source is not view.tensor for view in pair):
        return None
    weight, gradient = (fused.part_of(view.tensor, view.axes, exact=view.exact) for view in pair)
    return None if weight is None or gradient is None else (weight, gradient)


def _table(jobs: list[_Job], device: torch.device) -> fused.Table | None:
    parts = tuple(pair for job in jobs if (pair := _parts(job)) is not None)
    return fused.table(parts, tuple(_thresholds(jobs)[1]), device)


def _numbers(counts: list[tuple[str, int]], decision: fused.Decision, rule: AGC) -> UnitNumbers:
    floor_U, limit_U, norm_U, _ = decision.numbers.unbind()
    return UnitNumbers(counts, floor_U, limit_U, norm_U, rule.div_eps)


def _thresholds(jobs: list[_Job]) -> tuple[list[PlanEntry], list[int]]:
    """Return an entry for each threshold that there is, and which of them each job has."""
    entries: list[PlanEntry] = []
    indices = []
    for job in jobs:
        same = [i for i, entry in enumerate(entries) if entry.clipping == job.entry.clipping]
        indices.append(same[0] if same else len(entries))
        if not same:
            entries.append(job.entry)
    return entries, indices


def _sizes(jobs: list[_Job]) -> list[int]:
    """Return the units that have each threshold."""
    entries, indices = _thresholds(jobs)
    sizes = [0] * len(entries)
    for job, index in zip(jobs, indices, strict=True):
        sizes[index] += job.gradient.count
    return sizes


def _at(entries: list[PlanEntry], step: Step, device: torch.device) -> list[float | Tensor]:
    """Return the thresholds of entries at a step (AGC-10)."""
    thresholds: list[float | Tensor] = []
    for entry in entries:
        assert entry.clipping is not None  # only what is clipped becomes a job
        value = value_at(f"clipping of {entry.name!r}", entry.clipping, step)
        if callable(entry.clipping) and not isinstance(value, Tensor) and not on_host(device):
            # A fill: to send a number that is another one in every step would be a host sync.
            value = torch.full((), value, dtype=wide(device), device=device)
        thresholds.append(value)
    return thresholds


def _counts(jobs: list[_Job]) -> list[tuple[str, int]]:
    return [(job.entry.name, job.gradient.count) for job in jobs]


def _raise_nonfinite(numbers: list[UnitNumbers]) -> None:
    for group in numbers:
        if group.bad.any():
            sizes = [count for _, count in group.counts]
            for (name, count), bad in zip(group.counts, group.bad.split(sizes), strict=True):
                if bad.any():
                    raise NonFiniteError(
                        f"parameter {name!r}: {int(bad.sum())} of {count} units have a norm that is not "
                        "finite"
                    )
