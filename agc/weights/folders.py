"""Folders of ``agc train`` as sources of weights; :mod:`agc.training.checkpoints` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from agc.errors import FormatError
from agc.weights.choice import WhichWeights

__all__ = ["FACTS", "SHARDED", "STEP", "sharded_way_out", "weights_file"]

STEP: Final = re.compile(r"step-(\d{6,})")
"""Name of a checkpoint's folder."""
FACTS: Final = "state.json"
"""Name of the file in it that has the recipe."""
SHARDED: Final = "sharded"
"""Name of the folder in it that has a framework's own form, in place of arrays."""

_FILES: Final[dict[WhichWeights, str]] = {
    "raw": "parameters.safetensors",
    "ema": "ema.safetensors",
}
_SUFFIXES: Final = (
    ".index.json", ".safetensors", ".keras", ".h5", ".npz", ".pt", ".pth", ".bin", ".ckpt",
)  # fmt: skip
"""How names of weights end; an index comes before its shards."""


def weights_file(folder: Path, weights: WhichWeights | None) -> tuple[Path, str | None]:
    """Return a checkpoint's file of weights, and a note if nobody said which.

    Parameters
    ----------
    folder : Path
        A checkpoint, or the folder of a training, whose newest checkpoint is meant.
    weights : {"raw", "ema"}, optional
        Which; averaged ones if its recipe evaluates them, if None.

    Raises
    ------
    FormatError
        If there is no checkpoint, or it has no such weights.
    """
    steps = {
        int(found[1]): path for path in folder.iterdir() if (found := STEP.fullmatch(path.name))
    }
    if steps:
        folder = steps[max(steps)]
    if (folder / SHARDED).is_dir():
        raise FormatError(f"{folder}: {sharded_way_out(folder)}")
    if not (folder / _FILES["raw"]).is_file():
        raise FormatError(
            f"{folder}: a folder without a checkpoint of agc train; name a file of weights"
            f"{_such_as(folder)}"
        )
    which = weights or _evaluated(folder)
    file = folder / _FILES[which]
    if not file.is_file():
        raise FormatError(f"{folder}: has no {file.name}: its recipe has no average of the weights")
    if weights is not None or which == "raw":
        return file, None
    return file, f"{folder}: took {file.name}, which its recipe evaluates, not {_FILES['raw']}"


def _such_as(folder: Path) -> str:
    """Return words that name a file of the folder that looks like weights, if there is one."""
    found = (path for suffix in _SUFFIXES for path in sorted(folder.glob(f"*{suffix}")))
    path = next(found, None)
    return "" if path is None else f", such as {path}"


def sharded_way_out(folder: Path) -> str:
    """Return what to do with a sharded checkpoint where a portable one is needed."""
    step = int(folder.name.removeprefix("step-"))
    return (
        "a sharded checkpoint, in a framework's own form; make it portable with "
        f"agc checkpoint export {folder.parent} {step}"
    )


def _evaluated(folder: Path) -> WhichWeights:
    """Return which weights the recipe of a checkpoint evaluates; averaged ones if both."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return "ema" if "ema" in facts["recipe"]["evaluate"]["weights"] else "raw"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{folder / FACTS}: does not say which weights its recipe evaluates; {error}; "
            "say which: raw or ema"
        ) from None
