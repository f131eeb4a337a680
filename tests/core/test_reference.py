"""The reference is checked by hand-worked numbers, published ones, and properties; never by
itself.
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
    UnitsError,
)
from agc.plan import Parameter, make_plan
from agc.reference import RowSparse, adaptive_clip, clip_units, unit_norms

ROWS = Units("o i -> o")
NAN, INF = float("nan"), float("inf")


class TestByHand:
    """Numbers that can be checked with pencil and paper, from Eq. 3."""

    def test_rows(self):
        weight = np.array([[10.0, 0, 0], [0.1, 0.1, 0.1]])
        out = clip_units(np.ones((2, 3)), weight, ROWS).gradient
        assert out[0] == pytest.approx(0.01 * 10 / math.sqrt(3))
        assert out[1] == pytest.approx(0.01 * 0.1)

    def test_one_input_has_as_many_units_as_outputs(self):
        out = clip_units(np.ones((3, 1)), np.array([[10.0], [1], [0.1]]), ROWS).gradient
        assert out.ravel() == pytest.approx([0.1, 0.01, 0.001])

    def test_conv1d_reduces_inputs_and_taps(self):
        weight = np.array([[[1.0, 2], [3, 4]], [[0.1, 0.2], [0.3, 0.4]]])
        out = clip_units(np.ones((2, 2, 2)), weight, Units("o i ... -> o")).gradient
        assert out[0] == pytest.approx(np.full((2, 2), 0.01 * math.sqrt(30) / 2))
        assert out[1] == pytest.approx(np.full((2, 2), 0.001 * math.sqrt(30) / 2))

    def test_groups_are_kept_apart(self):
        weight = np.array(
            [[[3.0]], [[4.0]], [[6.0]], [[8.0]]]
        )  # two groups of two inputs, one output
        norms = unit_norms(weight, Units("(g=2 i) o k -> g o"))
        assert norms.ravel().tolist() == [5.0, 10.0]

    def test_vector_is_one_unit(self):
        out = clip_units(np.array([3.0, 4.0]), np.array([0.0, 1.0]), Units("... ->")).gradient
        assert out.tolist() == pytest.approx([0.006, 0.008])

    def test_scalar(self):
        assert clip_units(np.array(-5.0), np.array(2.0), Units("... ->")).gradient == -0.02


class TestFloor:
    """AGC-1: eps is a floor of the weight norm; not added, not inside the root."""

    def test_zero_weights_can_move(self):
        out = clip_units(np.array([[3.0, 4.0]]), np.zeros((1, 2)), ROWS)
        assert np.linalg.norm(out.gradient) == pytest.approx(0.01 * 1e-3)

    @pytest.mark.parametrize("norm", [5e-4, 1e-3, 2e-3, 1.0])
    def test_floor(self, norm):
        out = clip_units(np.array([[1.0]]), np.array([[norm]]), ROWS)
        assert out.limit.item() == pytest.approx(0.01 * max(norm, 1e-3), rel=1e-15)

    def test_eps_zero_stops_a_zero_unit(self):
        assert clip_units(np.array([[1.0]]), np.array([[0.0]]), ROWS, eps=0.0).gradient == 0


class TestTrigger:
    """AGC-2: strictly greater; no second epsilon."""

    def test_tie_keeps_its_bits(self):
        # 0.5 * 2 is exact in binary, so the norm equals the limit exactly.
        tie = clip_units(np.array([[1.0]]), np.array([[2.0]]), ROWS, clipping=0.5)
        assert not tie.clipped.any()
        over = clip_units(np.array([[np.nextafter(1.0, 2)]]), np.array([[2.0]]), ROWS, clipping=0.5)
        assert over.clipped.all()

    def test_unclipped_is_untouched(self):
        gradient = np.array([[-0.0, 1e-300], [1.0, 1.0]])
        out = clip_units(gradient, np.ones((2, 2)), ROWS).gradient
        assert out[0].tobytes() == gradient[0].tobytes()

    def test_tiny_limits_need_no_epsilon(self):
        """A peer's 1e-6 in the division over-clips this tenfold."""
        out = clip_units(np.array([[2e-7]]), np.array([[0.0]]), ROWS, clipping=0.01, eps=1e-5)
        assert out.gradient.item() == pytest.approx(1e-7, rel=1e-12)

    def test_div_eps_of_a_profile(self):
        fields = {"clipping": 0.01, "eps": 1e-5, "div_eps": 1e-6}
        out = clip_units(np.array([[2e-7]]), np.array([[0.0]]), ROWS, **fields)
        assert out.gradient.item() == pytest.approx(2e-7 * 1e-7 / 1e-6, rel=1e-12)


class TestNorms:
    """AGC-3."""

    def test_complex(self):
        assert unit_norms(np.array([[3 + 4j, 0]]), ROWS).item() == 5.0
        out = clip_units(np.array([[3 + 4j]]), np.array([[1 + 0j]]), ROWS)
        assert out.gradient.dtype == np.complex128
        assert out.gradient.item() == pytest.approx(0.01 * (0.6 + 0.8j))

    @pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
    def test_no_overflow_or_underflow(self, size):
        assert unit_norms(np.array([[3 * size, 4 * size]]), ROWS).item() == pytest.approx(5 * size)

    def test_float16_is_squared_after_widening(self):
        weight = np.full((1, 16384), 0.005, np.float16)
        gradient = np.full((1, 16384), 1.5e-4, np.float16)
        found = clip_units(gradient, weight, ROWS)
        assert found.gradient_norm.item() == pytest.approx(128 * float(gradient[0, 0]))

    def test_bfloat16(self):
        import ml_dtypes

        array = np.array([[3.0, 4.0]], ml_dtypes.bfloat16)
        assert unit_norms(array, ROWS).item() == 5.0

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


class TestNonFinite:
    """AGC-4: the policy decides for the whole unit."""

    @pytest.mark.parametrize("poison", [NAN, INF, -INF])
    @pytest.mark.parametrize("where", ["gradient", "weight"])
    def test_propagate_and_zero(self, poison, where):
        arrays = {"gradient": np.ones((2, 3)), "weight": np.ones((2, 3))}
        arrays[where][0, 1] = poison
        clean = clip_units(np.ones((1, 3)), np.ones((1, 3)), ROWS).gradient
        out = clip_units(**arrays, units=ROWS)
        assert np.isnan(out.gradient[0]).all()
        assert np.array_equal(out.gradient[1:], clean)
        assert out.nonfinite.ravel().tolist() == [True, False]
        zero = clip_units(**arrays, units=ROWS, nonfinite="zero").gradient
        assert np.array_equal(zero, np.vstack([np.zeros((1, 3)), clean]))

    def test_a_small_gradient_on_a_poisoned_weight_does_not_pass(self):
        out = clip_units(np.full((1, 1), 1e-9), np.array([[NAN]]), ROWS).gradient
        assert np.isnan(out).all()

    def test_raise_counts_units(self):
        gradient = np.array([[NAN], [1.0], [INF]])
        with pytest.raises(NonFiniteError, match="2 of 3 units"):
            clip_units(gradient, np.ones((3, 1)), ROWS, nonfinite="raise")


def small_model(rule, **shapes):
    rows = Units("o ... -> o")
    parameters = [
        Parameter(name, shape, rows if len(shape) > 1 else None) for name, shape in shapes.items()
    ]
    return make_plan(parameters, rule)


class TestModel:
    def test_excluded_frozen_and_switched_off_gradients_pass(self):
        rule = AGC(exclude=["head"], clipping={"off": None, "*": 0.01})
        plan = small_model(rule, head=(2, 2), off=(2,), frozen=(2,), body=(2,))
        ones = {entry.name: np.ones(entry.shape) for entry in plan}
        out = adaptive_clip(ones, {**ones, "frozen": None}, plan, rule)
        assert out.gradients["head"] is ones["head"]
        assert out.gradients["off"] is ones["off"]
        assert out.gradients["frozen"] is None
        assert out.gradients["body"] == pytest.approx([0.01, 0.01])
        assert out.total.units == 1

    def test_schedule(self):
        rule = AGC(clipping=lambda step: 0.1 * (step + 1))
        plan = small_model(rule, w=(1, 1))
        ones = {"w": np.ones((1, 1))}
        for step in range(3):
            out = adaptive_clip(ones, ones, plan, rule, step=step).gradients["w"]
            assert out.item() == pytest.approx(0.1 * (step + 1))

    def test_telemetry(self):
        rule = AGC(clipping=0.5)
        plan = small_model(rule, w=(4, 1))
        weights = {"w": np.ones((4, 1))}
        gradients = {"w": np.array([[0.25], [1.0], [5.0], [NAN]])}
        stats = adaptive_clip(weights, gradients, plan, rule).stats["w"]
        assert (stats.units, stats.clipped, stats.nonfinite) == (4, 2, 1)
        assert (stats.max_ratio, stats.min_scale) == (5.0, 0.1)

    def test_granularity_tensor_is_dreamers(self):
        rule = AGC.profile("dreamerv3")
        plan = small_model(rule, w=(2, 2))
        weight, gradient = np.array([[3.0, 0], [0, 4]]), np.array([[0.0, 6], [8, 0]])
        out = adaptive_clip({"w": weight}, {"w": gradient}, plan, rule).gradients["w"]
        assert out == pytest.approx(gradient * 0.3 * 5 / 10)

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

    def setup_method(self):
        self.rule = AGC(units={"w": "v d -> v"})
        self.plan = small_model(self.rule, w=(5, 2))
        self.weight = np.arange(10.0).reshape(5, 2)
        self.sparse = RowSparse(np.array([3, 1, 3]), np.array([[1.0, 2], [3, 4], [5, 6]]), (5, 2))

    def test_equals_dense_on_its_rows(self):
        dense = {"w": self.sparse.to_dense()}
        want = adaptive_clip({"w": self.weight}, dense, self.plan, self.rule).gradients["w"]
        got = adaptive_clip({"w": self.weight}, {"w": self.sparse}, self.plan, self.rule)
        out = got.gradients["w"]
        assert isinstance(out, RowSparse)
        assert out.indices.tolist() == [1, 3]
        assert np.array_equal(out.to_dense(), want)
        assert got.total.units == 2

    def test_rows_without_gradient_are_not_read(self):
        self.weight[[0, 2, 4]] = NAN
        got = adaptive_clip({"w": self.weight}, {"w": self.sparse}, self.plan, self.rule)
        assert got.total.nonfinite == 0

    def test_whole_tensor(self):
        rule = AGC(granularity="tensor")
        plan = small_model(rule, w=(5, 2))
        dense = {"w": self.sparse.to_dense()}
        want = adaptive_clip({"w": self.weight}, dense, plan, rule).gradients["w"]
        got = adaptive_clip({"w": self.weight}, {"w": self.sparse}, plan, rule).gradients["w"]
        assert np.allclose(got.to_dense(), want, rtol=1e-15)

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

    def test_other_units_are_refused(self):
        rule = AGC(units={"w": "v d -> d"})
        plan = small_model(rule, w=(5, 2))
        with pytest.raises(UnitsError, match="declare row units such as 'v d -> v'"):
            adaptive_clip({"w": self.weight}, {"w": self.sparse}, plan, rule)


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
