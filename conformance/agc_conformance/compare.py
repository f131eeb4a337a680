"""Comparison: how far a result may be from the float64 reference, in units in the last place (ULP).

A clipped gradient must be within 4 ULP of the reference in float32, float64 and complex, and within 1 ULP
of the correctly rounded reference in float16 and bfloat16. An unclipped unit keeps its bits. Whether a unit
is clipped may differ only if its norm is within 4 ULP (of the dtype the norms are accumulated in) of
its limit. Where finite values overflow that dtype when squared, the unit may also fall under the
non-finite policy (AGC-4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.reference import Stats
from agc_conformance.data import decode_numbers, dtype_of
from agc_conformance.records import ULP_BINS

__all__ = [
    "LIMITS",
    "Verdict",
    "accumulation_dtype",
    "compare_gradient",
    "compare_stats",
    "compare_weights",
    "round_to",
    "same_bits",
    "ulp",
    "ulp_error",
]

Array = npt.NDArray[Any]

LIMITS: Final[dict[str, float]] = {
    "float16": 1.0,
    "bfloat16": 1.0,
    "float32": 4.0,
    "float64": 4.0,
    "complex64": 4.0,
    "complex128": 4.0,
}
"""Largest error of a clipped gradient in ULP."""

# Bits of the significand, exponents of the smallest and largest normal numbers.
_FORMATS: Final[dict[str, tuple[int, int, int]]] = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
_PART: Final = {"complex64": "float32", "complex128": "float64"}


@dataclass
class Verdict:
    """What a comparison found.

    Attributes
    ----------
    problem : str
        What is wrong, or "".
    max_ulp : float or None
        Largest error measured; None if nothing was.
    histogram : list of int
        Elements by error, bins as :data:`agc_conformance.records.ULP_BINS` and one above.
    """

    problem: str = ""
    max_ulp: float | None = None
    histogram: list[int] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        """Take another verdict in; the first problem is kept."""
        self.problem = self.problem or other.problem
        if other.max_ulp is not None:
            self.max_ulp = max(self.max_ulp or 0.0, other.max_ulp)
        if other.histogram:
            mine = self.histogram or [0] * len(other.histogram)
            self.histogram = [a + b for a, b in zip(mine, other.histogram, strict=True)]

    def measure(self, errors: Array) -> None:
        """Count elementwise errors."""
        if errors.size:
            edges = [-np.inf, *ULP_BINS, np.inf]
            bins = np.searchsorted(edges[1:-1], np.nan_to_num(errors.ravel(), nan=np.inf))
            counts = np.bincount(bins, minlength=len(ULP_BINS) + 1).tolist()
            self.add(Verdict("", float(np.max(errors)), counts))


def accumulation_dtype(gradient: str) -> str:
    """Return the least dtype that norms are accumulated in (AGC-3)."""
    return "float64" if gradient in ("float64", "complex128") else "float32"


def ulp(values: Array, dtype: str) -> Array:
    """Spacing of a real dtype at the magnitude of float64 values.

    Examples
    --------
    >>> ulp(np.array([1.0, 0.75, 0.0]), "float16")
    array([9.76562500e-04, 4.88281250e-04, 5.96046448e-08])
    """
    bits, low, high = _FORMATS[dtype]
    exponent = np.frexp(np.abs(np.where(np.isfinite(values), values, 1.0)))[1] - 1
    exponent = np.where(values == 0, low, np.clip(exponent, low, high))
    return np.asarray(np.ldexp(1.0, exponent - (bits - 1)))


def round_to(values: Array, dtype: str) -> Array:
    """Round float64 values correctly (to nearest, ties to even) to a real dtype, kept in float64."""
    if dtype == "float64":
        return np.asarray(values, np.float64)
    quantum = ulp(values, dtype)
    rounded = np.rint(values / quantum) * quantum
    largest = math.ldexp(2.0 - 2.0 ** (1 - _FORMATS[dtype][0]), _FORMATS[dtype][2])
    return np.asarray(np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded))


def ulp_error(got: Array, want: Array, dtype: str) -> Array:
    """Error in ULP of every element; complex numbers by the worse of their parts.

    Parameters
    ----------
    got : array of ``dtype``
        What an implementation returned.
    want : array of float64 or complex128
        The reference, not rounded; float16 and bfloat16 are compared with it correctly rounded.
    dtype : str
        Dtype of the gradient.

    Returns
    -------
    array of float64
        0 where both are NaN or the same infinity; infinity where only one of them is.
    """
    if dtype in _PART:
        part = _PART[dtype]
        real, imaginary = (
            ulp_error(getattr(got, side), getattr(want, side), part) for side in ("real", "imag")
        )
        return np.asarray(np.maximum(real, imaginary))
    have = got.astype(np.float64)
    rounded = round_to(np.asarray(want, np.float64), dtype)
    target = rounded if LIMITS[dtype] == 1.0 else np.asarray(want, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(have - target) / ulp(rounded, dtype)
    same = (np.isnan(have) & np.isnan(target)) | (have == rounded) & np.isinf(rounded)
    error = np.where(same, 0.0, error)
    return np.asarray(np.where(np.isnan(error), np.inf, error))


def same_bits(got: Array, want: Array) -> npt.NDArray[np.bool_]:
    """Tell for every element whether both have the same bits, or are both NaN."""
    if got.dtype.kind == "c":
        return same_bits(got.real, want.real) & same_bits(got.imag, want.imag)
    kind = f"u{got.dtype.itemsize}"
    equal = np.ascontiguousarray(got).view(kind) == np.ascontiguousarray(want).view(kind)
    wide = got.astype(np.float64), want.astype(np.float64)
    return np.asarray(equal | (np.isnan(wide[0]) & np.isnan(wide[1])))


def compare_gradient(
    name: str,
    got: Any,
    gradient: Array,
    expected: Mapping[str, Any] | str,
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
        What came back, in canonical axes.
    gradient : array of the gradient's dtype
        What went in (after unscaling or averaging, where the scenario does that), in canonical axes.
    expected : mapping or str
        Of the vector: ``"untouched"``, or norms, limits, scales and actions of every unit.
    dtype : str
        Dtype of the gradient.
    nonfinite : str
        The policy.
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
    actions: Sequence[str] = expected["action"]
    if not actions:
        return verdict
    count = len(actions)
    got, gradient = got.reshape(count, -1), gradient.reshape(count, -1)
    columns = ("weight_norm", "gradient_norm", "limit", "scale")
    w_norm, g_norm, limit, scale = (decode_numbers(expected[column]) for column in columns)
    wide = gradient.astype(np.complex128 if gradient.dtype.kind == "c" else np.float64)
    largest = np.finfo(accumulation_dtype(dtype)).max
    near = 4 * float(np.finfo(accumulation_dtype(dtype)).eps)
    for unit, action in enumerate(actions):
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
    name: str, got: Stats | None, expected: Mapping[str, Any], near: int, *, dtype: str
) -> Verdict:
    """Compare telemetry; ``near`` units may have been decided either way (AGC-11)."""
    if got is None:
        return Verdict(f"{name}: no telemetry came back")
    for key in ("units", "clipped", "nonfinite"):
        have, want = int(getattr(got, key)), int(expected[key])
        if abs(have - want) > (near if key == "clipped" else 0):
            return Verdict(f"{name}: telemetry says {have} {key}, not {want}")
    wide = accumulation_dtype(dtype)
    for key in ("max_ratio", "min_scale"):
        value, target = float(getattr(got, key)), decode_numbers([expected[key]])
        error = float(ulp_error(np.array([value]), target, wide)[0])
        if error > LIMITS[wide]:
            return Verdict(
                f"{name}: telemetry says {key} {value:.8g}, not {target[0]:.8g}: {error:.3g} ULP"
            )
    return Verdict()


def compare_weights(
    name: str, got: Sequence[Array], want: Sequence[Array], start: Array, *, dtype: str
) -> Verdict:
    """Compare one parameter at every step of a trajectory.

    Each step may add 4 ULP, where the ULP is that of the largest magnitude that the element or its change has
    had so far: a weight that passes through zero is not held to the spacing at zero.
    """
    verdict = Verdict()
    reach, before = np.abs(start), start
    for step, (have, should) in enumerate(zip(got, want, strict=True), start=1):
        if have.dtype != dtype_of(dtype) or have.shape != should.shape:
            return Verdict(
                f"{name}, step {step}: weights came back as {have.dtype}{list(have.shape)}, "
                f"not {dtype}{list(should.shape)}"
            )
        reach = np.maximum(reach, np.maximum(np.abs(should), np.abs(should - before)))
        with np.errstate(invalid="ignore"):
            errors = np.abs(have.astype(np.float64) - should) / ulp(reach, dtype) / step
        errors = np.where(np.isnan(errors), np.inf, errors)
        verdict.measure(errors)
        if errors.size and errors.max() > LIMITS[dtype]:
            worst = int(errors.argmax())
            verdict.add(
                Verdict(
                    f"{name}, step {step}, element {worst}: got {have.ravel()[worst]!s}, not "
                    f"{should.ravel()[worst]!s}: {errors.max():.3g} ULP a step, {LIMITS[dtype]:g} allowed"
                )
            )
        before = should
    return verdict
