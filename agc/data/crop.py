"""Which part of an image is taken in training: TensorFlow's rule and torchvision's (DATA-6b).

Both draw a rectangle until one fits. TensorFlow draws the aspect uniformly, then the *height*
uniformly between those of the smallest and largest area; torchvision draws the *area* uniformly and
the aspect log-uniformly. TensorFlow's crops, which NFNets were trained with, are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from agc.data.uniforms import integer
from agc.errors import ShapeError
from agc.recipe.tables import Crop

__all__ = ["DRAWS", "Box", "crop_box"]

DRAWS: Final = 4
"""Uniform numbers of one attempt."""

_GRID: Final = 2**16
"""What comes out of ``exp`` is rounded to multiples of 1 / this (DATA-4)."""


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.left + self.width)


def crop_box(height: int, width: int, pixels: int, crop: Crop, uniforms: Sequence[float]) -> Box:
    """Return the part of an image that is resized to the model's input.

    Parameters
    ----------
    height, width : int
        Of the image.
    pixels : int
        Side of the model's input; it decides how large the middle square is.
    crop : Crop
    uniforms : sequence of float
        :data:`DRAWS` numbers in [0, 1) for each of ``crop.attempts``.

    Raises
    ------
    ShapeError
        If the image is too small for the middle square.
    """
    whole = Box(0, 0, height, width)
    if crop.rule == "none":
        return whole
    attempt = _tensorflow if crop.rule == "tensorflow" else _torchvision
    for start in range(0, DRAWS * crop.attempts, DRAWS):
        box = attempt(height, width, crop, uniforms[start : start + DRAWS])
        if box is not None:
            break
    else:
        box = whole if crop.rule == "tensorflow" else _widest(height, width, crop)
    if crop.rule == "tensorflow" and box == whole:
        return _middle(height, width, pixels, crop.margin)
    return box


def _tensorflow(height: int, width: int, crop: Crop, uniforms: Sequence[float]) -> Box | None:
    """One attempt of ``tf.image.sample_distorted_bounding_box`` with the image as the object."""
    smallest, largest = (share * height * width for share in crop.area)
    low, high = crop.aspect
    aspect = low + uniforms[0] * (high - low)
    least, most = (round(math.sqrt(area / aspect)) for area in (smallest, largest))
    if round(most * aspect) > width:
        most = int((width + 0.5 - 1e-7) / aspect)
        if round(most * aspect) > width:
            most -= 1
    most = min(most, height)
    least = min(least, most)
    tall = least + integer(uniforms[1], most - least + 1)
    # Rounding may have left the bounds of the area by less than a row.
    if tall * round(tall * aspect) < smallest:
        tall += 1
    if tall * round(tall * aspect) > largest:
        tall -= 1
    wide = round(tall * aspect)
    area = tall * wide
    fits = 0 < wide <= width and tall <= height and smallest <= area <= largest
    if not fits or area < crop.covered * height * width:
        return None
    # The last place is never taken, in TensorFlow either.
    return Box(integer(uniforms[2], height - tall), integer(uniforms[3], width - wide), tall, wide)


def _torchvision(height: int, width: int, crop: Crop, uniforms: Sequence[float]) -> Box | None:
    """One attempt of ``torchvision.transforms.RandomResizedCrop``."""
    (smallest, largest), (low, high) = crop.area, map(math.log, crop.aspect)
    area = height * width * (smallest + uniforms[0] * (largest - smallest))
    aspect = round(math.exp(low + uniforms[1] * (high - low)) * _GRID) / _GRID
    wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if not (0 < wide <= width and 0 < tall <= height):
        return None
    top, left = integer(uniforms[2], height - tall + 1), integer(uniforms[3], width - wide + 1)
    return Box(top, left, tall, wide)


def _widest(height: int, width: int, crop: Crop) -> Box:
    """Return the largest middle part whose aspect is allowed: torchvision's last resort."""
    low, high = crop.aspect
    if width / height < low:
        return _centred(height, width, min(height, round(width / low)), width)
    if width / height > high:
        return _centred(height, width, height, min(width, round(height * high)))
    return Box(0, 0, height, width)


def _middle(height: int, width: int, pixels: int, margin: int) -> Box:
    """Return DeepMind's middle square: the crop of evaluation at the image's own resolution."""
    side = int(pixels / (pixels + margin) * min(height, width))
    if side < 1:
        raise ShapeError(
            f"an image of {height} x {width} pixels is smaller than the crop: "
            f"{pixels} / ({pixels} + {margin}) of its shorter side is less than a pixel"
        )
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return Box(top, left, side, side)


def _centred(height: int, width: int, tall: int, wide: int) -> Box:
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)
