"""Weights in files: every form to every other bit for bit, broken files by name, nothing half-
written.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from agc import nfnet
from agc.cli import main
from agc.data import initial_values
from agc.errors import (
    ConfigError,
    FormatError,
    MissingPackageError,
    ParameterError,
    WeightsWarning,
)
from agc.recipe import load_recipe
from agc.training import Checkpoints, State
from agc.weights import FORMS, convert, load, open_weights, save
from agc.weights.choice import choose
from agc.weights.files import Source, in_memory
from agc.weights.forms import guess

FORM_NAMES = list(FORMS)


def write_safetensors(path, arrays, metadata=None):
    """By the library itself."""
    save_file({name: np.array(value, order="C") for name, value in arrays.items()}, path, metadata)


def metadata_of(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def folder(path):
    return sorted(found.name for found in path.parent.iterdir())


# --- Round trips


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(FORM_NAMES, 2)])
def test_round_trips_are_bitwise(tmp_path, neutral, first, second):
    a, b, c, back = (tmp_path / name for name in ("a", "b", "c", "back"))
    convert(neutral, a, first)
    assert convert(a, b, second).form == first
    assert convert(b, c, first).form == second
    assert c.read_bytes() == a.read_bytes()
    convert(c, back, "neutral")
    assert back.read_bytes() == neutral.read_bytes()


def test_neutral_files_are_what_the_library_reads(neutral, arrays):
    found = load_file(neutral)
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()
    assert metadata_of(neutral) == {
        "format": "agc-nfnet",
        "format_version": "1",
        "form": "neutral",
        "layout": "HWIO, IO",
        "variant": "tiny",
        "num_classes": "10",
        "in_channels": "3",
        "activation": "gelu",
        "ws_eps": "deepmind",
        "dropout": "0.2",
        "stochastic_depth": "0.25",
    }


KERAS_NAMES = {
    "stages.1.1.conv1b.weight": "stages.1/1/conv1b/weight",
    "stages.1.1.conv1b.gain": "stages.1/1/conv1b/gain",
    "stages.1.1.se.fc0.weight": "stages.1/1/se/fc0/weight",
    "stages.1.1.skip_gain": "stages.1/1/skip_gain",
    "head.weight": "head/weight",
}


@pytest.mark.parametrize("form", FORM_NAMES)
def test_names_and_layouts(tmp_path, neutral, arrays, form):
    path = tmp_path / "there"
    convert(neutral, path, form)
    found = dict(np.load(path)) if form == "haiku" else load_file(path)
    assert len(found) == 233
    specs = {spec.name: spec for spec in nfnet.parameters("tiny")}
    for name, keras in KERAS_NAMES.items():
        spec, value = specs[name], arrays[name]
        own = {"keras": keras, "timm": FORMS["timm"].rename(spec), "haiku": spec.haiku}
        stored = found[own.get(form, name)]
        if form in ("torch", "timm"):
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        if form == "timm" and spec.kind in ("gain", "se"):
            value = value.reshape(value.shape + (1,) * (4 - value.ndim))
        assert stored.shape == value.shape
        np.testing.assert_array_equal(stored, value)


TIMM_F0 = {  # section of a published state dict of dm_nfnet_f0
    "stem.conv1.weight": (16, 3, 3, 3),
    "stem.conv4.weight": (128, 64, 3, 3),
    "stem.conv4.gain": (128, 1, 1, 1),
    "stem.conv4.bias": (128,),
    "stages.0.0.skipinit_gain": (),
    "stages.0.0.downsample.conv.weight": (256, 128, 1, 1),
    "stages.0.0.conv1.weight": (128, 128, 1, 1),
    "stages.0.0.conv2.weight": (128, 128, 3, 3),
    "stages.0.0.conv2b.weight": (128, 128, 3, 3),
    "stages.0.0.conv3.weight": (256, 128, 1, 1),
    "stages.0.0.attn_last.fc1.weight": (128, 256, 1, 1),
    "stages.0.0.attn_last.fc2.weight": (256, 128, 1, 1),
    "stages.0.0.attn_last.fc2.bias": (256,),
    "stages.2.5.conv1.weight": (768, 1536, 1, 1),
    "stages.2.5.conv2b.weight": (768, 128, 3, 3),
    "stages.3.0.downsample.conv.gain": (1536, 1, 1, 1),
    "final_conv.weight": (3072, 1536, 1, 1),
    "final_conv.gain": (3072, 1, 1, 1),
    "head.fc.weight": (1000, 3072),
    "head.fc.bias": (1000,),
}


def test_timm_names_of_f0():
    form = FORMS["timm"]
    found = {form.spec(spec).name: form.spec(spec).shape for spec in nfnet.parameters("F0")}
    assert len(found) == 233
    assert {name: found.get(name) for name in TIMM_F0} == TIMM_F0
    assert "stages.2.5.downsample.conv.weight" not in found


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["torch", "timm", "keras"])
def test_dtypes_stay(tmp_path, arrays, form, dtype):
    there, back = tmp_path / "there", tmp_path / "back"
    values = {name: value.astype(dtype) for name, value in arrays.items()}
    save(there, nfnet.options("tiny"), values, form)
    convert(there, back, "neutral")
    for name, value in load(back)[1].items():
        assert value.dtype == np.dtype(dtype)
        assert value.tobytes() == values[name].tobytes()


@pytest.mark.parametrize("code", [0x80, 0x4B50])  # how a pickle starts, and a zip archive
def test_headers_whose_length_looks_like_another_kind(tmp_path, neutral, arrays, code):
    path = tmp_path / "looks"
    said = {**metadata_of(neutral), "note": ""}
    write_safetensors(path, arrays, said)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    said["note"] = "x" * ((code - length) % (256 if code < 256 else 65536))
    write_safetensors(path, arrays, said)
    assert path.read_bytes().startswith(code.to_bytes(2, "little").rstrip(b"\0"))
    chosen, found = load(path)
    assert chosen == nfnet.options("tiny")
    assert all(np.array_equal(found[name], value) for name, value in arrays.items())
    convert(path, tmp_path / "back", "neutral")
    assert (tmp_path / "back").read_bytes() == neutral.read_bytes()


READ_BFLOAT16 = """
import sys
from agc.weights import load
assert "ml_dtypes" not in sys.modules
print(load(sys.argv[1])[1]["head.bias"].dtype)
"""


@pytest.fixture
def narrow(tmp_path, arrays):
    """Return a file of bfloat16."""
    values = {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}
    save(tmp_path / "narrow", nfnet.options("tiny"), values)
    return tmp_path / "narrow"


def test_bfloat16_needs_nothing_to_be_imported_before(narrow):
    command = [sys.executable, "-c", READ_BFLOAT16, str(narrow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("bfloat16", "")


def test_bfloat16_names_the_extra(narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingPackageError, match=r"narrow: reading bfloat16 needs ml_dtypes"):
        load(narrow)


def test_mixed_dtypes_are_aligned(tmp_path, arrays):
    values = {k: v.astype("float16") if ".gain" in k else v for k, v in arrays.items()}
    values["stem.conv0.bias"] = values["stem.conv0.bias"].astype("float64")
    path = tmp_path / "mixed"
    save(path, nfnet.options("tiny"), values)
    found = load_file(path)
    assert all(np.array_equal(found[name], values[name]) for name in values)
    assert all(found[name].dtype == values[name].dtype for name in values)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    widths = {"F64": 8, "F32": 4, "F16": 2}
    for name in values:
        assert (8 + length + header[name]["data_offsets"][0]) % widths[header[name]["dtype"]] == 0


def test_npz_holds_no_bfloat16(tmp_path, narrow):
    chosen, values = load(narrow)
    with pytest.raises(ParameterError, match=r"stem\.conv0\.weight is bfloat16; haiku weights can"):
        save(tmp_path / "x", chosen, values, "haiku")
    assert folder(narrow) == ["narrow"]


def test_options_go_with_the_weights(tmp_path, arrays):
    rates = {"dropout": 0.0, "stochastic_depth": 0.1}
    chosen = nfnet.options("tiny", 7, in_channels=1, activation="silu", ws_eps="timm", **rates)
    values = nfnet.seeded_parameters("tiny", 7, 1)
    source = tmp_path / "0"
    save(source, chosen, values)
    for number, form in enumerate([*FORM_NAMES, "neutral"]):
        target = tmp_path / str(number + 1)
        assert convert(source, target, form).complete
        source = target
    options, found = load(source)
    assert options == chosen
    assert all(np.array_equal(found[name], values[name]) for name in values)


def test_what_a_file_does_not_say(tmp_path, neutral):
    convert(neutral, tmp_path / "timm", "timm")
    write_safetensors(tmp_path / "bare", load_file(tmp_path / "timm"))
    with open_weights(tmp_path / "bare") as found:
        assert (found.form, found.options, found.complete) == ("timm", nfnet.options("tiny"), False)
        assert "activation=gelu, ws_eps=deepmind" in found.notes[0]
    given = {"activation": "gelu_erf", "ws_eps": "timm"}
    with open_weights(tmp_path / "bare", **given) as found:
        assert (found.options.activation, found.options.ws_eps) == ("gelu_erf", "timm")
        assert not found.notes  # nothing was assumed
    with open_weights(tmp_path / "bare", ws_eps="timm") as found:
        assert "activation=gelu, ws_eps=timm" in found.notes[0]
    assert found.nbytes == 4 * 334_086
    with pytest.warns(WeightsWarning, match="bare does not say how it was trained; taken for"):
        load(tmp_path / "bare")
    assert load(tmp_path / "bare", **given)[0].activation == "gelu_erf"


def haiku_tree(items):
    """Return DeepMind's tree of modules and leaves of names with a value each."""
    tree = {}
    for key, value in items:
        module, _, name = key.rpartition("/")
        tree.setdefault(module, {})[name] = value
    return tree


def test_numpy_reads_haiku_files(tmp_path, neutral):
    convert(neutral, tmp_path / "haiku.npz", "haiku")
    tree = haiku_tree(np.load(tmp_path / "haiku.npz").items())  # no pickles inside
    assert len(tree) == 94
    assert set(tree["NFNet/~/linear"]) == {"w", "b"}
    assert set(tree["NFNet/~/nf_block_11/~/conv1b"]) == {"w", "gain", "bias"}
    assert tree["NFNet/~/nf_block"]["skip_gain"].shape == ()


# --- What is it?


@pytest.mark.parametrize(
    ("form", "variant"),
    [
        *itertools.product(["neutral", "torch", "haiku"], nfnet.VARIANTS),
        *itertools.product(["keras", "timm"], ["F0", "F3+", "tiny"]),
    ],
)
def test_forms_and_variants_are_told_apart(form, variant):
    specs = [FORMS[form].spec(spec) for spec in nfnet.parameters(variant, 21, 4)]
    found, sized = guess({spec.name: spec.shape for spec in specs})
    assert (found.name, sized.name) == (form, variant)


def test_timms_resnets_are_others(tmp_path, capsys):
    """The names are alike; what is computed is not."""
    chosen = nfnet.options("NF-ResNet-tiny")
    values = nfnet.seeded_parameters("NF-ResNet-tiny")
    with pytest.raises(ConfigError, match="timm's NF-ResNets are other networks"):
        save(tmp_path / "x", chosen, values, "timm")
    form = FORMS["timm"]
    specs = nfnet.parameters("NF-ResNet-tiny")
    theirs = {form.rename(spec): form.encode(spec, values[spec.name]) for spec in specs}
    write_safetensors(tmp_path / "x", theirs)
    with pytest.raises(FormatError, match="x: timm's NF-ResNets are other networks"):
        load_as(tmp_path / "x")
    save(tmp_path / "x", chosen, values, "haiku")
    assert_same(load_as(tmp_path / "x", variant="NF-ResNet-tiny"), values)
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", "keras"]) == 0
    assert "keras weights of NF-ResNet-tiny, 10 classes, 54 tensors" in capsys.readouterr().out


# --- Which weights?


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "ema."])
def test_a_prefix_that_all_names_share(tmp_path, arrays, prefix):
    found = {f"{prefix}{name}": value for name, value in arrays.items()}
    write_safetensors(tmp_path / "x", {**found, "n_averaged": np.int64(3)})
    assert_same(load_as(tmp_path / "x"), arrays)


def test_a_prefix_that_not_all_names_share(tmp_path, arrays):
    found = {f"net.{name}": value for name, value in arrays.items()}
    write_safetensors(tmp_path / "x", {**found, "loss.weight": np.ones(3)})
    with pytest.raises(ParameterError, match=r"under net: .* 1 unknown: loss\.weight.*by --key"):
        load_as(tmp_path / "x")
    assert_same(load_as(tmp_path / "x", key="net"), arrays)


def test_names_of_one_model_under_different_prefixes(tmp_path, arrays):
    odd = dict.fromkeys(list(arrays)[::2], "module.")
    found = {f"{odd.get(name, '')}{name}": value for name, value in arrays.items()}
    write_safetensors(tmp_path / "x", found)
    with pytest.raises(FormatError, match=r"different prefixes: .*module.*; save it"):
        load_as(tmp_path / "x")


def test_averages_in_place_of_what_lightning_trains(tmp_path, arrays):
    averaged = {name: value / 2 for name, value in arrays.items()}
    sets = {"state_dict": averaged, "current_model_state": arrays}
    contents = {
        key: {f"net.{name}": in_memory(value) for name, value in of.items()}
        for key, of in sets.items()
    }
    source = Source(tmp_path, contents, {}, ())
    with pytest.raises(FormatError, match=r"raw weights \(current_model_state\.net\) and averaged"):
        choose(source)
    for which, expected in (("raw", arrays), ("ema", averaged)):
        tensors = choose(source, weights=which).tensors
        assert_same({name: tensor.read() for name, tensor in tensors.items()}, expected)
    only = Source(tmp_path, {"state_dict": contents["state_dict"]}, {}, ())
    with pytest.raises(FormatError, match="says of no weights that they are ema"):
        choose(only, weights="ema")


def test_raw_and_averaged_weights(tmp_path, neutral, arrays, capsys):
    averaged = {name: value / 2 for name, value in arrays.items()}
    sets = {"model.": arrays, "ema_model.module.": averaged}
    found = {f"{prefix}{name}": value for prefix, of in sets.items() for name, value in of.items()}
    write_safetensors(tmp_path / "x", found)
    names = r"raw weights \(model\) and averaged ones \(ema_model\.module\)"
    with pytest.raises(FormatError, match=rf"x: holds {names}; say which: raw or ema"):
        load_as(tmp_path / "x")
    assert_same(load_as(tmp_path / "x", weights="raw"), arrays)
    assert_same(load_as(tmp_path / "x", key="model"), arrays)
    assert_same(load_as(tmp_path / "x", weights="ema"), averaged)
    assert_same(load_as(tmp_path / "x", key="ema_model"), averaged)
    with pytest.raises(
        FormatError, match=r"no weights under 'ema'; it holds ema_model\.module, model"
    ):
        load_as(tmp_path / "x", key="ema")
    with pytest.raises(
        FormatError, match="says of no weights that they are ema; it holds names wi"
    ):
        load_as(neutral, weights="ema")
    with pytest.raises(ConfigError, match="weights must be 'raw' or 'ema', got 'mean'"):
        load_as(neutral, weights="mean")
    command = ["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", "neutral"]
    assert main(command) == 2
    assert main([*command, "--weights", "ema"]) == 0
    assert_same(load(tmp_path / "y")[1], averaged)
    capsys.readouterr()


def test_several_weights_are_listed(tmp_path, arrays):
    found = {f"{p}.{name}": value for p in ("a", "b") for name, value in arrays.items()}
    moments = {f"optimizer.exp_avg.{name}": value for name, value in arrays.items()}
    write_safetensors(tmp_path / "x", found | moments)
    with pytest.raises(FormatError, match=r"x: holds several weights: a, b; say which by its key"):
        load_as(tmp_path / "x")
    assert_same(load_as(tmp_path / "x", key="b"), arrays)


@pytest.fixture
def index(tmp_path, arrays):
    """Return an index of two shards."""
    names = {name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(arrays)}
    for shard in set(names.values()):
        part = {name: arrays[name] for name in arrays if names[name] == shard}
        write_safetensors(tmp_path / shard, part)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return path


def test_shards(index, arrays):
    assert_same(load_as(index), arrays)
    first = index.with_name("model-00001-of-00002.safetensors")
    with pytest.raises(ParameterError, match="one of several; give their index"):
        load_as(first)
    with pytest.raises(ConfigError, match="source and target are the same file"):
        convert(index, first, "torch")
    first.unlink()
    with pytest.raises(FormatError, match=r"index\.json: names model-00001.* no file of weights"):
        load_as(index)


def test_an_index_says_which_shard_a_tensor_is_in(index, arrays):
    first, second = sorted(index.parent.glob("*-of-00002.safetensors"))
    name = next(iter(arrays))  # it is in the first
    held = load_file(second)
    write_safetensors(second, {**held, name: arrays[name] + 1})
    assert_same(load_as(index), arrays)
    write_safetensors(second, held)
    write_safetensors(first, {**load_file(first), next(iter(held)): arrays[name]})
    assert_same(load_as(index), arrays)
    said = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**said, name: second.name}}))
    with pytest.raises(
        FormatError, match=rf"1 not in the file where it says: {name} \({second.name}\)\."
    ):
        load_as(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON, but no index of shards"),
        ("{}", "JSON, but no index of shards"),
        ('{"weight_map": {}}', "JSON, but no index of shards with a weight_map; it maps no tensor"),
        ('{"weight_map": ["a"]}', "JSON, but no index of shards with a weight_map; it maps no"),
        ("{" * 9000, "JSON, but no index of shards"),
        ('{"weight_map": {"a": "../b"}}', r"puts a into '\.\./b'; shards must be beside it"),
        ('{"weight_map": {"a": ".."}}', r"names \.\., which is no file of weights beside it"),
        ('{"weight_map": {"a": ""}}', "puts a into ''; shards must be beside it"),
        ('{"weight_map": {"a": 1}}', "puts a into 1; shards must be beside it"),
        ('{"weight_map": {"a": "b"}}', "names b, which is no file of weights beside it"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "has 'a' twice"),
        ('{"weight_map": {"a": "x.index"}}', "neither safetensors, .* it starts with b'{"),
        ('{"weight_map": {"/a/vars": ["b"]}}', r"an index of Keras, .* model\.save_weights"),
    ],
)
def test_broken_indices(tmp_path, text, message):
    (tmp_path / "x.index").write_text(text)
    with pytest.raises(FormatError, match=rf"x\.index: {message}"):
        load(tmp_path / "x.index")


def test_folders_of_a_training(tmp_path, capsys):
    recipe = load_recipe("digits-mini")
    raw = initial_values(recipe)
    ema = {name: value / 2 for name, value in raw.items()}
    checkpoints, out = Checkpoints(tmp_path / "run", recipe), tmp_path / "x"
    checkpoints.save(State(step=7, parameters=ema, momentum=ema, ema=raw))
    folder = checkpoints.save(State(step=10, parameters=raw, momentum=raw, ema=ema))
    for source in (folder, tmp_path / "run"):
        assert main(["convert", str(source), str(out), "--to", "torch"]) == 0
        assert (
            "step-000010: took ema.safetensors, which its recipe evaluates"
            in capsys.readouterr().err
        )
        assert_same(load(out)[1], ema)
        assert main(["convert", str(source), str(out), "--to", "torch", "--weights", "raw"]) == 0
        assert capsys.readouterr().err == ""
        assert_same(load(out)[1], raw)
    with pytest.warns(WeightsWarning, match=r"took ema\.safetensors"):
        load(folder)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(FormatError, match=r"has no ema\.safetensors: its recipe has no average"):
        load(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(FormatError, match=r"state\.json: does not say which weights"):
        load(folder)
    with pytest.raises(FormatError, match="a folder without a checkpoint"):
        load(tmp_path)


def test_a_folder_of_files_names_one_of_them(tmp_path):
    """An index before its shards."""
    with pytest.raises(FormatError, match=r"name a file of weights$"):
        load(tmp_path)
    for name in ("b.bin", "a-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        with pytest.raises(FormatError, match=f"such as .*/{re.escape(name)}$"):
            load(tmp_path)


# --- What is wrong with it?


def damaged(tmp_path, neutral, change, form="torch", metadata=False):
    convert(neutral, tmp_path / "whole", form)
    found = load_file(tmp_path / "whole")
    change(found)
    said = metadata_of(tmp_path / "whole") if metadata else None
    write_safetensors(tmp_path / "damaged", found, said)
    return tmp_path / "damaged"


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stages.2.3.conv1.bias"), r"1 missing: stages\.2\.3\.conv1\.bias\. Is it"),
        (lambda t: t.pop("stem.conv0.weight"), r"1 missing: stem\.conv0\.weight\. Is it"),
        (lambda t: t.pop("head.bias"), r"1 missing: head\.bias\. Is it"),
        (lambda t: t.update(extra=t["head.bias"]), "1 unknown: extra"),
        (
            lambda t: t.update({"head.weight": t["head.weight"].T}),
            r"1 of another shape: head\.weight \(has \(192, 10\), needs \(10, 192\)\)",
        ),
        (
            lambda t: t.update({"stem.conv1.gain": t["stem.conv1.gain"][:-1]}),
            r"1 of another shape: stem\.conv1\.gain \(has \(31,\), needs \(32,\)\)",
        ),
        (
            lambda t: t.update({"stem.conv1.gain": t["stem.conv1.gain"].astype("int32")}),
            r"1 not floating point: stem\.conv1\.gain \(I32\)",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, neutral, change, message, metadata):
    source, target = damaged(tmp_path, neutral, change, metadata=metadata), tmp_path / "target"
    target.write_text("precious")
    before = folder(target)
    with pytest.raises(ParameterError, match=message) as caught:
        convert(source, target, "neutral")
    assert "damaged, read as torch weights of tiny: " in str(caught.value)
    assert target.read_text() == "precious"
    assert folder(target) == before


def test_wrong_variants_are_named(tmp_path, neutral):
    convert(neutral, tmp_path / "timm", "timm")
    with pytest.raises(ParameterError, match=r"as timm weights of F1: .*204 missing") as caught:
        convert(tmp_path / "timm", tmp_path / "x", "neutral", variant="F1")
    assert str(caught.value).endswith("Its tensors look like those of tiny")
    said = {**metadata_of(neutral), "variant": "F0"}
    write_safetensors(tmp_path / "lies", load_file(neutral), said)
    with pytest.raises(
        ParameterError, match=r"as neutral weights of F0: .*look like those of tiny"
    ):
        load(tmp_path / "lies")
    with pytest.raises(ConfigError, match="unknown NFNet variant 'F9'"):
        load_as(neutral, variant="F9")
    assert not (tmp_path / "x").exists()


def test_names_of_no_form_are_named_too(tmp_path, neutral):
    renamed = {f"{name}_old": value for name, value in load_file(neutral).items()}
    write_safetensors(tmp_path / "renamed", renamed, metadata_of(neutral))
    with pytest.raises(ParameterError, match=r"233 missing: .*233 unknown: .*_old") as caught:
        load(tmp_path / "renamed")
    assert str(caught.value).endswith("None of its names is an NFNet's")


def load_as(path, **options):
    with open_weights(path, **options) as found:
        return found.arrays()


def test_other_networks_are_refused(tmp_path):
    write_safetensors(tmp_path / "other", {"layer1.0.weight": np.zeros(3)})
    with pytest.raises(FormatError, match=r"no tensor is an NFNet's; it holds layer1\.0\.weight"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "format version 2; this program reads up to 1"),
        ({"format_version": "one"}, "broken metadata; invalid literal"),
        ({"form": "caffe"}, "broken metadata; 'caffe' is missing or unknown"),
        ({"variant": "F11"}, "broken metadata; unknown NFNet variant 'F11'"),
        ({"ws_eps": "1e-4"}, "broken metadata; ws_eps must be"),
        ({"num_classes": None}, "broken metadata; 'num_classes' is missing"),
    ],
)
def test_bad_metadata(tmp_path, neutral, change, message):
    said = {k: v for k, v in {**metadata_of(neutral), **change}.items() if v is not None}
    write_safetensors(tmp_path / "changed", load_file(neutral), said)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "changed")


@pytest.mark.parametrize("form", ["neutral", "haiku"])
@pytest.mark.parametrize("keep", [0, 4, 20, 5_000, 600_000, -1])
def test_truncated_files(tmp_path, neutral, form, keep):
    convert(neutral, tmp_path / "whole", form)
    (tmp_path / "short").write_bytes((tmp_path / "whole").read_bytes()[:keep])
    with pytest.raises(FormatError, match="short: ") as caught:
        convert(tmp_path / "short", tmp_path / "target", "torch")
    if keep > 10_000 or keep < 0:
        assert "short: truncated" in str(caught.value)
    if (form, keep) == ("neutral", 5_000):
        assert "short: truncated; its header has 4992 of" in str(caught.value)
    if (form, keep) == ("neutral", -1):
        assert str(caught.value).endswith("1 tensors are not whole: head.bias")
    assert not (tmp_path / "target").exists()


def test_damaged_archives(tmp_path, neutral):
    convert(neutral, tmp_path / "whole", "haiku")
    data = bytearray((tmp_path / "whole").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole") as archive:
        info = archive.getinfo("NFNet/~/linear/w.npy")
    data[info.header_offset + info.file_size // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(FormatError, match=r"NFNet/~/linear/w cannot be read; Bad CRC-32"):
        convert(tmp_path / "flipped", tmp_path / "target", "torch")
    assert folder(tmp_path / "target") == ["flipped", "neutral", "whole"]


def npy(header):
    """An array of eight zeros under any header."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(32)


@pytest.fixture
def archive(tmp_path):
    """Return a function that writes an archive of one array under any header."""

    def write(header):
        with zipfile.ZipFile(tmp_path / "x", "w") as file:
            file.writestr("NFNet/~/linear/b.npy", npy(header))
        return tmp_path / "x"

    return write


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8,",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8,), }}",
        "  {'descr': '<f4'\n 'shape'",
        "{'descr': '<f3', 'fortran_order': False, 'shape': (8,), }",
    ],
)
def test_broken_headers_in_archives(archive, header):
    with pytest.raises(FormatError, match="x: NFNet/~/linear/b cannot be read; "):
        load(archive(header))


def test_damaged_compression(tmp_path, arrays):
    haiku = {spec.haiku: arrays[spec.name] for spec in nfnet.parameters("tiny")}
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **haiku)
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("NFNet/~/linear/w.npy")
    data = bytearray(path.read_bytes())
    names = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + sum(names)] = 7  # a kind of block that does not exist
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"NFNet/~/linear/w cannot be read; .*invalid block type"):
        load(path)


def later_version(data):
    data[data.index(b"PK\x01\x02") + 6] = 99


def outside(data):
    place = data.index(b"PK\x05\x06") + 16  # where the archive says that its directory starts
    struct.pack_into("<I", data, place, struct.unpack_from("<I", data, place)[0] + 1000)


def no_text(data):
    entry = data.index(b"PK\x01\x02")
    data[entry + 9] |= 8  # names are UTF-8
    data[entry + 46] = 0xFF


def encrypted(data):
    for start in (6, data.index(b"PK\x01\x02") + 8):
        data[start] |= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (encrypted, r"linear/b cannot be read; .*encrypted"),
        (later_version, r"x: truncated, or not .*; zip file version 9\.9"),
        (no_text, "x: truncated, or not .*; 'utf-8' codec"),
        (outside, "x: NFNet/~/linear/b cannot be read; "),
    ],
)
def test_damaged_directories_of_archives(archive, damage, message):
    path = archive("{}")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        load(path)


def test_objects_in_archives_are_not_unpickled(tmp_path, arrays):
    haiku = {spec.haiku: arrays[spec.name] for spec in nfnet.parameters("tiny")}
    haiku["NFNet/~/linear/b"] = np.array([0.0] * 9 + [print], dtype=object)
    np.savez(tmp_path / "objects.npz", **haiku)
    with pytest.raises(ParameterError, match=r"1 not floating point: NFNet/~/linear/b \(object\)"):
        load(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "neither safetensors, npz, HDF5, a PyTorch file nor a pickle"),
        (b"", "x: is empty"),
        (b"PK\x03\x04\x14\0\0\0{", "truncated, or not a whole zip archive"),
        (b"PK\x05\x06" + bytes(18), "a zip archive, but neither NumPy's nor PyTorch's"),
        (struct.pack("<Q", 2**40) + b"{}", "x: "),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "x")


# --- PyTorch's files, without PyTorch: what its reader says is written down here


UNSAFE = (
    "In PyTorch 2.6, we changed the default value of the `weights_only` argument in `torch.load` from `False` to "
    "`True`. Re-running `torch.load` with `weights_only` set to `False` will likely succeed."
)
DOCS = "\n\nCheck the documentation of torch.load to learn more"
UNKNOWN = "Unsupported global: GLOBAL my.Model was not an allowed global by default."
BLOCKED = "Trying to load unsupported GLOBAL posix.system whose module posix is blocked."


@pytest.fixture
def pytorch(tmp_path, monkeypatch):
    """Return a function that lets PyTorch read something, or fail, and the file that it reads."""

    def make(found):
        def read(path, **how):
            assert how["weights_only"] is True
            if isinstance(found, Exception):
                raise found
            return found

        fake = types.SimpleNamespace(__version__="2.6.0", load=read, Tensor=np.ndarray)
        monkeypatch.setitem(sys.modules, "torch", fake)
        path = tmp_path / "model.pth"
        path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
        return path

    return make


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Weights only load failed. This file can still be loaded, to do so you have two options, \033[1mdo "
            f"those steps only if you trust the source of the checkpoint\033[0m. \n\t(1) {UNSAFE}\n\t(2) "
            "Alternatively, to load with `weights_only=True` please check the recommended steps in the following "
            f"error message.\n\tWeightsUnpickler error: {UNKNOWN} Please use `add_safe_globals([Model])`{DOCS}",
            UNKNOWN,
        ),
        (
            f"Weights only load failed. {UNSAFE}\nPlease file an issue with the following so that we can make "
            f"`weights_only=True` compatible: WeightsUnpickler error: \n\nUnsupported operand 149{DOCS}",
            "Unsupported operand 149",
        ),
        (f"Weights only load failed. {UNSAFE}\n\n\n{BLOCKED}{DOCS}", BLOCKED),
        (f"Weights only load failed. x must be imported to load\n {UNSAFE}\n", "x must be imported to load"),
        ("Ran out of input", "Ran out of input"),
        ("GLOBAL \033[1mbold", "GLOBAL [1mbold"),
        ("", "EOFError"),
    ],
)  # fmt: skip
def test_what_pytorch_found_is_said(pytorch, said, reason):
    path = pytorch(EOFError(said))
    with pytest.raises(FormatError) as caught:
        load(path)
    assert str(caught.value).endswith(f"with weights_only=True, which runs nothing; {reason}")


@pytest.mark.parametrize("name", [0, ("a", "b")])
def test_state_dicts_have_names(pytorch, name):
    path = pytorch({"head.bias": np.zeros(10), name: np.zeros(2)})
    with pytest.raises(FormatError, match=r"model\.pth: .* is a (int|tuple), not the name of"):
        load(path)


# --- Nothing half-written


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("form", ["torch", "haiku"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_conversion_leaves_no_trace(tmp_path, neutral, form, exists):
    target = tmp_path / "target"
    if exists:
        target.write_text("precious")
    before = folder(target)
    during = []

    def stop(name, size, total):
        during.append(name)
        if len(during) == 100:
            assert len(folder(target)) == len(before) + 1
            raise Interrupt

    with pytest.raises(Interrupt):
        convert(neutral, target, form, progress=stop)
    assert len(during) == 100
    assert folder(target) == before
    if exists:
        assert target.read_text() == "precious"


def test_progress(tmp_path, neutral):
    seen = []
    convert(neutral, tmp_path / "x", "timm", progress=lambda *step: seen.append(step))
    assert len(seen) == 233
    assert {total for _, _, total in seen} == {sum(size for _, size, _ in seen)} == {4 * 334_086}
    assert seen[0][0] == "stem.conv1.weight"


def test_misuse(tmp_path, neutral, arrays):
    with pytest.raises(ConfigError, match="source and target are the same file"):
        convert(neutral, neutral, "torch")
    assert load(neutral)[0].variant.name == "tiny"
    with pytest.raises(ConfigError, match="unknown form 'onnx'; the forms are neutral, torch"):
        convert(neutral, tmp_path / "x", "onnx")
    fewer = {name: value for name, value in arrays.items() if name != "head.bias"}
    with pytest.raises(ParameterError, match=r"1 missing: head\.bias"):
        save(tmp_path / "x", nfnet.options("tiny"), fewer)
    mine = nfnet.Variant("mine", (1, 1), 0.0, 8, 8, (16, 16), 8, 2)
    with pytest.raises(ConfigError, match="'mine' is not one of F0"):
        save(tmp_path / "x", nfnet.options(mine), nfnet.seeded_parameters(mine))
    assert not (tmp_path / "x").exists()


def test_targets_that_cannot_be(tmp_path, neutral, arrays, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen, before = nfnet.options("tiny"), folder(neutral)
    for place in (".", "..", "", str(tmp_path)):
        with pytest.raises(IsADirectoryError, match="name a file in it: "):
            save(place, chosen, arrays)
        with pytest.raises(IsADirectoryError, match="name a file in it: "):
            convert(neutral, place, "torch")
    with pytest.raises(FileNotFoundError, match=r"make its folder first: 'none/x'"):
        save("none/x", chosen, arrays)
    assert main(["convert", str(neutral), ".", "--to", "torch"]) == 2
    assert "Is a directory, name a file in it: '.'" in capsys.readouterr().err
    assert main(["convert", str(neutral), "none/x", "--to", "torch"]) == 2
    assert capsys.readouterr().err.endswith("make its folder first: 'none/x'\n")
    assert folder(neutral) == before


# --- Memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """F0 in float16: 143 MB, whose largest tensor has 9.4 MB."""
    path = tmp_path_factory.mktemp("large") / "neutral"
    zeros = {spec.name: np.zeros(spec.shape, "float16") for spec in nfnet.parameters("F0")}
    save(path, nfnet.options("F0"), zeros)
    return path


def peak(function, *arguments):
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_conversion_holds_a_tensor_or_two_at_a_time(large, tmp_path):
    largest = 2 * 1536 * 3072
    assert large.stat().st_size > 15 * largest
    assert peak(convert, large, tmp_path / "timm", "timm") < 4 * largest
    assert peak(convert, tmp_path / "timm", tmp_path / "haiku", "haiku") < 4 * largest
    (tmp_path / "timm").unlink()
    assert peak(convert, tmp_path / "haiku", tmp_path / "torch", "torch") < 4 * largest
    assert (tmp_path / "torch").stat().st_size == pytest.approx(large.stat().st_size, rel=1e-3)


def test_pickles_take_the_memory_of_one_file(large, tmp_path):
    specs = nfnet.parameters("F0")
    tree = haiku_tree((spec.haiku, np.zeros(spec.shape, "float16")) for spec in specs)
    with (tmp_path / "pickle").open("wb") as file:
        pickle.dump(tree, file)
    del tree
    size = (tmp_path / "pickle").stat().st_size
    assert peak(convert, tmp_path / "pickle", tmp_path / "torch", "torch") < 1.3 * size


# --- The command


def test_command(tmp_path, neutral, capsys):
    assert main(["convert", str(neutral), str(tmp_path / "a.npz"), "--to", "haiku"]) == 0
    out, err = capsys.readouterr()
    assert (
        "a.npz: haiku weights of NFNet-tiny, 10 classes, 233 tensors, 1.3 MB, from neutral" in out
    )
    assert err == ""
    write_safetensors(tmp_path / "bare", load_file(neutral))
    command = ["convert", str(tmp_path / "bare"), str(tmp_path / "b"), "--to", "torch"]
    assert main([*command, "--activation", "gelu_erf"]) == 0
    assert (
        "does not say how it was trained; taken for activation=gelu_erf" in capsys.readouterr().err
    )
    assert main([*command, "--activation", "gelu_erf", "--ws-eps", "timm"]) == 0
    assert capsys.readouterr().err == ""
    assert load(tmp_path / "b")[0].activation == "gelu_erf"
    assert main([*command, "--activation", "mish"]) == 2
    assert "agc: unknown activation 'mish'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "c"), "--to", "torch"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["convert", str(neutral), str(tmp_path / "no" / "c"), "--to", "torch"]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["safetensors", "rich"])
def test_missing_packages_name_the_extra(tmp_path, neutral, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["convert", str(neutral), str(tmp_path / "x"), "--to", "torch"]) == 2
    err = capsys.readouterr().err
    assert f"needs {package}, which cannot be imported" in err
    assert 'pip install "agc-sam[weights]"' in err
    assert not (tmp_path / "x").exists()


# --- DeepMind's files


@pytest.fixture
def flat_mapping(monkeypatch):
    """A class that is pickled by the name of Haiku's, as Haiku's is: called with a dictionary."""
    module = types.ModuleType("haiku._src.data_structures")

    class FlatMapping:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return FlatMapping, (self.data,)

    FlatMapping.__module__, FlatMapping.__qualname__ = module.__name__, "FlatMapping"
    module.FlatMapping = FlatMapping
    for name in ("haiku", "haiku._src"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return FlatMapping


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("mapping", ["dict", "FlatMapping"])
def test_released_files(tmp_path, neutral, arrays, flat_mapping, mapping, protocol):
    make = dict if mapping == "dict" else flat_mapping
    tree = haiku_tree((spec.haiku, arrays[spec.name]) for spec in nfnet.parameters("tiny"))
    tree = make({module: make(leaves) for module, leaves in tree.items()})
    back = tmp_path / "back"
    path = tmp_path / "F0_haiku.npz"  # npz is what these pickles are called
    path.write_bytes(pickle.dumps(tree, protocol))
    found = convert(path, back, "neutral")
    assert (found.form, found.complete) == ("haiku", False)
    assert back.read_bytes() == neutral.read_bytes()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"F0_haiku\.npz: truncated"):
        convert(path, back, "neutral")
    assert back.read_bytes() == neutral.read_bytes()


def test_only_regular_files_are_replaced(tmp_path, neutral, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["convert", str(neutral), str(pipe), "--to", "torch"]) == 2
    assert (
        f"a pipe, which is never replaced; name a regular file: '{pipe}'" in capsys.readouterr().err
    )
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_is_no_source(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    command = ["convert", str(tmp_path / "pipe"), str(tmp_path / "x"), "--to", "torch"]
    assert main(command) == 2
    assert "a pipe, which cannot be read twice; save it as a regular" in capsys.readouterr().err


def test_a_link_is_followed_and_named(tmp_path, neutral, capsys):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to("target")
    assert main(["convert", str(neutral), str(link), "--to", "torch"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}, which {link} links to: torch weights of")
    assert link.is_symlink()
    assert guess_form(target) == "torch"


def guess_form(path):
    with open_weights(path) as weights:
        return weights.form
