"""Vectors that ask for one sharpness-aware gradient.

Every number comes from :mod:`agc.reference`, on sums that are exact. Rounding errs by a fraction of
the terms of a sum, which may be far more than a fraction of the sum when they cancel. So each
number comes with its magnitude: the same computation on absolute values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from agc.config import SAM
from agc.reference import SharpnessAware, sharpness_aware_gradients
from agc.selectors import perturbed_names
from agc_conformance.data import encode_numbers
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data
from agc_conformance.generate.sam_case import SamCase
from agc_conformance.generate.unit_table import Array
from agc_conformance.sharpness.problems import as_batch, exact_sum, gradient_function, sam_rule

__all__ = ["DOWN_TO_FLOAT16", "sharpen_vector"]

DOWN_TO_FLOAT16: Final = ["float32", "bfloat16", "float16"]


def sharpen_vector(
    name: str,
    clause: int,
    flags: Sequence[str],
    comment: str,
    case: SamCase,
    rule: Mapping[str, Any],
    *,
    step: int = 0,
    dtypes: Sequence[str] = ("float32",),
    full_dtypes: Sequence[str] = ("float64",),
    error: tuple[str, Sequence[str]] | None = None,
    scenario: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Data:
    """Return a vector that asks for one gradient.

    Parameters
    ----------
    name, flags, comment
        See :func:`~agc_conformance.generate.build.vector`.
    clause : int
        Clause of SAM.
    case : SamCase
        Weights and batch.
    rule : mapping
        Differences from the default rule, or from the rule of a ``profile``.
    step : int
        Optimizer step, for schedules and ``every``.
    dtypes, full_dtypes : sequence of str
        Dtypes to run in each time, and those added by ``--full``.
    error : (str, sequence of str), optional
        Class of the expected error, and words that its message must contain.
    scenario, settings : str and mapping, optional
        The setting of real training.
    """
    setting = {} if scenario is None else {"scenario": scenario, "settings": dict(settings or {})}
    return vector(
        name,
        f"SAM-{clause}",
        "sharpness-scenario" if setting else "sharpen",
        flags,
        comment,
        dtypes=list(dtypes),
        full_dtypes=list(full_dtypes),
        **setting,
        rule=dict(rule),
        step=step,
        parameters=[p.to_json() for p in case.parameters],
        examples=case.batch_to_json(),
        expect=(
            _expectation(case, sam_rule(rule), step, scenario, settings or {})
            if error is None
            else {"error": error[0], "message": list(error[1])}
        ),
    )


def _expectation(
    case: SamCase, rule: SAM, step: int, scenario: str | None, settings: Mapping[str, Any]
) -> Data:
    """Return the expected results in a scenario."""
    fixed = [*settings.get("frozen", ()), *settings.get("absent", ())]
    rule = replace(rule, exclude=[*rule.exclude, *fixed])
    # The state of the forward pass doubles the loss of the second step.
    case = case.scaled(1) if scenario == "stateful" else case
    replicas = settings.get("replicas", 1)
    watched, weights = _WatchedGradient(case), case.weights
    reference = sharpness_aware_gradients(
        watched, weights, as_batch(case.examples), rule, step=step, replicas=replicas
    )
    if reference.skipped:
        return {"skipped": True}
    magnitudes = _magnitudes(watched.passes, weights, rule, step, replicas, reference)
    gradients: Data = {
        name: "absent"
        if gradient is None or name in fixed
        else {
            "values": encode_numbers(gradient),
            "magnitudes": _three_digits(magnitudes.gradients[name]),
        }
        for name, gradient in reference.gradients.items()
    }
    expected: Data = {"skipped": False, "gradients": gradients}
    perturbed = bool(reference.norms)
    if math.isfinite(reference.loss):
        expected["loss"] = _number(reference.loss, magnitudes.loss)
    if perturbed and math.isfinite(reference.perturbed_loss):
        expected["perturbed_loss"] = _number(reference.perturbed_loss, magnitudes.perturbed_loss)
    if replicas == 1 and perturbed and all(map(math.isfinite, reference.norms)):
        expected["norm"] = _number(max(reference.norms), magnitudes.norm)
    return expected


def _number(value: float, magnitude: float) -> Data:
    return {
        "value": encode_numbers([value])[0],
        "magnitude": _three_digits(np.array([magnitude]))[0],
    }


def _three_digits(magnitudes: Array) -> list[Any]:
    """Return magnitudes rounded to three digits, enough to measure errors in."""
    return encode_numbers([float(f"{value:.3g}") for value in magnitudes.ravel()])


# -- magnitudes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """Magnitudes of one gradient.

    Attributes
    ----------
    count : int
        Number of examples.
    curvatures : dict of str to array
        Mean curvature, the change of the gradient for a unit change of the weight.
    gradients : dict of str to array
        Magnitudes of the gradient.
    loss : float
        Magnitude of the loss.
    """

    count: int
    curvatures: dict[str, Array]
    gradients: dict[str, Array]
    loss: float


class _WatchedGradient:
    """The gradient function, which also keeps the magnitudes of every gradient that it computes."""

    def __init__(self, case: SamCase) -> None:
        self.used = list(case.curvatures)
        self.compute = gradient_function([p.name for p in case.parameters], self.used)
        self.passes: list[_Pass] = []

    def __call__(
        self, weights: Mapping[str, Array], batch: Sequence[Array]
    ) -> tuple[float, Mapping[str, Array | None]]:
        count = len(batch[0])
        curvatures, gradients, losses = {}, {}, []
        with np.errstate(invalid="ignore", over="ignore"):
            for name, curvature, center in zip(
                self.used, batch, batch[len(self.used) :], strict=False
            ):
                reach = np.abs(weights[name]) + np.abs(center)
                curvatures[name] = exact_sum(curvature) / count
                gradients[name] = exact_sum(curvature * reach) / count
                losses.append(float(exact_sum((0.5 * curvature * reach**2).ravel())) / count)
        self.passes.append(_Pass(count, curvatures, gradients, math.fsum(losses)))
        return self.compute(weights, batch)


@dataclass(frozen=True)
class _Magnitudes:
    gradients: dict[str, Array]
    loss: float
    perturbed_loss: float
    norm: float


def _magnitudes(
    passes: Sequence[_Pass],
    weights: Mapping[str, Array],
    rule: SAM,
    step: int,
    replicas: int,
    reference: SharpnessAware,
) -> _Magnitudes:
    """Return the magnitudes of the gradients, of both losses and of the largest norm."""
    if not reference.norms:
        plain = passes[0]
        return _Magnitudes(plain.gradients, plain.loss, plain.loss, 0.0)
    perturbed = set(perturbed_names(weights, rule))
    ascents: list[_Pass] = []
    descents: list[tuple[_Pass, dict[str, Array]]] = []
    norms = []
    # Order of passes: for each micro-batch, the ascents of all replicas, then their descents.
    for first in range(0, 2 * replicas * rule.microbatches, 2 * replicas):
        microbatch = passes[first : first + 2 * replicas]
        for replica, descent in enumerate(microbatch[replicas:]):
            ascent = microbatch[replica]
            norm = reference.norms[len(ascents)]
            moved = perturbed if math.isfinite(norm) and norm > 0 else set()
            reduced = microbatch[:replicas] if rule.scope == "global" else [ascent]
            gradients, squares = {}, 0.0
            for name, gradient in descent.gradients.items():
                if name in moved:
                    scale = _scale(weights[name], rule)
                    mean = sum(each.gradients[name] for each in reduced) / len(reduced)
                    squares += float(np.sum((scale * mean) ** 2))
                    away = rule.radius(step) * scale * scale * mean / norm
                    gradient = gradient + descent.curvatures[name] * away
                gradients[name] = gradient
            norms.append(math.sqrt(squares))
            ascents.append(ascent)
            descents.append((descent, gradients))
    return _Magnitudes(
        {
            name: _mean((descent.count, gradients[name]) for descent, gradients in descents)
            for name in passes[0].gradients
        },
        _mean((ascent.count, ascent.loss) for ascent in ascents),
        _mean((descent.count, descent.loss) for descent, _ in descents),
        max(norms),
    )


def _mean(weighted: Iterable[tuple[int, Any]]) -> Any:
    """Return the mean of values, weighted by their counts."""
    pairs = list(weighted)
    return sum(count * value for count, value in pairs) / sum(count for count, _ in pairs)


def _scale(weight: Array, rule: SAM) -> Array:
    """Return T of ASAM (SAM-10)."""
    if rule.adaptive and weight.ndim >= 2:
        return np.asarray(np.abs(weight) + rule.eta)
    return np.ones(weight.shape)
