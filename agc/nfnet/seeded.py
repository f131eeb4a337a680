"""Parameters and images that every framework can make by itself, for comparing models."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt

from agc.nfnet.parameters import parameters
from agc.nfnet.variants import Variant

__all__ = ["seeded_batch", "seeded_parameters"]


def seeded_parameters(
    variant: str | Variant, num_classes: int | None = None, in_channels: int = 3
) -> dict[str, npt.NDArray[np.float64]]:
    """Return parameters that every framework can make by itself, for comparing models.

    Each tensor is drawn by NumPy's legacy generator, whose stream is frozen, from a seed that is
    the CRC-32 of its Haiku name. Skip gains are about 0.5: at 0, as at initialisation, errors in
    the branches stay invisible.

    Returns
    -------
    dict of str to float64 array
        By canonical name, in the neutral layout.
    """
    arrays = {}
    for spec in parameters(variant, num_classes, in_channels):
        seed = zlib.crc32(spec.haiku.encode("ascii"))
        z = np.asarray(np.random.RandomState(seed).standard_normal(spec.shape))
        match spec.kind:
            case "conv" | "se":
                arrays[spec.name] = z / math.sqrt(spec.fan_in)
            case "head":
                arrays[spec.name] = 0.01 * z
            case "gain":
                arrays[spec.name] = 1 + 0.1 * z
            case "bias":
                arrays[spec.name] = 0.05 * z
            case "skip_gain":
                arrays[spec.name] = np.asarray(0.5 + 0.1 * z)
    return arrays


def seeded_batch(
    batch: int, height: int, width: int | None = None, channels: int = 3
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return images and labels to go with :func:`seeded_parameters`.

    Returns
    -------
    images : float64 array, shape (batch, height, width, channels)
        Normal random numbers.
    labels : int64 array, shape (batch,)
        1, 4, 7 and so on; take the remainder where there are fewer classes.
    """
    shape = (batch, height, height if width is None else width, channels)
    images = np.random.RandomState(12345).standard_normal(shape)
    return np.asarray(images), 3 * np.arange(batch, dtype=np.int64) + 1
