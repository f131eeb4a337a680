"""Weights in PyTorch's files, in timm's own model, and in the command that classifies
photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.optim.swa_utils import AveragedModel

import agc_torch
from agc import nfnet as core
from agc.cli import main
from agc.errors import FormatError, MissingPackageError
from agc.weights import FORMS, convert, load, save
from tests.contract.convert import ConvertContract
from tests.helpers import close, relative
from tests.torch.driver import TorchDriver

GAMMA = core.GAMMAS["relu"]
CHINA, FLOWER = load_sample_images().images


class TestConvert(ConvertContract):
    driver = TorchDriver()
    form = "torch"
    backend = "torch"
    read = ("neutral", "timm", "haiku")
    digits = 1e-6


def test_state_dict(tmp_path, neutral, arrays):
    convert(neutral, tmp_path / "torch", "torch")
    model = agc_torch.nfnet("tiny")
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "torch"), strict=True)
    found = agc_torch.to_neutral(model)
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_a_state_dict_without_our_metadata(tmp_path):
    model = agc_torch.nfnet("tiny", num_classes=3)
    found = agc_torch.to_neutral(model)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state")
    convert(tmp_path / "state", tmp_path / "back", "neutral")
    read = load(tmp_path / "back")[1]
    assert all(np.array_equal(value, found[name]) for name, value in read.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_torch_save(tmp_path, arrays, zipped, key, dtype):
    model = agc_torch.nfnet("tiny", dtype=dtype)
    agc_torch.from_neutral(model, arrays)
    state = model.state_dict()
    path = tmp_path / "model.pth"
    torch.save(
        state if key is None else {key: state, "epoch": 3},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    assert convert(path, tmp_path / "back", "torch").form == "torch"
    found = safetensors.torch.load_file(tmp_path / "back")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert {value.dtype for value in found.values()} == {dtype}


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_other_files(tmp_path, zipped):
    model, path = agc_torch.nfnet("tiny"), tmp_path / "model.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(FormatError, match=r"model\.pth: (truncated|PyTorch cannot read it)"):
        convert(path, tmp_path / "x", "neutral")
    torch.save([1, 2], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="holds a list, not a state dict"):
        convert(path, tmp_path / "x", "neutral")
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="a is a int, not a tensor"):
        convert(path, tmp_path / "x", "neutral")
    assert not (tmp_path / "x").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"{sys.executable} -c \"open('{self.marker}', 'w')\"",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_files_execute_nothing(tmp_path, zipped):
    marker, path = tmp_path / "executed", tmp_path / "model.pth"
    torch.save({"head.bias": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match="which runs nothing"):
        convert(path, tmp_path / "x", "neutral")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have been executed
    assert marker.exists()


def test_a_pytorch_that_is_not_safe_is_not_used(tmp_path, monkeypatch):
    state, path = agc_torch.nfnet("tiny").state_dict(), tmp_path / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(MissingPackageError, match=r"PyTorch 2\.5\.1\+cpu .* install PyTorch 2\.6"):
        convert(tmp_path / "model.pth", tmp_path / "x", "neutral")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = agc_torch.nfnet("tiny")


def test_checkpoints_with_more_than_weights(tmp_path):
    """As timm and the like have them: raw and averaged weights, optimizer, arguments."""
    torch.manual_seed(0)
    model, path = Model(), tmp_path / "model_best.pth.tar"
    average = AveragedModel(model)
    with torch.no_grad():
        model.net.head.bias += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step(lambda: model.net(torch.ones(1, 3, 32, 32)).sum().backward())
    with torch.no_grad():
        kernel = model.net.final_conv.weight  # its numbers lie in another order, behind others
        kernel.set_(torch.cat([torch.zeros(7, *kernel.shape[1:]), kernel]).mT.mT[7:])
    checkpoint = {
        "epoch": 3,
        "arch": "nfnet",
        "state_dict": model.state_dict(),
        "state_dict_ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, output=Path("x"), device=torch.device("cpu")),
        "metric": np.float64(0.5),
    }
    torch.save(checkpoint, path)
    raw, ema = (
        {name: value.detach().clone() for name, value in each.state_dict().items()}
        for each in (model.net, average.module.net)
    )
    both = r"raw weights \(state_dict\.net\) and averaged ones \(state_dict_ema\.module\.net\)"
    with pytest.raises(FormatError, match=both):
        convert(path, tmp_path / "x", "torch")
    for which, state in (("raw", raw), ("ema", ema)):
        found = convert(path, tmp_path / "x", "torch", weights=which)
        assert "does not say how it was trained" in found.notes[-1]
        read = safetensors.torch.load_file(tmp_path / "x")
        assert all(torch.equal(read[name], value) for name, value in state.items())
    assert not torch.equal(raw["head.bias"], ema["head.bias"])
    torch.save({"model": Model(), "epoch": 3}, path)
    with pytest.raises(FormatError, match=r"asks for tests\.torch\.test_convert\.Model\. If you"):
        convert(path, tmp_path / "x", "torch")


TIMM = """
# What timm imports at the start and its NFNets never use.
import importlib.abc, importlib.machinery, sys, types

class Named(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name

class Stub(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torchvision", "yaml", "huggingface_hub"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Stub(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())

import os, safetensors.torch, torch
from timm.models.nfnet import NfCfg, NormFreeNet, dm_nfnet_f0

os.chdir(sys.argv[1])
given = safetensors.torch.load_file("images")
theirs = dm_nfnet_f0().eval()
theirs.load_state_dict(safetensors.torch.load_file("F0"), strict=True)
with torch.inference_mode():
    logits = theirs(given["F0"])
safetensors.torch.save_file(theirs.state_dict() | {"logits": logits}, "F0-back")

resnet = NormFreeNet(
    NfCfg(
        (1, 2, 1), (32, 64, 128), stem_type="7x7_pool", stem_chs=8, bottle_ratio=0.25,
        skipinit=True, act_layer="relu",
    ),
    num_classes=10,
).double()
for stage in resnet.stages:
    for block in stage:
        if block.downsample is not None and block.conv2.stride[0] > 1:
            block.downsample.pool = torch.nn.AvgPool2d(1, 2)  # DeepMind's have a stride
resnet.load_state_dict(safetensors.torch.load_file("resnet"), strict=True)
logits = resnet(given["resnet"])
logits.square().sum().backward()
found = {name: p.grad for name, p in resnet.named_parameters()}
safetensors.torch.save_file(found | {"logits": logits.detach()}, "resnet-back")
"""


def images(*sizes: int) -> torch.Tensor:
    return torch.from_numpy(core.seeded_batch(*sizes)[0]).permute(0, 3, 1, 2).contiguous()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(dict(tensors), path)


def timms_name(spec: core.ParameterSpec) -> str:
    return FORMS["timm"].rename(spec).replace("stem.conv1", "stem.conv")


def factor(name: str) -> float:
    """Return timm's number by ours, which scale weights instead of activations.

    All convolutions have the constant of the activation before them but the first, which has one
    too many, and the classifier has one too few.
    """
    return {"stem.conv0.gain": 1 / GAMMA, "head.weight": GAMMA}.get(name, 1.0)


def resnet_of_timm() -> dict[str, torch.Tensor]:
    """Return the seeded weights of an NF-ResNet as timm's would have them."""
    values = core.seeded_parameters("NF-ResNet-tiny")
    found = {}
    for spec in core.parameters("NF-ResNet-tiny"):
        encoded = np.ascontiguousarray(FORMS["timm"].encode(spec, values[spec.name]))
        found[timms_name(spec)] = torch.from_numpy(encoded) * factor(spec.name)
    return found


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """Let timm load seeded weights and compute; return the folder with its answers."""
    folder = tmp_path_factory.mktemp("timm")
    values = {name: a.astype("float32") for name, a in core.seeded_parameters("F0").items()}
    chosen = core.options("F0", activation="gelu_erf", ws_eps="timm")
    save(folder / "F0", chosen, values, "timm")
    save_tensors(folder / "resnet", resnet_of_timm())
    save_tensors(folder / "images", {"F0": images(1, 64).float(), "resnet": images(2, 33)})
    command = [sys.executable, "-c", TIMM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_timms_own_model(timm, tmp_path):
    """F0 goes into timm's dm_nfnet_f0 and comes back, and gives the same logits there."""
    model = agc_torch.nfnet("F0", activation="gelu_erf", ws_eps="timm").eval()
    values = {name: a.astype("float32") for name, a in core.seeded_parameters("F0").items()}
    agc_torch.from_neutral(model, values)
    with torch.inference_mode():
        ours = model(images(1, 64).float())
    back = safetensors.torch.load_file(timm / "F0-back")
    theirs = back.pop("logits")
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    save_tensors(tmp_path / "state", back)
    found = convert(tmp_path / "state", tmp_path / "back", "neutral")
    assert (found.form, found.options.variant.name) == ("timm", "F0")
    for name, value in load(tmp_path / "back")[1].items():
        assert value.tobytes() == values[name].tobytes()


def test_timms_resnet_where_it_is_the_same(timm):
    """Outputs and gradients, on images whose sides are odd at every stride, where SAME is symmetric
    padding.
    """
    model = agc_torch.nfnet("NF-ResNet-tiny", ws_eps="timm", dtype=torch.float64).eval()
    agc_torch.from_neutral(model, core.seeded_parameters("NF-ResNet-tiny"))
    logits = model(images(2, 33))
    logits.square().sum().backward()
    theirs = safetensors.torch.load_file(timm / "resnet-back")
    close(logits.detach().numpy(), theirs["logits"].numpy(), 1e-12)
    ours = dict(model.named_parameters())
    for spec in core.parameters("NF-ResNet-tiny"):
        gradient = factor(spec.name) * theirs[timms_name(spec)]
        own = ours[spec.name].grad
        assert relative(own.numpy(), gradient.reshape(own.shape).numpy()) < 1e-10, spec.name


# --- agc classify


@pytest.fixture
def photographs(tmp_path):
    found = []
    for name, image in (("china", CHINA), ("flower", FLOWER)):
        path = tmp_path / f"{name}.png"
        Image.fromarray(image).save(path)
        found.append(str(path))
    return found


def test_classify_with_what_the_file_does_not_say(tmp_path, arrays, photographs, capsys):
    chosen = core.options("tiny", activation="silu", ws_eps="timm")
    save(tmp_path / "said", chosen, arrays)
    bare = {name: torch.from_numpy(value) for name, value in arrays.items()}
    safetensors.torch.save_file(bare, tmp_path / "bare")
    answers = []
    for more in (["said"], ["bare", "--activation", "silu", "--ws-eps", "timm"], ["bare"]):
        command = ["classify", photographs[0], "--backend", "torch", "--json", "--weights"]
        assert main([*command, str(tmp_path / more[0]), *more[1:]]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"])
    assert answers[0] == answers[1] != answers[2]


def test_classify_says_that_weights_are_random(photographs, capsys):
    command = ["classify", *photographs, "--weights", "random", "--backend", "torch"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "THE WEIGHTS ARE RANDOM" in out
    assert out.count("%") == 10


def test_classify_says_that_weights_are_untrained(tmp_path, photographs, capsys):
    model = agc_torch.nfnet("tiny")
    save(tmp_path / "new", model.options, agc_torch.to_neutral(model))
    command = ["classify", *photographs, "--weights", str(tmp_path / "new"), "--backend", "torch"]
    assert main(command) == 0
    assert "THE WEIGHTS LOOK UNTRAINED" in capsys.readouterr().out


def test_commands_of_the_documentation(tmp_path, neutral, arrays, monkeypatch, capsys):
    """The lines of docs/weights.md that start with agc, on small files of the same names."""
    monkeypatch.chdir(tmp_path)
    tree: dict[str, dict[str, np.ndarray]] = {}
    for spec in core.parameters("tiny"):
        module, _, name = spec.haiku.rpartition("/")
        tree.setdefault(module, {})[name] = arrays[spec.name]
    (tmp_path / "F0_haiku.npz").write_bytes(pickle.dumps(tree))
    for name, image in (("china", CHINA), ("flower", FLOWER)):
        Image.fromarray(image).save(tmp_path / f"{name}.jpg")
    state = agc_torch.nfnet("tiny").state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state}, "model_best.pth.tar")
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    lines = re.findall(r"^agc (.*)", text, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        assert main(shlex.split(line, comments=True)) == 0
    assert "flower.jpg" in capsys.readouterr().out
    convert("F0_torch.safetensors", "back", "neutral")
    assert (tmp_path / "back").read_bytes() == neutral.read_bytes()


def test_pickles_of_other_programs_are_not_torch_files(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({"m": {"w": torch.zeros(2)}}))
    with pytest.raises(FormatError, match=r"asks for torch\."):
        convert(tmp_path / "x", tmp_path / "y", "neutral")
