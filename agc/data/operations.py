"""The sixteen operations of RandAugment on uint8 images, in NumPy.

They follow the EfficientNet code for TensorFlow, which DeepMind's pipeline uses, and take and
return arrays of shape (height, width, 1) or (height, width, 3).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "FILL",
    "autocontrast",
    "blend",
    "cutout",
    "equalize",
    "grey",
    "invert",
    "posterize",
    "rotate",
    "sharpness",
    "shear",
    "solarize",
    "solarize_add",
    "translate",
    "warp",
]

Image = npt.NDArray[np.uint8]

FILL: Final = 128
"""Value of pixels from outside the image."""


def blend(other: Image, image: Image, factor: float) -> Image:
    """Return ``other + factor * (image - other)``, clipped and truncated; may extrapolate."""
    if factor == 1:
        return image
    start = other.astype(np.float32)
    mixed = start + np.float32(factor) * (image.astype(np.float32) - start)
    result: Image = np.clip(mixed, 0, 255).astype(np.uint8)
    return result


def grey(image: Image) -> Image:
    """Return the luma as an image of one channel: TensorFlow's ``rgb_to_grayscale``."""
    if image.shape[2] == 1:
        return image
    red, green, blue = np.moveaxis(image.astype(np.int64), 2, 0)
    # 0.2989 R + 0.5870 G + 0.1140 B of values to 1, times 255.5, truncated.
    luma = (2989 * red + 5870 * green + 1140 * blue) * 511 // 5_100_000
    return np.asarray(luma[:, :, None], np.uint8)


def sharpness(image: Image, factor: float) -> Image:
    """Blend with the image smoothed by (1 1 1; 1 5 1; 1 1 1) / 13, but for the border."""
    wide = image.astype(np.int16)  # holds 13 * 255
    height, width = image.shape[:2]
    total = 4 * wide[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += wide[row : height - 2 + row, column : width - 2 + column]
    smooth = np.array(image)
    smooth[1:-1, 1:-1] = total // 13
    return blend(smooth, image, factor)


def autocontrast(image: Image) -> Image:
    """Stretch each channel so that its values reach from 0 to 255."""

    def table(channel: Image) -> Image:
        low, high = np.float32(channel.min()), np.float32(channel.max())
        values = np.arange(256, dtype=np.float32)
        if high > low:
            scale = np.float32(255) / (high - low)
            values = np.clip(values * scale - low * scale, 0, 255)
        return values.astype(np.uint8)

    return _by_channel(image, table)


def equalize(image: Image) -> Image:
    """Make the values of each channel equally frequent, as far as possible."""

    def table(channel: Image) -> Image:
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step == 0:
            return np.arange(256, dtype=np.uint8)
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return np.asarray(np.clip((below + step // 2) // step, 0, 255), np.uint8)

    return _by_channel(image, table)


def invert(image: Image) -> Image:
    """Return 255 minus the image."""
    return np.uint8(255) - image


def posterize(image: Image, bits: int) -> Image:
    """Keep the highest bits of each value."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: Image, threshold: int) -> Image:
    """Invert values from the threshold on."""
    return np.where(image < threshold, image, invert(image))


def solarize_add(image: Image, addition: int) -> Image:
    """Add to values below 128."""
    added = np.minimum(image.astype(np.int16) + np.int16(addition), 255).astype(np.uint8)
    return np.where(image < 128, added, image)


def cutout(image: Image, half: int, row: int, column: int) -> Image:
    """Fill a square around a pixel."""
    result = np.array(image)
    result[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = FILL
    return result


def rotate(image: Image, degrees: float) -> Image:
    """Turn around the middle, counter-clockwise for degrees above 0."""
    angle = degrees * math.pi / 180
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    down, right = np.float32(image.shape[0] - 1), np.float32(image.shape[1] - 1)
    across = (right - (cos * right - sin * down)) / np.float32(2)
    along = (down - (sin * right + cos * down)) / np.float32(2)
    return warp(image, (cos, -sin, across, sin, cos, along))


def shear(image: Image, x: float = 0.0, y: float = 0.0) -> Image:
    """Shift each row by ``x`` times its number, each column by ``y`` times its number."""
    return warp(image, (1, x, 0, y, 1, 0))


def translate(image: Image, x: float = 0.0, y: float = 0.0) -> Image:
    """Shift to the left by ``x`` pixels, and up by ``y``."""
    return warp(image, (1, 0, x, 0, 1, y))


def warp(image: Image, transform: tuple[Any, ...]) -> Image:
    """Take each pixel from the one nearest to where an affine map says.

    Parameters
    ----------
    image : uint8 array, shape (height, width, channels)
    transform : six numbers
        ``(a, b, c, d, e, f)``: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), in
        float32; halves are rounded away from zero. From outside comes :data:`FILL`. TensorFlow's
        op ``ImageProjectiveTransform`` gives the same bits.
    """
    a, b, c, d, e, f = map(np.float32, transform)
    height, width = image.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    column, row = _nearest(a * x + b * y + c), _nearest(d * x + e * y + f)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    result: Image = image.reshape(height * width, -1).take(
        row * width + column, axis=0, mode="clip"
    )
    result[~inside] = FILL
    return result


def _nearest(positions: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Round halves away from zero; in float64, where adding 0.5 is exact."""
    wide = positions.astype(np.float64)
    return np.trunc(wide + np.copysign(0.5, wide)).astype(np.int64)


def _by_channel(image: Image, table: Any) -> Image:
    """Replace each channel's values by what a table of that channel says."""
    channels = [table(image[:, :, n])[image[:, :, n]] for n in range(image.shape[2])]
    return np.stack(channels, axis=2)
