"""DeepMind's optimizer, from optax's own parts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agc_jax
from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, SelectorError
from agc_conformance.nfnets.golden import LIMITS, OPTIMIZER, SMOOTHING

SHALLOW = core.Variant("shallow", (1, 1), 0.0, 32, 32, (16, 32), 8, 10)  # quick to compile


def norm(arrays):
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays))


@nnx.jit
def step(model, optimizer, images, labels):
    def loss(model):
        logits = model(images)
        wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(wanted, SMOOTHING)).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def test_golden_steps():
    with jax.enable_x64(True):
        model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        model.eval()
        start = core.seeded_parameters("tiny")
        agc_jax.from_neutral(model, start)
        images, labels = core.seeded_batch(2, 32)
        optimizer = nnx.Optimizer(model, agc_jax.sgd_nfnet(model, lr=0.1), wrt=nnx.Param)
        clipped = []
        for golden in OPTIMIZER:
            loss = step(model, optimizer, images, labels)
            clipped.append(agc_jax.stats(optimizer.opt_state).total())
            found = agc_jax.to_neutral(model)
            assert abs(float(loss) - golden.loss) <= LIMITS["float64"].loss
            assert norm(found.values()) == pytest.approx(golden.parameter_norm, abs=1e-11)
            assert found["stages.0.0.skip_gain"] == pytest.approx(golden.skip_gain, abs=1e-12)
            assert norm([found["head.bias"]]) == pytest.approx(golden.head_bias_norm, rel=1e-12)
            moved = [found[name] - value for name, value in start.items()]
            assert norm(moved) == pytest.approx(golden.distance, rel=1e-12)
        assert (clipped[0].clipped, clipped[0].units) == (254, 4855)


def test_weight_decay():
    """Coupled, on weights only, and after clipping: with gradients of 0 nothing else is left."""
    model = agc_jax.nfnet(SHALLOW, rngs=nnx.Rngs(0))
    agc_jax.from_neutral(model, core.seeded_parameters(SHALLOW))
    before = agc_jax.to_neutral(model)
    tx = agc_jax.sgd_nfnet(model, lr=0.5, weight_decay=0.01)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    after = agc_jax.to_neutral(model)
    for spec in core.parameters(SHALLOW):
        factor = 1 - 0.5 * 0.01 * 1.9 if spec.decays else 1  # Nesterov's first step is 1 + 0.9
        np.testing.assert_allclose(after[spec.name], factor * before[spec.name], rtol=1e-6)


def test_the_learning_rate_is_outside_the_momentum():
    """After a schedule's jump the whole momentum moves by the new rate (Keras would keep the old one)."""
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    rule = AGC(clipping=None)
    jump = optax.piecewise_constant_schedule(0.1, {1: 10.0})
    tx = agc_jax.sgd_nfnet(params, jump, weight_decay=0.0, rule=rule)
    state, gradients = tx.init(params), jax.tree.map(jnp.ones_like, params)
    first, state = tx.update(gradients, state, params)
    second, state = tx.update(gradients, state, params)
    np.testing.assert_allclose(first["head"]["kernel"], np.full((3, 2), -0.1 * 1.9), rtol=1e-6)
    np.testing.assert_allclose(second["head"]["kernel"], np.full((3, 2), -1.0 * 2.71), rtol=1e-6)


def test_other_rules_and_models():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    with pytest.raises(SelectorError, match="does not declare one"):
        agc_jax.sgd_nfnet(model, lr=0.1).init(params)
    tx = agc_jax.sgd_nfnet(model, 0.1, momentum=0.0, rule=AGC(clipping=0.1))
    state = tx.init(params)
    gradients = jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), params)
    updates, state = tx.update(gradients, state, params)
    assert int(agc_jax.stats(state).units) == 4 + 2 + 1 + 1
    plain = -0.1 * (0.01 + 2e-5 * params["last"]["kernel"][...])
    np.testing.assert_allclose(updates["last"]["kernel"][...], plain, rtol=1e-5)
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 2)]  # no momentum


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}])
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} must be a number"):
        agc_jax.sgd_nfnet({"a": jnp.ones((2, 2))}, 0.1, **options)
