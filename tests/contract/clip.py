"""Clipping by hand: what no vector asks, and ways of an adapter that the suite does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agc import AGC, SAM, Schedule, Units
from agc.errors import ConfigError, DTypeError, MissingGradientError, ShapeError, UnitsError
from agc.plan import Parameter, make_plan
from agc.reference import Result, RowSparse, Stats, adaptive_clip, to_floats
from agc.units import UnitAxes
from agc_conformance.backend import Optimizer, Outcome, Problem
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clipping.compare import compare_stats
from agc_conformance.runner import cases, run_case
from agc_conformance.vectors import load_vectors
from agc_conformance.verdict import LIMITS, ulp_error
from tests.contract import Contract
from tests.helpers import Array, draw

CONVENTIONS: Mapping[str, Any] = {"torch": "out-first", "flax": None, "keras": "out-last"}
ROWS = {"*": "o i -> o"}
PLAIN = AGC(units=ROWS)


def check_gradients(clipped: Mapping[str, Any], want: Result) -> None:
    """Compare with the reference, in units in the last place."""
    for name, exact in want.gradients.items():
        got = clipped[name]
        if exact is None:
            assert got is None
            continue
        if isinstance(exact, RowSparse):
            assert isinstance(got, RowSparse)
            got, exact = got.coalesce(), exact.coalesce()
            np.testing.assert_array_equal(got.indices, exact.indices)
            got, exact = got.values, exact.values
        dtype = got.dtype.name
        assert (ulp_error(got, exact, dtype) <= LIMITS[dtype]).all(), name


def check_stats(stats: Mapping[str, Stats], want: Result) -> None:
    """Compare the telemetry of what has units."""
    counted = {name: exact for name, exact in want.stats.items() if exact.units}
    assert {name for name, found in stats.items() if found.units} == counted.keys()
    for name, exact in counted.items():
        assert not compare_stats(name, stats[name], exact, near=0, dtype="float32").problem


FAMILIES: Mapping[str, Callable[[Any, int, int], Array]] = {
    "normal": lambda random, rows, length: random.standard_normal((rows, length)),
    "heavy tail": lambda random, rows, length: np.exp(3 * random.standard_normal((rows, length))),
    "positive": lambda random, rows, length: random.random((rows, length)) + 0.5,
    "almost constant": lambda random, rows, length: 1 + 1e-3 * random.random((rows, length)),
    "constant": lambda random, rows, length: np.repeat(random.random((rows, 1)) + 0.5, length, 1),
    "descending": lambda random, rows, length: np.sort(random.random((rows, length)))[:, ::-1],
    "one large": lambda random, rows, length: one_large(random.standard_normal((rows, length))),
    "decay": lambda random, rows, length: np.exp(-np.linspace(0, 30, length)) * np.ones((rows, 1)),
    # Many whose squares are almost lost on the few at first.
    "drop": lambda random, rows, length: np.where(
        np.arange(length) < 8, 1 + random.random((rows, length)), 2**-12.5
    ),
}
"""Rows of numbers whose squares are hard to add."""


def one_large(values: Array) -> Array:
    rows, length = values.shape
    values[np.arange(rows), 7 * np.arange(rows) % length] = 1e4
    return values


def of_families(random: Any, axes: UnitAxes, first: int) -> Array:
    """Return an array whose units are of the families in turn, from the first on."""
    matrix = np.empty((axes.count, axes.fan_in))
    names = list(FAMILIES)[first:]
    for number, name in enumerate(names):
        rows = matrix[number :: len(names)]
        rows[:] = FAMILIES[name](random, *rows.shape)
    order = (*axes.keep, *axes.reduce)
    split = matrix.reshape([axes.view[axis] for axis in order])
    return split.transpose(np.argsort(order)).astype(np.float32)


LAYOUTS = {
    "27": ((27, 2000), "i o -> o"),
    "64": ((360, 64), "o i -> o"),
    "147": ((360, 147), "o i -> o"),
    "512": ((360, 512), "o i -> o"),
    "odd": ((1153, 360), "i o -> o"),
    "prime": ((20, 4603), "o i -> o"),
    "first": ((4608, 360), "i o -> o"),
    "last": ((360, 4608), "o i -> o"),
    "leading": ((3, 3, 512, 40), "h w i o -> o"),
    "trailing": ((40, 512, 3, 3), "o i h w -> o"),
    "middle": ((8, 1152, 20), "l i o -> l o"),
    "heads": ((64, 72, 50), "h d o -> o"),
    "whole": ((1031, 1021), "... ->"),
    "each element": ((50, 40), "o i -> o i"),
}


def named(arrays: Any) -> Mapping[str, Any]:
    return arrays if isinstance(arrays, Mapping) else {"w": arrays}


class Clipping(Contract):
    """Clipping by the adapter's backend, which takes and returns arrays."""

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"way": self.driver.clip_ways, "accurate": self.driver.accurate_ways}

    def clip(self, way: str, weights: Any, gradients: Any, rule: AGC, step: Any = 0) -> Outcome:
        """Clip arrays by name, or one array, which is called ``w``."""
        with self.driver.clipping(way) as backend:
            return backend.clip(Problem(rule, named(weights), named(gradients), step=step))

    def check(self, way: str, weights: Any, gradients: Any, rule: AGC, step: Any = 0) -> Outcome:
        """Clip, and compare with the reference."""
        outcome = self.clip(way, weights, gradients, rule, step)
        layout = CONVENTIONS[self.driver.backend.layout]
        shapes = [Parameter(name, w.shape, None, layout) for name, w in named(weights).items()]
        plan = make_plan(shapes, rule)
        want = adaptive_clip(named(weights), named(gradients), plan, rule, step=int(step))
        check_gradients(outcome.gradients, want)
        assert outcome.stats is not None
        check_stats(outcome.stats, want)
        return outcome


class ClipContract(Clipping):
    # Numbers

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_accuracy(self, layout, accurate):
        """Holds for a fan-in of up to 4608, wherever units lie in memory (AGC-3)."""
        shape, pattern = LAYOUTS[layout]
        axes = Units(pattern).bind(shape)
        random = np.random.default_rng(7)
        for first in range(0, len(FAMILIES), axes.count):
            w, g = (of_families(random, axes, first).reshape(shape) for _ in range(2))
            self.check(accurate, w, 3 * g, AGC(units={"w": pattern}))

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_weights_in_float64(self, dtype, way):
        w, g = draw((5, 600), small=True)
        self.check(way, w, g.astype(dtype), PLAIN)

    @pytest.mark.parametrize("size", [1e-24, 1e-18, 1e18])
    @pytest.mark.parametrize("eps", [0.0, 1e-18])
    @pytest.mark.parametrize("clipping", [0.5, Schedule([(0, 0.5)])], ids=["number", "schedule"])
    def test_extreme_sizes(self, clipping, eps, size, accurate):
        """The squares are beyond float32, or the limits are tiny."""
        w = np.zeros((2, 20), np.float32)
        w[1] = size / 10
        g = np.full_like(w, size)
        rule = AGC(clipping=clipping, eps=eps, units=ROWS)
        clipped = self.check(accurate, w, g, rule).gradients["w"]
        assert (clipped[0] > 0).all() == (eps > 0)

    @pytest.mark.parametrize("length", [8, 70000])
    def test_squares_that_overflow(self, length, way):
        """They are clipped right or fall under the policy; they never become zeros (AGC-4)."""
        g = np.full((1, length), 1e25, np.float32)
        clipped = self.clip(way, np.ones_like(g), g, PLAIN).gradients["w"]
        if not np.isnan(clipped).all():
            np.testing.assert_allclose(clipped, 0.01, rtol=1e-6)

    def test_floor_of_the_division(self, way):
        w, g = np.zeros((3, 2), np.float32), np.full((3, 2), 1e-7, np.float32)
        rule = AGC(clipping=0.01, eps=1e-5, div_eps=1e-6, units=ROWS)
        outcome = self.check(way, w, g, rule)
        np.testing.assert_allclose(outcome.gradients["w"], 1e-8, rtol=1e-5)

    # Bits

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("clips", [False, True], ids=["nothing clipped", "a row clipped"])
    def test_subnormals_and_signed_zeros_keep_their_bits(self, clips, dtype, way):
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        g = np.array([[-0.0, 0.0, tiny, 1.0]] * 3 + [[-0.0, -tiny, 0.0, 3 * tiny]], dtype)
        g[1, 3] = 1000 if clips else 1
        clipped = self.clip(way, np.full((4, 4), 1000, dtype), g, PLAIN)
        kept = [row.tobytes() for row in np.asarray(clipped.gradients["w"])]
        assert [a == b.tobytes() for a, b in zip(kept, g, strict=True)] == [1, not clips, 1, 1]

    def test_a_little_more_than_a_tie_is_clipped(self, way):
        g = np.array([[0.0, 1.25], [-0.0, np.nextafter(1.25, 2)]])
        rule = AGC(clipping=0.25, units=ROWS)
        outcome = self.clip(way, np.array([[3.0, 4.0]] * 2), g, rule)
        assert outcome.gradients["w"].tolist() == [[0.0, 1.25]] * 2
        assert outcome.stats["w"].clipped == 1

    def test_what_is_not_clipped_is_not_written(self, way):
        payload = np.array([0x7FC12345, 0x7F800000, 0xFFFFFFFF], np.uint32).view(np.float32)
        ones = np.ones(3, np.float32)
        rule = AGC(clipping={"off": None, "*": 0.01}, exclude=["out"])
        g = {"off": payload, "out": payload, "on": ones}
        outcome = self.clip(way, dict.fromkeys(g, ones), g, rule)
        assert outcome.gradients["off"].tobytes() == payload.tobytes()
        assert outcome.gradients["out"].tobytes() == payload.tobytes()
        assert list(outcome.stats) == ["on"]

    def test_infinite_weight_where_nothing_is_clipped(self, way):
        w, g = np.array([[np.inf, 1], [1, 1]], "f"), np.full((2, 2), 1e-6, "f")
        clipped = self.clip(way, w, g, PLAIN).gradients["w"]
        assert np.isnan(clipped[0]).all()
        assert (clipped[1] == g[1]).all()

    @pytest.mark.parametrize(
        ("shape", "pattern"),
        [((), "... ->"), ((5,), "... ->"), ((6, 7), "o i -> o"), ((200, 64), "i o -> o")],
        ids=str,
    )
    def test_parameters_of_one_shape_do_not_mix(self, shape, pattern, way):
        """They are clipped together, each by its own norms and threshold (AGC-2, AGC-4)."""
        w, g = ({f"p{k}": draw(shape, k, "f")[i] for k in range(6)} for i in range(2))
        rule = AGC(clipping={"p1": 0.3, "p2": 1e9, "*": 0.01}, units={"*": pattern})
        g["p2"] *= np.nan
        g["p3"] *= np.float32(1e-9)
        g["p4"] = g["p4"].astype(np.float16)
        clipped = self.check(way, w, g, rule).gradients
        assert clipped["p3"].tobytes() == g["p3"].tobytes()

    def test_what_a_logger_is_given(self):
        """Flat floats by parameter and in total, with the clipped fraction."""
        w, g = ({f"p{k}": draw((4, 3), k, "f")[i] for k in range(3)} for i in range(2))
        rule = AGC(clipping={"p0": 1.0, "*": 0.01}, exclude=["p2"], units=ROWS)
        plan = make_plan([Parameter(name, (4, 3), None, None) for name in w], rule)
        want = adaptive_clip(w, g, plan, rule)
        got = self.driver.logged(rule, w, g)
        assert got == pytest.approx(to_floats(want.total, {n: want.stats[n] for n in ("p0", "p1")}))
        assert got["agc/clipped_fraction"] == want.total.clipped / 8
        assert all(type(value) is float for value in got.values())

    # Configuration

    @pytest.mark.parametrize("step", [0, 3, 99])
    def test_schedules(self, step, way):
        lines = Schedule([(2, 0.1), (4, 0.3), (8, 0.2)])
        rule = AGC(clipping={"a": lines, "b": lambda step: 0.01 + step / 10, "*": 0.02})
        g = {name: np.array([9.0, 1.0, 5.0], np.float32) for name in "abc"}
        w = dict.fromkeys(g, np.array([3.0, 4.0, 1.0], np.float32))
        for given_as in (step, self.driver.integer(step)):
            self.check(way, w, g, rule, given_as)

    def test_schedules_count_the_steps_of_an_optimizer(self):
        rule = AGC(clipping={"a": lambda step: 0.01 + step / 10, "*": Schedule([(0, 1), (2, 0.1)])})
        random = np.random.default_rng(1)
        w, *steps = (
            {name: random.standard_normal(3).astype(np.float32) for name in "ab"} for _ in range(5)
        )
        problem = Problem(rule, w, {}, {name: Units("... ->") for name in w})
        got, want = (
            backend.trajectory(problem, Optimizer(lr=0.1), steps)
            for backend in (self.driver.backend(), ReferenceBackend())
        )
        for got_weights, want_weights in zip(got, want, strict=True):
            for name in w:
                np.testing.assert_allclose(got_weights[name], want_weights[name], rtol=1e-6)

    @pytest.mark.parametrize("max_norm", [0.05, 100.0])
    def test_a_clip_by_the_global_norm_comes_after_agc(self, max_norm):
        """The norm is that of the clipped gradients, those left out by AGC among them (AGC-7)."""
        w, g = ({f"p{k}": draw((4, 3), k, "f")[i] for k in range(3)} for i in range(2))
        rule = AGC(clipping=0.02, exclude=["p2"], units=ROWS)
        plan = make_plan([Parameter(name, (4, 3), None, None) for name in w], rule)
        clipped = adaptive_clip(w, g, plan, rule).gradients
        size = np.sqrt(sum(np.square(gradient).sum() for gradient in clipped.values()))
        got = self.driver.limited_step(rule, max_norm, w, g)
        for name in w:
            want = w[name] - clipped[name] * min(1, max_norm / size)
            np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "profile", ["deepmind", "optax", "timm", "pytorch_optimizer", "composer", "dreamerv3"]
    )
    def test_profiles(self, profile, way):
        shapes = [(), (5,), (1,), (6, 5), (1, 5), (5, 1), (3, 3, 4, 5)]
        arrays = {f"p{k}": draw(shape, k, np.float32, small=True) for k, shape in enumerate(shapes)}
        excluded = {"exclude": ["p3"]} if profile == "deepmind" else {}
        w, g = ({name: pair[k] for name, pair in arrays.items()} for k in range(2))
        self.check(way, w, g, AGC.profile(profile, **excluded))

    @pytest.mark.parametrize("rule", [None, 0.01, {"clipping": 0.01}, SAM(), AGC], ids=str)
    def test_rule_that_is_none(self, rule):
        for function in self.driver.rule_takers():
            with pytest.raises(ConfigError, match=r"^rule must be an agc\.AGC, got "):
                function(rule)

    # Bad input

    @pytest.mark.parametrize(
        ("gradient", "error", "message"),
        [
            (np.ones((3, 2), "f"), ShapeError, r"'w' has shape \(2, 3\), its gradient \(3, 2\)"),
            (np.ones(3, "f"), ShapeError, r"'w' has shape \(2, 3\), its gradient \(3,\)"),
            (np.ones((2, 3), "int32"), DTypeError, r"'w': the gradient has dtype .*int32"),
            (np.ones((2, 3), bool), DTypeError, r"'w': the gradient has dtype .*bool"),
            (None, MissingGradientError, "no parameter has a gradient; compute gradients"),
        ],
        ids=["shape", "rank", "integer", "boolean", "none"],
    )
    def test_bad_gradients(self, gradient, error, message):
        with pytest.raises(error, match=message):
            self.clip(self.driver.clip_ways[0], np.ones((2, 3), "f"), gradient, PLAIN)

    # Properties

    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from([(4, 3), (1, 5), (6, 1)]),
        st.integers(0, 2**31),
        st.sampled_from([0.01, 0.3]),
        st.integers(-20, 20),
    )
    def test_properties(self, shape, seed, clipping, power):
        """No norm grows or passes its limit, and directions stay; units do not mix; scales of both
        carry over; clipping again changes next to nothing.
        """
        w, g = draw(shape, seed, np.float32)
        rule = AGC(clipping=clipping, eps=1e-30, units=ROWS)

        def clip(weight: Array, gradient: Array) -> Any:
            way = self.driver.clip_ways[0]
            return self.clip(way, weight, gradient, rule).gradients["w"]

        clipped = clip(w, g)
        w_norm, before, after = (
            np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (w, g, clipped)
        )
        assert (after <= before * (1 + 1e-6)).all()
        assert ((after <= clipping * w_norm * (1 + 1e-6)) | (after == before)).all()
        np.testing.assert_allclose(clipped * before, g.astype(np.float64) * after, rtol=1e-6)
        order = np.random.default_rng(seed).permutation(len(g))
        np.testing.assert_array_equal(clip(w[order], g[order]), clipped[order])
        factor = np.float32(2.0**power)
        np.testing.assert_array_equal(clip(w * factor, g * factor), clipped * factor)
        np.testing.assert_allclose(clip(w, clipped), clipped, rtol=4e-7)


class SparseContract(Clipping):
    @pytest.mark.parametrize(
        ("rows", "units"),
        [
            ([7, 1, 7, 4], "v d -> v"),
            ([7, 1, 7, 4], "v d ->"),
            ([3], "v d -> v"),
            ([], "v d -> v"),
        ],
        ids=["repeated", "one unit", "one row", "no row"],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
    def test_rows(self, dtype, rows, units, way):
        factor = 1 + 2j if dtype == "complex64" else 1
        table = (factor * draw((9, 4), 1)[0]).astype(dtype)
        values = (factor * draw((len(rows), 4), 2)[0]).astype(dtype)
        if units == "v d -> v":  # nobody looks at the other rows
            table[[row for row in range(9) if row not in rows]] = np.nan
        g = {"table": RowSparse(np.array(rows, int), values, (9, 4)), "bias": np.ones(4, dtype)}
        w = {"table": table, "bias": np.ones(4, dtype)}
        self.check(way, w, g, AGC(units={"table": units, "bias": "... ->"}))

    def test_columns(self, way):
        g = RowSparse(np.array([1]), np.ones((1, 4), "f"), (9, 4))
        with pytest.raises(UnitsError, match=r"'w'.*\(9, 4\) is row-sparse.*'v d -> v'"):
            self.clip(way, np.ones((9, 4), "f"), g, AGC(units={"w": "v d -> d"}))


VECTOR_FILES = ("errors", "layer", "nonfinite", "precision", "selection", "sparse", "threshold")


class VectorsContract(Contract):
    """The vectors of clipping by hand, in the ways that the suite does not take."""

    def choices(self) -> Mapping[str, Sequence[str]]:
        return {"other_way": self.driver.clip_ways[1:]}

    @pytest.mark.parametrize("file", VECTOR_FILES)
    def test_vectors(self, file, other_way):
        """Each is asked in one dtype, those about precision in all."""
        with self.driver.clipping(other_way) as backend:
            backend.paths = ()  # this way is one
            records = [
                run_case(backend, vector, dtype)
                for vector, dtype in cases(load_vectors())
                if vector.file == f"L1-{file}.json"
                and (dtype == vector.dtypes()[0] or file == "precision")
            ]
        assert records
        assert not [record for record in records if record["status"] in ("failed", "error")]
