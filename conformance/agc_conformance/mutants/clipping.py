"""Mutants of AGC.

:class:`Engine` is a second implementation of adaptive gradient clipping, cut into replaceable
parts. It passes every vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from agc.config import AGC
from agc.errors import (
    AGCError,
    AmbiguousUnitsError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    SelectorError,
    ShapeError,
    UnitsError,
)
from agc.plan import WHOLE, Parameter, Plan, PlanEntry, make_plan
from agc.rank_rules import RANK_RULES
from agc.reference import RowSparse, Stats
from agc.units import UnitAxes, Units
from agc_conformance.backend import Gradient, Layer, Outcome, Problem
from agc_conformance.backends.reference import (
    ReferenceBackend,
    Step,
    layer_parameters,
    to_dtype,
)
from agc_conformance.mutants.mutant import MUTANTS, Mutant, registered

__all__ = ["Engine"]

Array = npt.NDArray[Any]
Axes = Callable[[tuple[int, ...]], tuple[int, ...] | None]


class Engine(ReferenceBackend):
    """Adaptive gradient clipping in float64, in parts that a mutant replaces one at a time."""

    name = "engine"

    # -- selection ------------------------------------------------------------------------------

    def rule(self, problem: Problem) -> AGC:
        """Return the configuration with the problem's units."""
        return problem.declared_rule

    def plan(self, problem: Problem) -> Plan:
        """Return the plan of a problem; every entry goes through :meth:`entry`."""
        parameters = [
            Parameter(name, tuple(value.shape), None, "out-first")
            for name, value in problem.parameters.items()
        ]
        plan = make_plan(parameters, self.rule(problem))
        return Plan(tuple(self.entry(entry) for entry in plan))

    def entry(self, entry: PlanEntry) -> PlanEntry:
        """Return an entry of the plan, as it is or changed."""
        return entry

    def check(self, name: str, gradient: Gradient, weight: Array) -> None:
        """Refuse arrays that the specification does not define."""
        if gradient is None:
            return
        values = gradient.values if isinstance(gradient, RowSparse) else gradient
        if tuple(gradient.shape) != weight.shape:
            raise ShapeError(f"{name}: {tuple(gradient.shape)} is not {weight.shape}")
        if values.dtype.kind in "iub":
            raise DTypeError(f"{name}: {values.dtype}")

    def threshold(self, entry: PlanEntry, step: int) -> float | None:
        """Clipping threshold at a step (AGC-10)."""
        return entry.threshold(step)

    # -- the formula ----------------------------------------------------------------------------

    def norm(self, view: Array, axes: UnitAxes) -> Array:
        """L2 norms of a split view, in the array's own dtype on entry (AGC-3)."""
        wide = np.abs(view.astype(np.complex128 if view.dtype.kind == "c" else np.float64))
        largest = np.max(wide, axis=axes.reduce, keepdims=True, initial=0.0)
        divisor = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        squares = np.sum((wide / divisor) ** 2, axis=axes.reduce, keepdims=True)
        return np.asarray(divisor * np.sqrt(squares))

    def floor(self, w_norm: Array, eps: float) -> Array:
        """Weight norm with its floor (AGC-1)."""
        return np.asarray(np.maximum(w_norm, eps))

    def above(self, g_norm: Array, limit: Array) -> Array:
        """Whether a unit is clipped (AGC-2)."""
        return np.asarray(g_norm > limit)

    def factor(self, limit: Array, g_norm: Array, dtype: np.dtype[Any]) -> Array:  # noqa: ARG002
        """Scale of the clipped units."""
        return np.asarray(limit / g_norm)

    def apply(self, view: Array, scale: Array, clipped: Array) -> Array:
        """Scale the clipped units, in float64."""
        return np.asarray(np.where(clipped, view * np.where(clipped, scale, 1.0), view))

    def bad(self, g_norm: Array, w_norm: Array) -> Array:
        """Units that fall under the non-finite policy (AGC-4)."""
        return np.asarray(~(np.isfinite(g_norm) & np.isfinite(w_norm)))

    def poison(self, out: Array, bad: Array, policy: str) -> Array:
        """Apply the non-finite policy to poisoned units."""
        if policy == "raise" and bad.any():
            raise NonFiniteError("a norm is not finite")
        if not bad.any():
            return out
        return np.asarray(np.where(bad, 0.0 if policy == "zero" else np.nan, out))

    def store(self, values: Array, gradient: Array, weight: Array) -> Array:  # noqa: ARG002
        """Round to the gradient's dtype."""
        return to_dtype(values, gradient.dtype)

    def rows(self, gradient: RowSparse) -> RowSparse:
        """Prepare a row-sparse gradient (AGC-9)."""
        return gradient.coalesce()

    def sparse_out(self, gradient: RowSparse) -> Gradient:
        """Return a clipped row-sparse gradient."""
        return gradient

    def none_out(self, weight: Array) -> Gradient:  # noqa: ARG002
        """Return the result for a parameter without a gradient (AGC-5)."""
        return None

    def nothing(self) -> None:
        """Refuse a model without gradients."""
        raise MissingGradientError("no parameter has a gradient")

    # -- putting it together --------------------------------------------------------------------

    def clip_array(
        self, gradient: Array, weight: Array, axes: UnitAxes, threshold: float, rule: AGC
    ) -> tuple[Array, Stats]:
        """Clip one array; weight norms broadcast against gradient norms."""
        g_view = gradient.reshape(axes.view)
        w_axes = axes if weight.shape == gradient.shape else WHOLE.bind(weight.shape)
        with np.errstate(all="ignore"):
            g_norm, w_norm = self.norm(g_view, axes), self.norm(weight.reshape(w_axes.view), w_axes)
            w_norm = w_norm.reshape(g_norm.shape)
            limit = threshold * self.floor(w_norm, rule.eps)
            bad = self.bad(g_norm, w_norm)
            clipped = self.above(g_norm, limit) & ~bad
            scale = np.where(clipped, self.factor(limit, g_norm, gradient.dtype), 1.0)
            wide = g_view.astype(np.complex128 if g_view.dtype.kind == "c" else np.float64)
            out = self.poison(self.apply(wide, scale, clipped), bad, rule.nonfinite)
            stats = self.stats(g_norm, self.floor(w_norm, rule.eps), scale, clipped, bad)
        return self.store(out.reshape(gradient.shape), gradient, weight), stats

    def stats(self, g_norm: Array, floor: Array, scale: Array, clipped: Array, bad: Array) -> Stats:
        """Telemetry (AGC-11)."""
        ratio = np.where(g_norm > 0, g_norm / floor, 0.0)[~bad]
        return Stats(
            units=int(scale.size),
            clipped=int(clipped.sum()),
            nonfinite=int(bad.sum()),
            max_ratio=float(np.max(ratio, initial=0.0)),
            min_scale=float(np.min(scale[~bad], initial=1.0)),
        )

    def clip(self, problem: Problem) -> Outcome:
        """Clip a whole problem."""
        rule, plan = self.rule(problem), self.plan(problem)
        if all(gradient is None for gradient in problem.gradients.values()):
            self.nothing()
        out: dict[str, Gradient] = {}
        stats: dict[str, Stats] = {}
        for name, gradient in problem.gradients.items():
            weight, entry = problem.parameters[name], plan[name]
            try:
                self.check(name, gradient, weight)
                threshold = self.threshold(entry, problem.step)
                if gradient is None:
                    out[name] = self.none_out(weight)
                elif threshold is None:
                    out[name] = gradient
                elif isinstance(gradient, RowSparse):
                    prepared = self.rows(gradient)
                    if not entry.units.whole and 0 not in entry.axes.keep:
                        raise UnitsError("the rows are not units")
                    w = weight if entry.units.whole else weight[prepared.indices]
                    axes = entry.units.bind(prepared.values.shape)
                    values, stats[name] = self.clip_array(prepared.values, w, axes, threshold, rule)
                    out[name] = self.sparse_out(replace(prepared, values=values))
                else:
                    out[name], stats[name] = self.clip_array(
                        gradient, weight, entry.units.bind(weight.shape), threshold, rule
                    )
            except (NonFiniteError, UnitsError) as error:
                raise type(error)(f"{name}: {error}") from None
        return Outcome(out, stats)


_mutant = registered("clipping")


# -- which axis is a unit ------------------------------------------------------------------------


def _reduce(shape: tuple[int, ...], reduced: tuple[int, ...]) -> Units:
    names = [f"a{axis}" for axis in range(len(shape))]
    kept = [name for axis, name in enumerate(names) if axis not in reduced]
    return Units(f"{' '.join(names)} -> {' '.join(kept)}")


def _by_rank(
    name: str,
    flag: str,
    comment: str,
    axes: Axes,
    layout: Literal["torch", "flax", "keras"] = "torch",
) -> None:
    """Register a mutant that guesses the reduced axes from the shape."""

    class Guess(Engine):
        def entry(self, entry: PlanEntry) -> PlanEntry:
            reduced = axes(entry.shape)
            if reduced is None:
                raise ValueError(f"rank {len(entry.shape)} is not supported")
            units = _reduce(entry.shape, reduced)
            return replace(entry, units=units, count=units.count(entry.shape))

        def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
            return Plan(tuple(self.entry(e) for e in make_plan(layer_parameters(layer), rule)))

    Guess.layout = layout
    MUTANTS.append(Mutant(name, flag, comment, "clipping", Guess))


def _all(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _vballoli(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return _all(shape) if len(shape) <= 1 else {2: (0,), 3: (0,), 4: (1, 2, 3)}.get(len(shape))


def _keras_ports(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _all(shape) if len(shape) <= 1 else {2: (0,), 3: (0,)}.get(len(shape), _all(shape)[:-1])


def _benjs(shape: tuple[int, ...]) -> tuple[int, ...]:
    if sum(size != 1 for size in shape) <= 1:
        return (0,) if shape else ()
    return (1,) if len(shape) <= 3 else _all(shape)[1:]


def _last_is_unit(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _all(shape) if len(shape) <= 1 else _all(shape)[:-1]


_by_rank(
    "JAX axes in PyTorch",
    "WrongAxisDense",
    "rank 2 and 3 reduce axis 0, which holds the outputs (vballoli/nfnets-pytorch)",
    _vballoli,
)
_by_rank(
    "rank 3 is a stack of matrices",
    "WrongAxisConv",
    "only axis 1 of a Conv1d is reduced (pytorch_optimizer, Ranger21)",
    lambda shape: RANK_RULES["pytorch_optimizer"].reduce(shape),
)
_by_rank(
    "first axis is the output",
    "WrongAxisConvTranspose",
    "also in transposed convolutions (timm, composer)",
    lambda shape: RANK_RULES["timm"].reduce(shape),
)
_by_rank(
    "last axis is the output",
    "WrongAxisConvTranspose",
    "also in Keras's transposed convolutions (TensorFlow ports)",
    _last_is_unit,
    "keras",
)
_by_rank(
    "depthwise kernels mix channels",
    "WrongAxisDepthwise",
    "(h, w, C, M) reduced to M norms (TensorFlow ports)",
    _keras_ports,
    "keras",
)
_by_rank(
    "squeeze",
    "Squeeze",
    "axes of size 1 are dropped before ranks are compared (DeepMind, optax)",
    lambda shape: RANK_RULES["optax"].reduce(shape),
    "flax",
)
_by_rank(
    "squeeze, then axis 0",
    "Squeeze",
    "a squeezed vector is reduced over axis 0 of the unsqueezed array (benjs/nfnets_pytorch)",
    _benjs,
)
_by_rank(
    "rank 3 reduces axis 0",
    "WrongAxisAttention",
    "the output projection (h, d, o) is reduced over heads only (DeepMind, optax)",
    lambda shape: (0,) if len(shape) == 3 else _last_is_unit(shape),
    "flax",
)
_by_rank(
    "embedding columns",
    "WrongAxisEmbedding",
    "the last axis is the unit, also of an embedding (every JAX and TensorFlow peer)",
    _last_is_unit,
    "flax",
)
_by_rank(
    "norms across stacked layers",
    "WrongAxisStacked",
    "all axes but the last are reduced, also the one that scan stacks on",
    _last_is_unit,
    "flax",
)
_by_rank(
    "no rank above 4",
    "RankLimit",
    "Conv3d raises (DeepMind, vballoli, benjs)",
    lambda shape: None if len(shape) > 4 else _last_is_unit(shape),
    "flax",
)
_by_rank(
    "rank 5 is a vector",
    "RankLimit",
    "an unknown rank falls back to one norm for all",
    lambda shape: _all(shape) if len(shape) > 4 or len(shape) <= 1 else _all(shape)[1:],
)
_by_rank("per tensor", "PerTensor", "one norm a parameter (HeavyBall, smartclip)", _all)
_by_rank(
    "layers by rank",
    "LayerPlan",
    "the layer's type is not asked",
    lambda shape: RANK_RULES["timm"].reduce(shape),
)


@_mutant("GroupedSplit", "a fused axis (g i) is reduced as a whole")
class _GroupsTogether(Engine):
    def entry(self, entry: PlanEntry) -> PlanEntry:
        if "(" not in str(entry.units):
            return entry
        pattern = str(entry.units).replace("-> g o", "-> o")
        return replace(entry, units=Units(pattern), count=Units(pattern).count(entry.shape))


@_mutant("VectorPerElement", "every element of a vector is its own unit")
class _VectorsPerElement(Engine):
    def entry(self, entry: PlanEntry) -> PlanEntry:
        if not entry.units.whole or not entry.shape:
            return entry
        units = _reduce(entry.shape, ())
        return replace(entry, units=units, count=units.count(entry.shape))


@_mutant("TensorGranularity", "granularity='tensor' is ignored")
class _AlwaysUnitWise(Engine):
    def rule(self, problem: Problem) -> AGC:
        return replace(problem.declared_rule, granularity="unit")


@_mutant("GlobalNorm", "all gradients share the norm of all, as in clip_grad_norm")
class _GlobalNorm(Engine):
    def clip(self, problem: Problem) -> Outcome:
        dense = [g.ravel() for g in problem.gradients.values() if isinstance(g, np.ndarray)]
        wide = [part.astype(np.complex128) for part in dense]
        with np.errstate(all="ignore"):
            self.total = float(np.linalg.norm(np.concatenate(wide))) if wide else None
        return super().clip(problem)

    def above(self, g_norm: Array, limit: Array) -> Array:
        return np.asarray((g_norm if self.total is None else self.total) > limit)

    def factor(self, limit: Array, g_norm: Array, dtype: np.dtype[Any]) -> Array:  # noqa: ARG002
        return np.asarray(limit / (g_norm if self.total is None else self.total))


# -- threshold -----------------------------------------------------------------------------------


@_mutant("MissingEps", "no floor: zero weights freeze (composer)")
class _NoEps(Engine):
    def floor(self, w_norm: Array, eps: float) -> Array:  # noqa: ARG002
        return w_norm


@_mutant("AdditiveEps", "norm + eps (smartclip)")
class _AdditiveEps(Engine):
    def floor(self, w_norm: Array, eps: float) -> Array:
        return np.asarray(w_norm + eps)


@_mutant("EpsInsideRoot", "sqrt(sum of squares + eps)")
class _EpsInsideRoot(Engine):
    def floor(self, w_norm: Array, eps: float) -> Array:
        return np.asarray(np.sqrt(w_norm**2 + eps))


@_mutant("SecondEps", "max(norm(G), 1e-6) in the division (timm, optax)")
class _SecondEps(Engine):
    def factor(self, limit: Array, g_norm: Array, dtype: np.dtype[Any]) -> Array:  # noqa: ARG002
        return np.asarray(limit / np.maximum(g_norm, 1e-6))


@_mutant("SecondEps", "norm(G) + 1e-6 in the division (smartclip)")
class _SecondEpsAdded(Engine):
    def factor(self, limit: Array, g_norm: Array, dtype: np.dtype[Any]) -> Array:  # noqa: ARG002
        return np.asarray(limit / (g_norm + 1e-6))


@_mutant("TieClipped", ">= instead of >: 0/0 where both are zero")
class _TieClipped(Engine):
    def above(self, g_norm: Array, limit: Array) -> Array:
        return np.asarray(g_norm >= limit)


@_mutant("UnclippedChanged", "clipped * mask + g * (1 - mask): negative zeros lose their sign")
class _BlendByMask(Engine):
    def apply(self, view: Array, scale: Array, clipped: Array) -> Array:
        return np.asarray(view * scale * clipped + view * ~clipped + 0.0)


@_mutant("UnclippedChanged", "every unit is scaled to its limit")
class _AlwaysScaled(Engine):
    def above(self, g_norm: Array, limit: Array) -> Array:  # noqa: ARG002
        return np.asarray(g_norm > 0)


@_mutant("WrongNorm", "L1 norm")
class _SumOfMagnitudes(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        wide = np.abs(view.astype(np.complex128))
        return np.asarray(np.sum(wide, axis=axes.reduce, keepdims=True))


@_mutant("WrongNorm", "largest magnitude")
class _LargestMagnitude(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        wide = np.abs(view.astype(np.complex128))
        return np.asarray(np.max(wide, axis=axes.reduce, keepdims=True, initial=0.0))


@_mutant("WrongNorm", "root of the mean square: differs only at the floor")
class _MeanSquare(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        return np.asarray(super().norm(view, axes) / np.sqrt(max(axes.fan_in, 1)))


@_mutant("IgnoresClipping", "one threshold for all parameters, 0.01 where there is none")
class _OneThreshold(Engine):
    def threshold(self, entry: PlanEntry, step: int) -> float | None:
        return None if entry.excluded or not entry.count else _first(entry, step)


def _first(entry: PlanEntry, step: int) -> float:
    return entry.clipping(step) if callable(entry.clipping) else 0.01


@_mutant("IgnoresSchedule", "the schedule's value at step 0 for ever")
class _ScheduleFrozen(Engine):
    def threshold(self, entry: PlanEntry, step: int) -> float | None:  # noqa: ARG002
        return super().threshold(entry, 0)


@_mutant("IgnoresSchedule", "steps counted from 1")
class _ScheduleOffByOne(Engine):
    def threshold(self, entry: PlanEntry, step: int) -> float | None:
        return super().threshold(entry, step + 1)


# -- precision -----------------------------------------------------------------------------------


@_mutant("NormInInputDtype", "squares and sums in the input dtype (optax, DeepMind, Keras ports)")
class _NormInInputDtype(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        if view.dtype.kind == "c" or view.dtype == np.float64:
            return super().norm(view, axes)
        squares = np.sum(np.square(view).astype(np.float32), axis=axes.reduce, keepdims=True)
        return np.asarray(np.sqrt(squares.astype(view.dtype)).astype(np.float64))


@_mutant("LowPrecisionScale", "norms, limits and scales rounded to the gradient's dtype (timm)")
class _LowPrecisionScale(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        norm = super().norm(view, axes)
        if view.dtype.kind == "c":
            return norm
        return to_dtype(norm, view.dtype).astype(np.float64)

    def factor(self, limit: Array, g_norm: Array, dtype: np.dtype[Any]) -> Array:
        if dtype.kind == "c":
            return super().factor(limit, g_norm, dtype)
        narrow = to_dtype(limit, dtype).astype(np.float64)
        return to_dtype(narrow / g_norm, dtype).astype(np.float64)


@_mutant("NaiveAccumulation", "float32, one term after the other")
class _NaiveAccumulation(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        if view.dtype.kind == "c" or not axes.reduce or not view.size:
            return super().norm(view, axes)
        kept = np.moveaxis(view, axes.reduce, range(-len(axes.reduce), 0)).astype(np.float32)
        rows = kept.reshape(*kept.shape[: len(axes.keep)], -1)
        total = np.cumsum(np.square(rows), axis=-1, dtype=np.float32)[..., -1]
        return np.asarray(np.sqrt(total), np.float64).reshape(axes.unit_shape)


@_mutant("DtypePromoted", "the result has the dtype of scale times gradient (optax)")
class _Promoted(Engine):
    def store(self, values: Array, gradient: Array, weight: Array) -> Array:
        if gradient.dtype.itemsize < 4:
            return to_dtype(values, np.dtype(np.float32))
        return super().store(values, gradient, weight)


@_mutant("ComplexSquare", "x**2 instead of |x|^2 (DeepMind)")
class _ComplexSquare(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        if view.dtype.kind != "c":
            return super().norm(view, axes)
        return np.asarray(np.abs(np.sqrt(np.sum(view**2, axis=axes.reduce, keepdims=True))))


# -- non-finite values ---------------------------------------------------------------------------


@_mutant(
    "NaNPasses", "a comparison with NaN is false: the unit passes (DeepMind, pytorch_optimizer)"
)
class _NanPasses(Engine):
    def bad(self, g_norm: Array, w_norm: Array) -> Array:
        return np.asarray(np.isinf(g_norm) | np.isinf(w_norm))


@_mutant("InfToZero", "the limit divided by infinity: zeros beside the infinity (all peers)")
class _InfToZero(Engine):
    def bad(self, g_norm: Array, w_norm: Array) -> Array:
        return np.asarray(np.isnan(g_norm) | np.isnan(w_norm))


@_mutant("PoisonSpreads", "one poisoned unit makes the whole tensor NaN")
class _PoisonSpreads(Engine):
    def bad(self, g_norm: Array, w_norm: Array) -> Array:
        bad = super().bad(g_norm, w_norm)
        return np.full_like(bad, bad.any())


@_mutant("PolicyIgnored", "always propagate")
class _AlwaysPropagate(Engine):
    def poison(self, out: Array, bad: Array, policy: str) -> Array:  # noqa: ARG002
        return super().poison(out, bad, "propagate")


@_mutant("OverflowToZero", "squares overflow to infinity, the scale becomes 0 (all peers)")
class _OverflowToZero(Engine):
    def norm(self, view: Array, axes: UnitAxes) -> Array:
        if view.dtype.kind == "c" or not np.isfinite(view.astype(np.float64)).all():
            return super().norm(view, axes)
        wide: Array = view.astype(np.float64 if view.dtype == np.float64 else np.float32)
        return np.asarray(np.sqrt(np.sum(wide * wide, axis=axes.reduce, keepdims=True)), np.float64)

    def bad(self, g_norm: Array, w_norm: Array) -> Array:
        return np.asarray(np.isnan(g_norm) | np.isnan(w_norm))


# -- selection -----------------------------------------------------------------------------------


@_mutant("EmptyOrScalar", "the largest element of nothing is asked for")
class _EmptyBreaks(Engine):
    def check(self, name: str, gradient: Gradient, weight: Array) -> None:
        super().check(name, gradient, weight)
        np.max(weight)


@_mutant("NoneGradient", "zeros are made up where there is no gradient")
class _NoneBecomesZeros(Engine):
    def none_out(self, weight: Array) -> Gradient:
        return np.zeros_like(weight)


@_mutant("ExcludeIgnored", "exclusions are read and not obeyed (vballoli)")
class _ExcludeIgnored(Engine):
    def entry(self, entry: PlanEntry) -> PlanEntry:
        return replace(entry, excluded=False)


@_mutant("ExcludeByOrder", "the last two parameters are the head (timm)")
class _LastTwoExcluded(Engine):
    def plan(self, problem: Problem) -> Plan:
        plan = super().plan(problem)
        if not problem.rule.exclude:
            return plan
        last = {entry.name for entry in plan.entries[-2:]}
        return Plan(tuple(replace(entry, excluded=entry.name in last) for entry in plan))


@_mutant("ExcludeHeadBias", "'@head.weight' also excludes the head's bias")
class _HeadBiasExcluded(Engine):
    def rule(self, problem: Problem) -> AGC:
        rule = problem.declared_rule
        wide = ["@head" if item == "@head.weight" else item for item in rule.exclude]
        return replace(rule, exclude=wide)


@_mutant("UnverifiedPattern", "patterns that match nothing are dropped")
class _UnverifiedPattern(Engine):
    def plan(self, problem: Problem) -> Plan:
        try:
            return super().plan(problem)
        except SelectorError:
            return super().plan(replace(problem, rule=AGC()))


@_mutant("SparseDensified", "sparse gradients are made dense")
class _Densified(Engine):
    def sparse_out(self, gradient: RowSparse) -> Gradient:
        return gradient.to_dense()


@_mutant("SparseDuplicates", "every occurrence of a row is clipped by itself")
class _DuplicatesKept(Engine):
    def rows(self, gradient: RowSparse) -> RowSparse:
        return gradient


# -- order and place -----------------------------------------------------------------------------


@_mutant("DecayBeforeClip", "g + decay * w is clipped (scenic)")
class _DecayClipped(Engine):
    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        decay = 0.0 if step.optimizer.decoupled else step.optimizer.weight_decay
        summed = {name: g + decay * step.weights[name] for name, g in step.gradients.items()}
        optimizer = replace(step.optimizer, weight_decay=step.optimizer.weight_decay - decay)
        return super().update(replace(step, optimizer=optimizer, gradients=summed))


class _OtherNorms(Engine):
    """Uses norms of other weights than those that the optimizer moves."""

    norms: Mapping[str, Array] | None = None

    def clip(self, problem: Problem) -> Outcome:
        if self.norms is not None:
            problem = replace(problem, parameters=self.norms)
        return super().clip(problem)


@_mutant(
    "DecayBeforeNorm", "norms of weights that have already been decayed (a hook too late in Keras)"
)
class _DecayedNorms(_OtherNorms):
    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        keep = 1 - step.optimizer.lr * step.optimizer.weight_decay
        self.norms = {name: w * keep for name, w in step.weights.items()}
        return super().update(step)


@_mutant("StaleWeights", "norms of the weights before the previous step")
class _StaleWeights(_OtherNorms):
    previous: Mapping[str, Array] | None = None

    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        self.norms = self.previous if step.index else None
        self.previous = step.weights
        return super().update(step)


@_mutant("ClipAfterMomentum", "the momentum buffer is clipped")
class _BufferClipped(Engine):
    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        momentum = step.optimizer.momentum
        buffers = {n: momentum * step.momenta[n] + g for n, g in step.gradients.items()}
        plain = replace(step.optimizer, momentum=0.0, nesterov=False)
        after, _ = super().update(replace(step, optimizer=plain, gradients=buffers))
        return after, buffers


@_mutant("ClipEachMicroBatch", "micro-batches are clipped one by one (GradientAccumulator)")
class _EachMicroBatch(Engine):
    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        clipped = [self.clip(replace(problem, gradients=g)).gradients for g in micro]
        mean = {key: np.mean([np.asarray(g[key]) for g in clipped], axis=0) for key in micro[0]}
        return Outcome({key: value.astype(np.float32) for key, value in mean.items()})


@_mutant("ClipEachMicroBatch", "the sum of the micro-batches is clipped, not their mean")
class _SumOfMicroBatches(Engine):
    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        total = {key: np.sum([np.asarray(g[key]) for g in micro], axis=0) for key in micro[0]}
        return self.clip(replace(problem, gradients=total))


@_mutant("ClipBeforeUnscale", "scaled gradients are clipped, then unscaled")
class _ClipBeforeUnscale(Engine):
    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        clipped = self.clip(problem).gradients
        return Outcome({key: np.asarray(g) / np.float32(scale) for key, g in clipped.items()})


@_mutant("PerShardNorm", "every shard has its own norm (FSDP flat parameters, pmap)")
class _PerShardNorm(Engine):
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "flax"

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        out: dict[str, Gradient] = {}
        for key, weight in problem.parameters.items():
            gradient = problem.gradients[key]
            assert isinstance(gradient, np.ndarray)
            count = shards if weight.shape and weight.shape[0] % shards == 0 else 1
            alone = replace(problem, units={key: problem.units[key]})
            clipped = [
                self.clip(replace(alone, parameters={key: w}, gradients={key: g})).gradients[key]
                for w, g in zip(np.split(weight, count), np.split(gradient, count), strict=True)
            ]
            out[key] = np.concatenate([np.asarray(shard) for shard in clipped])
        return Outcome(out)


@_mutant("Compiled", "the compiled step was traced with the defaults")
class _CompiledDefaults(Engine):
    def scenario_compiled(self, problem: Problem) -> Outcome:
        return super().scenario_compiled(replace(problem, rule=AGC()))


@_mutant("ThroughOptimizer", "the hook is never called")
class _NeverCalled(Engine):
    def scenario_optimizer(self, problem: Problem) -> Outcome:
        return Outcome(problem.gradients)


@_mutant(
    "ThroughOptimizer", "clipping stops after the first step (a generator of parameters; vballoli)"
)
class _FirstStepOnly(Engine):
    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        if step.index:
            step = replace(step, problem=replace(step.problem, rule=AGC(clipping=None)))
        return super().update(step)


# -- reports and errors --------------------------------------------------------------------------


@_mutant("WrongStats", "units under the policy count as clipped")
class _PoisonCounted(Engine):
    def stats(self, g_norm: Array, floor: Array, scale: Array, clipped: Array, bad: Array) -> Stats:
        return super().stats(g_norm, floor, scale, clipped | bad, bad)


@_mutant("WrongStats", "ratios of clipped units only")
class _RatioOfClipped(Engine):
    def stats(self, g_norm: Array, floor: Array, scale: Array, clipped: Array, bad: Array) -> Stats:
        return super().stats(np.where(clipped, g_norm, 0.0), floor, scale, clipped, bad)


@_mutant("WrongStats", "the ratio is to the weights without their floor")
class _RatioWithoutFloor(Engine):
    def floor(self, w_norm: Array, eps: float) -> Array:
        self.w_norm = w_norm
        return super().floor(w_norm, eps)

    def stats(self, g_norm: Array, floor: Array, scale: Array, clipped: Array, bad: Array) -> Stats:
        weights = np.minimum(floor, self.w_norm)
        return super().stats(g_norm, weights, scale, clipped, bad)


@_mutant("WeightsChanged", "weights are brought up to their floor in place")
class _WeightsRaised(Engine):
    def clip(self, problem: Problem) -> Outcome:
        outcome = super().clip(problem)
        for weight in problem.parameters.values():
            np.maximum(weight, problem.rule.eps, out=weight, where=weight > 0)
        return outcome


@_mutant("AcceptsBadInput", "integers are cast, shapes reshaped, nothing is refused")
class _AcceptsAnything(Engine):
    def check(self, name: str, gradient: Gradient, weight: Array) -> None:
        """Refuse nothing."""

    def nothing(self) -> None:
        """Refuse nothing."""

    def clip(self, problem: Problem) -> Outcome:
        try:
            return super().clip(problem)
        except (AGCError, ValueError):
            return Outcome(problem.gradients)


@_mutant("VectorRefused", "a layer's vectors of rank above 1 are undecided")
class _TokensUndecided(Engine):
    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        for parameter in layer_parameters(layer):
            if len(parameter.shape) > 1 and parameter.units is None:
                raise AmbiguousUnitsError(f"parameter {parameter.name!r}")
        return super().layer_plan(layer, rule)


@_mutant("UnitsGuessed", "an unknown layer is stored out-first, whatever the rank")
class _OutFirstWhereUnknown(Engine):
    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        out_first = Units("o ... -> o")
        known = [
            p if p.units or len(p.shape) < 3 or 1 in p.shape else replace(p, units=out_first)
            for p in layer_parameters(layer)
        ]
        return make_plan(known, rule)


@_mutant("IdleStep", "a step without any gradient raises")
class _IdleStepRaises(Engine):
    def scenario_idle(self, problem: Problem) -> Outcome:  # noqa: ARG002
        raise MissingGradientError("no parameter has a gradient")
