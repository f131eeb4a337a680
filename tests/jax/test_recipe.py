"""DeepMind's optimizer, from optax's own parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agc_jax
from agc import AGC
from tests.contract.recipe import RecipeContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.usefixtures("x64")
class TestRecipe(RecipeContract):
    driver = JaxDriver()


def test_the_learning_rate_is_outside_the_momentum():
    """After a schedule's jump the whole momentum moves by the new rate (Keras would keep the old
    one).
    """
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    rule = AGC(clipping=None)
    jump = optax.piecewise_constant_schedule(0.1, {1: 10.0})
    tx = agc_jax.sgd_nfnet(params, jump, weight_decay=0.0, rule=rule)
    state, gradients = tx.init(params), jax.tree.map(jnp.ones_like, params)
    first, state = tx.update(gradients, state, params)
    second, state = tx.update(gradients, state, params)
    np.testing.assert_allclose(first["head"]["kernel"], np.full((3, 2), -0.1 * 1.9), rtol=1e-6)
    np.testing.assert_allclose(second["head"]["kernel"], np.full((3, 2), -1.0 * 2.71), rtol=1e-6)
