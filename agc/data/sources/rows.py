"""Rows of any source as arrays, checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError

__all__ = ["Arrays", "Source", "check_labels", "read_row"]

Image = npt.NDArray[np.uint8]


class Source(Protocol):
    """Labelled images by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Arrays:
    """Images and labels that are in memory.

    Parameters
    ----------
    images : uint8 array, shape (n, height, width) or (n, height, width, channels)
    labels : integer array, shape (n,)
    """

    def __init__(self, images: Image, labels: npt.NDArray[Any]) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self._images[index], int(self._labels[index])


def check_labels(labels: npt.NDArray[Any], images: int, num_classes: int, where: str) -> None:
    """Raise FormatError unless each image has a label from 0 to ``num_classes - 1``."""
    if labels.ndim != 1 or len(labels) != images:
        raise FormatError(f"{where}: {images} images have labels of the shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise FormatError(f"{where}: labels must be integers, got {labels.dtype}")
    if images and not 0 <= labels.min() <= labels.max() < num_classes:
        raise FormatError(
            f"{where}: labels reach from {labels.min()} to {labels.max()}, and the model has "
            f"num_classes={num_classes}"
        )


def read_row(source: Source, index: int, channels: int, num_classes: int) -> tuple[Image, int]:
    """Return an image, shape (height, width, channels), and its label.

    Grey images are repeated where the model takes three channels.

    Raises
    ------
    FormatError
        If the row is not an image of at least one pixel with a label that the model has; the
        message has the row's number.
    """
    row = source[index]
    try:
        image, label = (row["image"], row["label"]) if isinstance(row, Mapping) else row
        label = operator.index(label)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"row {index} must be a pair (image, label) or have the keys 'image' and 'label', and "
            f"an integer as the label: {type(error).__name__}: {error}"
        ) from None
    if hasattr(image, "convert"):
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise FormatError(
            f"row {index}: an image is uint8, shape (height, width) or (height, width, channels), "
            f"got {pixels.dtype} of the shape {pixels.shape}"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise FormatError(
            f"row {index}: the image has {pixels.shape[2]} channels, and the model has "
            f"in_channels={channels}"
        )
    if not 0 <= label < num_classes:
        raise FormatError(
            f"row {index} has the label {label}, and the model has num_classes={num_classes}"
        )
    return pixels, label
