"""What ``agc classify`` needs around a model; the models are in the frameworks' folders."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from agc import nfnet
from agc.cli import classify, main
from agc.errors import ConfigError, FormatError, MissingPackageError, NonFiniteError
from agc.nfnet.images import evaluation_image
from agc.weights import save

CHINA, FLOWER = load_sample_images().images


def test_top():
    logits = np.float32([0, 3, 1, 2])
    rows = classify.top(logits, 3, ["a", "b", "c", "d"])
    assert [(row.index, row.name) for row in rows] == [(1, "b"), (3, "d"), (2, "c")]
    exact = np.exp(np.float64([3, 2, 1])) / np.exp(np.float64(logits)).sum()
    np.testing.assert_allclose([row.probability for row in rows], exact, rtol=1e-12)
    assert classify.top(np.float32([1000, 0]), 5, None)[0].probability == 1
    assert len(classify.top(np.float32([1000, 0]), 5, None)) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad):
    with pytest.raises(NonFiniteError, match="1 of 3 logits are NaN or infinite"):
        classify.top(np.float32([0, bad, 1]), 3, None)


def test_names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog, hound\n", encoding="utf-8")
    assert classify.read_names(tmp_path / "names.txt", 2) == ["cat", "dog, hound"]
    (tmp_path / "names.json").write_text('["chat", "chien"]', encoding="utf-8")
    assert classify.read_names(tmp_path / "names.json", 2) == ["chat", "chien"]
    with pytest.raises(FormatError, match="has 2 names; the model has 10 classes"):
        classify.read_names(tmp_path / "names.txt", 10)
    (tmp_path / "names.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(FormatError, match="must be a list of names"):
        classify.read_names(tmp_path / "names.json", 1)
    (tmp_path / "names.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="cannot be read as names"):
        classify.read_names(tmp_path / "names.json", 1)


def test_names_of_imagenet_are_those_of_an_installed_timm(tmp_path, monkeypatch):
    info = tmp_path / "timm" / "data" / "_info"
    info.mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("raise ImportError('must not be imported')")
    synsets = [f"n{k:08}" for k in range(1000)]
    (info / "imagenet_synsets.txt").write_text("\n".join(synsets))
    (info / "imagenet_synset_to_lemma.txt").write_text("n00000001\tgoldfish, carp\nn9\tx\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    found = classify.class_names(1000)
    assert found[:2] == ["n00000000", "goldfish, carp"]
    assert len(found) == 1000
    assert classify.class_names(10) is None
    (info / "imagenet_synsets.txt").unlink()
    assert classify.class_names(1000) is None


def test_untrained_weights_are_seen():
    arrays = nfnet.seeded_parameters("tiny")
    assert not classify.untrained(arrays)
    start = {
        spec.name: np.full(spec.shape, spec.initial.value)
        if spec.initial.distribution == "constant"
        else arrays[spec.name]
        for spec in nfnet.parameters("tiny")
    }
    assert classify.untrained(start)
    start["stages.3.2.skip_gain"] = np.array(0.1)
    assert not classify.untrained(start)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_read_image(tmp_path, mode):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image = Image.fromarray(FLOWER).convert(mode)
    image.save(path)
    expected = evaluation_image(np.asarray(image.convert("RGB")), 32)
    np.testing.assert_array_equal(classify.read_image(path, 32), expected)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    grey = np.asarray(Image.fromarray(FLOWER).convert("L"))
    Image.fromarray(grey).save(tmp_path / "narrow.png")
    Image.fromarray(grey.astype("uint16") * 257).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode in ("I;16", "I")
    expected = classify.read_image(tmp_path / "narrow.png", 32)
    np.testing.assert_array_equal(classify.read_image(tmp_path / name, 32), expected)


def test_grey_of_16_bits_as_older_pillow_has_it(tmp_path, monkeypatch):
    grey = np.asarray(Image.fromarray(FLOWER).convert("L"))
    Image.fromarray(grey).save(tmp_path / "x.png")
    expected = classify.read_image(tmp_path / "x.png", 32)
    wide = Image.fromarray(grey.astype("int32") * 257)
    wide.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda path: wide)
    np.testing.assert_array_equal(classify.read_image(tmp_path / "x.png", 32), expected)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_grey_of_32_bits_is_refused(tmp_path, dtype):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.asarray(Image.fromarray(FLOWER).convert("L")).astype(dtype)).save(path)
    with pytest.raises(FormatError, match=r"^[^:]*x\.tiff: has 32 bits .*scale it to 8 bits a"):
        classify.read_image(path, 32)


def test_bad_images(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(FormatError, match=r"x\.png: cannot be read as an image"):
        classify.read_image(tmp_path / "x.png", 32)
    Image.fromarray(FLOWER).save(tmp_path / "y.jpg")
    (tmp_path / "y.jpg").write_bytes((tmp_path / "y.jpg").read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"y\.jpg: cannot be read as an image"):
        classify.read_image(tmp_path / "y.jpg", 32)
    with pytest.raises(FormatError, match=r"z\.jpg: cannot be read.*No such file"):
        classify.read_image(tmp_path / "z.jpg", 32)


def test_frameworks_and_channels():
    chosen, arrays = classify.random_weights("tiny")
    with pytest.raises(ConfigError, match="unknown framework 'mxnet'; the frameworks are jax, ten"):
        classify.classifier("mxnet", chosen, arrays)
    grey = nfnet.options("tiny", in_channels=1)
    with pytest.raises(ConfigError, match="for 1 channels; photographs have 3"):
        classify.classifier("torch", grey, nfnet.seeded_parameters("tiny", in_channels=1))


@pytest.fixture
def frameworks(monkeypatch):
    """Return a function that lets every framework make its classifier as a function does."""

    def classify_by(make):
        framework = SimpleNamespace(classifier=make)
        monkeypatch.setattr(classify, "load_framework", lambda *_: framework)

    return classify_by


@pytest.fixture
def brightness(frameworks):
    """A backend that says which of ten classes of brightness an image is in."""

    def make(chosen, arrays):
        def logits(images):
            assert images.shape == (1, 32, 32, 3)
            assert images.dtype == np.float32
            levels = np.linspace(-2, 2, chosen.num_classes, dtype=np.float32)
            return -((levels - images.mean()) ** 2)[None] * 10

        return logits

    frameworks(make)


@pytest.fixture
def photographs(tmp_path):
    for name, image in (("china", CHINA), ("[flower]", FLOWER)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "china.png"), str(tmp_path / "[flower].png")]


def test_command(tmp_path, photographs, brightness, capsys):
    chosen, arrays = classify.random_weights("tiny")
    save(tmp_path / "w", chosen, arrays)
    command = ["classify", *photographs, "--weights", str(tmp_path / "w"), "--backend", "torch"]
    assert main([*command, "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "NFNet-tiny, 10 classes with torch" in out
    assert "[flower].png" in out
    assert out.count("%") == 6
    assert "no names of classes; give them with --labels" in out
    assert "RANDOM" not in out
    (tmp_path / "names").write_text("".join(f"level {k}\n" for k in range(10)))
    assert main([*command, "--labels", str(tmp_path / "names"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trained"] is True
    assert document["note"] is None
    assert (document["variant"], document["backend"], document["pixels"]) == ("tiny", "torch", 32)
    china, flower = document["images"]
    assert china["image"] == photographs[0]
    assert len(china["top"]) == 5
    assert china["top"][0]["name"] == f"level {china['top'][0]['index']}"
    assert china["top"][0]["index"] > flower["top"][0]["index"]  # it has the brighter sky


def test_random_weights_are_announced(photographs, brightness, capsys, tmp_path):
    command = ["classify", photographs[0], "--backend", "torch"]
    assert main([*command, "--weights", "random"]) == 0
    assert "THE WEIGHTS ARE RANDOM: these answers mean nothing" in capsys.readouterr().out
    assert main([*command, "--weights", "random", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trained"] is False
    assert "RANDOM" in document["note"]
    chosen, arrays = classify.random_weights("tiny")
    for spec in nfnet.parameters("tiny"):
        if spec.initial.distribution == "constant":
            arrays[spec.name] = np.full(spec.shape, spec.initial.value, "float32")
    save(tmp_path / "new", chosen, arrays)
    assert main([*command, "--weights", str(tmp_path / "new")]) == 0
    assert "THE WEIGHTS LOOK UNTRAINED" in capsys.readouterr().out


def test_random_weights_take_the_options(photographs, frameworks, capsys):
    seen = []

    def make(chosen, arrays):
        seen.append((chosen.activation, chosen.ws_eps))
        return lambda images: np.zeros((1, 10), "float32")

    frameworks(make)
    command = ["classify", photographs[0], "--backend", "torch", "--weights", "random"]
    assert main(command) == 0
    assert main([*command, "--activation", "silu", "--ws-eps", "timm"]) == 0
    assert seen == [("gelu", "deepmind"), ("silu", "timm")]
    capsys.readouterr()
    assert main([*command, "--activation", "mish"]) == 2
    assert "agc: unknown activation 'mish'" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_no_classes_without_finite_logits(photographs, frameworks, capsys, more):
    def make(chosen, arrays):
        return lambda images: np.full((1, 10), np.nan, "float32")

    frameworks(make)
    command = ["classify", photographs[0], "--backend", "torch", "--weights", "random"]
    assert main([*command, *more]) == 1
    out, err = capsys.readouterr()
    assert "%" not in out
    assert "probability" not in out
    assert f"agc: {photographs[0]} with random: 10 of 10 logits are NaN or infinite" in err


def test_an_image_that_is_given_twice(photographs, brightness, capsys):
    images = [photographs[0], photographs[1], photographs[0]]
    command = ["classify", *images, "--backend", "torch", "--weights", "random"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    assert [entry["image"] for entry in found] == images
    assert found[0] == found[2] != found[1]
    assert main(command) == 0
    assert capsys.readouterr().out.count("china.png") == 2


def test_a_name_that_the_output_cannot_encode(tmp_path, brightness, monkeypatch):
    Image.fromarray(CHINA).save(tmp_path / "\u00fc.png")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    command = ["classify", str(tmp_path / "\u00fc.png"), "--backend", "torch"]
    assert main([*command, "--weights", "random"]) == 0
    assert b"\\xfc.png" in written.getvalue()


def test_a_broken_image_hides_no_other(tmp_path, photographs, brightness, capsys, monkeypatch):
    (tmp_path / "x.png").write_text("no image")
    images = [photographs[0], str(tmp_path / "x.png"), str(tmp_path / "none.png"), photographs[1]]
    command = ["classify", *images, "--backend", "torch", "--weights", "random"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out.count("%") == 10
    assert err.count("agc: ") == 2
    assert "x.png: cannot be read as an image" in err
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)  # tables alone need it
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["images"]
    assert [entry["image"] for entry in found] == images
    assert ["top" in entry for entry in found] == [True, False, False, True]
    assert "cannot be read as an image" in found[1]["error"]


def test_misuse(photographs, brightness, capsys, tmp_path):
    command = ["classify", photographs[0], "--backend", "torch", "--weights"]
    assert main([*command, "random", "--top", "0"]) == 2
    assert "--top must be >= 1, got 0" in capsys.readouterr().err
    assert main([*command, "random", "--labels", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main([*command, photographs[0]]) == 2
    assert "neither safetensors, npz, HDF5, a PyTorch file nor a pickle" in capsys.readouterr().err


def test_missing_pillow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image")
    with pytest.raises(MissingPackageError, match=r'needs PIL.*pip install "agc-sam\[weights\]"'):
        classify.read_image("x.png", 32)


def test_missing_framework_names_the_extra(photographs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "agc_jax.commands", None)
    assert main(["classify", photographs[0], "--weights", "random", "--backend", "jax"]) == 2
    assert 'pip install "agc-sam[jax]"' in capsys.readouterr().err


def test_what_an_adapter_says_itself_is_not_explained_again(photographs, capsys, monkeypatch):
    class Point:
        def load(self):
            raise ImportError("KERAS_BACKEND is 'jax'; set it to tensorflow")

    monkeypatch.setattr("agc.cli.frameworks.entry_points", lambda **_: [Point()])
    with pytest.raises(MissingPackageError) as caught:
        classify.load_framework("tensorflow", "the backend tensorflow", "tensorflow")
    said = "the backend tensorflow cannot be imported: KERAS_BACKEND is 'jax'; set it to tensorflow"
    assert str(caught.value) == said
