"""``agc reproduce``: what the papers claim, as far as two cores can show it.

An experiment is a recipe with changes, a few lines of :data:`EXPERIMENTS`; training, table and
picture are :mod:`agc.cli.experiments`. They show the shape of a result, not a published accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from agc.checks import check_count
from agc.cli.experiments import Axis, Experiment, Result, draw, results, run, table, write
from agc.cli.frameworks import framework_names, load_framework
from agc.cli.halves import CLASSES, half, write_halves
from agc.cli.step_time import NAME, QUESTION, step_time
from agc.cli.train import STOPPED
from agc.errors import ConfigError
from agc.files import named_files
from agc.packages import need
from agc.training import stop_signals

__all__ = ["EXPERIMENTS", "register"]

_FASHION: Final = Path("/usr/share/datasets/fashion-mnist")
_IMAGES: Final = 20_480  # that every training sees, whatever its batch
_PLAIN: Final = [
    "model.stochastic_depth=0",
    "input.crop.rule=none",
    "input.flip=false",
    "train.epochs=",
    "schedule.warmup_epochs=",
    "ema=",
]
_FRAMEWORKS: Final = Axis("framework", {})  # a row for each that has run


def _batch(size: int, steps: int | None = None) -> list[str]:
    """Return the changes for a batch: a warm-up of 10 %, and all images if no steps are given."""
    steps = steps or _IMAGES // size
    return [
        f"train.batch={size}",
        f"train.steps={steps}",
        f"schedule.warmup_steps={steps / 10}",
        f"evaluate.every_steps={steps}",
    ]


def _thresholds(*values: float) -> dict[str, list[str]]:
    return {f"{value:g}": [f"agc.clipping={value}"] for value in values}


_SETTINGS: Final = ("loose", "medium", "tight")
"""Columns of rows that have thresholds of their own: each is a fourth of the one before."""


_RATIOS: Final = (0.04, 0.01, 0.0025)


def _settings(
    name: str, change: str, values: Sequence[float], *others: str
) -> dict[str, dict[str, list[str]]]:
    """Return a row that says its thresholds; ``change`` has ``{}`` where they belong."""
    own = {
        column: [*others, change.format(value)]
        for column, value in zip(_SETTINGS, values, strict=True)
    }
    return {f"{name} ({', '.join(map(str, values))})": own}


# LARS scales the gradient of each tensor to a trust times the norm of its weights, up or down. AGC
# by tensor does so if it excludes none and its threshold is below all ratios but 0. That is 1e-9
# times the trust here, hence the rate is 1e9 times that of other rows, and the decay 1e-9 times.
_LARS: Final = [
    "agc.granularity=tensor",
    "agc.exclude=[]",
    "agc.div_eps=0",
    "optimizer.rate.base=0.4e9",
    "optimizer.weight_decay=2e-14",
]


EXPERIMENTS: Final = {
    "batch-threshold": Experiment(
        question="Which clipping thresholds work at which batch, if the rate grows with it?",
        recipe="fashion-mini",
        changes=_PLAIN,
        rows=Axis("clipping", {"none": ["agc="], **_thresholds(0.16, 0.04, 0.01)}),
        columns=Axis("batch", {str(size): _batch(size) for size in (64, 256, 1024)}),
        curves="256",
    ),
    "clippers": Experiment(
        question="At a large batch, how far does the threshold matter to AGC, a global norm, LARS?",
        recipe="fashion-mini",
        changes=[*_PLAIN, *_batch(1024)],
        rows=Axis(
            "clipping",
            {
                "none": ["agc="],
                **_settings("AGC by unit", "agc.clipping={}", _RATIOS),
                **_settings("AGC by tensor", "agc.clipping={}", _RATIOS, "agc.granularity=tensor"),
                # The middle one is the best of 1, 0.3, 0.1 and 0.03 at the first seed.
                **_settings("global norm", "optimizer.max_norm={}", (0.4, 0.1, 0.025), "agc="),
                **_settings("LARS, trust", "agc.clipping={}e-9", _RATIOS, *_LARS),
            },
        ),
        columns=Axis("threshold", dict.fromkeys(_SETTINGS, ())),
        curves="medium",
    ),
    "head": Experiment(
        question="Should the classifier be clipped? With ten classes no difference is expected.",
        recipe="fashion-mini",
        changes=[*_PLAIN, *_batch(1024)],
        rows=Axis("classifier", {"its weight is not clipped": [], "clipped": ["agc.exclude=[]"]}),
        columns=Axis("batch", {"1024": []}),
    ),
    "sam-fraction": Experiment(
        question="What does sharpness-aware minimization cost with 20 % of the batch in its ascent?",
        recipe="fashion-mini",
        changes=[*_PLAIN, *_batch(256)],
        rows=Axis(
            "ascent",
            {
                "none": [],
                "20 % of the batch": ["sam.rho=0.05", "sam.fraction=0.2", "sam.group=batch"],
                "all of it": ["sam.rho=0.05", "sam.group=batch"],
            },
        ),
        columns=Axis("batch", {"256": []}),
        costs=True,
    ),
    "transfer": Experiment(
        question="What does training on five classes save with 200 images of each of five others?",
        recipe="fashion-mini",
        changes=[*_PLAIN, f"model.num_classes={CLASSES}"],
        start=[*_batch(64), *half(0, 6000)],
        rows=Axis(
            "model",
            {
                "from scratch": [],
                "fine-tuned": ["model.init=file", "model.head=new"],
                "new head only": ["model.init=file", "model.head=new", 'train.only=["head.*"]'],
            },
        ),
        columns=Axis("steps", {str(n): [*_batch(64, n), *half(5, 200)] for n in (20, 80, 320)}),
        curves="80",
    ),
    "portability": Experiment(
        question="Is one recipe the same training in three frameworks? Run it in each.",
        recipe="digits-mini",
        changes=["train.epochs=", "train.steps=200", "evaluate.every_steps=200"],
        rows=_FRAMEWORKS,
        columns=Axis("batch", {"64": []}),
        seeds=1,
    ),
}
"""By the name that the command takes."""


def register(subparsers: Any) -> None:
    """Add the command ``reproduce`` to ``agc`` (entry-point group ``agc.commands``)."""
    questions = {name: plan.question for name, plan in EXPERIMENTS.items()} | {NAME: QUESTION}
    names = "\n".join(f"  {name:16} {question}" for name, question in questions.items())
    command = subparsers.add_parser(
        "reproduce",
        help="repeat an experiment of the papers in small",
        epilog=f"experiments:\n{names}\n\nexit status: 75 if SIGTERM or Ctrl-C stopped it; the "
        "same command goes on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("name", metavar="NAME", choices=questions, help="see below")
    command.add_argument(
        "--framework", choices=framework_names(), default="torch", help="what trains (torch)"
    )
    command.add_argument(
        "--data", type=Path, default=_FASHION, metavar="DIR", help=f"Fashion-MNIST ({_FASHION})"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("reproduced"),
        metavar="DIR",
        help="folder of all experiments; runs that are there are not repeated (reproduced)",
    )
    command.add_argument("--seeds", type=int, metavar="N", help="trainings of each kind (3)")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    name = arguments.framework
    plan = EXPERIMENTS.get(arguments.name)
    if arguments.seeds is not None:
        if plan is None:
            raise ConfigError(f"--seeds: {arguments.name} makes no trainings; leave it out")
        plan = replace(plan, seeds=check_count("seeds", arguments.seeds))
    framework = load_framework(name, f"agc reproduce in {name}", f"{name},demo")
    for package in ("matplotlib.figure", "safetensors.numpy"):
        need(package, "agc reproduce", "demo")
    folder = arguments.out / arguments.name
    console = Console()
    with named_files():
        folder.mkdir(parents=True, exist_ok=True)
        with stop_signals() as stop:
            if plan is None:
                made = step_time(name, framework, folder, console, stop)
            else:
                data = arguments.data
                if arguments.name == "transfer":
                    data = write_halves(data, folder / "data")
                mine = _for(plan, [name])
                made = run(mine, name, framework, folder, console, data=data, stop=stop)
        if not made:
            print(f"stopped; the same command goes on: {folder}", file=sys.stderr)
            return STOPPED
        if plan is not None:
            _show(plan, name, folder, console)
    console.print(f"written: {folder}/results.json and figure.svg", highlight=False)
    return 0


def _show(plan: Experiment, name: str, folder: Path, console: Console) -> None:
    """Print what the trainings came to, and write and draw it."""
    names = [name] if plan.rows is not _FRAMEWORKS else framework_names()
    found = [result for each in names for result in results(_for(plan, [each]), each, folder)]
    plan = _for(plan, list(dict.fromkeys(result.framework for result in found)))
    console.print(plan.question, table(plan, found), highlight=False)
    if len({result.framework for result in found}) > 1:
        console.print(f"largest relative difference of a loss: {_difference(found):.1e}")
    write(plan, found, folder / "results.json")
    draw(plan, found, folder / "figure.svg")


def _for(plan: Experiment, names: Sequence[str]) -> Experiment:
    """Return an experiment with these frameworks as its rows, if frameworks are its rows."""
    if plan.rows is not _FRAMEWORKS:
        return plan
    return replace(plan, rows=Axis(plan.rows.title, {name: [] for name in names}))


def _difference(found: Sequence[Result]) -> float:
    """Return how far losses of the same step and seed are apart in different frameworks."""
    most = 0.0
    for seed in {result.seed for result in found}:
        losses = np.array([result.losses for result in found if result.seed == seed])
        most = max(most, float(np.max(np.ptp(losses, 0) / losses.min(0))))
    return most
