"""``agc checkpoint``: checkpoints of ``agc train``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from agc.cli.frameworks import load_framework
from agc.errors import FormatError
from agc.recipe import Recipe
from agc.training import Checkpoints, Launch, ShardedTrainer
from agc.weights.folders import FACTS, STEP

__all__ = ["register"]

_EXAMPLE: Final = """\
examples:
  agc checkpoint export run            the newest
  agc checkpoint export run 12000
"""


def register(subparsers: Any) -> None:
    """Add the command ``checkpoint`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser(
        "checkpoint",
        help="make sharded checkpoints portable",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    export = actions.add_parser("export", help="put the portable form in place of a sharded one")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder of agc train")
    export.add_argument("step", type=int, nargs="?", metavar="STEP", help="the newest if left out")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    folder, step = arguments.folder, arguments.step
    if step is None:
        names = [STEP.fullmatch(path.name) for path in folder.iterdir()]
        step = max((int(name[1]) for name in names if name), default=0)
    file = folder / f"step-{step:06d}" / FACTS
    try:
        recipe = Recipe.from_dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file}: cannot be read as a checkpoint's state: {error}") from None
    checkpoints = Checkpoints(folder, recipe)
    facts, sharded = checkpoints.facts(step), checkpoints.sharded(step)
    if sharded is None:
        print(f"{checkpoints.path(step)}: is portable already")
        return 0
    name = str(facts.get("framework"))
    framework = load_framework(name, f"agc checkpoint in {name}", f"{name},weights")
    trainer: ShardedTrainer = framework.trainer(recipe, Launch(sharded=True))  # type: ignore[assignment]
    trainer.load_sharded(sharded, step)
    checkpoints.save(replace(trainer.state(), facts=facts))
    print(f"{checkpoints.path(step)}: is portable now")
    return 0
