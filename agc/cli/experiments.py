"""Experiments: a recipe with the changes of a grid, from several seeds, as table and picture.

Every training has a folder of its own, named after framework and id of its recipe. One that is
finished is not made again, one that was stopped goes on, and cells of the same recipe share it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agc.checks import check_count
from agc.cli.frameworks import Framework
from agc.cli.pictures import paper, write_picture
from agc.data import PARTS, Source, open_source
from agc.errors import FormatError, NonFiniteError
from agc.files import write_text
from agc.recipe import Recipe, load_recipe
from agc.training import Launch, SharedTrainers, Training, read_log

__all__ = ["Axis", "Cell", "Experiment", "Result", "draw", "results", "run", "table", "write"]


@dataclass(frozen=True)
class Axis:
    """A direction of a grid.

    Attributes
    ----------
    title : str
    changes : mapping of str to sequence of str
        Label to changes of the recipe, as :func:`agc.recipe.load_recipe` takes them. Of a row it
        may also be a mapping: label of each column to the row's changes there.
    """

    title: str
    changes: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Cell:
    """One training that an experiment asks for.

    Attributes
    ----------
    row, column, seed, recipe
    start : Cell, optional
        The training whose last weights this one begins from.
    """

    row: str
    column: str
    seed: int
    recipe: Recipe
    start: Cell | None = None

    def folder(self, folder: Path, framework: str) -> Path:
        """Return where the training is kept."""
        return folder / f"{framework}-{self.recipe.id[:16]}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid of recipes.

    Attributes
    ----------
    recipe : str
        Name or path of what all begin with.
    changes : sequence of str
        What all change in it.
    rows, columns : Axis
        What is varied; the changes of a row come after those of a column.
    seeds : int
        How many trainings there are for each cell; the seed decides initial values and batches.
    start : sequence of str, optional
        What a training changes that is in no cell, one for each seed: those with
        ``model.init = "file"`` begin from its last weights.
    curves : str, optional
        The column whose losses are drawn, the last one if None.
    question : str
        What it is about, in a line.
    costs : bool
        Whether the time of a step is a result, in units of the first row's.
    """

    recipe: str
    changes: Sequence[str] = ()
    rows: Axis
    columns: Axis
    seeds: int = 3
    start: Sequence[str] | None = None
    curves: str | None = None
    question: str = ""
    costs: bool = False

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)

    def cells(self) -> list[Cell]:
        """Return the trainings of the grid, those of the first seed first.

        Raises
        ------
        ConfigError
            If a change is not allowed.
        """
        return [
            Cell(row, column, seed, recipe, start if recipe.model.init == "file" else None)
            for seed, start in enumerate(self.starts())
            for row, of_row in self.rows.changes.items()
            for column, of_column in self.columns.changes.items()
            for own in [of_row[column] if isinstance(of_row, Mapping) else of_row]
            for recipe in [self._recipe([*of_column, *own], seed)]
        ]

    def starts(self) -> list[Cell | None]:
        """Return what trainings of each seed begin from; raise ConfigError as :meth:`cells`."""
        if self.start is None:
            return [None] * self.seeds
        return [
            Cell("start", "start", seed, self._recipe(self.start, seed))
            for seed in range(self.seeds)
        ]

    def _recipe(self, changes: Sequence[str], seed: int) -> Recipe:
        return load_recipe(self.recipe, [*self.changes, *changes, f"seed={seed}"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to.

    Attributes
    ----------
    framework, row, column, seed, recipe_id
        Which training.
    accuracy : float
        Share of the test images told right at the end, by the raw weights; that of guessing if the
        training diverged.
    clipped : float
        Share of the units that were clipped, mean over the steps; 0 without clipping.
    images_per_second : float
        Median over the steps.
    diverged : bool
        Whether a loss or a weight became infinite or NaN.
    losses : tuple of float
        Loss before each step; NaN where it is not finite.
    """

    framework: str
    row: str
    column: str
    seed: int
    recipe_id: str
    accuracy: float
    clipped: float
    images_per_second: float
    diverged: bool
    losses: tuple[float, ...]


def run(
    experiment: Experiment,
    name: str,
    framework: Framework,
    folder: Path,
    console: Console,
    *,
    data: Path | None = None,
    launch: Launch | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Make the trainings that are not finished as yet, with a progress bar.

    Parameters
    ----------
    experiment : Experiment
    name, framework
        A framework and its name.
    folder : Path
        Of the trainings' folders.
    console : Console
        Of the progress bar.
    data : Path, optional
        Folder of the images.
    launch : Launch, optional
    stop : callable
        Whether to stop after the step under way.

    Returns
    -------
    bool
        Whether all are finished now.

    Raises
    ------
    FormatError
        If a training has nothing to begin from, since that diverged or was removed.
    """
    launch = launch or Launch()
    trainers = SharedTrainers(framework.trainer, launch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    starts = [start for start in experiment.starts() if start]
    cells = [*starts, *experiment.cells()]
    sources: dict[Any, tuple[Source, Source]] = {}
    folder.mkdir(exist_ok=True)
    with Progress(*columns, console=console, transient=True) as bar:
        images = [cell.recipe.steps * cell.recipe.train.batch for cell in cells]
        task = bar.add_task("", total=sum(images))
        for number, cell in enumerate(cells):
            where, batch = cell.folder(folder, name), cell.recipe.train.batch
            labels = (experiment.rows.title, cell.row), (experiment.columns.title, cell.column)
            words = ["start"] if cell in starts else [f"{title} {label}" for title, label in labels]
            bar.update(task, description=", ".join([*words, f"seed {cell.seed}"]))

            def advance(record: Mapping[str, Any], batch: int = batch) -> None:
                bar.advance(task, batch * (record["type"] == "step"))

            if not _over(where):
                model = cell.recipe.model
                key = cell.recipe.data, model.num_classes, model.in_channels
                if key not in sources:
                    train, test = (open_source(cell.recipe, part, data) for part in PARTS)
                    sources[key] = train, test
                training = Training(
                    cell.recipe,
                    trainers(cell.recipe),
                    *sources[key],
                    where,
                    launch=replace(launch, init=_init(cell, folder, name) or launch.init),
                    resume=True,
                    report=advance,
                )
                needed = cell in starts
                try:
                    if not training.run(stop):
                        return False
                except NonFiniteError:
                    needed = False  # is a result, and the log has it
                for checkpoint in where.glob("step-*") if not needed else ():
                    shutil.rmtree(checkpoint)
            bar.update(task, completed=sum(images[: number + 1]))
    return True


def _init(cell: Cell, folder: Path, name: str) -> Path | None:
    """Return the folder with the weights that a training begins from, if it does."""
    if cell.start is None:
        return None
    start = cell.start.folder(folder, name)
    if not any(start.glob("step-*")):
        raise FormatError(
            f"{start}: has no weights for other trainings to begin from: it diverged, or they were "
            "removed; remove the folder to have it made again"
        )
    return start


def _over(folder: Path) -> bool:
    """Tell whether there is nothing to go on with."""
    log = folder / "log.jsonl"
    records = read_log(log) if log.exists() else []
    return bool(records) and records[-1].get("reason") in ("finished", "diverged")


def results(experiment: Experiment, name: str, folder: Path) -> list[Result]:
    """Return what the finished trainings of a framework came to, in the order of the cells."""
    cells = [(cell, cell.folder(folder, name)) for cell in experiment.cells()]
    return [_result(cell, name, read_log(at / "log.jsonl")) for cell, at in cells if _over(at)]


def _result(cell: Cell, name: str, records: Sequence[Mapping[str, Any]]) -> Result:
    steps = [record for record in records if record["type"] == "step"]
    last = {r["weights"]: r["top1"] for r in records if r["type"] == "evaluation"}
    diverged = records[-1]["reason"] == "diverged"
    assert cell.recipe.model.num_classes is not None
    return Result(
        framework=name,
        row=cell.row,
        column=cell.column,
        seed=cell.seed,
        recipe_id=cell.recipe.id,
        accuracy=1 / cell.recipe.model.num_classes if diverged else last["raw"],
        clipped=float(np.mean([record.get("clipped", 0.0) for record in steps])),
        images_per_second=float(np.median([record["images_per_second"] for record in steps])),
        diverged=diverged,
        losses=tuple(math.nan if r["loss"] is None else r["loss"] for r in steps),
    )


def write(experiment: Experiment, found: Sequence[Result], path: Path) -> None:
    """Write the experiment and its results as JSON; a loss that is not finite is null."""
    data = {
        "experiment": asdict(experiment),
        "results": [
            {**asdict(item), "losses": [x if math.isfinite(x) else None for x in item.losses]}
            for item in found
        ],
    }
    write_text(path, json.dumps(data, allow_nan=False) + "\n")


def _grid(experiment: Experiment, found: Sequence[Result]) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield row and column of each cell, and its results."""
    for row, of_row in enumerate(experiment.rows.changes):
        for column, of_column in enumerate(experiment.columns.changes):
            yield row, column, [r for r in found if (r.row, r.column) == (of_row, of_column)]


def table(experiment: Experiment, found: Sequence[Result]) -> Table:
    """Return mean test accuracies as a table, with speeds if there is one column."""
    shown = Table(title="Test accuracy in %, mean over the seeds", title_justify="left")
    shown.add_column(experiment.rows.title)
    for label in experiment.columns.changes:
        shown.add_column(f"{experiment.columns.title} {label}", justify="right")
    single = len(experiment.columns.changes) == 1
    if single:
        shown.add_column("images/s", justify="right")
    if experiment.costs:
        shown.add_column("time of a step", justify="right")
    rows = [[label] for label in experiment.rows.changes]
    for row, _, cell in _grid(experiment, found):
        diverged = sum(result.diverged for result in cell)
        lost = f" [red]({diverged} diverged)[/]" if diverged else ""
        mean = f"{100 * np.mean([result.accuracy for result in cell]):.1f}" if cell else "-"
        rows[row].append(f"{mean}{lost}")
        if single and cell:
            rows[row].append(f"{np.median([result.images_per_second for result in cell]):.0f}")
        if experiment.costs and cell:
            rows[row].append(f"{_cost(experiment, found, cell):.2f}")
    for cells in rows:
        shown.add_row(*cells)
    return shown


def _cost(experiment: Experiment, found: Sequence[Result], cell: Sequence[Result]) -> float:
    """Return the time of an image in units of the first row's: the median over the seeds."""
    first = next(iter(experiment.rows.changes))
    speeds = {(r.column, r.seed): r.images_per_second for r in found if r.row == first}
    return float(np.median([speeds[r.column, r.seed] / r.images_per_second for r in cell]))


def draw(experiment: Experiment, found: Sequence[Result], path: Path) -> None:
    """Draw the accuracies as a map, and the losses of one column at the first seed."""
    rows, columns = experiment.rows, experiment.columns
    size = len(rows.changes), len(columns.changes)
    means = np.full(size, np.nan)
    with paper(4 + 2.2 * size[1], 1 + 0.75 * size[0]) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
        for row, column, cell in _grid(experiment, found):
            if not cell:
                continue
            accuracies = [result.accuracy for result in cell]
            diverged = sum(result.diverged for result in cell)
            means[row, column] = mean = np.mean(accuracies)
            text = "diverged" if diverged == len(cell) else f"{100 * mean:.0f} %"
            if diverged < len(cell) > 1:
                text += f"\n± {50 * (max(accuracies) - min(accuracies)):.0f}"
            if experiment.costs:
                text += f"\ntime {_cost(experiment, found, cell):.2f}"
            colour = "white" if mean < 0.5 else "black"
            left.text(column, row, text, ha="center", va="center", color=colour)
        left.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        left.set_xticks(range(size[1]), list(columns.changes))
        left.set_yticks(range(size[0]), [label.replace(" (", "\n(") for label in rows.changes])
        left.set_xlabel(columns.title)
        left.set_ylabel(rows.title)
        left.set_title("test accuracy")
        drawn = experiment.curves or list(columns.changes)[-1]
        for result in found:
            if result.column == drawn and result.seed == 0:
                right.plot(result.losses, label=result.row)
        right.set_ylim(0, 4)
        right.set_xlabel("step")
        right.set_title(f"loss at {columns.title} {drawn}")
        if right.lines:
            right.legend(title=rows.title)
        write_picture(figure, path)
