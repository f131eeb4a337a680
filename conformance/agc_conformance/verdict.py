"""Verdicts, and errors in units in the last place (ULP)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc_conformance.records import ULP_BINS

__all__ = [
    "LIMITS",
    "Verdict",
    "accumulation_dtype",
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
    """The result of a comparison.

    Attributes
    ----------
    problem : str
        The first problem, in words; empty if the comparison passed.
    note : str
        The measurement, in words.
    max_ulp : float or None
        Largest error measured; None if nothing was.
    histogram : list of int
        Elements by error, bins as :data:`agc_conformance.records.ULP_BINS` and one above.
    ulp_by_path : dict of str to float
        Largest error by path of the backend, where paths are compared.
    errors, limits : dict of str to float
        Relative errors of layers or tensors, and the largest allowed, for the figures of NFNets.
    """

    problem: str = ""
    note: str = ""
    max_ulp: float | None = None
    histogram: list[int] = field(default_factory=list)
    ulp_by_path: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

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
            self.add(Verdict(max_ulp=float(np.max(errors)), histogram=counts))


def accumulation_dtype(gradient: str) -> str:
    """Return the least dtype that norms are accumulated in (AGC-3)."""
    return "float64" if gradient in ("float64", "complex128") else "float32"


def ulp(values: Array, dtype: str) -> Array:
    """Return the spacing of a real dtype at the magnitude of float64 values.

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
    """Round float64 values to the precision of a real dtype: to nearest, ties to even."""
    if dtype == "float64":
        return np.asarray(values, np.float64)
    quantum = ulp(values, dtype)
    rounded = np.rint(values / quantum) * quantum
    largest = math.ldexp(2.0 - 2.0 ** (1 - _FORMATS[dtype][0]), _FORMATS[dtype][2])
    return np.asarray(np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded))


def ulp_error(got: Array, want: Array, dtype: str) -> Array:
    """Return the error in ULP of every element; of a complex number, that of its worse part.

    Parameters
    ----------
    got : array of ``dtype``
        The implementation's result.
    want : array of float64 or complex128
        The reference, not rounded; here it is rounded correctly for float16 and bfloat16.
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
