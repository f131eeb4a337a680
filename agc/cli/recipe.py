"""``agc recipe``: see, check and compare recipe files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from agc.data import PARTS, Batches, Evaluation, digest, open_source
from agc.recipe import Recipe, load_recipe, shipped_recipes, to_toml
from agc.recipe.files import flat

__all__ = ["register"]

_EXAMPLE: Final = """\
examples:
  agc recipe show nfnet-f0
  agc recipe show nfnet-f0 --set train.batch=1024 > mine.toml
  agc recipe check mine.toml --data /data/imagenet
  agc recipe diff nfnet-f0 mine.toml
"""


def register(subparsers: Any) -> None:
    """Add the command ``recipe`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser(
        "recipe",
        help="see, check and compare training recipes",
        epilog=f"{_EXAMPLE}\nrecipes of this package: {', '.join(shipped_recipes())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)

    show = actions.add_parser("show", help="write a recipe as TOML, every default filled in")
    _add_recipe(show, "recipe")
    _add_changes(show)
    show.add_argument("--json", action="store_true", help="the JSON whose SHA-256 is the id")
    show.set_defaults(run=_show)

    check = actions.add_parser("check", help="report the first mistake, or the length and the id")
    _add_recipe(check, "recipe")
    _add_changes(check)
    check.add_argument(
        "--data", type=Path, metavar="DIR", help="open the images in this folder too"
    )
    check.set_defaults(run=_check)

    diff = actions.add_parser("diff", help="list the keys that differ; exit status 1 if any does")
    _add_recipe(diff, "first")
    _add_recipe(diff, "second")
    diff.set_defaults(run=_diff)


def _add_recipe(parser: Any, name: str) -> None:
    parser.add_argument(name, metavar="RECIPE", help="name of a recipe, or path of a .toml file")


def _add_changes(parser: Any) -> None:
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key, as TOML: train.steps=100",
    )


def _show(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.changes)
    if arguments.json:
        print(recipe.canonical())
    else:
        print("".join(f"# {line}\n" for line in _summary(recipe)) + to_toml(recipe), end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.changes)
    print(f"{arguments.recipe} is valid", *_summary(recipe), sep="\n")
    for key, note in recipe.notes.items():
        print(f"{key}: {note}")
    if arguments.data is not None:
        train, test = (open_source(recipe, part, arguments.data) for part in PARTS)
        Evaluation(recipe, test, batch=1)[0]
        print(f"first batch: SHA-256 {digest(Batches(recipe, train)[0])}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    first, second = (flat(load_recipe(name)) for name in (arguments.first, arguments.second))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    for key in keys:
        print(f"{key}: {_shown(first.get(key))} -> {_shown(second.get(key))}")
    return 1 if keys else 0


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def _summary(recipe: Recipe) -> list[str]:
    """Say what no single key says: the id, and lengths in steps."""
    return [
        f"id {recipe.id}",
        f"{recipe.steps} steps, {recipe.epoch:g} an epoch; "
        f"warm-up of {recipe.warmup:g} steps to the rate {recipe.peak:g}",
    ]
