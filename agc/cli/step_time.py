"""``agc reproduce bn-step-time``: a step of an NFNet beside one of its batch-normalised twin.

Contestants take turns in one process, and what is reported is ratios of their times: whatever else
the machine does then slows all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from agc.cli.frameworks import Framework
from agc.cli.pictures import paper, write_picture
from agc.errors import ConfigError
from agc.files import write_text
from agc.nfnet import options

__all__ = ["NAME", "QUESTION", "step_time"]

NAME: Final = "bn-step-time"
QUESTION: Final = "How long does a step take without batch normalisation, and with it?"

SIZES: Final = {"mini": (64, 16), "tiny": (32, 32), "F0": (8, 64)}
"""Variant to images of a batch, and pixels of their sides."""
SECONDS: Final = 30.0
"""For the rounds of a variant, of which there are at least five."""
TWIN: Final = "twin"
ROWS: Final = {"clipped": "with AGC", "plain": "without clipping"}


def step_time(
    name: str, framework: Framework, folder: Path, console: Console, stop: Callable[[], bool]
) -> bool:
    """Measure a framework, and draw it beside others that are in the folder.

    Parameters
    ----------
    name, framework
        A framework and its name.
    folder : Path
        For ``results.json`` and ``figure.svg``.
    console : Console
        Of the table.
    stop : callable
        Whether to stop after the round under way; nothing is written then.

    Returns
    -------
    bool
        Whether it is finished.

    Raises
    ------
    ConfigError
        If the framework has no batch-normalised twin.
    OSError
        If the files cannot be read or written.
    """
    if not hasattr(framework, "contest"):
        raise ConfigError(
            f"{NAME} is not offered in {name} as yet: its NFNet has no batch-normalised twin"
        )
    path = folder / "results.json"
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    found = [result for result in known if result["framework"] != name]
    for variant, (batch, pixels) in SIZES.items():
        console.print(f"{variant}, batch {batch}, {pixels} pixels", highlight=False)
        random = np.random.default_rng(0)
        images = random.standard_normal((batch, pixels, pixels, 3), np.float32)
        labels = random.integers(0, 10, batch)
        model = options(variant, 10, dropout=0.0, stochastic_depth=0.0)
        contest = framework.contest(model, images, labels)
        rounds = _rounds(contest.steps, stop)
        if rounds is None:
            return False
        size = {"variant": variant, "batch": batch, "pixels": pixels}
        of = {"framework": name, "facts": dict(contest.facts)} | size
        found.append(of | {"rounds": len(rounds[TWIN]), "ratios": _ratios(rounds)})
    found.sort(key=lambda result: (result["framework"], list(SIZES).index(result["variant"])))
    console.print(QUESTION, _table(found), highlight=False)
    write_text(path, json.dumps({"question": QUESTION, "results": found}) + "\n")
    _draw(found, folder / "figure.svg")
    return True


def _rounds(
    steps: Mapping[str, Callable[[], float]], stop: Callable[[], bool]
) -> dict[str, list[float]] | None:
    """Return the seconds of each contestant's turns; None if it was stopped."""
    for step in steps.values():
        step()  # compiles, or fills caches
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, begin = list(steps), time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(seconds[TWIN]) < 5:
        if stop():
            return None
        names.append(names.pop(0))  # nobody is always the first
        for name in names:
            before = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return how long the NFNet takes in units of its twin.

    ``minimum`` is the quotient of the shortest times, ``median`` and ``quartiles`` are of the
    quotients of all rounds.
    """
    twin = np.array(seconds[TWIN])
    ratios = {}
    for row in ROWS:
        own = np.array(seconds[row])
        low, median, high = np.quantile(own / twin, [0.25, 0.5, 0.75]).tolist()
        shortest = float(own.min() / twin.min())
        ratios[row] = {"minimum": shortest, "median": median, "quartiles": [low, high]}
    return ratios


def _rows(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield a label, the key of a contestant, and its ratios."""
    for result in found:
        label = "{framework}, {variant}\n{batch} images of {pixels} px".format(**result)
        for row in ROWS:
            yield label, row, result["ratios"][row]


def _table(found: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title="Time of an NFNet's step in steps of its twin", title_justify="left")
    for title in ("model", "", "minimum", "median", "quartiles"):
        shown.add_column(title)
    for label, row, ratios in _rows(found):
        numbers = f"{ratios['minimum']:.2f}", f"{ratios['median']:.2f}"
        quartiles = " to ".join(f"{value:.2f}" for value in ratios["quartiles"])
        shown.add_row(label.replace("\n", ", "), ROWS[row], *numbers, quartiles)
    return shown


def _draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    labels = list(dict.fromkeys(label for label, _, _ in _rows(found)))
    with paper(6, 1.2 + 0.5 * len(labels)) as figure:
        ax = figure.subplots()
        for number, row in enumerate(ROWS):
            of = [(labels.index(label), r) for label, key, r in _rows(found) if key == row]
            height = [place + 0.3 * number - 0.15 for place, _ in of]
            ax.hlines(height, *zip(*(r["quartiles"] for _, r in of), strict=True), f"C{number}")
            ax.plot([r["minimum"] for _, r in of], height, "o", color=f"C{number}", label=ROWS[row])
        ax.axvline(1, color="gray", linestyle=":")
        ax.set_xlim(0, 1.05 * ax.get_xlim()[1])
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_yticks(range(len(labels)), labels)
        ax.set_xlabel(
            "time of a step in steps of the batch-normalised twin\n"
            "(dot: shortest times; line: quartiles of all rounds)"
        )
        ax.legend(title="NFNet", loc="center left", bbox_to_anchor=(1, 0.5))
        write_picture(figure, path)
