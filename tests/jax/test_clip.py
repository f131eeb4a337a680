"""Clipping by hand, against the float64 reference: dtypes, layouts, policies, transformations,
cost.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import agc_jax
from agc import AGC, SAM, Schedule, Units
from agc.errors import (
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    ShapeError,
)
from agc.reference import Result, adaptive_clip
from tests.helpers import uneven

clip_module = importlib.import_module("agc_jax.clip")
norms = importlib.import_module("agc_jax.norms")

MODEL = {
    "conv.kernel": ((3, 3, 4, 5), "h w i o -> o"),
    "conv.bias": ((5,), "... ->"),
    "dense.kernel": ((1, 4), "i o -> o"),
    "query.kernel": ((6, 2, 3), "i h d -> h d"),
    "out.kernel": ((2, 3, 6), "h d o -> o"),
    "stack.kernel": ((2, 4, 3), "l i o -> l o"),
    "first.weight": ((5, 7), "o i -> o"),
    "grouped": ((6, 4, 2), "(g=2 i) o k -> g o"),
    "gain": ((), "... ->"),
    "nobody": ((0, 3), "i o -> o"),
}
UNITS = {name: pattern for name, (_, pattern) in MODEL.items()}
DTYPES = {
    "float16": 1,
    "bfloat16": 1,
    "float32": 4,
    "float64": 8,
    "complex64": 4,
    "complex128": 8,
}
"""Dtype to the largest error allowed, in units in the last place."""


def dtype_of(name: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def draw(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return (scale * uneven(rng, values)).astype(dtype)


def model(seed: int, dtype: Any, scale: float = 1.0) -> dict[str, Any]:
    return {
        name: draw(seed + i, shape, dtype, scale)
        for i, (name, (shape, _)) in enumerate(MODEL.items())
    }


def reference(gradients: Any, params: Any, rule: AGC, step: int = 0) -> Result:
    plan = agc_jax.plan(params, rule)
    return adaptive_clip(params, gradients, plan, rule, step=step)


def ulps(actual: Any, exact: Any) -> float:
    """Largest distance in units in the last place of the dtype of ``actual``."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    if np.iscomplexobj(exact):
        return max(ulps(actual.real, exact.real), ulps(actual.imag, exact.imag))
    if actual.size == 0:
        return 0.0
    info = ml_dtypes.finfo(actual.dtype)
    magnitude = np.maximum(np.abs(exact), float(info.smallest_normal))
    spacing = 2.0 ** (np.floor(np.log2(magnitude)) - info.nmant)
    return float(np.max(np.abs(actual.astype(np.float64) - exact) / spacing))


@pytest.fixture
def x64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switch float64 on for the dtypes that need it."""
    with jax.enable_x64(request.node.callspec.params["dtype"] in ("float64", "complex128")):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_agrees_with_the_reference(dtype: str) -> None:
    params, gradients = (model(seed, dtype_of(dtype), 2.0) for seed in (1, 50))
    gradients["conv.bias"] = gradients["conv.bias"] * dtype_of(dtype).type(1e-4)
    rule = AGC(clipping={"conv.*": 0.1, "*": 0.5}, units=UNITS)
    want = reference(gradients, params, rule)
    clipped, stats = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    for name, exact in want.gradients.items():
        assert clipped[name].dtype == gradients[name].dtype
        assert ulps(clipped[name], exact) <= DTYPES[dtype], name
    np.testing.assert_array_equal(np.asarray(clipped["conv.bias"]), gradients["conv.bias"])
    found = stats.parameters(agc_jax.plan(params, rule))
    assert found.keys() == want.stats.keys()
    for name, expected in want.stats.items():
        got = found[name]
        assert (got.units, got.clipped, got.nonfinite) == (expected.units, expected.clipped, 0)
        assert got.max_ratio == pytest.approx(expected.max_ratio, rel=1e-6)
        assert got.min_scale == pytest.approx(expected.min_scale, rel=1e-6)
    total = stats.total()
    assert (total.units, total.clipped) == (want.total.units, want.total.clipped)
    assert total.max_ratio == pytest.approx(want.total.max_ratio, rel=1e-6)
    assert 0 < total.clipped < total.units


LAYOUTS = {
    "leading": ((3, 3, 512, 40), "h w i o -> o"),
    "first": ((4608, 40), "i o -> o"),
    "last": ((40, 4608), "o i -> o"),
    "trailing": ((40, 512, 3, 3), "o i h w -> o"),
    "short": ((27, 2000), "i o -> o"),
    "middle": ((8, 1152, 20), "l i o -> l o"),
    "heads": ((64, 72, 50), "h d o -> o"),
    "prime": ((4603, 20), "i o -> o"),
    "whole": ((3, 3, 512, 40), "... ->"),
}
VALUES = {
    "uniform": lambda rng, shape: rng.random(shape),
    "almost constant": lambda rng, shape: 1 + 1e-3 * rng.random(shape),
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tail": lambda rng, shape: np.exp(2 * rng.standard_normal(shape)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", VALUES)
def test_accuracy_of_large_units(layout: str, values: str) -> None:
    """AGC's accuracy clause: 4 ULP for a fan-in of up to 4608, wherever the units lie in memory."""
    shape, pattern = LAYOUTS[layout]
    rng = np.random.default_rng(7)
    weight = VALUES[values](rng, shape).astype(np.float32)
    gradient = 3 * VALUES[values](rng, shape).astype(np.float32)
    rule = AGC(units={"w": pattern})
    exact = reference({"w": gradient}, {"w": weight}, rule).gradients["w"]
    clipped, _ = agc_jax.adaptive_clip_gradients({"w": gradient}, {"w": weight}, rule)
    assert ulps(clipped["w"], exact) <= 4


older_xla = pytest.mark.xfail(
    jax.__version_info__ < (0, 10, 2),
    reason="XLA of older releases fuses no squares into sums on the CPU",
    strict=True,
)


@pytest.mark.parametrize("platform", ["gpu", pytest.param("tpu", marks=older_xla)])
def test_sums_of_other_platforms(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lowered for a GPU or TPU, run on the CPU."""

    def only(*args: Any, default: Any, **branches: Any) -> Any:
        return branches.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", only)
    shape, pattern = LAYOUTS["leading"]
    params, gradients = ({"w": draw(seed, shape, np.float32)} for seed in (1, 2))
    rule = AGC(units={"w": pattern}, clipping=Schedule([(0, 0.02), (10, 0.01)]))
    exact = reference(gradients, params, rule, step=5).gradients["w"]
    function = jax.jit(
        lambda g, p: agc_jax.adaptive_clip_gradients(g, p, rule, step=jnp.int32(5))[0]
    )
    text = str(jax.make_jaxpr(function)(gradients, params))
    assert ("f64" in text) == (platform == "gpu")
    assert ulps(function(gradients, params)["w"], exact) <= 4


def test_gradient_dtype_is_kept_beside_wider_weights() -> None:
    params = {"kernel": draw(1, (8, 6), np.float32)}
    gradients = {"kernel": draw(2, (8, 6), ml_dtypes.bfloat16)}
    clipped, _ = agc_jax.adaptive_clip_gradients(gradients, params, AGC())
    exact = reference(gradients, params, AGC()).gradients["kernel"]
    assert clipped["kernel"].dtype == jnp.bfloat16
    assert ulps(clipped["kernel"], exact) <= 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unclipped_units_keep_their_bits(dtype: str) -> None:
    """A tie, signed zeros, and numbers too small for arithmetic that flushes them (AGC-2)."""
    kind = np.dtype(dtype)
    tiny = np.finfo(kind).smallest_subnormal
    weight = np.array([[3, 1, 1, 1], [4, 0, 0, 0]], kind)
    gradient = np.array([[1.5, -0.0, tiny, 2 * tiny], [2, 0.0, -tiny, tiny]], kind)
    clipped, stats = agc_jax.adaptive_clip_gradients(
        {"kernel": gradient}, {"kernel": weight}, AGC(clipping=0.5)
    )
    bits = {2: np.uint16, 4: np.uint32}[kind.itemsize]
    np.testing.assert_array_equal(np.asarray(clipped["kernel"]).view(bits), gradient.view(bits))
    assert stats.total().clipped == 0


def poisoned() -> tuple[dict[str, Any], dict[str, Any]]:
    weight = np.ones((3, 4), np.float32)
    gradient = np.full((3, 4), 0.001, np.float32)
    gradient[0, 1], gradient[1, 2], weight[2, 3] = np.nan, -np.inf, np.inf
    return {"kernel": gradient}, {"kernel": weight}


@pytest.mark.parametrize(("policy", "value"), [("propagate", np.nan), ("zero", 0.0)])
def test_policy_for_units_that_are_not_finite(policy: Any, value: float) -> None:
    gradients, params = poisoned()
    clipped, stats = agc_jax.adaptive_clip_gradients(gradients, params, AGC(nonfinite=policy))
    want = gradients["kernel"].copy()
    want[:, 1:] = value
    np.testing.assert_array_equal(np.asarray(clipped["kernel"]), want)
    total = stats.total()
    assert (total.units, total.nonfinite, total.clipped, total.min_scale) == (4, 3, 0, 1.0)


def test_raise_policy_by_hand() -> None:
    gradients, params = poisoned()
    with pytest.raises(
        NonFiniteError, match="parameter 'kernel': 3 of 4 units have a norm that is not"
    ):
        agc_jax.adaptive_clip_gradients(gradients, params, AGC(nonfinite="raise"))
    gradients["kernel"][:], params["kernel"][:] = 0.001, 1
    clipped, _ = agc_jax.adaptive_clip_gradients(gradients, params, AGC(nonfinite="raise"))
    np.testing.assert_array_equal(np.asarray(clipped["kernel"]), gradients["kernel"])


def test_raise_policy_under_jit() -> None:
    """Inside compiled code JAX reports the error its own way; the message says which parameter."""
    script = """
import jax, jax.numpy as jnp, agc_jax
from agc import AGC
step = jax.jit(lambda g, p: agc_jax.adaptive_clip_gradients(g, p, AGC(nonfinite="raise"))[0])
params = {"kernel": jnp.ones((3, 4))}
jax.block_until_ready(step(params, params))
print("fine")
try:
    jax.block_until_ready(step({"kernel": jnp.full((3, 4), jnp.nan)}, params))
    jax.effects_barrier()
except jax.errors.JaxRuntimeError as error:
    assert "parameter 'kernel': 4 of 4 units have a norm that is not finite" in str(error), error
    assert "or a threshold that is not a finite number above 0" in str(error), error
    print("raised")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fine", "raised"], done.stdout + done.stderr


@pytest.mark.parametrize("size", [8, 70000])
def test_finite_values_whose_squares_overflow_float32(size: int) -> None:
    """They fall under the policy, never to zero (AGC-4)."""
    gradients = {"kernel": jnp.full((size, 1), 1e25)}
    clipped, stats = agc_jax.adaptive_clip_gradients(
        gradients, {"kernel": jnp.ones((size, 1))}, AGC()
    )
    assert bool(jnp.isnan(clipped["kernel"]).all())
    assert stats.total().nonfinite == 1


@pytest.mark.parametrize("value", [1e-18, 1e18])
def test_extreme_ratios(value: float) -> None:
    gradients = {"kernel": np.full((8, 2), value, np.float32)}
    params = {"kernel": np.zeros((8, 2), np.float32)}
    rule = AGC(eps=1e-20)
    exact = reference(gradients, params, rule).gradients["kernel"]
    clipped, _ = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    assert ulps(clipped["kernel"], exact) <= 4
    assert np.all(np.asarray(clipped["kernel"]) > 0)


def test_zero_weights_zero_eps() -> None:
    zeros = {"kernel": jnp.zeros((3, 2))}
    rule = AGC(eps=0.0)
    for gradient in (0.0, 1.0):
        gradients = {"kernel": jnp.full((3, 2), gradient)}
        clipped, stats = agc_jax.adaptive_clip_gradients(gradients, zeros, rule)
        np.testing.assert_array_equal(np.asarray(clipped["kernel"]), 0)
        assert stats.total().nonfinite == 0


def test_div_eps() -> None:
    rule = AGC(clipping=0.01, eps=1e-5, div_eps=1e-6)
    gradients, params = (
        {"kernel": np.full((4, 2), 1e-7, np.float32)},
        {"kernel": np.zeros((4, 2), np.float32)},
    )
    exact = reference(gradients, params, rule).gradients["kernel"]
    clipped, stats = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    assert ulps(clipped["kernel"], exact) <= 4
    assert stats.total().min_scale == pytest.approx(0.1)


def test_whole_tensors() -> None:
    params, gradients = (model(seed, np.float32) for seed in (1, 9))
    rule = AGC(granularity="tensor", clipping=0.3)
    want = reference(gradients, params, rule)
    clipped, stats = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    assert max(ulps(clipped[name], want.gradients[name]) for name in params) <= 4
    assert stats.total().units == len(params) - 1  # one is empty


def test_what_is_left_alone() -> None:
    """Excluded, switched off, absent, frozen: the very objects come back."""
    params = {k: jnp.ones((3, 2)) for k in ("kernel", "off", "none", "masked")} | {
        "index": jnp.zeros((2, 2), int)
    }
    gradients = {k: jnp.ones((3, 2)) for k in ("kernel", "off")} | {
        "none": None,
        "masked": optax.MaskedNode(),
        "index": np.zeros((2, 2), jax.dtypes.float0),
    }
    rule = AGC(clipping={"off": None, "*": 0.01}, exclude=["kernel"], units={"*": "i o -> o"})
    clipped, stats = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    assert all(clipped[name] is gradients[name] for name in gradients)
    assert stats.total().units == 0
    assert stats.parameters(agc_jax.plan(params, rule)) == {}


def test_params_may_have_more_leaves() -> None:
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((3, 2))}}
    clipped, stats = agc_jax.adaptive_clip_gradients({"b": params["b"]}, params, AGC())
    assert set(clipped) == {"b"}
    assert stats.parameters(agc_jax.plan(params, AGC())).keys() == {"b.kernel"}


KERNEL = {"kernel": jnp.ones((3, 2))}
BAD = {
    "no params": (KERNEL, None, ParameterError, "params is None: call update"),
    "unknown gradient": ({"w": KERNEL["kernel"]}, KERNEL, ParameterError, "'w' has a gradient, but there"),
    "shape": ({"kernel": jnp.ones((2, 3))}, KERNEL, ShapeError, r"'kernel' has shape \(3, 2\), its gradient \(2, 3\)"),
    "integer gradient": ({"kernel": jnp.ones((3, 2), int)}, KERNEL, DTypeError, "the gradient has dtype int32"),
    "integer weight": (KERNEL, {"kernel": jnp.ones((3, 2), int)}, DTypeError, "the weight has dtype int32"),
    "no gradients": ({"kernel": None}, KERNEL, MissingGradientError, "no parameter has a gradient"),
    "empty tree": ({}, KERNEL, MissingGradientError, "no parameter has a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    gradients, params, error, message = BAD[case]
    with pytest.raises(error, match=message):
        agc_jax.adaptive_clip_gradients(gradients, params, AGC())


SCHEDULES = {
    "points": Schedule([(0, 0.04), (10, 0.01)]),
    "one point": Schedule([(0, 0.02)]),
    "callable": lambda step: 0.04 / (1 + step),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [0, 3, 99])
def test_schedules(schedule: str, step: int) -> None:
    value = SCHEDULES[schedule]
    params, gradients = ({"kernel": draw(seed, (9, 5), np.float32)} for seed in (1, 2))
    rule = AGC(clipping=value)
    exact = reference(gradients, params, rule, step).gradients["kernel"]
    clipped, _ = agc_jax.adaptive_clip_gradients(gradients, params, rule, step=step)
    assert ulps(clipped["kernel"], exact) <= 4


NONSENSE = [-1.0, 0.0, np.nan, np.inf]


@pytest.mark.parametrize("value", NONSENSE)
def test_a_schedule_that_returns_nonsense_for_a_known_step(value: float) -> None:
    message = r"clipping of 'kernel': the schedule returned .* a finite number > 0"
    rule = AGC(clipping=lambda step: value + 0 * step)
    for step in (0, jnp.int32(0)):
        with pytest.raises(ConfigError, match=message):
            agc_jax.adaptive_clip_gradients(KERNEL, KERNEL, rule, step=step)
    with pytest.raises(ConfigError, match=message):
        jax.jit(lambda g: agc_jax.adaptive_clip_gradients(g, g, AGC(clipping=lambda _: value)))(
            KERNEL
        )


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("value", NONSENSE)
def test_a_schedule_that_returns_nonsense_for_a_traced_step(value: float, nonfinite: Any) -> None:
    """Nothing can be raised, so all of its units become NaN; the others are clipped."""
    rule = AGC(clipping={"kernel": lambda step: value + 0 * step, "*": 0.1}, nonfinite=nonfinite)
    params = KERNEL | {"bias": jnp.ones(2)}
    gradients = {"kernel": KERNEL["kernel"].at[0].set(0), "bias": jnp.ones(2)}
    clipped, stats = jax.jit(
        lambda g, p, step: agc_jax.adaptive_clip_gradients(g, p, rule, step=step)
    )(gradients, params, 0)
    assert bool(jnp.isnan(clipped["kernel"]).all())
    np.testing.assert_allclose(clipped["bias"], 0.1, rtol=1e-6)
    total = stats.total()
    assert (total.units, total.nonfinite, total.clipped) == (3, 2, 1)
    assert total.min_scale == pytest.approx(0.1)


def test_a_schedule_that_returns_no_number() -> None:
    for returned, message in ((None, "must return a number"), (np.ones(3), "must return a scalar")):
        with pytest.raises(ConfigError, match=f"clipping of 'kernel': the schedule .* {message}"):
            agc_jax.adaptive_clip_gradients(KERNEL, KERNEL, AGC(clipping=lambda _, r=returned: r))


@pytest.mark.parametrize("scalar", [2.0, 2 + 1j, np.float32(2)])
def test_python_numbers_are_parameters_as_under_jit(scalar: Any) -> None:
    """An integer is none, there as here, and is not mistaken for one that is."""
    rule = AGC(clipping=0.1)
    params = {"scale": scalar, "count": 3, "kernel": jnp.ones((3, 2))}
    gradients = {"scale": 1.0 + 0 * scalar, "count": None, "kernel": jnp.ones((3, 2))}
    for other in ({"scale": 2, "count": 3}, params):
        names = [entry.name for entry in agc_jax.plan(other, rule)]
        assert ("scale" in names) == (other is params)
    agc_jax.adaptive_grad_clip(rule).init({**params, "scale": 2})
    by_hand, stats = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    jitted, other = jax.jit(lambda g, p: agc_jax.adaptive_clip_gradients(g, p, rule))(
        gradients, params
    )
    assert abs(by_hand["scale"]) == pytest.approx(0.1 * abs(scalar))
    assert same(by_hand, jitted)
    assert stats.total() == other.total()
    state = agc_jax.adaptive_grad_clip(rule).init(params)
    assert state.stats.columns.units.shape == other.columns.units.shape == (2,)


def test_a_tree_without_parameters() -> None:
    assert agc_jax.adaptive_clip_gradients({}, {}, AGC(exclude=["head.*"]))[0] == {}


@pytest.mark.parametrize("rule", [None, 0.01, {"clipping": 0.01}, SAM()], ids=repr)
def test_a_wrong_rule(rule: Any) -> None:
    for function in (
        lambda: agc_jax.adaptive_clip_gradients(KERNEL, KERNEL, rule),
        lambda: agc_jax.adaptive_grad_clip(rule),
        lambda: agc_jax.adaptive_grad_clip(rule, clipping=0.1),
        lambda: agc_jax.plan(KERNEL, rule),
    ):
        with pytest.raises(ConfigError, match=r"rule must be an agc\.AGC, got"):
            function()


def test_wrong_units() -> None:
    units: Any = {"kernel": "i o -> o"}
    for function in (
        lambda: agc_jax.adaptive_clip_gradients(KERNEL, KERNEL, AGC(), units=units),
        lambda: agc_jax.adaptive_grad_clip(AGC(), units=units),
    ):
        with pytest.raises(ParameterError, match=r"units= takes what agc_jax\.units\(model\)"):
            function()


def pair(seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = {"kernel": (6, 5), "bias": (5,)}
    return tuple(
        {k: jnp.asarray(draw(seed + i, s, np.float32)) for k, s in shapes.items()} for i in (0, 9)
    )  # type: ignore[return-value]


def clip(gradients: Any, params: Any) -> Any:
    return agc_jax.adaptive_clip_gradients(gradients, params, AGC())[0]


def same(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_by_hand_and_under_jit_are_equal() -> None:
    gradients, params = pair()
    assert same(clip(gradients, params), jax.jit(clip)(gradients, params))


def test_vmap() -> None:
    gradients, params = jax.tree.map(lambda *x: jnp.stack(x), *[pair(seed) for seed in (1, 2, 3)])
    batched = jax.vmap(clip)(gradients, params)
    for index, seed in enumerate((1, 2, 3)):
        assert same(jax.tree.map(lambda x, i=index: x[i], batched), clip(*pair(seed)))


def test_scan_and_cond() -> None:
    gradients, params = pair()
    steps = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), gradients)

    @jax.jit
    def run(steps: Any) -> Any:
        return jax.lax.scan(
            lambda carry, g: (carry, jax.lax.cond(carry > 0, clip, lambda g, p: g, g, params)),
            jnp.ones(()),
            steps,
        )[1]

    found = run(steps)
    assert same(jax.tree.map(lambda x: x[0], found), clip(gradients, params))


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_derivatives_take_the_factor_as_constant(mode: Any) -> None:
    """Also where a root has no derivative: at zero gradients and zero weights."""
    gradients, params = pair()
    gradients["bias"], params["bias"] = jnp.zeros(5), jnp.zeros(5)

    def total(gradients: Any, params: Any) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(clip(gradients, params)))

    slope = mode(total)(gradients, params)
    np.testing.assert_array_equal(np.asarray(slope["bias"]), 1)
    factor = np.asarray(clip(gradients, params)["kernel"] / gradients["kernel"])
    np.testing.assert_allclose(np.asarray(slope["kernel"]), factor, rtol=1e-6)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total, argnums=1)(gradients, params))
    )


def test_nothing_waits_for_the_host() -> None:
    gradients, params = pair()
    scheduled = AGC(clipping=Schedule([(0, 0.04), (10, 0.01)]))

    def step(gradients: Any, params: Any, step: Any) -> Any:
        return agc_jax.adaptive_clip_gradients(gradients, params, scheduled, step=step)

    text = str(jax.make_jaxpr(step)(gradients, params, jnp.int32(3)))
    assert "callback" not in text
    count = jax.device_put(np.int32(3))
    compiled = jax.jit(step).lower(gradients, params, count).compile()
    with jax.transfer_guard("disallow"):
        clipped, stats = compiled(gradients, params, count)
        by_hand, _ = agc_jax.adaptive_clip_gradients(gradients, params, scheduled, step=3)
    assert same(clipped, by_hand)
    assert stats.total().units == 6


@older_xla
def test_donated_gradients_are_reused() -> None:
    gradients, params = ({"kernel": jnp.ones((512, 128))} for _ in range(2))
    compiled = jax.jit(clip, donate_argnums=0).lower(gradients, params).compile()
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes == gradients["kernel"].nbytes
    assert sizes.temp_size_in_bytes < 0.2 * gradients["kernel"].nbytes


def test_parameters_that_are_alike_have_one_program() -> None:
    """A slice would make each of them a program of its own, and compiling slow."""
    tree = {f"layer{i}": {"bias": jnp.ones(64) * i} for i in range(8)}
    text = jax.jit(clip).lower(tree, tree).compile().as_text()
    assert text.count("fusion(") >= 8
    assert " slice(" not in text


def test_a_plan_is_made_and_compiled_once() -> None:
    gradients, params = pair()
    rule = AGC(clipping=0.0123)
    clipper = clip_module.clipper(rule, None)
    for _ in range(3):
        agc_jax.adaptive_clip_gradients(gradients, params, rule)
    (program,) = clipper._programs.values()
    assert len(clipper._plans) == 1
    assert program._cache_size() == 1


def test_nnx_state() -> None:
    model = nnx.Conv(2, 3, (2, 2), rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, state)
    clipped, _ = agc_jax.adaptive_clip_gradients(
        gradients, state, AGC(), units=agc_jax.units(model)
    )
    assert isinstance(clipped, nnx.State)
    norms = jnp.linalg.norm(clipped["kernel"][...].reshape(-1, 3), axis=0)
    limits = 0.01 * jnp.linalg.norm(model.kernel[...].reshape(-1, 3), axis=0)
    np.testing.assert_allclose(norms, limits, rtol=1e-6)


arrays = st.integers(0, 2**32 - 1).map(
    lambda seed: (draw(seed, (4, 3), np.float32), draw(seed + 1, (4, 3), np.float32))
)


@settings(max_examples=50, deadline=None)
@given(arrays, st.floats(0.25, 4))
def test_properties(pair: tuple[Any, Any], factor: float) -> None:
    """No norm grows or exceeds its limit, directions are kept, columns do not mix, scales carry
    over.
    """
    gradient, weight = pair

    def run(gradient: Any, weight: Any) -> Any:
        return np.asarray(clip({"kernel": gradient}, {"kernel": weight})["kernel"])

    clipped = run(gradient, weight)
    norm = np.linalg.norm
    limit = 0.01 * np.maximum(norm(weight, axis=0), 1e-3)
    assert np.all(norm(clipped, axis=0) <= np.minimum(norm(gradient, axis=0), limit) * (1 + 1e-6))
    np.testing.assert_allclose(
        clipped / norm(clipped, axis=0), gradient / norm(gradient, axis=0), rtol=1e-5
    )
    order = [2, 0, 1]
    np.testing.assert_array_equal(run(gradient[:, order], weight[:, order]), clipped[:, order])
    if np.all(norm(weight, axis=0) * min(factor, 1) > 1e-3):
        scaled = run(gradient * np.float32(factor), weight * np.float32(factor))
        np.testing.assert_allclose(scaled, clipped * factor, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), st.integers(1, 15), st.data())
def test_runs_cover_every_element_once(shape: list[int], mask: int, data: st.DataObject) -> None:
    """How squares are grouped never changes which of them make up a unit."""
    names = [f"a{axis}" for axis in range(len(shape))]
    kept = [name for axis, name in enumerate(names) if not mask >> axis & 1]
    axes = Units(f"{' '.join(names)} -> {' '.join(kept)}").bind(tuple(shape))
    split = norms._split_into_runs(axes)
    if split is None:
        return
    found, inside, between = split
    assert np.prod(found) == np.prod(shape)
    assert not set(inside) & set(between)
    rest = [found[a] for a in range(len(found)) if a not in (*inside, *between)]
    assert rest == [size for axis, size in enumerate(shape) if axis in axes.keep]
    assert 4 <= np.prod([found[a] for a in inside]) <= norms._RUN
