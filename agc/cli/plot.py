"""``agc plot``: the curves of trainings, from their logs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from agc.checks import check_count
from agc.cli.pictures import FORMATS, check_picture, paper, write_picture
from agc.errors import ConfigError
from agc.files import named_files, written
from agc.packages import need
from agc.training import read_log

__all__ = ["draw_curves", "register"]

_EXAMPLE: Final = """\
examples:
  agc plot run
  agc plot plain=run1 clipped=run2 --out comparison.pdf --mean 10
"""
_PANELS: Final = {"loss": "loss", "rate": "learning rate", "clipped": "share of clipped units"}
Logs = Mapping[str, Sequence[Mapping[str, Any]]]


def register(subparsers: Any) -> None:
    """Add the command ``plot`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser(
        "plot",
        help="draw loss, rate, clipping and accuracy of trainings over each other",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "runs",
        metavar="[LABEL=]RUN",
        nargs="+",
        help="folder of a training, or its log.jsonl; the label is the folder's name",
    )
    command.add_argument(
        "--out", type=Path, default=Path("curves.svg"), help=f"picture, .{', .'.join(FORMATS)}"
    )
    command.add_argument(
        "--mean", type=int, default=1, metavar="N", help="draw means over N steps (1)"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_count("mean", arguments.mean)
    check_picture(arguments.out)
    need("matplotlib.figure", "agc plot", "demo")
    with named_files():
        logs = _read(arguments.runs)
        draw_curves(logs, arguments.out, mean=arguments.mean)
    print(f"written: {written(arguments.out)}")
    return 0


def _read(runs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the logs by label."""
    logs = {}
    for run in runs:
        label, equals, path = run.partition("=")
        log = Path(path if equals else run)
        if log.is_dir():
            log /= "log.jsonl"
        label = label if equals else log.resolve().parent.name
        if label in logs:
            raise ConfigError(f"two runs are called {label!r}: give labels, {label}2={log.parent}")
        logs[label] = read_log(log)
        if not any(record["type"] == "step" for record in logs[label]):
            raise ConfigError(f"{log}: has no step as yet")
    return logs


def draw_curves(logs: Logs, path: Path, *, mean: int = 1) -> None:
    """Draw what the logs have of loss, rate, clipped share, and accuracy over the steps.

    Parameters
    ----------
    logs : mapping of str to sequence of records
        Label to what :func:`agc.training.read_log` returns.
    path : Path
        Picture; its name says how it is written.
    mean : int
        Number of steps that a point of a curve is the mean of.
    """
    records = [record for log in logs.values() for record in log]
    panels = [key for key in _PANELS if any(key in r for r in records if r["type"] == "step")]
    evaluated = any(record["type"] == "evaluation" for record in records)
    count = len(panels) + evaluated
    with paper(3.2 * count, 2.8) as figure:
        axes = figure.subplots(1, count, squeeze=False)[0]
        for ax, key in zip(axes, panels, strict=False):
            ax.set_title(_PANELS[key])
            for number, (label, log) in enumerate(logs.items()):
                ax.plot(*_curve(log, key, mean), label=label, color=f"C{number}")
        if evaluated:
            axes[-1].set_title("test accuracy")
            for number, log in enumerate(logs.values()):
                for weights, line in (("raw", "o-"), ("ema", "s--")):
                    found = [r for r in log if r["type"] == "evaluation" if r["weights"] == weights]
                    x, y = ([record[key] for record in found] for key in ("step", "top1"))
                    axes[-1].plot(x, y, line, color=f"C{number}", markersize=3)
            for weights, line in (("raw", "-"), ("average", "--")):
                axes[-1].plot([], [], line, color="gray", label=weights)
            axes[-1].legend()
        for ax in axes:
            ax.set_xlabel("step")
        axes[0].legend()
        write_picture(figure, path)


def _curve(log: Sequence[Mapping[str, Any]], key: str, mean: int) -> tuple[list[float], list[Any]]:
    """Return the steps and the values of a curve, NaN where a number is not finite."""
    steps = [record for record in log if record["type"] == "step" and key in record]
    values = [math.nan if r[key] is None else float(r[key]) for r in steps]
    starts = range(0, len(steps), mean)
    x = [sum(r["step"] for r in steps[n : n + mean]) / len(steps[n : n + mean]) for n in starts]
    y = [sum(values[n : n + mean]) / len(values[n : n + mean]) for n in starts]
    return x, y
