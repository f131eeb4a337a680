"""Comparison: what is let through and what is not, just inside and just outside every limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agc.reference import Stats
from agc_conformance.clipping.compare import compare_gradient, compare_stats
from agc_conformance.clipping.problems import ExpectedUnits
from agc_conformance.data import dtype_of
from agc_conformance.trajectories import compare_weights
from agc_conformance.verdict import LIMITS, Verdict, round_to, same_bits, ulp, ulp_error

REAL = ["float16", "bfloat16", "float32", "float64"]


def expected(
    norm: float = 4.0, limit: float = 2.0, action: str = "clip", weight: float = 1.0
) -> ExpectedUnits:
    scale = limit / norm if action == "clip" else 1.0
    return ExpectedUnits.from_data(
        {
            "weight_norm": [weight],
            "gradient_norm": [norm],
            "limit": [limit],
            "scale": [scale],
            "action": [action],
        }
    )


def check(got: Any, was: Any, expect: Any, dtype: str = "float32", **options: Any) -> Verdict:
    return compare_gradient(
        "w",
        np.asarray(got, dtype_of(dtype)),
        np.asarray(was, dtype_of(dtype)),
        expect,
        dtype=dtype,
        **options,
    )


def steps(value: float, count: int, dtype: str) -> np.ndarray[Any, Any]:
    """A value ``count`` representable numbers away."""
    array = np.asarray([value], dtype_of(dtype))
    for _ in range(abs(count)):
        array = np.nextafter(array, np.asarray([np.inf * np.sign(count)], array.dtype))
    return array


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_ulp_is_numpy_spacing(value: float) -> None:
    value = value if abs(value) < 1e308 else 1.0  # NumPy's overflows at the largest number
    narrow = np.float32(value) if abs(value) < 1e38 else np.float32(1)
    assert ulp(np.array([float(narrow)]), "float32")[0] == np.spacing(np.abs(narrow))
    assert ulp(np.array([value]), "float64")[0] == np.spacing(abs(value))


@given(st.floats(allow_nan=False, allow_infinity=False))
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_rounding_is_the_cast(value: float) -> None:
    for dtype in ("float16", "float32"):
        want = np.asarray([value]).astype(dtype).astype(np.float64)
        assert np.array_equal(round_to(np.array([value]), dtype), want)


def test_bfloat16_is_rounded_once() -> None:
    """A cast by way of float32 rounds twice: to the tie, then away from the nearer neighbour."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert round_to(value, "bfloat16")[0] == 1 + 2.0**-7
    assert float(value.astype(ml_dtypes.bfloat16)[0]) == 1.0


@pytest.mark.parametrize("dtype", REAL)
def test_error_of_neighbours(dtype: str) -> None:
    for count in (0, 1, 2, 5):
        got = steps(1.5, count, dtype)
        assert ulp_error(got, np.array([1.5]), dtype)[0] == count


def test_error_of_special_values() -> None:
    got = np.array([np.nan, np.nan, 1.0, np.inf, -np.inf, np.inf], np.float32)
    want = np.array([np.nan, 1.0, np.nan, np.inf, np.inf, 1.0])
    assert ulp_error(got, want, "float32").tolist() == [0, np.inf, np.inf, 0, np.inf, np.inf]


def test_complex_error_is_the_worse_part() -> None:
    got = np.array([1 + (1 + 3 * 2.0**-23) * 1j], np.complex64)
    assert ulp_error(got, np.array([1 + 1j]), "complex64")[0] == 3


def test_bits() -> None:
    a = np.array([0.0, 1.0, np.nan, -0.0], np.float32)
    b = np.array([-0.0, 1.0, np.nan, -0.0], np.float32)
    assert same_bits(a, b).tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", REAL)
def test_the_limit_of_a_clipped_unit(dtype: str) -> None:
    allowed = int(LIMITS[dtype])
    was = [3.0, 3.0]
    inside = np.concatenate([steps(1.5, allowed, dtype), steps(1.5, -allowed, dtype)])
    outside = np.concatenate([steps(1.5, 0, dtype), steps(1.5, allowed + 1, dtype)])
    good = check(inside, was, expected(), dtype)
    assert good.problem == ""
    assert good.max_ulp == allowed
    assert sum(good.histogram) == 2
    bad = check(outside, was, expected(), dtype)
    assert "w, unit 0, element 1" in bad.problem
    assert f"{allowed} allowed" in bad.problem


def test_an_unclipped_unit_keeps_its_bits() -> None:
    expect = expected(norm=1.0, action="keep")
    assert check([-0.0, 1.0], [-0.0, 1.0], expect).problem == ""
    assert "1 of 2 elements changed" in check([0.0, 1.0], [-0.0, 1.0], expect).problem
    assert "elements changed" in check(steps(1.0, 1, "float32"), [1.0], expect).problem


def test_a_unit_that_should_be_clipped_and_is_not() -> None:
    assert "ULP" in check([3.0], [3.0], expected()).problem


def test_a_unit_at_its_limit_may_go_either_way() -> None:
    for ulps, either in ((3, True), (6, False)):
        norm = 2.0 * (1 + ulps * 2.0**-23)
        above, scaled = expected(norm=norm), 3.0 * 2.0 / norm
        assert (check([3.0], [3.0], above).problem == "") == either or not either
        below = expected(norm=2.0 * (1 - ulps * 2.0**-23), action="keep")
        assert check([3.0], [3.0], below).problem == ""
        assert (check(steps(3.0, -2, "float32"), [3.0], below).problem == "") == either
        assert check([scaled], [3.0], above).problem == ""


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_poisoned_unit_is_under_the_policy(policy: str) -> None:
    expect = expected(norm=math.nan, action="nonfinite")
    right = {"propagate": [np.nan, np.nan], "zero": [0.0, -0.0]}[policy]
    assert check(right, [np.nan, 1.0], expect, nonfinite=policy).problem == ""
    for wrong in ([np.nan, 1.0], [np.nan, 0.0], [np.inf, np.nan]):
        assert (
            "not under the policy" in check(wrong, [np.nan, 1.0], expect, nonfinite=policy).problem
        )


def test_overflow_permits_both() -> None:
    huge = expected(norm=2.0**70, limit=2.0)
    was = [2.0**70]
    assert check([2.0], was, huge).problem == ""
    assert check([np.nan], was, huge).problem == ""
    assert check([0.0], was, huge, nonfinite="zero").problem == ""
    assert check([0.0], was, huge).problem != ""
    assert check([2.0**70], was, huge).problem != ""
    # float64 holds the square, so there is no excuse.
    assert check([np.nan], was, huge, "float64").problem != ""
    weight = expected(norm=1.0, weight=2.0**70, limit=2.0**60, action="keep")
    assert check([np.nan], [1.0], weight).problem == ""
    assert check([0.5], [1.0], weight).problem != ""


def test_dtype_and_shape_are_compared() -> None:
    was = np.ones(2, np.float16)
    assert "came back in float32, not float16" in (
        compare_gradient("w", was.astype(np.float32), was, expected(), dtype="float16").problem
    )
    assert "shape (1, 2), not (2,)" in (
        compare_gradient("w", was[None], was, expected(), dtype="float16").problem
    )


def test_untouched_means_untouched() -> None:
    assert check([np.nan, -0.0], [np.nan, -0.0], "untouched").problem == ""
    assert "1 elements changed" in check([1.0, 0.0], [1.0, -0.0], "untouched").problem


def test_histogram_has_the_published_bins() -> None:
    verdict = Verdict()
    verdict.measure(np.array([0.0, 0.3, 0.5, 0.7, 1.5, 2.5, 3.5, 5.0, 9.0, np.inf]))
    assert verdict.histogram == [1, 2, 1, 1, 1, 1, 1, 2]
    assert verdict.max_ulp == np.inf


STATS = Stats(units=3, clipped=2, nonfinite=0, max_ratio=0.5, min_scale=0.25)


@pytest.mark.parametrize(
    ("change", "near", "message"),
    [
        ({}, 0, ""),
        ({"clipped": 1}, 0, "1 clipped, not 2"),
        ({"clipped": 1}, 1, ""),
        ({"units": 4}, 1, "4 units, not 3"),
        ({"nonfinite": 1}, 1, "1 nonfinite, not 0"),
        ({"max_ratio": 0.5 * (1 + 4 * 2.0**-23)}, 0, ""),
        ({"max_ratio": 0.5 * (1 + 5 * 2.0**-23)}, 0, "max_ratio"),
        ({"min_scale": 1.0}, 0, "min_scale"),
    ],
)
def test_stats(change: dict[str, Any], near: int, message: str) -> None:
    problem = compare_stats("w", replace(STATS, **change), STATS, near, dtype="float32").problem
    assert message in problem if message else problem == ""


def test_missing_stats() -> None:
    assert "no telemetry" in compare_stats("w", None, STATS, 0, dtype="float32").problem


def test_weights_may_drift_by_four_ulp_a_step() -> None:
    start = np.array([1.0])
    want = [np.array([1.0]), np.array([1.0])]
    good = [steps(1.0, 4, "float32"), steps(1.0, 8, "float32")]
    bad = [steps(1.0, 4, "float32"), steps(1.0, 9, "float32")]
    assert compare_weights("w", good, want, start, dtype="float32").problem == ""
    assert "w, step 2, element 0" in compare_weights("w", bad, want, start, dtype="float32").problem


def test_weights_that_pass_through_zero_keep_their_spacing() -> None:
    start, want = np.array([1.0]), [np.array([1e-9])]
    near = [np.array([1e-9 + 2.0**-24], np.float32)]
    far = [np.array([1e-9 + 2.0**-20], np.float32)]
    assert compare_weights("w", near, want, start, dtype="float32").problem == ""
    assert compare_weights("w", far, want, start, dtype="float32").problem != ""


def test_weights_that_are_nan_or_of_another_dtype() -> None:
    start, want = np.array([1.0]), [np.array([1.0])]
    nan = [np.array([np.nan], np.float32)]
    assert compare_weights("w", nan, want, start, dtype="float32").problem != ""
    wide = [np.array([1.0])]
    assert "float64" in compare_weights("w", wide, want, start, dtype="float32").problem


def test_limits_are_those_of_the_specification() -> None:
    assert LIMITS == {
        "float16": 1,
        "bfloat16": 1,
        "float32": 4,
        "float64": 4,
        "complex64": 4,
        "complex128": 4,
    }
