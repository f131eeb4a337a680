"""MixUp and CutMix (DATA-4, DATA-5): how two images become one example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.data.crop import Box
from agc.data.uniforms import integer

__all__ = ["CUTMIX_DRAWS", "MIXUP_DRAWS", "cut_in", "cutmix_box", "is_cutmix", "mixup_ratio"]

MIXUP_DRAWS: Final = 128
"""Uniform numbers of one ratio: 64 candidates, each accepted with a probability above 0.49."""

CUTMIX_DRAWS: Final = 3
"""Uniform numbers of one box."""

_GRID: Final = 2**16
"""A ratio is rounded to multiples of 1 / this, so that a last bit of ``pow`` changes nothing."""


def is_cutmix(number: int, share: float) -> bool:
    """Tell whether an example is mixed by CutMix; for a share of 0.5 the odd ones are (DATA-5)."""
    return math.floor((number + 1) * share) > math.floor(number * share)


def mixup_ratio(alpha: float, uniforms: Sequence[float]) -> float:
    """Return a number of the distribution Beta(alpha, alpha), by Johnk's method.

    Parameters
    ----------
    alpha : float
        At most 1.
    uniforms : sequence of float
        :data:`MIXUP_DRAWS` numbers in [0, 1): pairs, of which the first that is accepted counts.
    """
    for first, second in zip(uniforms[::2], uniforms[1::2], strict=True):
        x, y = (math.pow(1 - uniform, 1 / alpha) for uniform in (first, second))
        if x + y <= 1:
            return round(x / (x + y) * _GRID) / _GRID
    return 0.5


def cutmix_box(pixels: int, uniforms: Sequence[float]) -> Box:
    """Return the box that is taken from the first image, by DeepMind's rule.

    Its share of the image is uniform before the box is clipped at the border; the centre is a
    uniform pixel.

    Parameters
    ----------
    pixels : int
        Side of the images.
    uniforms : sequence of float
        :data:`CUTMIX_DRAWS` numbers in [0, 1).
    """
    half = int(math.sqrt(1 - uniforms[0]) * pixels) // 2
    (top, bottom), (left, right) = (
        (max(centre - half, 0), min(centre + half, pixels))
        for centre in (integer(uniform, pixels) for uniform in uniforms[1:])
    )
    return Box(top, left, bottom - top, right - left)


def cut_in(first: npt.NDArray[Any], second: npt.NDArray[Any], box: Box) -> npt.NDArray[Any]:
    """Return the second image, with a box of the first one in it."""
    mixed = np.array(second)
    mixed[box.rows, box.columns] = first[box.rows, box.columns]
    return mixed
