"""Pairs of IDX files, the form of MNIST: ``train-images-idx3-ubyte`` and ``-labels-idx1-ubyte``."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.data.sources.rows import Arrays, check_labels
from agc.errors import FormatError

__all__ = ["open_idx"]


def open_idx(folder: Path, split: str, num_classes: int) -> Arrays:
    """Read ``{split}-images-idx3-ubyte`` and ``{split}-labels-idx1-ubyte``, or those in ``.gz``.

    Raises
    ------
    FormatError
        If a file is missing, not IDX or truncated, or the two do not fit; the message names it.
    """
    images = _read(folder, f"{split}-images-idx3-ubyte", 3)
    labels = _read(folder, f"{split}-labels-idx1-ubyte", 1)
    check_labels(labels, len(images), num_classes, f"{folder}, split {split!r}")
    return Arrays(images, labels)


def _read(folder: Path, name: str, axes: int) -> npt.NDArray[Any]:
    paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not paths:
        raise FormatError(
            f"{folder}: there is neither {name} nor {name}.gz; Fashion-MNIST is in Debian's package "
            "dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist"
        )
    path = paths[0]
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes([0, 0, 8, axes]):
        raise FormatError(f"{path}: is not an IDX file of bytes with {axes} axes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", axes, 4))
    if len(data) != header + math.prod(shape):
        raise FormatError(
            f"{path}: the header says {shape}, which is {math.prod(shape)} bytes, and there are "
            f"{len(data) - header}; the file is truncated or damaged"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
