"""The ``agc`` command: every subcommand is an entry point of the group ``agc.commands``.

An entry point is a function that takes argparse's subparsers, adds one command, and sets ``run`` to
a function of the parsed arguments that returns the exit status. Each module of this package that is
named after a command is one; other packages add theirs in the same way.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from agc import __version__
from agc.errors import AGCError
from agc.packages import missing

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 if something failed, 2 for misuse."""
    parser = argparse.ArgumentParser(
        prog="agc", description="Adaptive gradient clipping, proven equal."
    )
    parser.add_argument("--version", action="version", version=f"agc-sam {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for entry_point in sorted(entry_points(group="agc.commands"), key=lambda point: point.name):
        try:
            entry_point.load()(commands)
        except ImportError as error:
            _add_missing(commands, entry_point.name, error)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe (`| head`): keep the flush at exit from raising again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AGCError, OSError) as error:
        print(f"agc: {error}", file=sys.stderr)
        return 2
    return status


def _add_missing(commands: Any, name: str, cause: ImportError) -> None:
    """Add a command whose packages are not installed: it says so when it is called."""

    def explain(_: argparse.Namespace) -> int:
        raise missing(f"'agc {name}'", cause, name)

    # No argument starts with a null character, so none is refused as an unknown option.
    command = commands.add_parser(
        name, help="(needs packages that are not installed)", prefix_chars="\0", add_help=False
    )
    command.add_argument("rest", nargs="*")
    command.set_defaults(run=explain)
