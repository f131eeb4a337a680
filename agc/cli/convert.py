"""``agc convert``: NFNet weights from any framework's file to any other's."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from agc.cli.model_options import add_model_options, add_which_option, describe
from agc.files import named_files, written
from agc.packages import need
from agc.weights import FORMS, convert

__all__ = ["register"]

_EXAMPLE: Final = """\
examples:
  agc convert F0_haiku.npz F0.safetensors --to neutral
  agc convert model_best.pth.tar mine.safetensors --to torch --weights ema
  agc convert run mine.safetensors --to flax                a folder of agc train
  agc convert last.ckpt mine.safetensors --to keras --key state_dict.net
"""


def register(subparsers: Any) -> None:
    """Add the command ``convert`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser(
        "convert",
        help="convert NFNet weights between frameworks",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source", type=Path, metavar="SRC", help="file of any form, or folder of agc train"
    )
    command.add_argument("target", type=Path, metavar="DST", help="file to write")
    command.add_argument("--to", required=True, choices=list(FORMS), help="form of DST")
    add_which_option(command, "--weights")
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
            key=arguments.key,
            weights=arguments.which,
            progress=advance,
        )
    print(
        f"{written(arguments.target)}: {arguments.to} weights of {describe(converted.options)}, "
        f"{len(converted.tensors)} tensors, {converted.nbytes / 1e6:.1f} MB, from {converted.form}"
    )
    for note in converted.notes:
        print(note, file=sys.stderr)
    return 0
