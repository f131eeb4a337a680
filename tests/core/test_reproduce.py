"""``agc reproduce``: the declarations are recipes, and a run that was stopped goes on."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest

from agc.cli import main, reproduce
from agc.cli.experiments import Axis, Experiment
from agc.cli.reproduce import EXPERIMENTS
from tests.core.test_demo import Fake

TINY = ["train.epochs=", "train.steps=2", "train.batch=8", "schedule.warmup_epochs=", "ema="]
ROWS = Axis("clipping", {"none": ["agc="], "0.05": ["agc.clipping=0.05"]})


@pytest.fixture
def made(monkeypatch):
    """Experiments of two runs; return the steps that were made, by framework."""
    made = []

    def load_framework(name, *_):
        class Trainer(Fake):
            def step(self, batch, numbers):
                made.append(name)
                return super().step(batch, numbers)

        return SimpleNamespace(trainer=lambda recipe, launch: Trainer())

    monkeypatch.setattr(reproduce, "load_framework", load_framework)
    columns = Axis("batch", {"8": []})
    tiny = Experiment(recipe="digits-mini", changes=TINY, rows=ROWS, columns=columns, seeds=1)
    monkeypatch.setitem(EXPERIMENTS, "head", tiny)
    portable = Experiment(
        recipe="digits-mini", changes=TINY, rows=reproduce._FRAMEWORKS, columns=columns, seeds=1
    )
    monkeypatch.setitem(EXPERIMENTS, "portability", portable)
    return made


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_declarations_are_recipes(name):
    cells = reproduce._for(EXPERIMENTS[name], ["torch"]).cells()
    assert {cell.seed for cell in cells} == set(range(EXPERIMENTS[name].seeds))
    # No training is like another, but where there is no threshold to choose.
    ids = {cell.recipe.id for cell in cells if cell.row != "none"}
    assert len(ids) == sum(cell.row != "none" for cell in cells)
    assert all(cell.recipe.evaluate.every_steps == cell.recipe.steps for cell in cells)


def test_a_run_that_was_stopped_goes_on(made, tmp_path, monkeypatch, capsys):
    command = ["reproduce", "head", "--out", str(tmp_path)]
    evaluate = Fake.evaluate

    def stopped(self, batches, weights):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, batches, weights)

    monkeypatch.setattr(Fake, "evaluate", stopped)
    assert main(command) == 75
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(Fake, "evaluate", evaluate)
    assert main(command) == 0
    assert len(made) == 4  # no step was made twice
    assert "10.0 (1 diverged)" in capsys.readouterr().out
    data = json.loads((tmp_path / "head" / "results.json").read_text())
    assert [run["diverged"] for run in data["results"]] == [True, False]
    assert "diverged" in (tmp_path / "head" / "figure.svg").read_text()
    assert main(command) == 0
    assert len(made) == 4


def test_rows_of_frameworks(made, tmp_path, capsys):
    for name in ("jax", "torch"):
        assert main(["reproduce", "portability", "--framework", name, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "largest relative difference of a loss: 0.0e+00" in out
    assert made == ["jax", "jax", "torch", "torch"]
    data = json.loads((tmp_path / "portability" / "results.json").read_text())
    assert [run["framework"] for run in data["results"]] == ["jax", "torch"]
