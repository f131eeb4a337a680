"""``agc convert``: NFNet weights from any framework's file to any other's."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from agc.cli.model_options import add_model_options, describe
from agc.files import named_files, written
from agc.packages import need
from agc.weights import FORMS, convert

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the command ``convert`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser("convert", help="convert NFNet weights between frameworks")
    command.add_argument("source", type=Path, metavar="SRC", help="file of any form")
    command.add_argument("target", type=Path, metavar="DST", help="file to write")
    command.add_argument("--to", required=True, choices=list(FORMS), help="form of DST")
    add_model_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    progress = need("rich.progress", "agc convert")
    console = need("rich.console", "agc convert").Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=console, transient=True)
    task = bar.add_task("reading", total=None)

    def advance(name: str, size: int, total: int) -> None:
        bar.update(task, description=name, total=total, advance=size)

    # Older releases of rich print an empty line for a bar that is switched off.
    with named_files(), bar if console.is_terminal else nullcontext():
        converted = convert(
            arguments.source,
            arguments.target,
            arguments.to,
            variant=arguments.variant,
            activation=arguments.activation,
            ws_eps=arguments.ws_eps,
            progress=advance,
        )
    print(
        f"{written(arguments.target)}: {arguments.to} weights of {describe(converted.options)}, "
        f"{len(converted.tensors)} tensors, {converted.nbytes / 1e6:.1f} MB, from {converted.form}"
    )
    if not converted.complete:
        print(
            f"{arguments.source} does not say how it was trained; taken for activation={converted.options.activation}, "
            f"ws_eps={converted.options.ws_eps}. DeepMind's weights, also timm's dm_nfnet_*.dm_in1k, are gelu and "
            "deepmind; for what you trained with timm, say --activation gelu_erf --ws-eps timm",
            file=sys.stderr,
        )
    return 0
