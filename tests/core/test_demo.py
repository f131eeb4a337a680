"""The demo without a framework: its data, its schedule, its bookkeeping and what it writes."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from agc.cli import demo, main
from agc.errors import ConfigError
from agc.nfnet import parameters


def fake(initial, batches, rates, clipping, test):
    """Diverges at once without clipping, else reports the clipping as accuracy."""
    for rate, (images, labels) in zip(rates, batches, strict=True):
        assert images.shape == (len(labels), 32, 32, 3)
        if clipping is None and rate > 0:
            yield math.nan, 0.0
            return
        yield 2.0, 0.25
    yield 10 * clipping, 0.0


@pytest.fixture
def frameworks(monkeypatch):
    """Return a function that lets every framework train as a function does."""

    def train_by(train):
        framework = SimpleNamespace(train=train)
        monkeypatch.setattr(demo, "load_framework", lambda *_: framework)

    return train_by


def test_gratings_can_be_told_by_their_orientation():
    images, labels = demo.gratings(np.random.default_rng(0), 400)
    assert images.shape == (400, 32, 32, 3)
    assert images.dtype == np.float32
    assert set(labels) == set(range(demo.CLASSES))
    # Energy of the two-dimensional spectrum at six cycles in each orientation; the labels must
    # stand out.
    angle = np.pi * np.arange(demo.CLASSES) / demo.CLASSES
    place = np.stack(np.meshgrid(*2 * [np.arange(32) / 32], indexing="ij"))
    wave = np.exp(2j * np.pi * 6 * np.einsum("pa,pyx->ayx", [np.sin(angle), np.cos(angle)], place))
    energy = (np.abs(np.einsum("nyxc,ayx->nca", images, wave)) ** 2).sum(1)
    assert (energy.argmax(1) == labels).mean() > 0.8


def test_learning_rates():
    rates = demo.learning_rates(0.8, 100)
    assert rates[0] == 0
    assert rates[4] == pytest.approx(0.64)
    assert max(rates) == rates[5] == 0.8
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.001
    assert len(demo.learning_rates(0.1, 1)) == 1


def test_initial_values():
    arrays = demo.initial_values(3)
    specs = {spec.name: spec for spec in parameters("tiny")}
    assert arrays.keys() == specs.keys()
    assert arrays["stages.0.0.skip_gain"] == 0
    conv = arrays["stages.3.0.conv1.weight"]
    assert conv.std() * math.sqrt(specs["stages.3.0.conv1.weight"].fan_in) == pytest.approx(1, 0.05)
    se = arrays["stages.3.0.se.fc0.weight"]
    bound = specs["stages.3.0.se.fc0.weight"].fan_in ** -0.5
    assert np.abs(se).max() <= 2 * bound * (1 + 1e-6)
    assert se.std() == pytest.approx(0.88 * bound, 0.02)
    assert (demo.initial_values(4)["head.weight"] != arrays["head.weight"]).all()


def test_runs():
    experiment = demo.Experiment(clippings=(None, 0.08), rates=(0.1, 0.2), seeds=2, steps=4)
    runs = demo.run(experiment, SimpleNamespace(train=fake), Console(quiet=True))
    assert len(runs) == 8
    assert {run.diverged for run in runs if run.clipping is None} == {True}
    clipped = [run for run in runs if run.clipping == 0.08]
    assert {(run.accuracy, run.clipped, run.losses) for run in clipped} == {(0.8, 0.25, (2.0,) * 4)}
    text = io.StringIO()
    Console(width=80, file=text).print(demo.table(experiment, runs))
    assert "10.0 (2 diverged)" in text.getvalue()
    assert "80.0" in text.getvalue()


def test_command(frameworks, tmp_path, capsys):
    frameworks(fake)
    out = tmp_path / "picture.svg"
    given = ["demo", "--clippings", "none", "0.08", "--rates", "0.1", "0.2", "--steps", "3"]
    assert main([*given, "--seeds", "1", "--out", str(out)]) == 0
    assert "diverged" in out.read_text()
    data = json.loads(out.with_suffix(".json").read_text())
    assert [run["clipping"] for run in data["runs"]] == [None, None, 0.08, 0.08]
    assert data["runs"][0]["losses"][-1] is None
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".svg"]
    assert "written:" in capsys.readouterr().out


def test_bad_input(capsys, tmp_path):
    with pytest.raises(ConfigError, match="seeds must be an integer >= 1, got 0"):
        demo.Experiment(seeds=0)
    with pytest.raises(ConfigError, match=r"batch must be an integer >= 1, got 1\.5"):
        demo.Experiment(batch=1.5)
    with pytest.raises(ConfigError, match="rates must name at least one number"):
        demo.Experiment(rates=())
    assert main(["demo", "--steps", "0", "--out", str(tmp_path / "x.svg")]) == 2
    assert "steps must be an integer >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("clipping", [0.0, -0.01, math.nan, math.inf])
def test_bad_clippings(clipping):
    with pytest.raises(ConfigError, match=f"clippings must be none, or .*> 0, got {clipping}"):
        demo.Experiment(clippings=(None, clipping))


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
def test_bad_rates(rate):
    with pytest.raises(ConfigError, match=f"rates must be finite and >= 0, got {rate}"):
        demo.Experiment(rates=(0.1, rate))
    assert demo.Experiment(rates=(0.0,)).rates == (0.0,)


@pytest.fixture
def untrained(frameworks):
    """A framework that must not be asked to train."""

    def train(*_):
        raise AssertionError("trained")

    frameworks(train)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.svg", "--out: .*No such file or directory, make its folder first: .*x.svg"),
        ("folder", "--out: .*Is a directory, name a file in it: .*folder"),
        (".", "--out: .*Is a directory, name a file in it: "),
        ("taken.svg", "--out: .*Is a directory, name a file in it: .*taken.json"),
        ("locked/x.svg", "--out: .*Permission denied, choose a folder .*: .*locked/x.svg'$"),
        ("x.json", r"--out: .*x.json cannot be drawn; .* in .svg, .png, .pdf"),
        ("x.tiff", r"--out: .*x.tiff cannot be drawn; .* in .svg, .png, .pdf"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, monkeypatch, capsys, untrained, out, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("locked"))
    for name in ("folder", "locked", "taken.json"):
        (tmp_path / name).mkdir()
    assert main(["demo", "--out", out]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys, untrained):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(tmp_path / "x.svg")]) == 2
    err = capsys.readouterr().err
    assert "agc demo needs matplotlib" in err
    assert 'pip install "agc-sam[demo]"' in err


SHORT = ["demo", "--clippings", "0.08", "--rates", "0.1", "--steps", "3", "--seeds", "1"]


@pytest.mark.parametrize("name", ["x", "x.svg", "x.PNG", "x.pdf"])
def test_pictures(frameworks, tmp_path, name):
    frameworks(fake)
    assert main([*SHORT, "--out", str(tmp_path / name)]) == 0
    start = (tmp_path / name).read_bytes()[:5]
    assert start == {".PNG": b"\x89PNG\r", ".pdf": b"%PDF-"}.get(Path(name).suffix, b"<?xml")


def test_a_folder_that_is_lost_meanwhile(frameworks, tmp_path, capsys):
    place = tmp_path / "place"
    place.mkdir()

    def train(*given):
        if place.exists():
            place.rmdir()
        return fake(*given)

    frameworks(train)
    assert main([*SHORT, "--out", str(place / "x.svg")]) == 2
    assert re.search(r"No such file .*place/x\.json'$", capsys.readouterr().err)


def test_a_folder_that_is_locked_meanwhile_is_reported_by_the_name_of_the_file(
    monkeypatch, frameworks, tmp_path, capsys
):
    def deny(path, _):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    frameworks(fake)
    monkeypatch.setattr(Path, "replace", deny)
    assert main([*SHORT, "--out", str(tmp_path / "x.svg")]) == 2
    assert re.search(r"Permission denied: .*/x\.json'$", capsys.readouterr().err)


def test_numbers_survive_a_picture_that_fails(monkeypatch, frameworks, tmp_path):
    def draw(*_):
        raise RuntimeError("no ink")

    frameworks(fake)
    monkeypatch.setattr(demo, "draw", draw)
    with pytest.raises(RuntimeError, match="no ink"):
        main([*SHORT, "--out", str(tmp_path / "x.svg")])
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_framework_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "agc_torch.commands", None)
    assert main(["demo", "--framework", "torch"]) == 2
    assert 'pip install "agc-sam[torch,demo]"' in capsys.readouterr().err
