"""Comparison of SAM: how far a sharpness-aware gradient may be from the float64 reference.

Every number comes with its *magnitude*, the sum of the magnitudes of all its terms. Rounding errs
by a fraction of the terms, which may be far more than a fraction of their sum when they cancel. For
a gradient the magnitude is the mean of ``|a| (|w + e| + |c| + de)``, where ``de`` bounds the change
of ``e`` by rounding of the ascent gradient.

An error is measured in units in the last place of the magnitude, in the dtype of the weights: that
dtype has to hold ``w + e``. Allowed are 4 in float32 and float64 and 2 in float16 and bfloat16 (the
rounding of ``w + e`` and of the gradient, half a unit each, doubled where the magnitude is just
above a power of two). Losses and norms are sums of squares, and a square has twice the relative
error of what is squared: allowed are twice as many.

The weights themselves must come back bit for bit (SAM-3).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from agc_conformance.backend import SharpnessOutcome, Unsupported
from agc_conformance.data import dtype_of
from agc_conformance.sharpness.problems import ExpectedGradient, ExpectedNumber, SharpenQuestion
from agc_conformance.verdict import Verdict, accumulation_dtype, same_bits, ulp

__all__ = ["NUMBER_LIMITS", "SHARPNESS_LIMITS", "compare_sharpness"]

Array = npt.NDArray[Any]

SHARPNESS_LIMITS: Final[dict[str, float]] = {
    "float16": 2.0,
    "bfloat16": 2.0,
    "float32": 4.0,
    "float64": 4.0,
}
"""Largest error of a sharpness-aware gradient in ULP of its magnitude."""

NUMBER_LIMITS: Final = {dtype: 2 * limit for dtype, limit in SHARPNESS_LIMITS.items()}
"""Largest error of a loss or a norm in ULP of its magnitude."""


def compare_sharpness(question: SharpenQuestion, outcome: SharpnessOutcome) -> Verdict:
    """Compare an outcome with the expectations of its question."""
    if not isinstance(outcome, SharpnessOutcome):
        return Verdict(f"a {type(outcome).__name__} came back, not a SharpnessOutcome")
    verdict = Verdict()
    for name, weight in question.problem.parameters.items():
        verdict.add(_compare_weight(name, outcome.weights.get(name), weight))
    if outcome.skipped != question.skipped:
        what = "skipped" if outcome.skipped else "not skipped"
        verdict.add(Verdict(f"the step was {what}"))
    if not verdict.problem and not question.skipped:
        for name, expected in question.gradients.items():
            got = outcome.gradients.get(name)
            verdict.add(_compare_gradient(question, name, got, expected))
    reported = {kind: getattr(outcome, kind) for kind in question.numbers}
    for kind, value in reported.items():
        if value is not None:
            number = question.numbers[kind]
            verdict.add(_compare_number(kind, float(value), number, question.dtype))
    silent = all(value is None for value in reported.values())
    if silent and question.numbers_required and not verdict.problem:
        raise Unsupported("tells no loss")
    return verdict


def _compare_weight(name: str, got: Any, want: Array) -> Verdict:
    if got is None:
        return Verdict(f"{name}: no weights came back")
    got = np.asarray(got)
    if got.dtype != want.dtype or got.shape != want.shape:
        return Verdict(
            f"{name}: the weights came back as {got.dtype}{list(got.shape)}, "
            f"not {want.dtype}{list(want.shape)}"
        )
    wrong = ~same_bits(got, want)
    if wrong.any():
        return Verdict(
            f"{name}: {int(wrong.sum())} of {wrong.size} weights are not what they were before"
        )
    return Verdict()


def _compare_gradient(
    question: SharpenQuestion,
    name: str,
    got: Any,
    expected: Literal["absent"] | ExpectedGradient,
) -> Verdict:
    if isinstance(expected, str):
        moves = got is not None and np.asarray(got).any()
        return Verdict(f"{name}: is in no loss, and got a gradient" if moves else "")
    if got is None:
        return Verdict(f"{name}: no gradient came back")
    got, dtype = np.asarray(got), question.dtype
    if got.dtype != dtype_of(dtype) or got.shape != question.problem.parameters[name].shape:
        return Verdict(f"{name}: the gradient came back as {got.dtype}{list(got.shape)}")
    verdict = Verdict()
    want = expected.values.ravel()
    have = question.layout.canonical(name, got).astype(np.float64).ravel()
    errors = _errors(have, want, expected.magnitudes.ravel(), dtype)
    verdict.measure(errors)
    worst = int(errors.argmax())
    if errors[worst] > SHARPNESS_LIMITS[dtype]:
        verdict.problem = (
            f"{name}, element {worst}: got {have[worst]:.9g}, not {want[worst]:.9g}: "
            f"{errors[worst]:.3g} ULP, {SHARPNESS_LIMITS[dtype]:g} allowed"
        )
    return verdict


def _compare_number(kind: str, got: float, expected: ExpectedNumber, dtype: str) -> Verdict:
    """Compare a loss or norm.

    The clean loss is compared in the accumulation dtype. The perturbed loss and the norm depend on
    rounded values, so they are only as exact as the dtype of the weights.
    """
    want, size = expected.value, expected.magnitude
    exact = kind == "loss"
    kept = accumulation_dtype(dtype) if exact else dtype
    error = float(_errors(np.array([got]), np.array([want]), np.array([size]), kept)[0])
    limit = NUMBER_LIMITS[kept]
    if error > limit:
        name = kind.replace("_", " ")
        return Verdict(
            f"the {name} is {got:.9g}, not {want:.9g}: {error:.3g} ULP, {limit:g} allowed"
        )
    return Verdict()


def _errors(got: Array, want: Array, magnitude: Array, dtype: str) -> Array:
    """Return errors in ULP of the magnitude.

    If a value is not finite, the error is 0 where both are NaN or the same infinity, else infinite.
    """
    smallest, at_one = ulp(np.array([0.0, 1.0]), dtype)
    # ldexp, not ulp: where terms cancel, a magnitude may exceed the largest number of the dtype.
    unit = np.maximum(smallest, np.ldexp(at_one, np.frexp(magnitude)[1] - 1))
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want) / unit
    same = (np.isnan(got) & np.isnan(want)) | (got == want)
    error = np.where(same, 0.0, error)
    return np.asarray(np.where(np.isnan(error), np.inf, error))
