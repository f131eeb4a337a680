"""Resizing: TensorFlow's bicubic interpolation without antialiasing, or Pillow's with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agc.nfnet.images import resize_bicubic
from agc.packages import need
from agc.recipe.tables import Resize

__all__ = ["resizer"]


def resizer(how: Resize) -> Any:
    """Return a function of (image, height, width), whose result is float32.

    Raises
    ------
    MissingPackageError
        If it needs Pillow, which is not installed.
    """
    if how == "bicubic":
        return resize_bicubic
    pillow = need("PIL.Image", 'resize = "pillow"', "data")

    def resize(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.float32]:
        """Resize an image, shape (h, w, 1) or (h, w, 3); the values stay whole numbers."""
        grey = image.shape[2] == 1
        source = pillow.fromarray(np.ascontiguousarray(image[:, :, 0] if grey else image))
        resized = np.asarray(source.resize((width, height), pillow.Resampling.BICUBIC), np.float32)
        return resized[:, :, None] if grey else resized

    return resize
