"""RandAugment: so many operations in a row, each drawn from sixteen (arXiv:1909.13719).

The ``deepmind`` flavour is what NFNets were trained with, quirks included:

* Contrast blends with the grey of ``pixels / 256``, at most 255, instead of the image's mean: 144
  for 192 x 192 pixels, 255 from 256 x 256 on.
* Solarize has the threshold ``25.6 * magnitude`` modulo 256: at 10 every pixel is inverted.
* Posterize keeps more bits the larger the magnitude is.
* Color, Contrast, Brightness and Sharpness have the factor ``0.18 * magnitude + 0.1``, which at
  magnitude 5 is 1 and changes nothing.

In the ``clean`` flavour Contrast blends with the mean, and each of these operations is stronger the
larger the magnitude is, from nothing at 0 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from agc.data import operations
from agc.data.uniforms import integer
from agc.recipe.tables import Flavour, RandAugment

__all__ = ["DRAWS", "OPERATIONS", "apply", "randaugment"]

Image = npt.NDArray[np.uint8]

DRAWS: Final = 4
"""Uniform numbers of one layer: operation, sign, and the two places of Cutout."""

OPERATIONS: Final = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
"""In the order of the published code."""


def randaugment(image: Image, rule: RandAugment, uniforms: Sequence[float]) -> Image:
    """Apply ``rule.layers`` operations.

    Parameters
    ----------
    image : uint8 array, shape (height, width, channels)
        One or three channels.
    rule : RandAugment
    uniforms : sequence of float
        :data:`DRAWS` numbers in [0, 1) for each layer.
    """
    for start in range(0, DRAWS * rule.layers, DRAWS):
        draws = uniforms[start : start + DRAWS]
        name = OPERATIONS[integer(draws[0], len(OPERATIONS))]
        sign = -1 if draws[1] < 0.5 else 1
        image = apply(name, image, rule.magnitude, rule.flavour, sign, (draws[2], draws[3]))
    return image


def apply(
    name: str,
    image: Image,
    magnitude: float,
    flavour: Flavour = "deepmind",
    sign: int = 1,
    place: tuple[float, float] = (0.0, 0.0),
) -> Image:
    """Apply one operation.

    Parameters
    ----------
    name : str
        One of :data:`OPERATIONS`.
    image : uint8 array, shape (height, width, channels)
    magnitude : float
    flavour : {"deepmind", "clean"}
    sign : {1, -1}
        Direction of what has one.
    place : two numbers in [0, 1)
        Row and column of Cutout's centre, as shares of the image.
    """
    part = magnitude / 10
    clean = flavour == "clean"
    factor = max(0.0, 1 + sign * 0.9 * part) if clean else part * 1.8 + 0.1
    match name:
        case "AutoContrast":
            return operations.autocontrast(image)
        case "Equalize":
            return operations.equalize(image)
        case "Invert":
            return operations.invert(image)
        case "Rotate":
            return operations.rotate(image, sign * part * 30)
        case "Posterize":
            bits = min(8, int(part * 4))
            return operations.posterize(image, 8 - bits if clean else bits)
        case "Solarize":
            threshold = int(part * 256)
            threshold = max(0, 256 - threshold) if clean else threshold % 256
            return operations.solarize(image, threshold)
        case "Color":
            other = np.broadcast_to(operations.grey(image), image.shape)
            return operations.blend(other, image, factor)
        case "Contrast":
            middle = (
                _mean_grey(image) if clean else min(255, image.shape[0] * image.shape[1] // 256)
            )
            return operations.blend(np.full_like(image, middle), image, factor)
        case "Brightness":
            return operations.blend(np.zeros_like(image), image, factor)
        case "Sharpness":
            return operations.sharpness(image, factor)
        case "ShearX":
            return operations.shear(image, x=sign * part * 0.3)
        case "ShearY":
            return operations.shear(image, y=sign * part * 0.3)
        case "TranslateX":
            return operations.translate(image, x=sign * part * 100)
        case "TranslateY":
            return operations.translate(image, y=sign * part * 100)
        case "Cutout":
            row, column = (integer(u, n) for u, n in zip(place, image.shape, strict=False))
            return operations.cutout(image, int(part * 40), row, column)
        case "SolarizeAdd":
            return operations.solarize_add(image, int(part * 110))
    raise ValueError(name)


def _mean_grey(image: Image) -> int:
    """Return the mean of the luma, rounded half up."""
    luma = operations.grey(image)
    return (2 * int(luma.sum(dtype=np.int64)) + luma.size) // (2 * luma.size)
