"""Fashion-MNIST in two halves, classes 0 to 4 and 5 to 9, for what is learned from one for another.

A file has the first so many images of each of five classes, in their order, with labels from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from agc.data.sources.idx import open_idx
from agc.files import replacing

__all__ = ["CLASSES", "half", "write_halves"]

CLASSES: Final = 5
"""Of each half."""

_FILES: Final = (
    ("train", 0, 6000),
    ("t10k", 0, 1000),
    ("train", 5, 200),
    ("t10k", 5, 1000),
)
"""Split, lowest class, and images of each class."""


def half(lowest: int, images: int) -> list[str]:
    """Return the changes of a recipe for a half.

    Parameters
    ----------
    lowest : {0, 5}
        Its first class.
    images : int
        Of each class, to train on: 6000 of the first half, 200 of the second.
    """
    parts = {"train": ("train", lowest, images), "test": ("t10k", lowest, 1000)}
    return [
        f'data.{part}={{kind="npz", split="{_name(*file)}", images={CLASSES * file[-1]}}}'
        for part, file in parts.items()
    ]


def write_halves(source: Path, folder: Path) -> Path:
    """Write those ``.npz`` files that are not there, and return their folder.

    Parameters
    ----------
    source : Path
        Folder of Fashion-MNIST.
    folder : Path
        Made if it does not exist, in a folder that does.

    Raises
    ------
    FormatError
        If Fashion-MNIST cannot be read.
    OSError
        If a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for split, lowest, count in _FILES:
        path = folder / f"{_name(split, lowest, count)}.npz"
        if path.exists():
            continue
        rows = open_idx(source, split, 2 * CLASSES)
        labels = np.array([rows[index][1] for index in range(len(rows))])
        wanted = [np.flatnonzero(labels == lowest + n)[:count] for n in range(CLASSES)]
        chosen = np.sort(np.concatenate(wanted))
        images = np.stack([rows[index][0] for index in chosen])
        with replacing(path) as file:
            np.savez(file, images=images, labels=labels[chosen] - lowest)
    return folder


def _name(split: str, lowest: int, images: int) -> str:
    return f"{split}-{lowest}-{images}"
