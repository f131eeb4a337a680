"""Parameters to and from the neutral form."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import agc_jax
from agc import nfnet as core
from agc.errors import ParameterError
from tests.contract.weights import WeightsContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")

driver = JaxDriver()


class TestWeights(WeightsContract):
    driver = driver


def test_sharding_stays():
    """Parameters that lie on several devices still do, and the neutral form is the whole."""
    model = driver.blank("tiny")
    mesh = jax.make_mesh((2,), ("outputs",), devices=jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P(None, "outputs"))
    model.head.weight = nnx.Param(jax.device_put(model.head.weight[...], split))
    arrays = core.seeded_parameters("tiny")
    agc_jax.from_neutral(model, arrays)
    assert model.head.weight[...].sharding == split
    whole = agc_jax.to_neutral(model)["head.weight"]
    np.testing.assert_array_equal(whole, arrays["head.weight"].astype(np.float32))


def test_a_model_without_values_is_refused():
    with pytest.raises(ParameterError, match=r"ShapeDtypeStruct.*not under nnx\.eval_shape"):
        agc_jax.from_neutral(driver.abstract("tiny"), core.seeded_parameters("tiny"))
