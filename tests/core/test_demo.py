"""The demo and its experiment without a framework: bookkeeping, messages, and what is written."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from agc.cli import demo, experiments, main
from agc.errors import ConfigError
from agc.recipe import load_recipe
from agc.training import Hosts, Metrics, Totals, step_of


class Fake:
    """Diverges without clipping, else classifies as many images right as the threshold says."""

    def __init__(self):
        self.facts, self.hosts, self.clipping = {"framework": "none"}, Hosts(), 0.05

    def load(self, state):
        self.now = state

    def state(self):
        return self.now

    def step(self, batch, numbers):
        self.now = replace(self.now, step=self.now.step + 1)
        self.clipping = numbers.clipping.get("*")
        loss = math.nan if self.clipping is None and numbers.rate > 0 else 2.0
        return Metrics(loss=loss, units=4, clipped=1)

    def evaluate(self, batches, weights):
        images = sum(int(batch.weight.sum()) for batch in batches)
        return Totals(images, round(10 * float(self.clipping) * images), images, images)


FAKE = SimpleNamespace(trainer=lambda recipe, launch: Fake())


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(demo, "load_framework", lambda *_: FAKE)


def test_experiment(tmp_path):
    plan = demo.experiment((None, 0.08), (0.1,), seeds=2, steps=3, batch=16)
    recipe = plan.cells()[1].recipe
    assert (recipe.agc.clipping, recipe.peak, recipe.steps) == (0.08, 0.1, 3)
    quiet = Console(quiet=True)
    assert experiments.run(plan, "fake", FAKE, tmp_path, quiet)
    found = experiments.results(plan, "fake", tmp_path)
    assert len(found) == 4
    assert {result.diverged for result in found if result.row == "none"} == {True}
    clipped = {(r.accuracy, r.clipped, r.losses) for r in found if r.row == "0.08"}
    assert clipped == {(238 / 297, 0.25, (2.0,) * 3)}
    text = io.StringIO()
    Console(width=80, file=text).print(experiments.table(plan, found))
    assert "10.0 (2 diverged)" in text.getvalue()
    assert "80.1" in text.getvalue()
    # What is finished is not made again; of what is not, only that is made.
    folders = sorted(tmp_path.iterdir())
    assert {path.name for folder in folders for path in folder.iterdir()} == {"log.jsonl"}
    (folders[0] / "log.jsonl").unlink()
    before = [(folder / "log.jsonl").stat().st_mtime_ns for folder in folders[1:]]
    assert not experiments.run(plan, "fake", FAKE, tmp_path, quiet, stop=lambda: True)
    assert len(experiments.results(plan, "fake", tmp_path)) == 3
    assert experiments.run(plan, "fake", FAKE, tmp_path, quiet)
    assert experiments.results(plan, "fake", tmp_path)[0].losses == found[0].losses
    assert [(folder / "log.jsonl").stat().st_mtime_ns for folder in folders[1:]] == before


def test_recipes_with_the_same_step():
    plain, other = (
        load_recipe("digits-mini", changes)
        for changes in (
            [],
            [
                "seed=1",
                "agc.clipping=0.1",
                "optimizer.rate.base=1",
                "ema.decay=0.5",
                "train.epochs=3",
            ],
        )
    )
    assert step_of(plain) == step_of(other) != step_of(load_recipe("digits-mini", ["agc="]))
    drawn = [load_recipe("digits-mini", ["train.masks=[]", f"seed={n}"]) for n in range(2)]
    assert step_of(drawn[0]) != step_of(drawn[1])


def test_command(fake, tmp_path, capsys):
    out = tmp_path / "picture.svg"
    given = ["demo", "--clippings", "none", "0.08", "--rates", "0.1", "0.2"]
    assert main([*given, *TINY, "--out", str(out)]) == 0
    assert "diverged" in out.read_text()
    data = json.loads(out.with_suffix(".json").read_text())
    assert [run["row"] for run in data["results"]] == ["none", "none", "0.08", "0.08"]
    assert data["results"][0]["losses"][-1] is None
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".svg"]
    assert "written:" in capsys.readouterr().out


def test_bad_input(capsys, tmp_path):
    with pytest.raises(ConfigError, match="seeds must be an integer >= 1, got 0"):
        demo.experiment(seeds=0)
    with pytest.raises(ConfigError, match=r"batch must be an integer >= 1, got 1\.5"):
        demo.experiment(batch=1.5)
    with pytest.raises(ConfigError, match="rates must name at least one number"):
        demo.experiment(rates=())
    assert main(["demo", "--steps", "0", "--out", str(tmp_path / "x.svg")]) == 2
    assert "steps must be an integer >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("clipping", [0.0, -0.01, math.nan, math.inf])
def test_bad_clippings(clipping):
    with pytest.raises(ConfigError, match=f"clippings must be none, or .*> 0, got {clipping}"):
        demo.experiment(clippings=(None, clipping))


@pytest.mark.parametrize("rate", [-0.1, 0.0, math.nan, math.inf])
def test_bad_rates(rate):
    with pytest.raises(ConfigError, match=f"rates must be finite and > 0, got {rate}"):
        demo.experiment(rates=(0.1, rate))


@pytest.fixture
def untrained(monkeypatch):
    """A framework that must not be asked to train."""
    monkeypatch.setattr(demo, "load_framework", lambda *_: SimpleNamespace())


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


TINY = ["--steps", "3", "--seeds", "1", "--batch", "16"]
SHORT = ["demo", "--clippings", "0.08", "--rates", "0.1", *TINY]


@pytest.mark.parametrize("name", ["x", "x.svg", "x.PNG", "x.pdf"])
def test_pictures(fake, tmp_path, name):
    assert main([*SHORT, "--out", str(tmp_path / name)]) == 0
    start = (tmp_path / name).read_bytes()[:5]
    assert start == {".PNG": b"\x89PNG\r", ".pdf": b"%PDF-"}.get(Path(name).suffix, b"<?xml")


def test_a_folder_that_is_lost_meanwhile(monkeypatch, tmp_path, capsys):
    place = tmp_path / "place"
    place.mkdir()

    def trainer(*_):
        place.rmdir()
        return Fake()

    monkeypatch.setattr(demo, "load_framework", lambda *_: SimpleNamespace(trainer=trainer))
    assert main([*SHORT, "--out", str(place / "x.svg")]) == 2
    assert re.search(r"No such file .*place/x\.json'$", capsys.readouterr().err)


def test_a_folder_that_is_locked_meanwhile_is_reported_by_the_name_of_the_file(
    monkeypatch, fake, tmp_path, capsys
):
    rename = Path.replace

    def deny(path, target):
        if Path(target).parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", deny)
    assert main([*SHORT, "--out", str(tmp_path / "x.svg")]) == 2
    assert re.search(r"Permission denied: .*/x\.json'$", capsys.readouterr().err)


def test_numbers_survive_a_picture_that_fails(monkeypatch, fake, tmp_path):
    def draw(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(demo, "draw", draw)
    with pytest.raises(RuntimeError, match="no ink"):
        main([*SHORT, "--out", str(tmp_path / "x.svg")])
    assert len(json.loads((tmp_path / "x.json").read_text())["results"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_framework_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "agc_torch.commands", None)
    assert main(["demo", "--framework", "torch"]) == 2
    assert 'pip install "agc-sam[torch,demo]"' in capsys.readouterr().err
