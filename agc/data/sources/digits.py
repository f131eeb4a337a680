"""The handwritten digits that scikit-learn has in it: 1,797 grey images of 8 x 8 pixels."""

from __future__ import annotations

from typing import Final

import numpy as np

from agc.data.sources.rows import Arrays, check_labels
from agc.errors import FormatError
from agc.packages import need

__all__ = ["open_digits"]

_SPLITS: Final = {"train": slice(0, 1500), "test": slice(1500, None)}


def open_digits(split: str, num_classes: int) -> Arrays:
    """Return the first 1,500 images for ``train``, the other 297 for ``test``.

    Raises
    ------
    FormatError
        If there is no such split, or the model has fewer than ten classes.
    MissingPackageError
        If scikit-learn is not installed.
    """
    if split not in _SPLITS:
        raise FormatError(f"the digits have the splits {', '.join(_SPLITS)}, not {split!r}")
    data = need("sklearn.datasets", "the source of digits", "demo").load_digits()
    part = _SPLITS[split]
    images = (data.images[part].astype(np.int64) * 255 // 16).astype(np.uint8)
    labels = np.asarray(data.target[part])
    check_labels(labels, len(images), num_classes, "digits")
    return Arrays(images, labels)
