"""The models, and what a Flax user expects of a module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import agc_jax
from agc import AGC
from agc import nfnet as core
from agc_jax.nfnet import halved
from tests.contract.golden import EXACT
from tests.contract.nfnet import NARROW, SHALLOW, SIZE, NFNetContract, images_of
from tests.helpers import close, relative
from tests.jax.driver import JaxDriver, blank, run, values_of

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.usefixtures("x64")]

driver = JaxDriver()


class TestNFNet(NFNetContract):
    driver = driver


def test_the_dtype_is_that_of_images_and_parameters():
    def computed(images: Any, **options: Any) -> Any:
        model = nnx.eval_shape(lambda: agc_jax.nfnet(SHALLOW, rngs=nnx.Rngs(0), **options))
        shape = jax.ShapeDtypeStruct((1, 8, 8, 3), images)
        return nnx.eval_shape(lambda model, x: model(x), model, shape).dtype

    assert computed(jnp.float32) == jnp.float32
    assert computed(jnp.bfloat16) == jnp.float32
    assert computed(jnp.float64) == jnp.float64
    assert computed(jnp.float32, dtype=jnp.bfloat16) == jnp.bfloat16
    assert computed(jnp.float32, param_dtype=jnp.bfloat16) == jnp.float32
    assert computed(jnp.bfloat16, param_dtype=jnp.bfloat16) == jnp.bfloat16


def test_deterministic_is_an_argument():
    model = driver.seeded(SHALLOW, dropout=0.4)
    expected = run(model, images_of(*SIZE))
    model.train()
    still = nnx.jit(lambda model, x: model(x, deterministic=True))(model, images_of(*SIZE))
    assert jnp.array_equal(still, expected)
    block = model.stages[1][1]
    view = nnx.view(block, deterministic=False)
    assert run(view, jnp.zeros((0, 2, 2, 32))).shape == (0, 2, 2, 32)  # no image at all


def test_parameters_are_drawn_anew():
    model = agc_jax.nfnet(SHALLOW, 4, rngs=nnx.Rngs(2), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in values_of(model).values()} == {jnp.dtype(jnp.bfloat16)}
    model.reset_parameters(nnx.Rngs(3))
    before = values_of(model)
    model.reset_parameters(nnx.Rngs(3))
    again = values_of(model)
    assert all(np.array_equal(again[name], value) for name, value in before.items())
    model.reset_parameters(nnx.Rngs(4))
    again = values_of(model)
    weights = {spec.name for spec in core.parameters(SHALLOW) if len(spec.shape) > 1}
    assert {n for n, v in before.items() if not np.array_equal(again[n], v)} == weights


def test_shapes_are_enough_for_a_plan():
    rule = AGC.profile("deepmind")
    assert agc_jax.plan(driver.abstract("tiny"), rule) == agc_jax.plan(driver.blank("tiny"), rule)


# Uses


def test_folding_leaves_the_model_alone():
    """It stays in its mode, and nothing is shared: a step that is donated one leaves the other."""
    model = driver.seeded(SHALLOW)
    model.train()
    folded = model.fold()
    assert not model.stages[0][0].deterministic
    for value in values_of(model).values():
        value.delete()
    assert all(np.isfinite(value).all() for value in values_of(folded).values())


def test_a_twin_stays_in_its_mode():
    model = driver.blank(NARROW)
    assert model.batch_normalised().stem.conv0.norm.use_running_average
    model.train()
    assert not model.batch_normalised().stem.conv0.norm.use_running_average


@pytest.mark.parametrize(
    ("options", "computed", "statistics"),
    [
        ({}, jnp.float32, jnp.float32),
        ({"dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
        ({"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
        ({"param_dtype": jnp.float64}, jnp.float64, jnp.float64),
    ],
)
def test_dtypes_of_a_twin(options, computed, statistics):
    """A step leaves the statistics' dtypes as they are, as a loop in a program wants it."""

    def make() -> Any:
        return agc_jax.nfnet(NARROW, rngs=nnx.Rngs(0), **options).batch_normalised()

    def step(twin: Any, images: jax.Array) -> Any:
        return twin(images), nnx.state(twin, nnx.BatchStat)

    twin = nnx.eval_shape(make)
    before = nnx.state(twin, nnx.BatchStat)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    logits, after = nnx.eval_shape(step, twin, images)
    assert logits.dtype == computed
    for state in (before, after):
        leaves = jax.tree.leaves(state)
        assert len(leaves) == 2 * sum(s.kind == "conv" for s in core.parameters(NARROW))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(statistics)}


def test_states():
    """What plain JAX sees: a tree, which goes through ``jax.jit`` and into another model."""
    model = driver.seeded(SHALLOW)
    images = images_of(*SIZE)
    graph, state = nnx.split(model)
    merged = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    assert np.array_equal(merged, run(model, images))
    other = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    nnx.update(other, jax.tree.map(blank, nnx.state(other, nnx.Param)))
    nnx.update(other, nnx.state(model, nnx.Param))
    values = values_of(other)
    assert all(np.array_equal(values[name], value) for name, value in values_of(model).items())


def test_linen():
    """The bridge of Flax makes a Linen module of it, with parameters of the same names."""
    linen = nnx.bridge.to_linen(agc_jax.nfnet, SHALLOW, dropout=0.5, param_dtype=jnp.float64)
    images = images_of(*SIZE)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda keys: linen.init(keys, images, deterministic=True), keys)
    assert set(shapes) == {"params"}

    model = driver.seeded(SHALLOW)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(params) == jax.tree.structure(shapes["params"])
    apply = jax.jit(linen.apply, static_argnames="deterministic")
    found = apply({"params": params}, images, deterministic=True)
    close(found, run(model, images), EXACT.logits)
    first, second = (
        apply({"params": params}, images, deterministic=False, rngs={"dropout": jax.random.key(k)})
        for k in range(2)
    )
    assert relative(first, second) > 1e-3

    tx = agc_jax.sgd_nfnet(driver.abstract(SHALLOW), 0.1)
    state = tx.init(params)
    gradients = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    plan = agc_jax.plan(model, AGC.profile("deepmind"))
    assert int(agc_jax.stats(state).units) == plan.count
    assert jax.tree.structure(updates) == jax.tree.structure(params)

    nnx.update(model, jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params))  # and back
    values = values_of(model)
    assert all(
        np.array_equal(values[name], np.asarray(value) + 1)
        for name, value in values_of(driver.seeded(SHALLOW)).items()
    )


@pytest.mark.parametrize("sides", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_means_of_pixels(sides):
    """In arrays that are large enough for XLA to compute them in another way."""
    images = np.random.default_rng(0).random((64, *sides, 96), np.float32)
    expected = np.stack(
        [
            np.stack(
                [images[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, sides[1], 2)], 1
            )
            for i in range(0, sides[0], 2)
        ],
        1,
    )
    np.testing.assert_allclose(halved(images), expected, rtol=1e-6)
