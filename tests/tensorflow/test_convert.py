"""Weights in Keras' form."""

from __future__ import annotations

import keras
import pytest
from safetensors.numpy import load_file

import agc_tensorflow
from agc.weights import convert, load
from tests.contract.convert import ConvertContract
from tests.tensorflow.driver import TensorFlowDriver


class TestConvert(ConvertContract):
    driver = TensorFlowDriver()
    form = "keras"
    backend = "tensorflow"


@pytest.mark.parametrize("name", [None, "my_net"])
def test_names_are_the_paths_of_the_variables(tmp_path, neutral, name):
    convert(neutral, tmp_path / "keras", "keras")
    found = load_file(tmp_path / "keras")
    model = agc_tensorflow.nfnet("tiny", name=name)
    paths = {v.path.partition("/")[2]: v for v in model.trainable_variables}
    assert {path: tuple(v.shape) for path, v in paths.items()} == {
        path: value.shape for path, value in found.items()
    }
    agc_tensorflow.from_neutral(model, load(tmp_path / "keras")[1])
    for path, variable in paths.items():
        assert keras.ops.convert_to_numpy(variable).tobytes() == found[path].tobytes()
