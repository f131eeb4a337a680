"""Clipping by hand: what is peculiar to JAX's trees, transformations and programs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import agc_jax
from agc import AGC, Schedule, Units
from agc.errors import ConfigError, DTypeError, MissingGradientError, ParameterError
from agc.reference import adaptive_clip
from agc_conformance.compiled import hlo
from tests.contract.clip import ClipContract, check_gradients
from tests.helpers import draw
from tests.jax.driver import JaxDriver

clip_module = importlib.import_module("agc_jax.clip")
norms = importlib.import_module("agc_jax.norms")


class TestClip(ClipContract):
    driver = JaxDriver()


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
    pairs = {
        name: draw((3, 3, 512, 40), seed, np.float32)
        for name, seed in (("scheduled", 1), ("fixed", 5))
    }
    params, gradients = ({name: pair[k] for name, pair in pairs.items()} for k in range(2))
    rule = AGC(
        units={"*": "h w i o -> o"},
        clipping={"scheduled": Schedule([(0, 0.02), (10, 0.01)]), "fixed": 0.03},
    )
    want = adaptive_clip(params, gradients, agc_jax.plan(params, rule), rule, step=5)
    function = jax.jit(lambda g, p, step: agc_jax.adaptive_clip_gradients(g, p, rule, step=step)[0])
    arguments = gradients, params, jnp.int32(5)
    text = str(jax.make_jaxpr(function)(*arguments))
    assert ("f64" in text) == (platform == "gpu")
    check_gradients(jax.tree.map(np.asarray, function(*arguments)), want)


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
    "integer weight": (KERNEL, {"kernel": jnp.ones((3, 2), int)}, DTypeError, "the weight has dtype int32"),
    "empty tree": ({}, KERNEL, MissingGradientError, "no parameter has a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    gradients, params, error, message = BAD[case]
    with pytest.raises(error, match=message):
        agc_jax.adaptive_clip_gradients(gradients, params, AGC())


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


def test_wrong_units() -> None:
    units: Any = {"kernel": "i o -> o"}
    for function in (
        lambda: agc_jax.adaptive_clip_gradients(KERNEL, KERNEL, AGC(), units=units),
        lambda: agc_jax.adaptive_grad_clip(AGC(), units=units),
    ):
        with pytest.raises(ParameterError, match=r"units= takes what agc_jax\.units\(model\)"):
            function()


def pair(seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return gradients and parameters."""
    kernels, biases = (draw(shape, seed, np.float32) for shape in ((6, 5), (5,)))
    params, gradients = (
        {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        for kernel, bias in zip(kernels, biases, strict=True)
    )
    return gradients, params


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


def test_what_telemetry_exchanges_does_not_grow_with_the_devices() -> None:
    """Whether units or what they are summed over are sharded."""
    shapes = {"kernel0": (3, 64), "kernel1": (3, 64), "deep": (64, 3), "bias": (64,)}
    rule = AGC(units={"bias": "o ->", "*": "i o -> o"})
    exchanges = []
    for count in (2, 4, 8):
        mesh = jax.make_mesh(
            (count,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )
        tree = {
            name: jax.ShapeDtypeStruct(
                shape,
                np.float32,
                sharding=jax.NamedSharding(mesh, jax.P(*("d" if n == 64 else None for n in shape))),
            )
            for name, shape in shapes.items()
        }
        step = jax.jit(lambda g, w: agc_jax.adaptive_clip_gradients(g, w, rule))
        text = step.lower(tree, tree).compile().as_text()
        exchanges.append(hlo.parse(text).collectives)
    assert exchanges[0] == exchanges[1] == exchanges[2]
    assert 0 < exchanges[0].count <= 4


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
