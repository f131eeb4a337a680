"""The commands ``agc convert`` and ``agc classify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from agc.errors import ConfigError, NonFiniteError
from agc.files import named_files, written
from agc.nfnet import VARIANTS, WS_EPS, Options
from agc.weights.classify import (
    BACKENDS,
    Guess,
    class_names,
    classifier,
    random_weights,
    read_image,
    read_names,
    top,
    untrained,
)
from agc.weights.files import need
from agc.weights.forms import FORMS
from agc.weights.store import convert, open_weights

__all__ = ["register"]

_RANDOM = "random"


def register(subparsers: Any) -> None:
    """Add both commands to ``agc``."""
    command = subparsers.add_parser("convert", help="convert NFNet weights between frameworks")
    command.add_argument("source", type=Path, metavar="SRC", help="file of any form")
    command.add_argument("target", type=Path, metavar="DST", help="file to write")
    command.add_argument("--to", required=True, choices=list(FORMS), help="form of DST")
    _add_options(command)
    command.set_defaults(run=_convert)

    command = subparsers.add_parser("classify", help="say what photographs show, with an NFNet")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="photograph")
    command.add_argument(
        "--weights", required=True, metavar="FILE", help=f"file of any form, or '{_RANDOM}'"
    )
    command.add_argument("--backend", required=True, choices=list(BACKENDS), help="framework")
    command.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes an image (5)")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_options(command)
    command.set_defaults(run=_classify)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", help=f"what it must be: {', '.join(VARIANTS)}")
    parser.add_argument("--activation", help="instead of what the file says; timm's is gelu_erf")
    parser.add_argument("--ws-eps", choices=list(WS_EPS), help="instead of what the file says")


def _convert(chosen: argparse.Namespace) -> int:
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

    # Where nobody looks on, older releases of rich print an empty line for a bar that is switched off.
    with named_files(), bar if console.is_terminal else nullcontext():
        found = convert(
            chosen.source,
            chosen.target,
            chosen.to,
            variant=chosen.variant,
            activation=chosen.activation,
            ws_eps=chosen.ws_eps,
            progress=advance,
        )
    print(
        f"{written(chosen.target)}: {chosen.to} weights of {_describe(found.options)}, "
        f"{len(found.tensors)} tensors, {found.nbytes / 1e6:.1f} MB, from {found.form}"
    )
    if not found.complete:
        print(
            f"{chosen.source} does not say how it was trained; taken for activation={found.options.activation}, "
            f"ws_eps={found.options.ws_eps}. DeepMind's weights, also timm's dm_nfnet_*.dm_in1k, are gelu and "
            "deepmind; for what you trained with timm, say --activation gelu_erf --ws-eps timm",
            file=sys.stderr,
        )
    return 0


def _classify(chosen: argparse.Namespace) -> int:
    with named_files():
        if chosen.weights == _RANDOM:
            options, arrays = random_weights(chosen.variant or "tiny")
            options = _override(options, activation=chosen.activation, ws_eps=chosen.ws_eps)
        else:
            with open_weights(
                chosen.weights,
                variant=chosen.variant,
                activation=chosen.activation,
                ws_eps=chosen.ws_eps,
            ) as weights:
                options, arrays = weights.options, weights.arrays()
        if chosen.top < 1:
            raise ConfigError(f"--top must be >= 1, got {chosen.top}")
        classes = options.num_classes
        names = read_names(chosen.labels, classes) if chosen.labels else class_names(classes)
        model = classifier(chosen.backend, options, arrays)
        pixels = options.variant.test_pixels
        found = {}
        for path in chosen.images:
            logits = model(read_image(path, pixels)[None])[0]
            try:
                found[path] = top(logits, chosen.top, names)
            except NonFiniteError as error:
                raise NonFiniteError(f"{path} with {chosen.weights}: {error}") from None
    note = None
    if chosen.weights == _RANDOM:
        note = "THE WEIGHTS ARE RANDOM: these answers mean nothing"
    elif untrained(arrays):
        note = "THE WEIGHTS LOOK UNTRAINED, with every gain and bias as at the start: these answers mean nothing"
    if chosen.json:
        _print_json(chosen, options, note, found)
    else:
        _print_tables(chosen, options, note, found)
    return 0


def _override(options: Options, **given: str | None) -> Options:
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(options, **changes)


def _print_json(
    chosen: argparse.Namespace, options: Options, note: str | None, found: dict[Path, list[Guess]]
) -> None:
    document = {
        "weights": chosen.weights,
        "trained": note is None,
        "note": note,
        "backend": chosen.backend,
        "variant": options.variant.name,
        "pixels": options.variant.test_pixels,
        "images": [
            {"image": str(path), "top": [dataclasses.asdict(guess) for guess in guesses]}
            for path, guesses in found.items()
        ],
    }
    print(json.dumps(document, indent=2))


def _print_tables(
    chosen: argparse.Namespace, options: Options, note: str | None, found: dict[Path, list[Guess]]
) -> None:
    console = need("rich.console", "agc classify").Console()
    table = need("rich.table", "agc classify").Table
    text = need("rich.text", "agc classify").Text

    def say(line: str, **how: Any) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True, **how)

    say(f"{_describe(options)} with {chosen.backend}, weights: {chosen.weights}")
    for path, guesses in found.items():
        say(str(path))
        shown = table()
        shown.add_column("class", justify="right")
        if any(guess.name is not None for guess in guesses):
            shown.add_column("name")
        shown.add_column("probability", justify="right")
        for guess in guesses:
            name = [] if guess.name is None else [text(guess.name)]
            shown.add_row(str(guess.index), *name, f"{guess.probability:.1%}")
        console.print(shown)
    if any(guess.name is None for guesses in found.values() for guess in guesses):
        say("(no names of classes; give them with --labels FILE)")
    if note is not None:
        say(note, style="bold red")


def _describe(options: Options) -> str:
    return f"NFNet-{options.variant.name}, {options.num_classes} classes"
