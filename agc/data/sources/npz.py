"""NumPy's ``.npz`` files with the arrays ``images`` and ``labels``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from agc.data.sources.rows import Arrays, check_labels
from agc.errors import FormatError

__all__ = ["open_npz"]


def open_npz(path: Path, num_classes: int) -> Arrays:
    """Read uint8 images, shape (n, height, width[, channels]), and integer labels, shape (n,).

    Raises
    ------
    FormatError
        If the file is missing or is not this; the message names it.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(
            f"{path}: cannot be read as an .npz file with 'images' and 'labels': {error}"
        ) from None
    except (TypeError, AttributeError):  # an .npy file is an array, which is no context
        raise FormatError(
            f"{path}: is one array, no .npz file with 'images' and 'labels'"
        ) from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise FormatError(
            f"{path}: images must be uint8, shape (n, height, width) or (n, height, width, "
            f"channels), got {images.dtype} of the shape {images.shape}"
        )
    check_labels(labels, len(images), num_classes, str(path))
    return Arrays(images, labels)
