"""Comparison of AGC: how far a clipped gradient may be from the float64 reference, in ULP.

A clipped gradient must be within 4 ULP of the reference in float32, float64 and complex, and within
1 ULP of the correctly rounded reference in float16 and bfloat16. An unclipped unit keeps its bits.
Whether a unit is clipped may differ only if its norm is within 4 ULP (of the dtype the norms are
accumulated in) of its limit. Where finite values overflow that dtype when squared, the unit may
also fall under the non-finite policy (AGC-4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.reference import RowSparse, Stats
from agc_conformance.backend import Outcome, Unsupported
from agc_conformance.clipping.problems import (
    ClipQuestion,
    Expected,
    ExpectedUnits,
)
from agc_conformance.data import dtype_of
from agc_conformance.verdict import LIMITS, Verdict, accumulation_dtype, same_bits, ulp_error

__all__ = ["compare_clip", "compare_gradient", "compare_stats"]

Array = npt.NDArray[Any]


def compare_clip(question: ClipQuestion, outcome: Outcome) -> Verdict:
    """Compare an outcome with the expectations of its question."""
    if not isinstance(outcome, Outcome):
        return Verdict(f"a {type(outcome).__name__} came back, not an Outcome")
    unknown = sorted(set(outcome.gradients) - set(question.gradients))
    if unknown:
        return Verdict(f"gradients came back for {unknown}, which are no parameters")
    verdict = Verdict()
    for name, expected in question.gradients.items():
        verdict.add(_compare_named(question, name, outcome.gradients.get(name), expected))
    if outcome.stats is not None:
        for name, stats in question.stats.items():
            expected = question.gradients[name]
            near = _near_limit(expected, question.dtype)
            verdict.add(
                compare_stats(name, outcome.stats.get(name), stats, near, dtype=question.dtype)
            )
    elif question.stats and question.stats_required and not verdict.problem:
        raise Unsupported("no telemetry")
    return verdict


def _compare_named(question: ClipQuestion, name: str, got: Any, expected: Expected) -> Verdict:
    if expected == "absent":
        return Verdict(f"{name}: had no gradient, and one came back" if got is not None else "")
    if got is None:
        return Verdict(f"{name}: no gradient came back")
    seen, nonfinite = question.seen[name], question.problem.rule.nonfinite
    if isinstance(seen, RowSparse):
        return _compare_sparse(name, got, seen, expected, question.dtype, nonfinite)
    if isinstance(got, RowSparse):
        return Verdict(f"{name}: a dense gradient came back sparse")
    assert seen is not None
    return compare_gradient(
        name,
        question.layout.canonical(name, np.asarray(got)),
        question.layout.canonical(name, seen),
        expected,
        dtype=question.dtype,
        nonfinite=nonfinite,
    )


def _compare_sparse(
    name: str, got: Any, seen: RowSparse, expected: Expected, dtype: str, nonfinite: str
) -> Verdict:
    if not isinstance(got, RowSparse):
        return Verdict(f"{name}: a row-sparse gradient came back dense")
    if tuple(got.shape) != tuple(seen.shape):
        return Verdict(f"{name}: came back with shape {got.shape}, not {seen.shape}")
    if got.values.dtype != dtype_of(dtype):
        return Verdict(f"{name}: the gradient came back in {got.values.dtype}, not {dtype}")
    have, want = got.coalesce(), seen.coalesce()
    if have.indices.tolist() != want.indices.tolist():
        return Verdict(
            f"{name}: rows {have.indices.tolist()} came back, not {want.indices.tolist()}"
        )
    return compare_gradient(
        name, have.values, want.values, expected, dtype=dtype, nonfinite=nonfinite
    )


def _near_limit(expected: Expected, dtype: str) -> int:
    """Count the units whose norm is so close to the limit that either decision is right."""
    assert isinstance(expected, ExpectedUnits)
    norm, limit = expected.gradient_norm, expected.limit
    with np.errstate(invalid="ignore"):
        close = np.abs(norm - limit) <= 4 * float(np.finfo(accumulation_dtype(dtype)).eps) * limit
    return int(close.sum())


def compare_gradient(
    name: str,
    got: Any,
    gradient: Array,
    expected: Expected,
    *,
    dtype: str,
    nonfinite: str = "propagate",
) -> Verdict:
    """Compare one clipped gradient with its expectation.

    Parameters
    ----------
    name : str
        Parameter, for messages.
    got : array
        The backend's gradient, in canonical axes.
    gradient : array of the gradient's dtype
        The gradient before clipping (unscaled or averaged, if the scenario does that), in canonical
        axes.
    expected : "untouched" or ExpectedUnits
        The vector's expectation.
    dtype : str
        Dtype of the gradient.
    nonfinite : str
        The policy for non-finite norms.
    """
    verdict = Verdict()
    if got.dtype != dtype_of(dtype):
        verdict.problem = f"{name}: the gradient came back in {got.dtype}, not {dtype}"
        return verdict
    if got.shape != gradient.shape:
        verdict.problem = (
            f"{name}: the gradient came back with shape {got.shape}, not {gradient.shape}"
        )
        return verdict
    if isinstance(expected, str):
        wrong = ~same_bits(got, gradient)
        if wrong.any():
            verdict.problem = (
                f"{name}: {int(wrong.sum())} elements changed that must not be touched"
            )
        return verdict
    if not expected.actions:
        return verdict
    count = len(expected.actions)
    got, gradient = got.reshape(count, -1), gradient.reshape(count, -1)
    w_norm, g_norm = expected.weight_norm, expected.gradient_norm
    limit, scale = expected.limit, expected.scale
    wide = gradient.astype(np.complex128 if gradient.dtype.kind == "c" else np.float64)
    largest = np.finfo(accumulation_dtype(dtype)).max
    near = 4 * float(np.finfo(accumulation_dtype(dtype)).eps)
    for unit, action in enumerate(expected.actions):
        back, was = got[unit], gradient[unit]
        kept = bool(same_bits(back, was).all())
        policy = _under_policy(back, nonfinite)
        at = f"{name}, unit {unit}"
        numbers = f"norm {g_norm[unit]:.6g}, limit {limit[unit]:.6g}"
        if action == "nonfinite":
            if not policy:
                verdict.add(Verdict(f"{at}: not under the policy {nonfinite!r}: {_few(back)}"))
            continue
        if policy and max(w_norm[unit], g_norm[unit]) > 0.999 * math.sqrt(largest):
            continue
        at_limit = abs(g_norm[unit] - limit[unit]) <= near * limit[unit]
        if kept and (action == "keep" or at_limit):
            continue
        if action == "keep" and not at_limit:
            changed = int((~same_bits(back, was)).sum())
            verdict.add(
                Verdict(
                    f"{at}: {numbers}: not clipped, yet {changed} of {was.size} elements changed: "
                    f"{_few(back)}, not {_few(was)}"
                )
            )
            continue
        want = wide[unit] * scale[unit]
        errors = ulp_error(back, want, dtype)
        verdict.measure(errors)
        if errors.max() > LIMITS[dtype]:
            worst = int(errors.argmax())
            verdict.add(
                Verdict(
                    f"{at}, element {worst}: {numbers}: got {back[worst]!s}, not {want[worst]!s}: "
                    f"{errors[worst]:.3g} ULP, {LIMITS[dtype]:g} allowed"
                )
            )
    return verdict


def _under_policy(values: Array, nonfinite: str) -> bool:
    if nonfinite == "zero":
        return bool((values == 0).all())
    return bool(np.isnan(values.astype(np.complex128)).all())


def _few(values: Array) -> str:
    shown = ", ".join(str(value) for value in values[:4])
    return f"[{shown}{', ...' if values.size > 4 else ''}]"


def compare_stats(
    name: str, got: Stats | None, expected: Stats, near: int, *, dtype: str
) -> Verdict:
    """Compare telemetry; ``near`` units may have been decided either way (AGC-11)."""
    if got is None:
        return Verdict(f"{name}: no telemetry came back")
    for key in ("units", "clipped", "nonfinite"):
        have, want = int(getattr(got, key)), int(getattr(expected, key))
        if abs(have - want) > (near if key == "clipped" else 0):
            return Verdict(f"{name}: telemetry says {have} {key}, not {want}")
    wide = accumulation_dtype(dtype)
    for key in ("max_ratio", "min_scale"):
        value, target = float(getattr(got, key)), float(getattr(expected, key))
        error = float(ulp_error(np.array([value]), np.array([target]), wide)[0])
        if error > LIMITS[wide]:
            return Verdict(
                f"{name}: telemetry says {key} {value:.8g}, not {target:.8g}: {error:.3g} ULP"
            )
    return Verdict()
