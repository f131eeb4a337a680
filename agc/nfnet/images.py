"""Images as the released weights were evaluated on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import ConfigError, DTypeError, ShapeError

__all__ = ["MEAN", "MORE", "STD", "evaluation_image", "normalise", "resize_bicubic"]

Array = npt.NDArray[np.float32]

MEAN: Final = (0.485, 0.456, 0.406)
"""Of ImageNet's red, green and blue, for values from 0 to 1."""

STD: Final = (0.229, 0.224, 0.225)
"""Standard deviations to go with :data:`MEAN`."""

MORE: Final = 32
"""Images are resized to this many pixels more than the model takes, then cropped."""

_TABLE: Final = 1024
"""TensorFlow rounds positions between two pixels to this fraction."""
_GRID: Final = 2.0**16
_FINE: Final = 2.0**24


def evaluation_image(
    image: npt.NDArray[Any],
    pixels: int,
    *,
    more: int = MORE,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    resize: Callable[[npt.NDArray[Any], int, int], Array] | None = None,
) -> Array:
    """Return an image as DeepMind's evaluation gives it to the model.

    Both sides are resized to ``pixels + more``, whatever the image's proportions, the middle is cut
    out, and mean and standard deviation make it standard. What bicubic interpolation overshoots
    stays.

    Parameters
    ----------
    image : uint8 array, shape (height, width, channels)
        As many channels as ``mean`` has numbers: red, green and blue by default.
    pixels : int
        Side of the result: ``variant.test_pixels``.
    more : int
        Pixels that are cut off in all.
    mean, std : sequence of float
        Of each channel, for values from 0 to 1; ImageNet's by default.
    resize : callable, optional
        Takes an image, a height and a width; :func:`resize_bicubic` if None.

    Returns
    -------
    float32 array, shape (pixels, pixels, channels)

    Raises
    ------
    ShapeError, DTypeError
        If it is not such an image.
    """
    channels = len(mean)
    if image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
        raise ShapeError(
            f"image must have the shape (height, width, {channels}), got {image.shape}"
        )
    if image.dtype != np.uint8:
        raise DTypeError(f"image must be uint8, from 0 to 255, got {image.dtype}")
    if pixels < 1:
        raise ShapeError(f"pixels must be >= 1, got {pixels}")
    start = (more + 1) // 2
    middle = slice(start, start + pixels)
    resized = (resize or resize_bicubic)(image, pixels + more, pixels + more)
    return normalise(resized[middle, middle], mean, std)


def normalise(
    images: npt.NDArray[Any], mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Array:
    """Subtract the mean of each channel and divide by its standard deviation, in float64.

    Parameters
    ----------
    images : array, shape (..., channels)
        Values from 0 to 255.
    mean, std : sequence of float
        For values from 0 to 1.

    Returns
    -------
    float32 array of the same shape

    Raises
    ------
    ConfigError
        If there is not a mean and a deviation for each channel.
    """
    channels = images.shape[-1]
    if not len(mean) == len(std) == channels:
        raise ConfigError(
            f"mean and std must have a number for each of the {channels} channels of images of "
            f"shape {images.shape}, got {len(mean)} and {len(std)}"
        )
    # Whole rows at a time: NumPy is slow along an axis of three.
    rows = images.reshape(*images.shape[:-2], -1) if images.ndim > 1 else images
    times = rows.shape[-1] // channels
    means, stds = (np.tile(255 * np.array(each), times) for each in (mean, std))
    standard = rows - means
    standard /= stds
    return np.asarray(standard, np.float32).reshape(images.shape)


def resize_bicubic(image: npt.NDArray[Any], height: int, width: int) -> Array:
    """Resize as ``tf.image.resize(image, (height, width), "bicubic")`` does: without antialiasing.

    Keys' cubic with a = -0.5 between pixel centres; where it would reach beyond the image, the
    remaining weights are scaled to sum to 1. Positions between two pixels are multiples of 1/1024,
    as there.

    Weights are rounded to multiples of 2^-24, rows in between to 2^-16. All sums of a uint8 image
    are then exact in float64, so that the result has the same bits whatever adds them up.

    Parameters
    ----------
    image : array, shape (h, w, channels)
    height, width : int
        Of the result.

    Returns
    -------
    float32 array, shape (height, width, channels)
    """
    rows = _along_first_axis(image, height)
    rows *= _GRID
    np.rint(rows, out=rows)
    rows /= _GRID
    return _transposed(_along_first_axis(_transposed(rows, np.float64), width), np.float32)


def _along_first_axis(image: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    index, weights = _taps(len(image), size)
    flat = np.ascontiguousarray(image, np.float64).reshape(len(image), -1)
    result: npt.NDArray[np.float64] = np.matmul(weights[:, None], flat[index])
    return result.reshape(size, *image.shape[1:])


def _transposed(image: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Exchange rows and columns, a channel at a time: NumPy is slow along an axis of three."""
    height, width, channels = image.shape
    result = np.empty((width, height, channels), dtype)
    for channel in range(channels):
        result[:, :, channel] = image[:, :, channel].T
    return result


@lru_cache(maxsize=256)
def _taps(length: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return which pixels each output is made of, shape (size, 4), and their weights."""
    # In float32, because TensorFlow's rounding decides which fraction is nearest.
    scale = np.float32(length) / np.float32(size)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    first = np.floor(centres).astype(np.int64)
    place = np.rint((centres - first.astype(np.float32)) * np.float32(_TABLE))
    steps = np.arange(-1, 3)
    index = first[:, None] + steps
    weights = _keys(np.abs(place.astype(np.float64)[:, None] / _TABLE - steps))
    weights[(index < 0) | (index >= length)] = 0
    weights = np.rint(weights / weights.sum(axis=1, keepdims=True) * _FINE) / _FINE
    weights[np.arange(size), weights.argmax(axis=1)] += 1 - weights.sum(axis=1)
    return np.clip(index, 0, length - 1), weights


def _keys(distance: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Cubic convolution with a = -0.5 (Keys 1981), for distances up to 2."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.asarray(np.where(distance <= 1, near, far))
