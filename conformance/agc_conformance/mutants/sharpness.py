"""Mutants of SAM.

:class:`SharpnessEngine` is a second implementation of SAM, written as a framework would do it:
weights in their own dtype, moved in place and copied back. It is cut into replaceable parts, and
passes every vector.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.config import AGC, SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, SelectorError
from agc.selectors import perturbed_names
from agc_conformance.backend import (
    Examples,
    Optimizer,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
)
from agc_conformance.backends.reference import Step, to_dtype
from agc_conformance.mutants.clipping import Engine
from agc_conformance.mutants.mutant import registered

__all__ = ["SharpnessEngine"]

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Gradients = dict[str, Array | None]
Evaluated = tuple[float, Gradients]

_mutant = registered("sharpness", "SAM: ")


@dataclass(frozen=True)
class Pass:
    """Where a loss is evaluated.

    Attributes
    ----------
    problem : SharpnessProblem
        With the examples of the whole batch.
    weights : dict of name to array
        They may be perturbed.
    rows : array of int
        Examples of this micro-batch.
    ascent : dict of name to array or None
        Gradients of the first pass, for the second.
    """

    problem: SharpnessProblem
    weights: Arrays
    rows: Array
    ascent: Gradients = field(default_factory=dict)


class SharpnessEngine(Engine):
    """SAM in place, in parts that a mutant replaces one at a time."""

    name = "sharp engine"

    #: Factor of the loss; a forward pass multiplies it by ``growth`` (scenario ``stateful``).
    state, growth = 1.0, 1.0
    #: Gradients from before the first pass (scenario ``stale``).
    left: Mapping[str, Array | None] = MappingProxyType({})

    # -- selection ------------------------------------------------------------------------------

    def chosen(self, problem: SharpnessProblem) -> set[str]:
        """Names of the perturbed parameters (SAM-11)."""
        return set(perturbed_names(problem.parameters, problem.rule))

    def parts(self, examples: int, rule: SAM, replicas: int) -> list[list[Array]]:
        """Rows of every micro-batch of every replica (SAM-8, SAM-9)."""
        shares = np.split(np.arange(examples), replicas)
        if rule.microbatches > len(shares[0]):
            raise ConfigError(
                f"microbatches={rule.microbatches} is more than the {len(shares[0])} examples"
            )
        return [np.array_split(share, rule.microbatches) for share in shares]

    def first(self, rows: Array, rule: SAM) -> Array:
        """Rows of the ascent pass (SAM-7)."""
        return rows[: math.ceil(rule.fraction * len(rows))]

    def descent_rows(self, rows: Array, rule: SAM) -> Array:  # noqa: ARG002
        """Rows of the descent pass."""
        return rows

    # -- gradients ------------------------------------------------------------------------------

    def loss_and_gradients(self, at: Pass) -> Evaluated:
        """Mean loss of some examples and its gradients, in the dtype of the weights."""
        weights, examples, rows = at.weights, at.problem.examples, at.rows
        loss, gradients = 0.0, dict.fromkeys(weights)
        for name, a in examples.curvatures.items():
            away = weights[name].astype(np.float64) - examples.centers[name][rows]
            a = self.state * a[rows].astype(np.float64)
            loss += float(np.sum(0.5 * a * away**2)) / len(rows)
            gradients[name] = to_dtype(np.mean(a * away, axis=0), weights[name].dtype)
        self.state *= self.growth
        return loss, gradients

    def ascent(self, at: Pass) -> Evaluated:
        """First pass."""
        return self.loss_and_gradients(replace(at, rows=self.first(at.rows, at.problem.rule)))

    def descent(self, at: Pass) -> Evaluated:
        """Second pass, at the perturbed weights."""
        return self.loss_and_gradients(at)

    def before_ascent(self) -> Mapping[str, Array | None]:
        """Gradients that the first pass adds to: none, even if old ones are left (SAM-4)."""
        return {}

    def before_descent(self, first: Gradients) -> Mapping[str, Array | None]:  # noqa: ARG002
        """Gradients that the second pass adds to (SAM-4)."""
        return {}

    def state_of_descent(self, before: float, after: float) -> float:  # noqa: ARG002
        """State at the start of the second pass: that before or after the first (SAM-12)."""
        return before

    def state_of_step(self, before: float, after: float) -> float:  # noqa: ARG002
        """State after a step: that before or after its first pass, or ``self.state`` after both."""
        return after

    # -- the perturbation -----------------------------------------------------------------------

    def radius(self, rule: SAM, step: int) -> float:
        """Rho at a step (SAM-11)."""
        return rule.radius(step)

    def perturbs(self, rule: SAM, step: int) -> bool:
        """Whether a step perturbs (SAM-11)."""
        return rule.perturbs(step)

    def scale(self, weight: Array, rule: SAM) -> Array:
        """Diagonal of T (SAM-10)."""
        if rule.adaptive and weight.ndim >= 2:
            return np.asarray(np.abs(weight.astype(np.float64)) + rule.eta)
        return np.ones(weight.shape)

    def global_norm(self, directions: Arrays, gradients: Arrays) -> float:  # noqa: ARG002
        """Global norm of ``T g`` (SAM-1); ``gradients`` are as the framework has them."""
        flat = np.concatenate([d.ravel() for d in directions.values()])
        largest = float(np.max(np.abs(flat), initial=0.0))
        if largest == 0 or not math.isfinite(largest):
            return largest
        return largest * float(np.sqrt(np.sum((flat / largest) ** 2)))

    def length(self, radius: float, norm: float, rule: SAM) -> float:
        """Return the factor of ``T^2 g`` (SAM-1, SAM-2)."""
        if norm == 0 or not math.isfinite(norm):
            return 0.0
        return radius / (norm + rule.eps)

    def step_of(self, scale: Array, gradient: Array, factor: float) -> Array:
        """Perturbation of one parameter."""
        if factor == 0:
            return np.zeros(gradient.shape)
        return np.asarray(factor * scale * scale * gradient)

    def perturbation(self, at: Pass) -> tuple[Arrays, float]:
        """Perturbation of every selected parameter with an ascent gradient, and the norm."""
        chosen, rule = self.chosen(at.problem), at.problem.rule
        present = {n: g for n, g in at.ascent.items() if g is not None and n in chosen}
        if not present:
            self.nothing_to_perturb()
        wide = {name: g.astype(np.float64) for name, g in present.items()}
        scales = {name: self.scale(at.weights[name], rule) for name in present}
        norm = self.global_norm({name: scales[name] * g for name, g in wide.items()}, present)
        factor = self.length(self.radius(rule, at.problem.step), norm, rule)
        return {name: self.step_of(scales[name], g, factor) for name, g in wide.items()}, norm

    def nothing_to_perturb(self) -> None:
        """Refuse a model without ascent gradients (SAM-4)."""
        raise MissingGradientError("no gradient; only and exclude must leave some")

    def restore(self, weights: Arrays, copies: Arrays, e: Arrays) -> None:  # noqa: ARG002
        """Put the weights back (SAM-3)."""
        for name, value in copies.items():
            weights[name][...] = value

    # -- putting it together --------------------------------------------------------------------

    def policy(self, norm: float, rule: SAM) -> bool:
        """Apply the policy for a non-finite norm, and tell whether to skip the step (SAM-5)."""
        if math.isfinite(norm) or rule.nonfinite == "skip_perturb":
            return False
        if rule.nonfinite == "raise":
            raise NonFiniteError(f"the norm is {norm}")
        return True

    def reduce(self, ascents: list[tuple[int, Gradients]], rule: SAM) -> list[Gradients]:
        """Ascent gradient of every replica (SAM-9)."""
        if rule.scope == "global":
            mean = self.average([(1, gradients) for _, gradients in ascents])
            return [mean] * len(ascents)
        return [gradients for _, gradients in ascents]

    def average(self, parts: list[tuple[int, Gradients]]) -> Gradients:
        """Mean of gradients by example count (SAM-8)."""
        total = sum(n for n, _ in parts)
        out: Gradients = {}
        for name, like in parts[0][1].items():
            if like is None:
                out[name] = None
            else:
                shares = [n / total * np.asarray(g[name], np.float64) for n, g in parts]
                out[name] = to_dtype(np.sum(shares, axis=0), like.dtype)
        return out

    def reported(self, clean: list[tuple[int, float]], perturbed: list[tuple[int, float]]) -> float:  # noqa: ARG002
        """Return the loss to report (SAM-12)."""
        return sum(n * loss for n, loss in clean) / sum(n for n, _ in clean)

    def estimate(self, problem: SharpnessProblem, replicas: int = 1) -> SharpnessOutcome:
        """Both passes, for every micro-batch and replica."""
        rule, examples, weights = problem.rule, problem.examples, dict(problem.parameters)
        if not self.perturbs(rule, problem.step):
            loss, gradients = self.loss_and_gradients(
                Pass(problem, weights, np.arange(len(examples)))
            )
            return SharpnessOutcome(gradients, weights, loss)
        parts = self.parts(len(examples), rule, replicas)
        clean: list[tuple[int, float]] = []
        perturbed: list[tuple[int, float]] = []
        descents: list[tuple[int, Gradients]] = []
        norms: list[float] = []
        skip, before = False, self.state
        for micro in range(rule.microbatches):
            firsts: list[tuple[int, Gradients]] = []
            for share in parts:
                loss, first = self.ascent(Pass(problem, weights, share[micro]))
                count = len(self.first(share[micro], rule))
                clean.append((count, loss))
                firsts.append((count, _added(first, self.before_ascent())))
            after = self.state
            for share, ascent in zip(parts, self.reduce(firsts, rule), strict=True):
                at = Pass(problem, weights, self.descent_rows(share[micro], rule), ascent)
                e, norm = self.perturbation(at)
                norms.append(norm)
                skip |= self.policy(norm, rule)
                copies = {name: weights[name].copy() for name in e}
                for name, move in e.items():
                    w = weights[name]
                    w[...] = to_dtype(w.astype(np.float64) + move, w.dtype)
                self.state = self.state_of_descent(before, after)
                loss, gradients = self.descent(at)
                gradients = _added(gradients, self.before_descent(ascent))
                self.state = self.state_of_step(before, after)
                self.restore(weights, copies, e)
                perturbed.append((len(at.rows), loss))
                descents.append((len(at.rows), gradients))
        return SharpnessOutcome(
            self.average(descents),
            weights,
            self.reported(clean, perturbed),
            sum(n * loss for n, loss in perturbed) / sum(n for n, _ in perturbed),
            max(norms),
            skip,
        )

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute a sharpness-aware gradient."""
        return self.estimate(problem)

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Follow SAM, AGC and the optimizer in the dtype of the weights; update in float64."""
        problem, optimizer = task.problem, task.optimizer
        behind = Problem(problem.clipping or AGC(clipping=None), {}, {})
        dtypes = {name: value.dtype for name, value in problem.parameters.items()}
        weights = {name: value.astype(np.float64) for name, value in problem.parameters.items()}
        momenta = {name: np.zeros_like(value) for name, value in weights.items()}
        out: list[Mapping[str, Array]] = []
        step = 0
        for index, examples in enumerate(task.batches):
            if index == task.restart:
                step, momenta = self.reload(step, momenta)
            now = replace(problem, parameters=weights, examples=examples, step=step)
            outcome = self.before_step(now, optimizer)
            weights = dict(outcome.weights)
            if not outcome.skipped:
                gradients = {name: g for name, g in outcome.gradients.items() if g is not None}
                weights, momenta = self.update(
                    Step(behind, optimizer, weights, momenta, gradients, step)
                )
            step += 1
            out.append({name: to_dtype(value, dtypes[name]) for name, value in weights.items()})
        return out

    def reload(self, step: int, momenta: Arrays) -> tuple[int, Arrays]:
        """Save and load (SAM-13)."""
        return step, momenta

    def before_step(self, problem: SharpnessProblem, optimizer: Optimizer) -> SharpnessOutcome:  # noqa: ARG002
        """Compute the gradient of one step."""
        return self.estimate(problem)

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Estimate."""
        return self.estimate(problem)

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Estimate as replicas do."""
        return self.estimate(problem, replicas)

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Estimate with gradients of 1 left from before."""
        scene = copy.copy(self)  # the old gradients must not reach other questions
        scene.left = {key: np.ones_like(value) for key, value in problem.parameters.items()}
        return scene.estimate(problem)

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Estimate without the fixed parameters."""
        fixed = [*frozen, *absent]
        rule = replace(problem.rule, exclude=[*problem.rule.exclude, *fixed])
        outcome = self.estimate(replace(problem, rule=rule))
        return replace(outcome, gradients={**outcome.gradients, **dict.fromkeys(fixed)})

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Estimate twice, with a state that grows."""
        scene = copy.copy(self)
        scene.growth = 2.0
        scene.estimate(problem)
        return scene.estimate(problem)

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Estimate under loss scaling, and remove the scale."""
        curvatures = {
            n: a * np.asarray(scale, a.dtype) for n, a in problem.examples.curvatures.items()
        }
        examples = replace(problem.examples, curvatures=curvatures)
        outcome = self.estimate(replace(problem, examples=examples))
        return self.unscale(outcome, scale)

    def unscale(self, outcome: SharpnessOutcome, scale: float) -> SharpnessOutcome:
        """Divide the gradients by the scale."""
        gradients = {
            name: None if g is None else g / np.asarray(scale, g.dtype)
            for name, g in outcome.gradients.items()
        }
        return SharpnessOutcome(gradients, outcome.weights, skipped=outcome.skipped)


def _added(gradients: Gradients, more: Mapping[str, Array | None]) -> Gradients:
    """Add gradients to those that have a value."""
    return {
        name: g if g is None or more.get(name) is None else g + more[name]
        for name, g in gradients.items()
    }


# -- the perturbation ----------------------------------------------------------------------------


@_mutant("PerLayerNorm", "every parameter is moved by rho in its own direction")
class _NormPerParameter(SharpnessEngine):
    def perturbation(self, at: Pass) -> tuple[Arrays, float]:
        e, norm = super().perturbation(at)
        for name in e:
            alone = {**dict.fromkeys(at.ascent), name: at.ascent[name]}
            e[name] = super().perturbation(replace(at, ascent=alone))[0][name]
        return e, norm


@_mutant("AscentSign", "w - e: downhill, with the optimizer's own sign")
class _Downhill(SharpnessEngine):
    def step_of(self, scale: Array, gradient: Array, factor: float) -> Array:
        return -super().step_of(scale, gradient, factor)


@_mutant("RhoMisused", "the direction has length 1: rho is left out")
class _UnitLength(SharpnessEngine):
    def radius(self, rule: SAM, step: int) -> float:  # noqa: ARG002
        return 1.0


@_mutant("RhoMisused", "rho squared")
class _RhoSquared(SharpnessEngine):
    def radius(self, rule: SAM, step: int) -> float:
        return rule.radius(step) ** 2


@_mutant("NotNormalised", "e = rho * g (HeavyBall)")
class _NotNormalised(SharpnessEngine):
    def length(self, radius: float, norm: float, rule: SAM) -> float:
        return radius if super().length(radius, norm, rule) else 0.0


class _Eps(SharpnessEngine):
    eps = 0.0

    def length(self, radius: float, norm: float, rule: SAM) -> float:
        return super().length(radius, norm + self.eps, rule)


@_mutant("PerturbationEps", "1e-12 is added to the norm (davda54, composer, pytorch_optimizer)")
class _SmallEps(_Eps):
    eps = 1e-12


@_mutant("PerturbationEps", "1e-7 is added to the norm (scenic, ESAM)")
class _LargeEps(_Eps):
    eps = 1e-7


@_mutant("PerturbationEps", "1e-16 is added to the norm (Samsung)")
class _TinyEps(_Eps):
    eps = 1e-16


@_mutant("ProfileEps", "the epsilon that a profile asks for is left out")
class _NoEps(SharpnessEngine):
    def length(self, radius: float, norm: float, rule: SAM) -> float:
        return super().length(radius, norm, replace(rule, eps=0.0))


class _PlainNorm(SharpnessEngine):
    """Squares and sums gradients without scaling them first."""

    def squares_in(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)

    def global_norm(self, directions: Arrays, gradients: Arrays) -> float:
        total = 0.0
        for name, direction in directions.items():
            kind = self.squares_in(gradients[name].dtype)
            values = to_dtype(direction, kind)
            total += float(np.sum(values * values, dtype=kind))
        return math.sqrt(total)


@_mutant("PerturbationOverflow", "squares in float32: 1e20 is infinite, 1e-24 is zero (all peers)")
class _SquaresInFloat32(_PlainNorm):
    def length(self, radius: float, norm: float, rule: SAM) -> float:
        return 0.0 if norm == 0 else radius / (norm + rule.eps)


@_mutant("PerturbationNormDtype", "norms in the dtype of the gradients (davda54)")
class _NormInInputDtype(_PlainNorm):
    def squares_in(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def policy(self, norm: float, rule: SAM) -> bool:
        return math.isnan(norm) and super().policy(norm, rule)


@_mutant("ZeroGradientNaN", "0 / 0 (google, optax, moskomule)")
class _ZeroOverZero(SharpnessEngine):
    def length(self, radius: float, norm: float, rule: SAM) -> float:
        return math.nan if norm == 0 else super().length(radius, norm, rule)


@_mutant(
    "StaleGradient", "both steps use the first gradient (NoteDance; no_sync after the forward)"
)
class _SecondIsFirst(SharpnessEngine):
    def descent(self, at: Pass) -> Evaluated:
        return super().descent(at)[0], at.ascent


# -- restoring -----------------------------------------------------------------------------------


@_mutant("RestoreBySubtraction", "w - e (composer, GSAM, Samsung, tf_keras)")
class _Subtraction(SharpnessEngine):
    def restore(self, weights: Arrays, copies: Arrays, e: Arrays) -> None:  # noqa: ARG002
        for name, move in e.items():
            w = weights[name]
            w[...] = to_dtype(w.astype(np.float64) - to_dtype(move, w.dtype), w.dtype)


@_mutant("NotRestored", "the update is applied at w + e (davda54 under FSDP2)")
class _NotRestored(SharpnessEngine):
    def restore(self, weights: Arrays, copies: Arrays, e: Arrays) -> None:
        """Do not remove the perturbation."""


@_mutant("NotRestored", "only matrices are restored")
class _VectorsForgotten(SharpnessEngine):
    def restore(self, weights: Arrays, copies: Arrays, e: Arrays) -> None:
        super().restore(weights, {n: c for n, c in copies.items() if c.ndim > 1}, e)


@_mutant("UnusedParameter", "a gradient of ones is made up")
class _MadeUp(SharpnessEngine):
    def loss_and_gradients(self, at: Pass) -> Evaluated:
        loss, gradients = super().loss_and_gradients(at)
        ones = {name: np.ones_like(weight) for name, weight in at.weights.items()}
        return loss, {name: ones[name] if g is None else g for name, g in gradients.items()}


@_mutant("UnusedParameter", "every parameter is taken to have a gradient")
class _NoneBreaks(SharpnessEngine):
    def perturbation(self, at: Pass) -> tuple[Arrays, float]:
        for gradient in at.ascent.values():
            gradient.ravel()  # type: ignore[union-attr]
        return super().perturbation(at)


@_mutant("NonFiniteAscent", "no policy: NaN is added to the weights and the step is taken")
class _NoPolicy(SharpnessEngine):
    def policy(self, norm: float, rule: SAM) -> bool:  # noqa: ARG002
        return False


@_mutant("NonFiniteAscent", "'skip_perturb' and 'raise' skip the step")
class _AlwaysSkips(SharpnessEngine):
    def policy(self, norm: float, rule: SAM) -> bool:
        return super().policy(norm, replace(rule, nonfinite="skip_step"))


@_mutant("NonFiniteAscent", "after an infinity the weights are NaN (composer)")
class _InfinityStays(_Subtraction):
    def length(self, radius: float, norm: float, rule: SAM) -> float:
        if math.isfinite(norm):
            return super().length(radius, norm, rule)
        return math.nan


# -- the batch -----------------------------------------------------------------------------------


@_mutant("SubsetIgnored", "the whole batch (every peer)")
class _WholeBatch(SharpnessEngine):
    def first(self, rows: Array, rule: SAM) -> Array:  # noqa: ARG002
        return rows


@_mutant("SubsetFromEnd", "the last examples")
class _LastExamples(SharpnessEngine):
    def first(self, rows: Array, rule: SAM) -> Array:
        return rows[::-1][: math.ceil(rule.fraction * len(rows))]


@_mutant("SubsetFloor", "int(fraction * examples)")
class _RoundedDown(SharpnessEngine):
    def first(self, rows: Array, rule: SAM) -> Array:
        return rows[: max(1, int(rule.fraction * len(rows)))]


@_mutant("SubsetFloor", "no example at all where the fraction is small")
class _NoExample(SharpnessEngine):
    def first(self, rows: Array, rule: SAM) -> Array:
        return rows[: int(rule.fraction * len(rows))]


@_mutant("SubsetOfOtherBatch", "the previous batch (optax's transparent mode)")
class _PreviousBatch(SharpnessEngine):
    previous: Examples | None = None

    def before_step(self, problem: SharpnessProblem, optimizer: Optimizer) -> SharpnessOutcome:
        outcome = super().before_step(problem, optimizer)
        self.previous = problem.examples
        return outcome

    def ascent(self, at: Pass) -> Evaluated:
        problem = at.problem
        if problem.step and self.previous:
            problem = replace(problem, examples=self.previous)
        return super().ascent(replace(at, problem=problem))


@_mutant("DescentOnSubset", "both passes see the ascent examples")
class _DescentOnSubset(SharpnessEngine):
    def descent_rows(self, rows: Array, rule: SAM) -> Array:
        return self.first(rows, rule)


@_mutant("MicrobatchSum", "gradients are added up (tf_keras)")
class _Summed(SharpnessEngine):
    def average(self, parts: list[tuple[int, Gradients]]) -> Gradients:
        mean = super().average(parts)
        return {
            n: None if g is None else g * np.asarray(len(parts), g.dtype) for n, g in mean.items()
        }


@_mutant("MicrobatchUnweighted", "the mean of the means")
class _MeanOfMeans(SharpnessEngine):
    def average(self, parts: list[tuple[int, Gradients]]) -> Gradients:
        return super().average([(1, gradients) for _, gradients in parts])


@_mutant("MicrobatchShared", "accumulate, then one perturbation (composer)")
class _OnePerturbation(SharpnessEngine):
    def parts(self, examples: int, rule: SAM, replicas: int) -> list[list[Array]]:
        super().parts(examples, rule, replicas)
        return [[share] * rule.microbatches for share in np.split(np.arange(examples), replicas)]


@_mutant("ScopeIgnored", "always local (no_sync around both passes)")
class _AlwaysLocal(SharpnessEngine):
    def reduce(self, ascents: list[tuple[int, Gradients]], rule: SAM) -> list[Gradients]:
        return super().reduce(ascents, replace(rule, scope="local"))


@_mutant("ScopeIgnored", "always global (davda54's recipe for DDP)")
class _AlwaysGlobal(SharpnessEngine):
    def reduce(self, ascents: list[tuple[int, Gradients]], rule: SAM) -> list[Gradients]:
        return super().reduce(ascents, replace(rule, scope="global"))


@_mutant("WrongLoss", "the loss at the perturbed weights (google)")
class _PerturbedLoss(SharpnessEngine):
    def reported(self, clean: list[tuple[int, float]], perturbed: list[tuple[int, float]]) -> float:
        return super().reported(perturbed, clean)


@_mutant("WrongLoss", "the mean of both passes (tf_keras)")
class _BothLosses(SharpnessEngine):
    def reported(self, clean: list[tuple[int, float]], perturbed: list[tuple[int, float]]) -> float:
        return super().reported([*clean, *perturbed], [])


# -- variants and selection ----------------------------------------------------------------------


@_mutant("AsamBias", "T = |w| + eta for vectors too")
class _VectorsScaled(SharpnessEngine):
    def scale(self, weight: Array, rule: SAM) -> Array:
        return super().scale(weight.reshape(1, 1, *weight.shape), rule).reshape(weight.shape)


@_mutant("AsamBias", "T = |w| everywhere (davda54's adaptive)")
class _Magnitudes(SharpnessEngine):
    def scale(self, weight: Array, rule: SAM) -> Array:
        return np.abs(weight.astype(np.float64)) if rule.adaptive else np.ones(weight.shape)


@_mutant("AsamEta", "eta = 0 (the command line of the authors' code)")
class _NoEta(SharpnessEngine):
    def scale(self, weight: Array, rule: SAM) -> Array:
        return super().scale(weight, replace(rule, eta=0.0))


@_mutant("AsamSquare", "e = rho * T g / norm(T g)")
class _OnceScaled(SharpnessEngine):
    def step_of(self, scale: Array, gradient: Array, factor: float) -> Array:
        return super().step_of(np.sqrt(scale), gradient, factor)


@_mutant("AsamNorm", "divided by norm(g)")
class _UnscaledNorm(SharpnessEngine):
    def global_norm(self, directions: Arrays, gradients: Arrays) -> float:  # noqa: ARG002
        return super().global_norm(
            {n: g.astype(np.float64) for n, g in gradients.items()}, gradients
        )


@_mutant("ExcludedInNorm", "the norm of everything, the perturbation of what is selected")
class _NormOfEverything(SharpnessEngine):
    def perturbation(self, at: Pass) -> tuple[Arrays, float]:
        chosen = self.chosen(at.problem)
        every = replace(at.problem, rule=replace(at.problem.rule, only=(), exclude=()))
        e, norm = super().perturbation(replace(at, problem=every))
        return {name: move for name, move in e.items() if name in chosen}, norm


@_mutant("ExcludedPerturbed", "only and exclude are read and not obeyed")
class _SelectionIgnored(SharpnessEngine):
    def chosen(self, problem: SharpnessProblem) -> set[str]:
        super().chosen(problem)
        return set(problem.parameters)


@_mutant("EveryOffByOne", "the k-th step is the first that perturbs")
class _EveryLate(SharpnessEngine):
    def perturbs(self, rule: SAM, step: int) -> bool:
        return (step + 1) % rule.every == 0


@_mutant("EveryOffByOne", "every step perturbs")
class _EveryIgnored(SharpnessEngine):
    def perturbs(self, rule: SAM, step: int) -> bool:  # noqa: ARG002
        return True


@_mutant("RhoScheduleStep", "the schedule is read at the next step")
class _NextRadius(SharpnessEngine):
    def radius(self, rule: SAM, step: int) -> float:
        return rule.radius(step + 1)


@_mutant("RhoScheduleStep", "the schedule counts passes, two a step (optax's transparent mode)")
class _CountsPasses(SharpnessEngine):
    def radius(self, rule: SAM, step: int) -> float:
        return rule.radius(2 * step)


# -- order and place -----------------------------------------------------------------------------


@_mutant("AgcOnAscent", "both gradients are clipped (composer)")
class _BothClipped(SharpnessEngine):
    def ascent(self, at: Pass) -> Evaluated:
        loss, gradients = super().ascent(at)
        if at.problem.clipping is None:
            return loss, gradients
        clip = Problem(at.problem.clipping, at.weights, gradients, step=at.problem.step)
        return loss, dict(self.clip(clip).gradients)  # type: ignore[arg-type]


@_mutant("AgcAgainstPerturbedWeights", "clipped before the weights are restored (composer)")
class _ClippedTooEarly(SharpnessEngine):
    def descent(self, at: Pass) -> Evaluated:
        loss, gradients = super().descent(at)
        if at.problem.clipping is None:
            return loss, gradients
        clip = Problem(at.problem.clipping, at.weights, gradients)
        return loss, dict(self.clip(clip).gradients)  # type: ignore[arg-type]

    def update(self, step: Step) -> tuple[Arrays, Arrays]:
        return super().update(replace(step, problem=Problem(AGC(clipping=None), {}, {})))


class _DecayInLoss(SharpnessEngine):
    """Weight decay as a term of the loss, in the passes that a subclass chooses."""

    decay = 0.0
    decay_ascent = decay_descent = False

    def before_step(self, problem: SharpnessProblem, optimizer: Optimizer) -> SharpnessOutcome:
        self.decay = 0.0 if optimizer.decoupled else optimizer.weight_decay
        return super().before_step(problem, optimizer)

    def with_decay(self, weights: Arrays, gradients: Gradients, active: bool) -> Gradients:
        if not (active and self.decay):
            return gradients
        return {n: None if g is None else g + self.decay * weights[n] for n, g in gradients.items()}

    def ascent(self, at: Pass) -> Evaluated:
        loss, gradients = super().ascent(at)
        return loss, self.with_decay(at.weights, gradients, self.decay_ascent)

    def descent(self, at: Pass) -> Evaluated:
        loss, gradients = super().descent(at)
        return loss, self.with_decay(at.weights, gradients, self.decay_descent)

    def update(self, step: Step) -> tuple[Arrays, Arrays]:
        if self.decay_descent and not step.optimizer.decoupled:
            step = replace(step, optimizer=replace(step.optimizer, weight_decay=0.0))
        return super().update(step)


@_mutant("DecayInGradient", "weight decay is in the ascent gradient")
class _DecayInAscent(_DecayInLoss):
    decay_ascent = True


@_mutant("DecayInGradient", "an L2 term in the loss, so in both gradients (google)")
class _DecayInBoth(_DecayInLoss):
    decay_ascent = decay_descent = True


@_mutant("RestartForgets", "the counter starts again at 0 (composer)")
class _CounterLost(SharpnessEngine):
    def reload(self, step: int, momenta: Arrays) -> tuple[int, Arrays]:  # noqa: ARG002
        return 0, momenta


@_mutant("RestartForgets", "the base optimizer's state is not saved (davda54, composer, GSAM)")
class _MomentumLost(SharpnessEngine):
    def reload(self, step: int, momenta: Arrays) -> tuple[int, Arrays]:
        return step, {name: np.zeros_like(m) for name, m in momenta.items()}


@_mutant("GradientsLeft", "the first pass adds to the gradients that are there")
class _GradientsLeft(SharpnessEngine):
    def before_ascent(self) -> Mapping[str, Array | None]:
        return self.left


@_mutant("GradientsLeft", "the second pass adds to the gradients of the first")
class _PassesAdded(SharpnessEngine):
    def before_descent(self, first: Gradients) -> Mapping[str, Array | None]:
        return first


@_mutant("StatePerPass", "both passes update normalisation statistics (davda54)")
class _StateTwice(SharpnessEngine):
    def state_of_descent(self, before: float, after: float) -> float:  # noqa: ARG002
        return after

    def state_of_step(self, before: float, after: float) -> float:  # noqa: ARG002
        return self.state


@_mutant("StatePerPass", "the second pass sees what the first one updated")
class _StateOfFirstPass(SharpnessEngine):
    def state_of_descent(self, before: float, after: float) -> float:  # noqa: ARG002
        return after


@_mutant("StatePerPass", "what the forward pass updates is dropped")
class _StateDropped(SharpnessEngine):
    def state_of_step(self, before: float, after: float) -> float:  # noqa: ARG002
        return before


@_mutant(
    "FixedPerturbed",
    "every parameter with a gradient is perturbed (frozen ones, other optimizers')",
)
class _FixedPerturbed(SharpnessEngine):
    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        outcome = self.estimate(problem)
        fixed = [*frozen, *absent]
        return replace(outcome, gradients={**outcome.gradients, **dict.fromkeys(fixed)})


@_mutant("SamCompiled", "the compiled step was traced with the defaults")
class _TracedDefaults(SharpnessEngine):
    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        return super().sharpen_compiled(replace(problem, rule=SAM()))


@_mutant("SamLossScale", "the scale stays in the gradients")
class _ScaleStays(SharpnessEngine):
    def unscale(self, outcome: SharpnessOutcome, scale: float) -> SharpnessOutcome:  # noqa: ARG002
        return super().unscale(outcome, 1.0)


@_mutant("SamLossScale", "a poisoned step is not skipped under loss scaling")
class _ScaledStepTaken(SharpnessEngine):
    def unscale(self, outcome: SharpnessOutcome, scale: float) -> SharpnessOutcome:
        return replace(super().unscale(outcome, scale), skipped=False)


# -- errors --------------------------------------------------------------------------------------


@_mutant(
    "SamAcceptsBadInput", "nothing to perturb: silently the plain gradient (pytorch_optimizer)"
)
class _SilentlyPlain(SharpnessEngine):
    def nothing_to_perturb(self) -> None:
        """Refuse nothing."""

    def global_norm(self, directions: Arrays, gradients: Arrays) -> float:
        return super().global_norm(directions, gradients) if directions else 0.0


@_mutant("SamAcceptsBadInput", "as many micro-batches as there are examples")
class _FewerMicrobatches(SharpnessEngine):
    def estimate(self, problem: SharpnessProblem, replicas: int = 1) -> SharpnessOutcome:
        most = min(problem.rule.microbatches, len(problem.examples) // replicas)
        return super().estimate(
            replace(problem, rule=replace(problem.rule, microbatches=most)), replicas
        )


@_mutant("SamUnverifiedPattern", "patterns that match nothing are dropped")
class _UnverifiedPattern(SharpnessEngine):
    def chosen(self, problem: SharpnessProblem) -> set[str]:
        try:
            return super().chosen(problem)
        except SelectorError:
            return set(problem.parameters)
