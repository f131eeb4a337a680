"""Weights in Flax's form."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.flax
from flax import nnx
from safetensors.numpy import load_file

import agc_jax
from agc.weights import convert, load
from tests.contract.convert import ConvertContract
from tests.jax.driver import JaxDriver, values_of

pytestmark = pytest.mark.usefixtures("quick")


class TestConvert(ConvertContract):
    driver = JaxDriver()
    form = "flax"
    backend = "jax"


def test_names_are_the_paths_of_the_state(tmp_path, neutral, arrays):
    convert(neutral, tmp_path / "flax", "flax")
    model = TestConvert.driver.blank("tiny")
    found = load_file(tmp_path / "flax")
    shapes = {name: value.shape for name, value in values_of(model).items()}
    assert {name: value.shape for name, value in found.items()} == shapes
    agc_jax.from_neutral(model, load(tmp_path / "flax")[1])
    for name, value in values_of(model).items():
        assert np.asarray(value).tobytes() == found[name].tobytes()


def test_flax_itself_loads_it(tmp_path, neutral, arrays):
    convert(neutral, tmp_path / "flax", "flax")
    model = TestConvert.driver.blank("tiny")
    state = nnx.state(model, nnx.Param)
    flat = {
        tuple(int(key) if key.isdigit() else key for key in name.split(".")): array
        for name, array in safetensors.flax.load_file(tmp_path / "flax").items()
    }
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(flat))
    nnx.update(model, state)
    for name, value in agc_jax.to_neutral(model).items():
        assert value.tobytes() == arrays[name].tobytes()
