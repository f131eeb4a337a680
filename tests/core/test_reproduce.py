"""``agc reproduce``: the declarations are recipes, and a run that was stopped goes on."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from agc.cli import halves, main, reproduce, step_time
from agc.cli.experiments import Axis, Experiment, Result, results, run, table
from agc.cli.frameworks import Contest
from agc.cli.reproduce import EXPERIMENTS
from agc.data import initial_values
from agc.data.sources.npz import open_npz
from agc.errors import FormatError
from tests.core.test_demo import Fake
from tests.core.test_sources import idx

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


def test_the_documentation_says_how_near_the_frameworks_are():
    """The largest relative difference of a loss, and which steps were made where."""
    text = " ".join((DOCS / "training.md").read_text(encoding="utf-8").split())
    data = json.loads((DOCS / "figures" / "relay.json").read_text(encoding="utf-8"))
    whole, relay = (np.array(data["losses"][name]) for name in ("whole", "relay"))
    most = np.max(np.abs(relay - whole) / whole)
    assert f"by more than {most:.1e} of it".replace("e-0", "e-") in text
    torch, jax, keras = np.diff([start["step"] for start in data["starts"]] + [len(relay)])
    assert f"{torch} of them in PyTorch, {jax} in JAX on two processes and {keras} in Keras" in text
    text = " ".join((DOCS / "reproduce.md").read_text(encoding="utf-8").split())
    data = json.loads((DOCS / "figures" / "portability.json").read_text(encoding="utf-8"))
    losses = np.array([run["losses"] for run in data["results"]])
    most = np.max(np.ptp(losses, 0) / losses.min(0))
    assert f"by more than {most:.1e} of it".replace("e-0", "e-") in text


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


# --- a training that others begin from ------------------------------------------------------------

FILE = ["model.init=file", "model.head=new"]
STARTED = Experiment(
    recipe="digits-mini",
    changes=TINY,
    start=["agc.clipping=0.01", "train.steps=1"],
    rows=Axis("model", {"scratch": [], "tuned": FILE, "head": [*FILE, 'train.only=["head.*"]']}),
    columns=Axis("batch", {"8": []}),
    seeds=2,
)
QUIET = Console(quiet=True)


class Halving(Fake):
    """Halves all weights in each step, and may diverge in the second."""

    loaded = ()

    def __init__(self, diverges=False):
        super().__init__()
        self.diverges = diverges

    def load(self, state):
        super().load(state)
        Halving.loaded = (*Halving.loaded, state.parameters)

    def step(self, batch, numbers):
        halved = {name: value / 2 for name, value in self.now.parameters.items()}
        self.now = replace(self.now, parameters=halved, step=self.now.step + 1)
        metrics = super().step(batch, numbers)
        self.now = replace(self.now, step=self.now.step - 1)
        lost = self.diverges and self.now.step == 2
        return replace(metrics, loss=math.nan) if lost else metrics


def framework(**options):
    return SimpleNamespace(trainer=lambda recipe, launch: Halving(**options))


def test_trainings_begin_from_the_last_weights_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(Halving, "loaded", ())
    assert run(STARTED, "any", framework(), tmp_path, QUIET)
    starts, begun = Halving.loaded[:2], Halving.loaded[2:]
    assert len(begun) == 6
    cells = STARTED.cells()
    assert [cell.row for cell in cells] == [*STARTED.rows.changes] * 2
    for cell, found in zip(cells, begun, strict=True):
        drawn, start = initial_values(cell.recipe), starts[cell.seed]
        for name, value in found.items():
            own = cell.row == "scratch" or name.startswith("head.")
            np.testing.assert_array_equal(value, drawn[name] if own else start[name] / 2, name)
    assert len(results(STARTED, "any", tmp_path)) == 6
    # Those that are added later begin from it too; it is not made again.
    assert {len(list(tmp_path.glob(f"*/{name}"))) for name in ("step-*", "log.jsonl")} == {2, 8}
    more = replace(STARTED, rows=Axis("model", {"other": [*FILE, "agc.clipping=0.1"]}))
    assert run(more, "any", framework(), tmp_path, QUIET)
    assert len(Halving.loaded) == 10


def test_a_start_that_diverged(tmp_path):
    changes = [*STARTED.start, "train.steps=2", "checkpoint.every_steps=1"]
    lost = replace(STARTED, start=changes, rows=Axis("model", {"tuned": FILE}))
    for _ in range(2):
        with pytest.raises(
            FormatError, match=r"any-.*has no weights .* to begin from: it diverged"
        ):
            run(lost, "any", framework(diverges=True), tmp_path, QUIET)


def test_halves(tmp_path, monkeypatch):
    files = [("train", 0, 2), ("t10k", 0, 1), ("train", 5, 1), ("t10k", 5, 1)]
    monkeypatch.setattr(halves, "_FILES", files)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10, dtype=np.uint8), 3))
    images = np.zeros((30, 4, 4), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None]
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    folder = halves.write_halves(tmp_path, tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == len(files)
    for split, lowest, count in files:
        source = open_npz(folder / f"{split}-{lowest}-{count}.npz", 5)
        assert len(source) == 5 * count
        for image, label in (source[index] for index in range(len(source))):
            number = image[0, 0]  # the image's, in Fashion-MNIST
            assert labels[number] == lowest + label
            assert list(labels[:number]).count(labels[number]) < count
    halves.write_halves(tmp_path, tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_transfer_asks_for_the_halves():
    plan = EXPERIMENTS["transfer"]
    data = {cell.recipe.data for cell in [*plan.starts(), *plan.cells()]}
    wanted = {(part.split, part.images) for each in data for part in (each.train, each.test)}
    assert wanted == {(f"{split}-{low}-{n}", 5 * n) for split, low, n in halves._FILES}


def test_transfer_makes_its_data(made, tmp_path, monkeypatch):
    def write(source, folder):
        monkeypatch.setattr(reproduce, "run", lambda *_, data, **__: used.append((source, data)))
        return folder

    used = []
    monkeypatch.setattr(reproduce, "write_halves", write)
    out = ["--out", str(tmp_path), "--data", str(tmp_path / "fashion")]
    assert main(["reproduce", "transfer", *out]) == 75
    assert used == [(tmp_path / "fashion", tmp_path / "transfer" / "data")]


# --- times ----------------------------------------------------------------------------------------


def test_costs_are_ratios_of_the_same_seed():
    plan = EXPERIMENTS["sam-fraction"]
    rows = [*plan.rows.changes]
    speeds = {rows[0]: (100, 10, 200), rows[1]: (80, 5, 200), rows[2]: (50, 1, 20)}
    same = {"framework": "any", "column": "256", "recipe_id": "", "clipped": 0.0}
    found = [
        Result(
            **same, row=row, seed=n, accuracy=0.5, images_per_second=s, diverged=False, losses=()
        )
        for row, values in speeds.items()
        for n, s in enumerate(values)
    ]
    text = io.StringIO()
    Console(width=80, file=text).print(table(plan, found))
    assert [line.split()[-2] for line in text.getvalue().splitlines()[-4:-1]] == [
        "1.00",
        "1.25",
        "10.00",
    ]


@pytest.fixture
def contest(monkeypatch):
    """Contestants that take 2, 1 and 1.5 seconds, of which the first step takes longer."""
    clock, made = [0.0], []

    def load_framework(name, *_):
        def contest(options, images, labels):
            assert images.shape[0] == len(labels)

            def step(key, seconds):
                def run():
                    made.append(key)
                    clock[0] += seconds * (1 + 9 * (made.count(key) < 2) + 0.1 * len(made) % 0.3)
                    return 0.0

                return run

            times = {"twin": 2.0, "plain": 1.0, "clipped": 1.5}
            made.clear()
            return Contest({"device": "any"}, {key: step(key, t) for key, t in times.items()})

        return SimpleNamespace(contest=contest) if name != "tensorflow" else SimpleNamespace()

    monkeypatch.setattr(reproduce, "load_framework", load_framework)
    monkeypatch.setattr(step_time, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(step_time, "SIZES", {"mini": (4, 16), "tiny": (2, 32)})
    return made


def test_step_times(contest, tmp_path, capsys):
    command = ["reproduce", "bn-step-time", "--out", str(tmp_path)]
    for name in ("torch", "jax", "torch"):
        assert main([*command, "--framework", name]) == 0
    out = capsys.readouterr().out
    assert "written:" in out
    folder = tmp_path / "bn-step-time"
    data = json.loads((folder / "results.json").read_text())
    of = [(result["framework"], result["variant"]) for result in data["results"]]
    assert of == [(name, size) for name in ("jax", "torch") for size in ("mini", "tiny")]
    for result in data["results"]:
        assert result["rounds"] >= 5
        for row, ratio in {"clipped": 0.75, "plain": 0.5}.items():
            found = result["ratios"][row]
            assert found["minimum"] == pytest.approx(ratio)
            low, high = found["quartiles"]
            assert 0.8 * ratio < low <= found["median"] <= high < 1.25 * ratio
    # A step before the rounds compiles, and nobody is always the first.
    assert len(contest) == 3 * (1 + data["results"][-1]["rounds"])
    assert {tuple(contest[n : n + 3]) for n in range(3, len(contest), 3)} == {
        ("plain", "clipped", "twin"),
        ("clipped", "twin", "plain"),
        ("twin", "plain", "clipped"),
    }
    figure = (folder / "figure.svg").read_text()
    assert all(word in figure for word in ("jax, mini", "torch, tiny", "with AGC"))


def test_step_times_that_are_not_to_be_had(contest, tmp_path, capsys, monkeypatch):
    command = ["reproduce", "bn-step-time", "--out", str(tmp_path)]
    assert main([*command, "--framework", "tensorflow"]) == 2
    assert "not offered in tensorflow as yet: its NFNet has no" in capsys.readouterr().err
    assert main([*command, "--seeds", "2"]) == 2
    assert "--seeds: bn-step-time makes no trainings; leave it out" in capsys.readouterr().err
    rounds = step_time._rounds

    def stopped(steps, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return rounds(steps, stop)

    monkeypatch.setattr(step_time, "_rounds", stopped)
    assert main([*command, "--framework", "jax"]) == 75
    assert not list((tmp_path / "bn-step-time").iterdir())
