"""Weights in Keras' form, and the command that classifies photographs."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_images

import agc_tensorflow
from agc.cli import main
from agc.nfnet.images import evaluation_image
from agc.weights import convert, load, save


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


def test_files_of_a_model(tmp_path):
    model = agc_tensorflow.nfnet("tiny", 3)
    save(tmp_path / "saved", model.options, agc_tensorflow.to_neutral(model), "keras")
    options, found = load(tmp_path / "saved")
    assert options == model.options
    other = agc_tensorflow.nfnet("tiny", 3)
    agc_tensorflow.from_neutral(other, found)
    for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_classify(tmp_path, neutral, arrays, capsys):
    paths, images = [], load_sample_images().images
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    command = ["classify", *paths, "--weights", str(neutral), "--backend", "tensorflow", "--json"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trained"] is True
    model = agc_tensorflow.nfnet("tiny")
    agc_tensorflow.from_neutral(model, arrays)
    for found, image in zip(document["images"], images, strict=True):
        exact = tf.nn.softmax(model(evaluation_image(image, 32)[None], training=False)).numpy()[0]
        best = np.argsort(-exact)[:5]
        assert [row["index"] for row in found["top"]] == best.tolist()
        probabilities = [row["probability"] for row in found["top"]]
        np.testing.assert_allclose(probabilities, exact[best], rtol=1e-4)
