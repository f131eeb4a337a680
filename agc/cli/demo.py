"""``agc demo``: why one clips adaptively, seen in five minutes on a laptop.

The smallest NFNet learns to tell ten orientations of noisy gratings, once for each learning rate
and each clipping threshold, from several seeds. Without clipping a large learning rate diverges;
the tighter the clipping, the larger the learning rate that still works, and the slower a small one
becomes. That is what Fig. 2 of the paper shows for ImageNet and large batches (arXiv:2102.06171).

Everything but the training itself is here; that is the framework's own (``agc.cli.frameworks``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agc.checks import check_count
from agc.cli.frameworks import Framework, framework_names, load_framework
from agc.errors import ConfigError
from agc.files import check_target, named_files, replacing, write_text, written
from agc.nfnet import parameters
from agc.packages import need
from agc.schedule import WarmupCosine

__all__ = [
    "CLASSES",
    "Experiment",
    "Run",
    "draw",
    "gratings",
    "initial_values",
    "learning_rates",
    "register",
    "run",
    "table",
]

Array = npt.NDArray[Any]

CLASSES: Final = 10
_CYCLES: Final = 6
_PIXELS: Final = 32
_TEST_IMAGES: Final = 512
_PICTURES: Final = ("svg", "png", "pdf")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is tried.

    Attributes
    ----------
    clippings : tuple of float or None
        Thresholds of AGC, above 0; None is training without it.
    rates : tuple of float
        Peak learning rates, at least 0.
    seeds : int
        How many times each pair is trained, from other initial values on other images.
    steps, batch : int
        Length of a training, and images in a batch.

    Raises
    ------
    ConfigError
        If a number is none of these, or not finite.
    """

    clippings: tuple[float | None, ...] = (None, 0.08, 0.01)
    rates: tuple[float, ...] = (0.05, 0.2, 0.8)
    seeds: int = 2
    steps: int = 100
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch"):
            check_count(name, getattr(self, name))
        for name in ("clippings", "rates"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must name at least one number")
        for clipping in self.clippings:
            if clipping is not None and not (math.isfinite(clipping) and clipping > 0):
                raise ConfigError(f"clippings must be none, or finite and > 0, got {clipping}")
        for rate in self.rates:
            if not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(f"rates must be finite and >= 0, got {rate}")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes
    ----------
    clipping, rate, seed
        What was tried.
    accuracy : float
        Share of the test images told right; that of guessing, 0.1, if the training diverged.
    clipped : float
        Share of the units that were clipped, mean over the steps.
    losses : tuple of float
        Loss before each step, up to the first that is not finite.
    """

    clipping: float | None
    rate: float
    seed: int
    accuracy: float
    clipped: float
    losses: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite or NaN."""
        return not math.isfinite(self.losses[-1])


def gratings(random: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Draw noisy gratings in ten orientations.

    Parameters
    ----------
    random : Generator
    count : int
        Number of images.

    Returns
    -------
    images : float32 array, shape (count, 32, 32, 3)
        A sine of six cycles in the orientation ``pi * label / 10`` with a random phase, its
        amplitude normal with standard deviation 0.5 in each channel, in unit normal noise.
    labels : int64 array, shape (count,)
    """
    labels = random.integers(0, CLASSES, count)
    angle = np.pi * labels[:, None, None] / CLASSES
    y, x = np.meshgrid(*2 * [np.arange(_PIXELS) / _PIXELS], indexing="ij")
    along = np.cos(angle) * x + np.sin(angle) * y
    phase = random.uniform(0, 2 * np.pi, (count, 1, 1))
    wave = np.sin(2 * np.pi * _CYCLES * along + phase)[..., None]
    amplitude = 0.5 * random.standard_normal((count, 1, 1, 3))
    noise = random.standard_normal((count, _PIXELS, _PIXELS, 3))
    return (amplitude * wave + noise).astype(np.float32), labels.astype(np.int64)


def learning_rates(peak: float, steps: int) -> list[float]:
    """Return the learning rate of each step: 5 % linear warm-up, then half a cosine down to 0."""
    rate = WarmupCosine(peak=peak, steps=steps, warmup=max(1, round(0.05 * steps)))
    return [rate(step) for step in range(steps)]


def initial_values(seed: int) -> dict[str, Array]:
    """Draw the parameters of ``tiny`` as DeepMind initialises them."""
    random = np.random.default_rng(seed)
    drawn = {}
    for spec in parameters("tiny", CLASSES):
        how = spec.initial
        if how.distribution == "constant":
            array = np.full(spec.shape, how.value)
        else:
            array = random.standard_normal(spec.shape)
            while how.distribution == "truncated" and (outside := np.abs(array) > 2).any():
                array[outside] = random.standard_normal(int(outside.sum()))
            array = how.value * array
        drawn[spec.name] = array.astype(np.float32)
    return drawn


def run(experiment: Experiment, framework: Framework, console: Console) -> list[Run]:
    """Train everything that an experiment asks for, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs = []
    plan = [
        (clipping, rate, seed)
        for seed in range(experiment.seeds)
        for clipping in experiment.clippings
        for rate in experiment.rates
    ]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(plan) * experiment.steps)
        for number, (clipping, rate, seed) in enumerate(plan):
            bar.update(task, description=f"clipping {_name(clipping)}, rate {rate:g}, seed {seed}")
            random = np.random.default_rng([seed, 1])
            test = gratings(np.random.default_rng([seed, 2]), _TEST_IMAGES)
            batches = (gratings(random, experiment.batch) for _ in range(experiment.steps))
            rates = learning_rates(rate, experiment.steps)
            seen = []
            for pair in framework.train(initial_values(seed), batches, rates, clipping, test):
                seen.append(pair)
                bar.advance(task)
            finished = math.isfinite(seen[-1][0]) and len(seen) > experiment.steps
            steps = seen[:-1] if finished else seen
            losses = tuple(loss for loss, _ in steps)
            accuracy = seen[-1][0] if finished else 1 / CLASSES
            clipped = float(np.mean([share for _, share in steps]))
            runs.append(Run(clipping, rate, seed, accuracy, clipped, losses))
            bar.update(task, completed=(number + 1) * experiment.steps)
    return runs


def _name(clipping: float | None) -> str:
    return "none" if clipping is None else f"{clipping:g}"


def _cells(
    experiment: Experiment, runs: Sequence[Run]
) -> Iterator[tuple[int, int, float, float, int]]:
    """Row, column, mean accuracy, its range, and number of diverged trainings of each pair."""
    for row, clipping in enumerate(experiment.clippings):
        for column, rate in enumerate(experiment.rates):
            cell = [run for run in runs if (run.clipping, run.rate) == (clipping, rate)]
            accuracies = [run.accuracy for run in cell]
            spread = max(accuracies) - min(accuracies)
            mean = float(np.mean(accuracies))
            yield row, column, mean, spread, sum(run.diverged for run in cell)


def table(experiment: Experiment, runs: Sequence[Run]) -> Table:
    """Return mean test accuracies as a table: a row a threshold, a column a learning rate."""
    shown = Table(title="Test accuracy in %, mean over the seeds", title_justify="left")
    shown.add_column("clipping")
    for rate in experiment.rates:
        shown.add_column(f"rate {rate:g}", justify="right")
    rows = [[_name(clipping)] for clipping in experiment.clippings]
    for row, _, mean, _, diverged in _cells(experiment, runs):
        lost = f" [red]({diverged} diverged)[/]" if diverged else ""
        rows[row].append(f"{100 * mean:.1f}{lost}")
    for cells in rows:
        shown.add_row(*cells)
    return shown


def draw(experiment: Experiment, runs: Sequence[Run], path: Path) -> None:
    """Draw the accuracies as a map, and the losses of the first seed; the file's name says how."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    size = len(experiment.clippings), len(experiment.rates)
    means = np.zeros(size)
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "agc"}):
        figure = Figure(figsize=(4 + 2.2 * size[1], 1 + 0.75 * size[0]), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
        for row, column, mean, spread, diverged in _cells(experiment, runs):
            means[row, column] = mean
            text = "diverged" if diverged == experiment.seeds else f"{100 * mean:.0f} %"
            if experiment.seeds > 1 and diverged < experiment.seeds:
                text += f"\n± {50 * spread:.0f}"
            colour = "white" if mean < 0.5 else "black"
            left.text(column, row, text, ha="center", va="center", color=colour)
        left.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        left.set_xticks(range(size[1]), [f"{rate:g}" for rate in experiment.rates])
        left.set_yticks(range(size[0]), [_name(clipping) for clipping in experiment.clippings])
        left.set_xlabel("peak learning rate")
        left.set_ylabel("clipping")
        left.set_title("test accuracy", loc="left")
        rate = experiment.rates[-2] if size[1] > 1 else experiment.rates[0]
        for run in runs:
            if run.rate == rate and run.seed == 0:
                right.plot(run.losses, label=_name(run.clipping), lw=1)
        right.set_ylim(0, 4)
        right.set_xlabel("step")
        right.set_title(f"loss at learning rate {rate:g}", loc="left")
        right.legend(frameon=False, title="clipping")
        right.spines[["top", "right"]].set_visible(False)
        with replacing(path) as file:
            figure.savefig(file, format=_picture(path), dpi=150)


def _picture(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or _PICTURES[0]


def _check_out(path: Path) -> Path:
    """Return the file of numbers beside the picture; refuse what cannot be written."""
    try:
        check_target(path)
        numbers = path.with_suffix(".json")
        check_target(numbers)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    if _picture(path) not in _PICTURES:
        raise ConfigError(
            f"--out: {path} cannot be drawn; let its name end in .{', .'.join(_PICTURES)}"
        )
    return numbers


def register(subparsers: Any) -> None:
    """Add the command ``demo`` to ``agc`` (entry-point group ``agc.commands``)."""
    plain = Experiment()
    parser = subparsers.add_parser(
        "demo", help="see in five minutes why one clips adaptively", description=__doc__
    )
    parser.add_argument("--framework", choices=framework_names(), default="torch")
    parser.add_argument("--clippings", type=_clipping, nargs="+", default=plain.clippings)
    parser.add_argument("--rates", type=float, nargs="+", default=plain.rates)
    parser.add_argument("--seeds", type=int, default=plain.seeds)
    parser.add_argument("--steps", type=int, default=plain.steps)
    parser.add_argument("--batch", type=int, default=plain.batch)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo.svg"),
        help="picture (.svg, .png or .pdf); the numbers go beside it",
    )
    parser.set_defaults(run=_run)


def _clipping(text: str) -> float | None:
    return None if text == "none" else float(text)


def _run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(
        clippings=tuple(arguments.clippings),
        rates=tuple(arguments.rates),
        seeds=arguments.seeds,
        steps=arguments.steps,
        batch=arguments.batch,
    )
    # Fail on missing packages before training.
    numbers = _check_out(arguments.out)
    name = arguments.framework
    framework = load_framework(name, f"the demo in {name}", f"{name},demo")
    need("matplotlib.figure", "agc demo", "demo")
    console = Console()
    runs = run(experiment, framework, console)
    console.print(table(experiment, runs))
    data = {
        "framework": name,
        "experiment": asdict(experiment),
        "runs": [
            # JSON has no NaN: a loss that is not finite is null.
            {**asdict(item), "losses": [x if math.isfinite(x) else None for x in item.losses]}
            for item in runs
        ],
    }
    text = json.dumps(data, allow_nan=False) + "\n"
    with named_files():
        write_text(numbers, text)
        draw(experiment, runs, arguments.out)
    console.print(f"written: {written(arguments.out)} and {written(numbers)}", highlight=False)
    return 0
