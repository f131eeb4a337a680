"""Weights in Keras' form."""

from __future__ import annotations

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import agc_tensorflow
from agc import SAM
from agc.errors import FormatError, ParameterError
from agc.weights import convert, load, open_weights
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


def test_files_of_keras_itself(tmp_path, arrays):
    model = agc_tensorflow.nfnet("tiny", activation="silu", dtype="bfloat16")
    model.compile(keras.optimizers.SGD(momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    agc_tensorflow.from_neutral(model, arrays)
    wrapped = agc_tensorflow.SharpnessAwareModel(model, SAM())
    model.save(tmp_path / "model.keras")
    for name, of in (("model.weights.h5", model), ("wrapped.weights.h5", wrapped)):
        of.save_weights(tmp_path / name)
    expected = agc_tensorflow.to_neutral(model)
    for path in tmp_path.iterdir():
        with open_weights(path) as found:
            assert (found.form, found.complete) == ("keras", path.suffix == ".keras")
            assert not found.complete or found.options == model.options
            read = found.arrays()
        assert all(np.array_equal(read[name], value) for name, value in expected.items())
    with h5py.File(path := tmp_path / "elsewhere.h5", "w") as file:
        outside = [(tmp_path / "model.keras", 0, 8)]
        file.create_dataset("layers/stem/conv0/vars/0", (2,), "f4", external=outside)
    with pytest.raises(FormatError, match=r"conv0/vars/0 refers to another file"):
        load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"elsewhere\.h5: truncated, or not a whole HDF5"):
        load(path)


def test_files_of_keras_of_an_nf_resnet(tmp_path):
    model = agc_tensorflow.nfnet("NF-ResNet-tiny")
    expected = agc_tensorflow.to_neutral(model)
    model.save(tmp_path / "x.keras")
    model.save_weights(tmp_path / "x.weights.h5")
    for path in tmp_path.iterdir():
        with open_weights(path) as found:
            assert found.options.variant.name == "NF-ResNet-tiny"
            read = found.arrays()
        assert all(np.array_equal(read[name], value) for name, value in expected.items())


def test_other_files_of_keras_name_the_way_out(tmp_path):
    model = agc_tensorflow.nfnet("tiny")
    model.save(tmp_path / "x.h5")
    with pytest.raises(FormatError, match=r"in the form of Keras 2, .* model\.save\('x\.keras'\)"):
        load(tmp_path / "x.h5")
    model.save_weights(tmp_path / "x.weights.json", max_shard_size=0.0005)
    with pytest.raises(FormatError, match=r"an index of Keras, .* save one file"):
        load(tmp_path / "x.weights.json")
    with pytest.raises(ParameterError, match="one of Keras' several; load them in Keras"):
        load(tmp_path / "x_00000.weights.h5")
