"""``agc reproduce``: the declarations are recipes, and a run that was stopped goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from agc.cli import main, reproduce
from agc.cli.experiments import Axis, Experiment
from agc.cli.reproduce import EXPERIMENTS
from tests.core.test_demo import Fake

DOCS = Path(__file__).parents[2] / "docs"
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


def test_rows_with_thresholds_of_their_own():
    plan = EXPERIMENTS["clippers"]
    found = {(c.row, c.column): c.recipe for c in plan.cells()}
    none, unit, tensor, norm, lars = (
        [found[row, column] for column in plan.columns.changes] for row in plan.rows.changes
    )
    assert {(recipe.agc, recipe.optimizer.max_norm) for recipe in none} == {(None, None)}
    for row in (unit, tensor):
        assert [recipe.agc.clipping for recipe in row] == [0.04, 0.01, 0.0025]
    assert {recipe.agc.granularity for recipe in tensor} == {"tensor"}
    assert [recipe.optimizer.max_norm for recipe in norm] == [0.4, 0.1, 0.025]
    assert {recipe.agc for recipe in norm} == {None}
    # LARS moves a weight as far as AGC by tensor moves one that it clips, and decays it as much.
    for ours, other in zip(lars, tensor, strict=True):
        assert ours.agc.exclude == ()
        assert ours.agc.clipping < 1e-10
        assert ours.peak * ours.agc.clipping == pytest.approx(other.peak * other.agc.clipping)
        decays = [recipe.peak * recipe.optimizer.weight_decay for recipe in (ours, other)]
        assert decays[0] == pytest.approx(decays[1])


def test_the_run_in_the_documentation_is_of_this_experiment():
    """The table in docs/reproduce.md has the means of the results, and those are of its recipes."""
    plan = EXPERIMENTS["clippers"]
    data = json.loads((DOCS / "figures" / "clippers.json").read_text(encoding="utf-8"))
    runs = {(run["row"], run["column"], run["seed"]): run for run in data["results"]}
    ids = {(c.row, c.column, c.seed): c.recipe.id for c in plan.cells()}
    assert {key: run["recipe_id"] for key, run in runs.items()} == ids
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    spans = []
    for row in plan.rows.changes:
        cells, means = [], []
        for column in plan.columns.changes:
            mine = [100 * runs[row, column, s]["accuracy"] for s in range(plan.seeds)]
            means.append(sum(mine) / len(mine))
            cells.append(f"{means[-1]:.1f} ({min(mine):.1f} to {max(mine):.1f})")
        assert re.search(re.escape(row) + r" +\| " + r" +\| ".join(map(re.escape, cells)), page)
        spans.append(max(means) - min(means))
    _, unit, tensor, norm, lars = spans
    said = f"{unit:.0f} points by unit and by {tensor:.0f} by tensor, that of the global norm by {norm:.0f}"
    assert f"{said}, that of LARS by {lars:.0f}." in " ".join(page.split())
    shares = {round(100 * run["clipped"]) for key, run in runs.items() if "LARS" in key[0]}
    assert {f"{share} % are scaled" in page for share in shares} == {True}
    diverged = {key[0] for key, run in runs.items() if run["diverged"]}
    assert diverged == {"none"}


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
