"""Why one clips adaptively, seen in five minutes on a laptop.

A small NFNet learns scikit-learn's handwritten digits, once for each learning rate and each
clipping threshold, from several seeds. Without clipping a large learning rate diverges; the tighter
the clipping, the larger the learning rate that still works, and the slower a small one becomes.
That is what Fig. 2 of the paper shows for ImageNet and large batches (arXiv:2102.06171).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from agc.checks import check_count
from agc.cli.experiments import Axis, Experiment, draw, results, run, table, write
from agc.cli.frameworks import framework_names, load_framework
from agc.cli.pictures import check_picture
from agc.errors import ConfigError
from agc.files import check_target, named_files, written
from agc.packages import need

__all__ = ["experiment", "register"]

_WARMUP: Final = 0.05


def experiment(
    clippings: Sequence[float | None] = (None, 0.08, 0.01),
    rates: Sequence[float] = (0.05, 0.2, 0.8),
    seeds: int = 2,
    steps: int = 100,
    batch: int = 64,
) -> Experiment:
    """Return what is tried: the recipe ``digits-mini`` with other rates and thresholds.

    Parameters
    ----------
    clippings : sequence of float or None
        Thresholds of AGC, above 0; None is training without it.
    rates : sequence of float
        Peak learning rates, above 0.
    seeds : int
        How many times each pair is trained, from other initial values on other batches.
    steps, batch : int
        Length of a training, and images in a batch.

    Raises
    ------
    ConfigError
        If a number is none of these, or not finite.
    """
    for name, count in (("seeds", seeds), ("steps", steps), ("batch", batch)):
        check_count(name, count)
    for name, values in (("clippings", clippings), ("rates", rates)):
        if not values:
            raise ConfigError(f"{name} must name at least one number")
    for clipping in clippings:
        if clipping is not None and not (math.isfinite(clipping) and clipping > 0):
            raise ConfigError(f"clippings must be none, or finite and > 0, got {clipping}")
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"rates must be finite and > 0, got {rate}")
    return Experiment(
        recipe="digits-mini",
        changes=[
            f"train.batch={batch}",
            "train.epochs=",
            f"train.steps={steps}",
            "schedule.warmup_epochs=",
            f"schedule.warmup_steps={max(1, round(_WARMUP * steps))}",
            f"optimizer.rate.per={batch}",
            f"evaluate.every_steps={steps}",
            f"checkpoint.every_steps={steps}",
            "ema=",
        ],
        rows=Axis("clipping", {_name(c): [_clipped(c)] for c in clippings}),
        columns=Axis("rate", {f"{rate:g}": [f"optimizer.rate.base={rate!r}"] for rate in rates}),
        seeds=seeds,
        curves=f"{rates[max(0, len(rates) - 2)]:g}",
    )


def _name(clipping: float | None) -> str:
    return "none" if clipping is None else f"{clipping:g}"


def _clipped(clipping: float | None) -> str:
    return "agc=" if clipping is None else f"agc.clipping={clipping!r}"


def register(subparsers: Any) -> None:
    """Add the command ``demo`` to ``agc`` (entry-point group ``agc.commands``)."""
    parser = subparsers.add_parser(
        "demo", help="see in five minutes why one clips adaptively", description=__doc__
    )
    parser.add_argument(
        "--framework", choices=framework_names(), default="torch", help="what trains (torch)"
    )
    parser.add_argument(
        "--clippings",
        type=_clipping,
        nargs="+",
        default=(None, 0.08, 0.01),
        metavar="X",
        help="thresholds of AGC; none is training without it (none 0.08 0.01)",
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=(0.05, 0.2, 0.8),
        metavar="X",
        help="peak learning rates (0.05 0.2 0.8)",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, metavar="N", help="trainings of each pair (2)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="length of a training (100)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images in a batch (64)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo.svg"),
        metavar="FILE",
        help="picture (.svg, .png or .pdf); the numbers go beside it (demo.svg)",
    )
    parser.set_defaults(run=_run)


def _clipping(text: str) -> float | None:
    return None if text == "none" else float(text)


def _run(arguments: argparse.Namespace) -> int:
    plan = experiment(
        arguments.clippings, arguments.rates, arguments.seeds, arguments.steps, arguments.batch
    )
    # Fail on missing packages before training.
    check_picture(arguments.out)
    numbers = arguments.out.with_suffix(".json")
    try:
        check_target(numbers)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    name = arguments.framework
    framework = load_framework(name, f"the demo in {name}", f"{name},demo")
    for package in ("matplotlib.figure", "safetensors.numpy", "sklearn.datasets"):
        need(package, "agc demo", "demo")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        run(plan, name, framework, Path(folder), console)
        found = results(plan, name, Path(folder))
    console.print(table(plan, found))
    with named_files():
        write(plan, found, numbers)
        draw(plan, found, arguments.out)
    console.print(f"written: {written(arguments.out)} and {written(numbers)}", highlight=False)
    return 0
