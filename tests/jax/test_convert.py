"""Weights in Flax's form, and the command that classifies photographs."""

from __future__ import annotations

import json

import jax
import numpy as np
import safetensors.flax
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_images

import agc_jax
from agc.cli import main
from agc.nfnet.images import evaluation_image
from agc.weights import convert, load, save


def test_names_are_the_paths_of_the_state(tmp_path, neutral, arrays):
    convert(neutral, tmp_path / "flax", "flax")
    model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    paths = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    found = load_file(tmp_path / "flax")
    assert {name: value.shape for name, value in found.items()} == {
        name: leaf.shape for name, leaf in paths.items()
    }
    agc_jax.from_neutral(model, load(tmp_path / "flax")[1])
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert np.asarray(leaf[...]).tobytes() == found[".".join(map(str, path))].tobytes()


def test_flax_itself_loads_it(tmp_path, neutral, arrays):
    convert(neutral, tmp_path / "flax", "flax")
    model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    flat = {
        tuple(int(key) if key.isdigit() else key for key in name.split(".")): array
        for name, array in safetensors.flax.load_file(tmp_path / "flax").items()
    }
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(flat))
    nnx.update(model, state)
    for name, value in agc_jax.to_neutral(model).items():
        assert value.tobytes() == arrays[name].tobytes()


def test_files_of_a_model(tmp_path):
    model = agc_jax.nfnet("tiny", 3, rngs=nnx.Rngs(1))
    save(tmp_path / "saved", model.options, agc_jax.to_neutral(model), "flax")
    options, found = load(tmp_path / "saved")
    assert options == model.options
    other = agc_jax.nfnet("tiny", 3, rngs=nnx.Rngs(2))
    agc_jax.from_neutral(other, found)
    pairs = zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)),
        jax.tree.leaves(nnx.state(other, nnx.Param)),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_classify(tmp_path, neutral, arrays, capsys):
    paths, images = [], load_sample_images().images
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    command = ["classify", *paths, "--weights", str(neutral), "--backend", "jax", "--json"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trained"] is True
    model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    agc_jax.from_neutral(model, arrays)
    model.eval()
    for found, image in zip(document["images"], images, strict=True):
        exact = np.asarray(jax.nn.softmax(model(evaluation_image(image, 32)[None])))[0]
        best = np.argsort(-exact)[:5]
        assert [row["index"] for row in found["top"]] == best.tolist()
        probabilities = [row["probability"] for row in found["top"]]
        np.testing.assert_allclose(probabilities, exact[best], rtol=1e-4)
