"""The optax transformation inside everything that optax and Flax put around one."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

import agc_jax
from agc import AGC, SAM, Schedule
from agc.errors import ConfigError, NonFiniteError, ParameterError, SelectorError, ShapeError
from agc.reference import adaptive_clip
from agc_conformance.compiled import hlo

RULE = AGC()


def draw(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return jax.device_put((scale * rng.standard_normal(shape)).astype(np.float32))

    return {"body": {"kernel": normal(4, 3), "bias": normal(3)}, "head": {"kernel": normal(3, 2)}}


@pytest.fixture
def params() -> Any:
    return draw(1)


@pytest.fixture
def gradients() -> Any:
    return draw(2)


def expected(gradients: Any, params: Any, rule: AGC = RULE, step: int = 0) -> Any:
    """Return what the reference says, as a tree of float64."""
    flat = [
        {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in
         jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, gradients)
    ]  # fmt: skip
    clipped = adaptive_clip(flat[0], flat[1], agc_jax.plan(params, rule), rule, step=step).gradients
    return jax.tree.unflatten(jax.tree.structure(gradients), [clipped[name] for name in flat[1]])


def close(actual: Any, wanted: Any, rtol: float = 5e-7, atol: float = 0) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True)
    return all(np.allclose(a, b, rtol=rtol, atol=atol) for a, b in pairs)


def moved(before: Any, after: Any) -> Any:
    return jax.tree.map(lambda b, a: np.asarray(b, np.float64) - np.asarray(a), before, after)


def update(tx: Any, gradients: Any, params: Any, steps: int = 1) -> tuple[Any, Any]:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(gradients, state, params)
    return updates, state


def test_params_are_needed(params: Any, gradients: Any) -> None:
    tx = agc_jax.adaptive_grad_clip(RULE)
    with pytest.raises(ParameterError, match=r"call update\(gradients, state, params\)"):
        tx.update(gradients, tx.init(params))


def test_errors_come_early(params: Any, gradients: Any) -> None:
    with pytest.raises(SelectorError, match="matches no parameter"):
        agc_jax.adaptive_grad_clip(AGC(exclude=["fc.*"])).init(params)
    with pytest.raises(ConfigError, match="clipping must be a finite number > 0"):
        agc_jax.adaptive_grad_clip(RULE, clipping=-0.1)
    with pytest.raises(ParameterError, match=r"must be a scalar, got the shape \(2,\)"):
        agc_jax.adaptive_grad_clip(RULE, clipping=jnp.ones(2))
    for array in (jnp.array(-1.0), np.array(np.nan)):
        with pytest.raises(ConfigError, match="clipping must be a finite number > 0"):
            agc_jax.adaptive_grad_clip(RULE, clipping=array)


AROUND = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.identity()),
    "named chain": lambda tx: optax.named_chain(("agc", tx), ("id", optax.identity())),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.identity()), 3),
    "masked": lambda tx: optax.masked(tx, {"body": True, "head": True}),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, "all"),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_a_step_without_gradients(params: Any, around: str, jitted: bool, hole: Any) -> None:
    """Nothing to do is no error here, as optax's own transformations have none (AGC-5)."""
    tx = AROUND[around](agc_jax.adaptive_grad_clip(RULE))
    state = tx.init(params)
    empty = jax.tree.map(lambda _: hole, params)
    updates, state = (jax.jit(tx.update) if jitted else tx.update)(empty, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(empty)
    assert agc_jax.stats(state).total() == agc_jax.stats(tx.init(params)).total()
    assert agc_jax.stats(state).total().units == 0


def test_the_names_of_a_state_are_not_those_of_optax(params: Any, gradients: Any) -> None:
    """What looks for optax's counters and moments by name finds optax's alone."""
    tx = optax.chain(agc_jax.adaptive_grad_clip(RULE), optax.adam(0.1))
    _, state = update(tx, gradients, params, steps=2)
    assert optax.tree_utils.tree_get(state, "count") == 2
    of_us = ("AdaptiveGradClipState", "Stats", "PerParameter", "SamStats")
    ours = {field for name in of_us for field in getattr(agc_jax, name)._fields}
    kinds = [kind for kind in vars(optax).values() if hasattr(kind, "_fields")]
    theirs = {field for kind in kinds for field in kind._fields}
    assert {"count", "mu", "nu", "trace", "inner_state", "hyperparams"} <= theirs
    assert not ours & theirs


def test_exported(params: Any, gradients: Any) -> None:
    """The state is part of what is exported, and is called by the name of its type."""
    tx = agc_jax.adaptive_grad_clip(AGC(clipping=Schedule([(0, 0.04), (4, 0.01)])))
    state = tx.init(params)
    data = jax.export.export(jax.jit(tx.update))(gradients, state, params).serialize()
    updates, after = jax.export.deserialize(data).call(gradients, state, params)
    want, wanted = tx.update(gradients, state, params)
    assert isinstance(after, agc_jax.AdaptiveGradClipState)
    assert close(updates, want)
    assert agc_jax.stats(after).total() == agc_jax.stats(wanted).total()
    function = agc_jax.sam_value_and_grad(lambda p: optax.tree.norm(p), SAM(), return_stats=True)
    found = jax.export.export(jax.jit(function))(params)
    assert isinstance(jax.export.deserialize(found.serialize()).call(params)[2], agc_jax.SamStats)


@pytest.mark.parametrize(
    "rule", [RULE, AGC(clipping=Schedule([(0, 0.04), (4, 0.01)])), AGC(nonfinite="raise")], ids=str
)
def test_eager_steps_transfer_nothing(params: Any, gradients: Any, rule: AGC) -> None:
    tx = agc_jax.adaptive_grad_clip(rule)
    with jax.transfer_guard("disallow"):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradients, state, params)
    assert close(updates, expected(gradients, params, rule, step=1))


def test_a_fresh_state_has_buffers_of_its_own(params: Any) -> None:
    """So that it can be donated."""
    leaves = jax.tree.leaves(agc_jax.adaptive_grad_clip(RULE).init(params))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == 11


def test_raising_on_several_processes_is_refused(
    params: Any, gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx = agc_jax.adaptive_grad_clip(AGC(nonfinite="raise"))
    state = tx.init(params)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"'raise' inside compiled code of 2 processes .*apply_if_"
    ):
        jax.jit(tx.update)(gradients, state, params)
    tx.update(gradients, state, params)  # outside each process sees the numbers itself
    poisoned = jax.tree.map(lambda g: jnp.nan * g, gradients)
    with pytest.raises(NonFiniteError, match=r"parameter 'body\.bias': 1 of 1 units"):
        tx.update(poisoned, state, params)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_a_traced_threshold_of_nonsense(params: Any, gradients: Any, nonfinite: Any) -> None:
    @jax.jit
    def step(clipping: Any) -> Any:
        tx = agc_jax.adaptive_grad_clip(AGC(nonfinite=nonfinite), clipping=clipping)
        return tx.update(gradients, tx.init(params), params)[0]

    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(step(-1.0)))


def test_a_schedule_of_nonsense_outside_jit(params: Any, gradients: Any) -> None:
    tx = agc_jax.adaptive_grad_clip(AGC(clipping=lambda step: 0.01 - 0.01 * step))
    state = tx.init(params)
    _, state = tx.update(gradients, state, params)
    with pytest.raises(ConfigError, match="the schedule returned"):
        tx.update(gradients, state, params)


def test_a_tree_without_parameters() -> None:
    for rule in (RULE, AGC(exclude=["head.*"])):
        tx = agc_jax.adaptive_grad_clip(rule)
        state = tx.init({})
        updates, state = tx.update({}, state, {})
        assert updates == {}
        assert state.steps == 1


def test_python_numbers_in_a_scan() -> None:
    tx = agc_jax.adaptive_grad_clip(RULE)
    params = {"scale": 2.0, "kernel": jnp.ones((3, 2))}

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2)
    assert float(after["scale"]) == pytest.approx(2 * 1.01**2)


BODY = {"body": True, "head": False}


def masked(rule: AGC, mask: Any = BODY, **options: Any) -> Any:
    return optax.masked(agc_jax.adaptive_grad_clip(rule, **options), mask)


def test_a_step_reuses_the_memory_of_what_is_donated() -> None:
    """Parameters and momentum, however large, are there once."""
    params = gradients = {"kernel": jnp.ones((512, 128)), "bias": jnp.ones(128)}
    tx = optax.chain(agc_jax.adaptive_grad_clip(RULE), optax.sgd(0.1, 0.9, nesterov=True))

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), gradients)
    text = lowered.compile().as_text()
    assert "input_output_alias" in text
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 2 * size <= hlo.parse(text).aliased_bytes < 2.1 * size


def test_telemetry_of_several_models_is_read_one_by_one(params: Any, gradients: Any) -> None:
    tx = agc_jax.adaptive_grad_clip(RULE)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    _, state = jax.vmap(lambda one: tx.update(gradients, tx.init(one), one))(many)
    stats, plan = agc_jax.stats(state), agc_jax.plan(params, RULE)
    for read in (stats.total, stats.to_dict, lambda: stats.parameters(plan)):
        with pytest.raises(ShapeError, match=r"shape \(2,\), of several models .* jax\.tree\.map"):
            read()
    _, single = update(tx, gradients, params)
    second = jax.tree.map(lambda numbers: numbers[1], stats)
    assert second.to_dict(plan=plan) == agc_jax.stats(single).to_dict(plan=plan)


def test_a_state_without_agc_says_so(params: Any) -> None:
    """A checkpoint that is read without a target has dictionaries in place of named tuples."""
    tx = agc_jax.adaptive_grad_clip(RULE)
    as_read = flax.serialization.to_state_dict(tx.init(params))
    for state in (as_read, optax.sgd(0.1).init(params)):
        with pytest.raises(ParameterError, match=r"holds no state .* with tx\.init\(params\)"):
            agc_jax.stats(state)


def test_a_plan_names_what_was_clipped(params: Any, gradients: Any) -> None:
    _, state = update(agc_jax.adaptive_grad_clip(RULE), gradients, params)
    stats, plan = agc_jax.stats(state), agc_jax.plan(params, RULE)
    assert "agc/head.kernel/units" in stats.to_dict(plan=plan)
    assert stats.to_dict(plan=plan, parameters=False) == stats.to_dict()
    part = agc_jax.plan({"body": params["body"]}, RULE)
    with pytest.raises(ParameterError, match="the plan has 2 parameters, the telemetry 3; give"):
        stats.to_dict(plan=part)


@pytest.mark.parametrize("known", [True, False], ids=["units", "no units"])
@pytest.mark.parametrize("pattern", ["head.*", "head.kernel", "*kernel"])
def test_masked(params: Any, gradients: Any, known: bool, pattern: str) -> None:
    """A pattern may mean what is masked out; one that means nothing at all is still an error."""
    units = agc_jax.units(params) if known else None
    updates, state = update(masked(AGC(exclude=[pattern]), units=units), gradients, params)
    left_out = {"head.*", pattern} - {"head.kernel"}
    assert close(updates, expected(gradients, params, AGC(exclude=sorted(left_out))))
    assert len(agc_jax.stats(state).columns.units) == 2
    with pytest.raises(SelectorError, match=r"'haed\.\*' matches no parameter"):
        masked(AGC(exclude=["haed.*"]), units=units).init(params)


@pytest.mark.parametrize("selector", ["@head", "@head.weight"])
def test_the_matrix_of_the_head_is_masked(selector: str) -> None:
    params = {"body": jnp.ones(3), "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    mask = {"body": True, "head": {"kernel": False, "bias": True}}
    updates, _ = update(masked(AGC(exclude=[selector], head="head"), mask), params, params)
    clipped = jax.tree.map(lambda leaf: bool((leaf != 1).all()), updates)
    assert clipped == {"body": True, "head": {"kernel": False, "bias": selector != "@head"}}


def test_masked_patterns_of_other_fields(params: Any, gradients: Any) -> None:
    rule = AGC(
        clipping={"head.*": 0.5, "*": 0.01},
        units={"head.kernel": "... ->"},
        head="head",
        exclude=["@head"],
    )
    updates, _ = update(masked(rule), gradients, params)
    assert close(updates, expected(gradients, params, AGC(exclude=["head.*"])))


def test_everything_masked(params: Any, gradients: Any) -> None:
    updates, _ = update(masked(RULE, {"body": False, "head": False}), gradients, params)
    assert close(updates, gradients)


def test_partition(params: Any, gradients: Any) -> None:
    units = agc_jax.units(params)
    tx = optax.partition(
        {
            "tight": optax.chain(
                agc_jax.adaptive_grad_clip(AGC(clipping=0.001), units=units), optax.identity()
            ),
            "loose": agc_jax.adaptive_grad_clip(AGC(clipping=0.1), units=units),
            "unused": agc_jax.adaptive_grad_clip(RULE),
        },
        {"body": "tight", "head": "loose"},
    )
    updates, state = update(tx, gradients, params)
    assert close(updates, expected(gradients, params, AGC(clipping={"body.*": 0.001, "*": 0.1})))
    with pytest.raises(ParameterError, match="holds 3 states of adaptive_grad_clip"):
        agc_jax.stats(state)
    assert agc_jax.stats(state.inner_states["loose"]).total().units == 2


def test_injected_hyperparameter(params: Any, gradients: Any) -> None:
    schedule = optax.piecewise_interpolate_schedule("linear", 0.04, {4: 0.25})
    tx = optax.inject_hyperparams(agc_jax.adaptive_grad_clip)(
        RULE, units=agc_jax.units(params), clipping=schedule
    )
    state = tx.init(params)
    for step in range(4):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        value = float(state.hyperparams["clipping"])
        assert value == pytest.approx(0.04 - 0.0075 * step)
        assert close(updates, expected(gradients, params, AGC(clipping=value)))
    fixed = optax.inject_hyperparams(agc_jax.adaptive_grad_clip)(RULE, clipping=0.02)
    state = fixed.init(params)
    state.hyperparams["clipping"] = jnp.float32(0.03)
    updates, _ = fixed.update(gradients, state, params)
    assert close(updates, expected(gradients, params, AGC(clipping=float(np.float32(0.03)))))


def test_an_override_spares_what_is_switched_off(params: Any, gradients: Any) -> None:
    rule = AGC(clipping={"head.*": None, "*": 0.5})
    want = expected(gradients, params, AGC(clipping={"head.*": None, "*": 0.02}))
    for value in (0.02, jnp.float32(0.02), lambda step: jnp.float32(0.02)):
        updates, _ = update(agc_jax.adaptive_grad_clip(rule, clipping=value), gradients, params)
        assert close(updates, want)
    off = agc_jax.adaptive_grad_clip(AGC(clipping=None), clipping=0.02)
    assert close(update(off, gradients, params)[0], gradients)


def test_apply_if_finite_sees_the_poison(params: Any, gradients: Any) -> None:
    tx = optax.apply_if_finite(optax.chain(agc_jax.adaptive_grad_clip(RULE), optax.sgd(1.0)), 3)
    gradients["body"]["kernel"] = gradients["body"]["kernel"].at[0, 0].set(jnp.nan)
    updates, state = update(tx, gradients, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert state.total_notfinite == 1


@pytest.mark.parametrize("way", ["dynamic", "chain"])
def test_loss_scaling(params: Any, gradients: Any, way: str) -> None:
    """Gradients are unscaled by Flax' DynamicScale, or by what stands before AGC in the chain."""

    def loss(params: Any) -> Any:
        return optax.tree.vdot(params, gradients)  # whose gradients these are

    transformation = agc_jax.adaptive_grad_clip(RULE)
    if way == "dynamic":
        _, finite, _, given = DynamicScale(scale=1024.0).value_and_grad(loss)(params)
        assert finite
    else:
        given = jax.grad(lambda params: 1024.0 * loss(params))(params)
        transformation = optax.chain(optax.scale(1 / 1024.0), transformation)
    clipped, state = update(transformation, given, params)
    assert close(clipped, expected(gradients, params))
    wanted = update(agc_jax.adaptive_grad_clip(RULE), gradients, params)[1]
    assert agc_jax.stats(state).total() == agc_jax.stats(wanted).total()


def test_a_whole_training_loop_in_scan(params: Any, gradients: Any) -> None:
    tx = optax.chain(agc_jax.adaptive_grad_clip(RULE), optax.sgd(0.1, 0.9, nesterov=True))

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), agc_jax.stats(state).clipped

    (scanned, _), clipped = jax.jit(lambda c: jax.lax.scan(step, c, length=3))(
        (params, tx.init(params))
    )
    carry = (params, tx.init(params))
    for _ in range(3):
        carry, _ = step(carry, None)
    assert close(scanned, carry[0])
    assert clipped.tolist() == [6, 6, 6]


def test_the_state_is_saved_and_restored(params: Any, gradients: Any) -> None:
    tx = optax.chain(
        agc_jax.adaptive_grad_clip(AGC(clipping=Schedule([(0, 0.04), (4, 0.01)]))), optax.adam(0.1)
    )
    _, state = update(tx, gradients, params, steps=2)
    data = flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state))
    restored = flax.serialization.from_state_dict(
        tx.init(params), flax.serialization.msgpack_restore(data)
    )
    for other in (restored, pickle.loads(pickle.dumps(state))):
        assert close(tx.update(gradients, other, params)[0], tx.update(gradients, state, params)[0])
        assert agc_jax.stats(other).total() == agc_jax.stats(state).total()


def test_the_state_is_told_from_parameters(params: Any) -> None:
    tx = optax.chain(agc_jax.adaptive_grad_clip(AGC(exclude=["head.*"])), optax.adam(0.1))
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _: "like a parameter", tx.init(params), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(mapped[0])) == {"other"}
    assert jax.tree.leaves(mapped[1][0].mu) == ["like a parameter"] * 3
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(tx.init(params))


class Model(nnx.Module):
    agc_head = "head"

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.tied = self.head

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(self.conv(x)).mean((1, 2)))


def test_nnx_optimizer() -> None:
    model = Model(nnx.Rngs(0))
    rule = AGC(clipping=1e-3, exclude=["@head"])
    tx = optax.chain(agc_jax.adaptive_grad_clip(rule, units=agc_jax.units(model)), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        gradients = nnx.grad(lambda model: (model(jnp.ones((2, 5, 5, 2))) ** 2).sum())(model)
        optimizer.update(model, gradients)
        return gradients

    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    gradients = nnx.to_pure_dict(step(model, optimizer))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    want = expected(gradients, before, AGC(clipping=1e-3, exclude=["head.*"]))
    assert close(moved(before, after), want, rtol=1e-7, atol=2e-7)
    plan = agc_jax.plan(model, rule)
    stats = agc_jax.stats(optimizer.opt_state)
    assert set(stats.parameters(plan)) == {"conv.kernel", "conv.bias", "norm.scale", "norm.bias"}
    assert stats.total().units == plan.count == 7


def test_linen_train_state() -> None:
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(3)])
    x = jnp.ones((2, 5, 5, 2))
    params = module.init(jax.random.key(0), x)["params"]
    tx = optax.chain(agc_jax.adaptive_grad_clip(RULE), optax.sgd(1.0))
    state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    gradients = jax.grad(lambda p: (module.apply({"params": p}, x) ** 2).sum())(params)
    after = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, gradients)
    assert close(moved(params, after.params), expected(gradients, params), rtol=1e-7, atol=1e-7)


def mesh(**axes: tuple[int, str]) -> Any:
    """Return a mesh of CPUs whose axes have these sizes and types."""
    shape, kinds = zip(*axes.values(), strict=True)
    types = tuple(jax.sharding.AxisType[kind] for kind in kinds)
    devices = jax.devices("cpu")[: int(np.prod(shape))]
    return jax.make_mesh(shape, tuple(axes), axis_types=types, devices=devices)


KINDS = [
    ("Explicit", "Explicit"),
    ("Auto", "Auto"),
    ("Explicit", "Auto"),
    ("Auto", "Explicit"),
    ("Auto", "Auto", "gradients otherwise"),
]
LAYOUTS = {
    "up.kernel": ((16, 16), (None, "d")),
    "up.bias": ((16,), ("d",)),
    "down.kernel": ((16, 16), ("d", None)),
    "down.bias": ((16,), ()),
    "query.kernel": ((16, 4, 8), (None, "d", "m")),
    "heads.kernel": ((16, 4, 8), (None, None, "m")),
    "runs.kernel": ((1536, 24), (("d", "m"), None)),
    "whole.kernel": ((64, 16), ()),
    "grouped": ((8, 12), ("d", None)),
}
"""Shapes and specs that no two axes of units have in common."""


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("context", [False, True], ids=["no context", "set_mesh"])
def test_every_layout_on_every_mesh(kinds: tuple[str, ...], jitted: bool, context: bool) -> None:
    """The bits of the unsharded result, and the layout that came in (AGC-8)."""
    kinds, otherwise = kinds[:2], kinds[2:]
    rng = np.random.default_rng(5)
    params, gradients = (
        {k: rng.standard_normal(shape).astype(np.float32) for k, (shape, _) in LAYOUTS.items()}
        for _ in range(2)
    )
    units = {"query.*": "i h d -> h d", "heads.*": "i h d -> h d", "grouped": "(g=4 o) i -> g o",
             "*.kernel": "i o -> o"}  # fmt: skip
    tx = agc_jax.adaptive_grad_clip(AGC(units=units))
    whole, wanted = tx.update(gradients, tx.init(params), params)
    devices = mesh(d=(4, kinds[0]), m=(2, kinds[1]))
    places, of_gradients = (
        {k: jax.NamedSharding(devices, jax.P(*spec[::way])) for k, (_, spec) in LAYOUTS.items()}
        for way in (1, -1 if otherwise else 1)
    )
    step = jax.jit(tx.update) if jitted else tx.update
    with jax.set_mesh(devices) if context else nullcontext():
        placed = jax.device_put(params, places)
        gradients = jax.device_put(gradients, of_gradients)
        _, state = step(gradients, tx.init(placed), placed)
        split, state = step(gradients, state, placed)
    for name, place in places.items():
        np.testing.assert_array_equal(np.asarray(split[name]), np.asarray(whole[name]))
        if kinds == ("Explicit", "Explicit"):
            assert split[name].sharding.is_equivalent_to(place, split[name].ndim), name
    assert agc_jax.stats(state).total() == agc_jax.stats(wanted).total()


def test_data_parallel_shard_map(params: Any) -> None:
    """Average over the replicas, then clip: every replica gets the answer for the whole batch."""
    gradients = jax.tree.map(lambda *g: jnp.stack(g), *[draw(seed) for seed in range(8)])
    units = agc_jax.units(params)

    def replica(gradients: Any, params: Any) -> Any:
        mean = jax.lax.pmean(jax.tree.map(lambda g: g[0], gradients), "batch")
        return agc_jax.adaptive_clip_gradients(mean, params, RULE, units=units)[0]

    specs = {"in_specs": (jax.P("batch"), jax.P()), "out_specs": jax.P()}
    run = jax.jit(jax.shard_map(replica, mesh=mesh(batch=(8, "Auto")), **specs))
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    assert close(run(gradients, params), expected(mean, params), rtol=1e-5)


@pytest.mark.parametrize("check", [True, False])
def test_gradients_taken_inside_shard_map(params: Any, check: bool) -> None:
    """By default they are sums over the devices, unless the parameters are cast, as documented."""

    def loss(params: Any, x: Any) -> Any:
        hidden = x @ params["body"]["kernel"] + params["body"]["bias"]
        return jnp.mean((hidden @ params["head"]["kernel"]) ** 2)

    def run(cast: bool) -> Any:
        def replica(params: Any, x: Any) -> Any:
            local = jax.lax.pcast(params, "batch", to="varying") if cast else params
            mean = jax.lax.pmean(jax.grad(loss)(local, x), "batch")
            return mean, agc_jax.adaptive_clip_gradients(mean, params, RULE)[0]

        specs = {"in_specs": (jax.P(), jax.P("batch")), "out_specs": jax.P(), "check_vma": check}
        return jax.jit(jax.shard_map(replica, mesh=mesh(batch=(8, "Auto")), **specs))(params, x)

    x = jnp.arange(64.0).reshape(16, 4) / 64 - 0.4
    mean = jax.grad(loss)(params, x)
    close_to = {"rtol": 1e-5, "atol": 1e-7}
    assert close(run(cast=True)[1], expected(mean, params), **close_to)
    times = 8 if check else 1
    assert close(run(cast=False)[0], jax.tree.map(lambda g: times * g, mean), **close_to)


def test_split_parameters_in_shard_map_are_an_error(params: Any) -> None:
    units = agc_jax.units(params)

    def run(axis: str | None) -> Any:
        clip = jax.shard_map(
            lambda g, p: agc_jax.adaptive_clip_gradients(g, p, RULE, units=units)[0],
            mesh=mesh(d=(2, "Auto")),
            in_specs=jax.P(axis, None),
            out_specs=jax.P(axis),
        )
        return jax.jit(clip)(tree, tree)

    tree = {"body": {"kernel": params["body"]["kernel"]}}
    assert close(run(None), expected(tree, tree))
    with pytest.raises(
        ShapeError, match=r"has shape \(2, 3\), the units given are for the shape \(4, 3\)"
    ):
        run("d")
