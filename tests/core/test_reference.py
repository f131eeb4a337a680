"""The reference against numbers worked by hand, and its properties and errors.

The suite's vectors are numbers that the reference made once, and that a second implementation
confirms; they have the rest.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agc import AGC, Units
from agc.errors import (
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    ShapeError,
)
from agc.plan import Parameter, make_plan
from agc.reference import RowSparse, Stats, adaptive_clip, clip_units, unit_norms

ROWS = Units("o i -> o")
NAN = float("nan")


def test_rows_by_hand():
    """Numbers that can be checked with pencil and paper, from Eq. 3."""
    weight = np.array([[10.0, 0, 0], [0.1, 0.1, 0.1]])
    out = clip_units(np.ones((2, 3)), weight, ROWS).gradient
    assert out[0] == pytest.approx(0.01 * 10 / math.sqrt(3))
    assert out[1] == pytest.approx(0.01 * 0.1)


def test_div_eps_of_a_profile():
    fields = {"clipping": 0.01, "eps": 1e-5, "div_eps": 1e-6}
    out = clip_units(np.array([[2e-7]]), np.array([[0.0]]), ROWS, **fields)
    assert out.gradient.item() == pytest.approx(2e-7 * 1e-7 / 1e-6, rel=1e-12)


class TestNorms:
    """AGC-3."""

    @pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
    def test_no_overflow_or_underflow(self, size):
        assert unit_norms(np.array([[3 * size, 4 * size]]), ROWS).item() == pytest.approx(5 * size)

    @pytest.mark.parametrize("dtype", [np.int32, np.bool_, object, np.uint8])
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(DTypeError, match="needs floating point or complex"):
            unit_norms(np.ones((2, 2), dtype), ROWS)

    def test_what_float64_cannot_hold_is_refused(self):
        if np.finfo(np.longdouble).bits == 64:
            pytest.skip("here a longdouble is a float64")
        huge = np.array([[np.longdouble(2) ** 2000]])
        for array in (huge, huge * 1j):
            with pytest.raises(DTypeError, match="which float64 cannot hold"):
                clip_units(array, np.ones((1, 1)), ROWS)


class TestHyperParameters:
    """What the specification does not define is refused, here as in a rule."""

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            *[("clipping", value, "a finite number > 0") for value in (-1, 0, NAN, None, abs)],
            *[("eps", value, "a finite number >= 0") for value in (NAN, -1)],
            *[("div_eps", value, "a finite number >= 0") for value in (NAN, -1)],
            ("nonfinite", "banana", "one of 'propagate', 'zero', 'raise'"),
        ],
    )
    def test_clip_units(self, field, value, message):
        with pytest.raises(ConfigError, match=f"{field} must be {message}"):
            clip_units(np.ones((1, 2)), np.ones((1, 2)), ROWS, **{field: value})

    @pytest.mark.parametrize("step", [-1, "a", 0.5])
    def test_adaptive_clip(self, step):
        plan = small_model(AGC(), w=(2, 2))
        ones = {"w": np.ones((2, 2))}
        with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
            adaptive_clip(ones, ones, plan, AGC(), step=step)


def small_model(rule, **shapes):
    rows = Units("o ... -> o")
    parameters = [
        Parameter(name, shape, rows if len(shape) > 1 else None) for name, shape in shapes.items()
    ]
    return make_plan(parameters, rule)


class TestModel:
    def test_what_is_not_clipped_passes_and_the_total_is_of_the_rest(self):
        rule = AGC(exclude=["head"], clipping={"off": None, "*": 0.5})
        plan = small_model(rule, head=(2, 2), off=(2,), frozen=(2,), body=(3, 1), bias=(1,))
        ones = {entry.name: np.ones(entry.shape) for entry in plan}
        weights = {**ones, "bias": np.zeros(1)}
        gradients = {**ones, "frozen": None, "body": np.array([[0.25], [5.0], [NAN]])}
        out = adaptive_clip(weights, gradients, plan, rule)
        assert out.gradients["head"] is ones["head"]
        assert out.gradients["off"] is ones["off"]
        assert out.gradients["frozen"] is None
        assert out.total == Stats(units=4, clipped=2, nonfinite=1, max_ratio=1e3, min_scale=5e-4)

    def test_errors_name_the_parameter(self):
        rule = AGC()
        plan = small_model(rule, w=(2, 2))
        ones = np.ones((2, 2))
        with pytest.raises(ShapeError, match=r"'w' has shape \(2, 2\), its gradient \(2, 3\)"):
            adaptive_clip({"w": ones}, {"w": np.ones((2, 3))}, plan, rule)
        with pytest.raises(DTypeError, match="parameter 'w': the gradient has dtype int64"):
            adaptive_clip({"w": ones}, {"w": np.ones((2, 2), int)}, plan, rule)
        with pytest.raises(MissingGradientError, match="no parameter has a gradient"):
            adaptive_clip({"w": ones}, {"w": None}, plan, rule)
        with pytest.raises(ParameterError, match="gradient 'v' is not in the plan"):
            adaptive_clip({"w": ones}, {"v": ones}, plan, rule)
        with pytest.raises(ParameterError, match="parameter 'w' of the plan is missing"):
            adaptive_clip({}, {"w": ones}, plan, rule)
        bad = np.array([[NAN, 1], [1, 1]])
        with pytest.raises(NonFiniteError, match="parameter 'w': 1 of 2 units"):
            adaptive_clip({"w": ones}, {"w": bad}, plan, AGC(nonfinite="raise"))


class TestRowSparse:
    """AGC-9."""

    def test_rows_without_gradient_are_not_read(self):
        rule = AGC(units={"w": "v d -> v"})
        weight = np.array([[NAN, NAN], [1.0, 2], [NAN, NAN], [3, 4]])
        sparse = RowSparse(np.array([3, 1]), np.ones((2, 2)), weight.shape)
        out = adaptive_clip({"w": weight}, {"w": sparse}, small_model(rule, w=(4, 2)), rule)
        assert out.total.nonfinite == 0

    @pytest.mark.parametrize(
        ("indices", "width", "error", "message"),
        [
            ([0, 1], (1, 3), ShapeError, r"values of shape \(1, 3\); it needs one row for each"),
            ([0], (1, 2), ShapeError, r"gradient of shape \(5, 3\) .* values of shape \(1, 2\)"),
            ([[0]], (1, 3), ShapeError, r"indices of shape \(1, 1\)"),
            ([-1], (1, 3), ShapeError, r"row -1 is outside of the gradient's shape \(5, 3\)"),
            ([5], (1, 3), ShapeError, r"row 5 is outside of the gradient's shape \(5, 3\)"),
            ([0.0], (1, 3), DTypeError, "the indices have dtype float64; rows are integers"),
        ],
    )
    def test_rows_that_are_none(self, indices, width, error, message):
        with pytest.raises(error, match=message):
            RowSparse(np.array(indices), np.ones(width), (5, 3))


matrices = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False),
)


class TestProperties:
    @settings(deadline=None)
    @given(matrices, st.floats(1e-3, 10), st.integers(0, 2**32 - 1))
    def test_within_the_limit_along_the_same_direction(self, weight, clipping, seed):
        gradient = np.random.default_rng(seed).lognormal(0, 3, weight.shape)
        found = clip_units(gradient, weight, ROWS, clipping=clipping)
        norm = unit_norms(found.gradient, ROWS)
        assert (norm <= found.gradient_norm * (1 + 1e-15)).all()
        assert (norm[found.clipped] <= found.limit[found.clipped] * (1 + 1e-14)).all()
        assert np.allclose(found.gradient / norm, gradient / found.gradient_norm, rtol=1e-13)

    @settings(deadline=None)
    @given(matrices, st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**30]), st.integers(0, 2**32 - 1))
    def test_scale_invariance(self, weight, factor, seed):
        """Scaling weights, gradients and eps alike scales the result, exactly for powers of two."""
        gradient = np.random.default_rng(seed).lognormal(0, 3, weight.shape)
        plain = clip_units(gradient, weight, ROWS).gradient
        scaled = clip_units(gradient * factor, weight * factor, ROWS, eps=1e-3 * factor).gradient
        assert np.array_equal(plain * factor, scaled)

    @settings(deadline=None)
    @given(matrices, st.integers(0, 2**32 - 1))
    def test_units_do_not_see_each_other(self, weight, seed):
        rng = np.random.default_rng(seed)
        gradient = rng.lognormal(0, 3, weight.shape)
        order = rng.permutation(len(weight))
        plain = clip_units(gradient, weight, ROWS).gradient
        assert np.array_equal(
            plain[order], clip_units(gradient[order], weight[order], ROWS).gradient
        )

    @settings(deadline=None)
    @given(matrices, st.integers(0, 2**32 - 1))
    def test_layout_does_not_matter(self, weight, seed):
        gradient = np.random.default_rng(seed).lognormal(0, 3, weight.shape)
        rows = clip_units(gradient, weight, ROWS).gradient
        columns = clip_units(gradient.T, weight.T, Units("i o -> o")).gradient
        assert np.allclose(rows, columns.T, rtol=1e-14)
