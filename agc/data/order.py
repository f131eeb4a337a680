"""Which image comes when (DATA-2): every image once an epoch, in an order of the epoch's own."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from agc.data.uniforms import Purpose, Stream

__all__ = ["image_at"]


def image_at(seed: int, images: int, place: int) -> int:
    """Return the index of an image.

    Parameters
    ----------
    seed : int
    images : int
        How many there are.
    place : int
        Number of the source image in the run, from 0; ``place // images`` is its epoch.
    """
    epoch, within = divmod(place, images)
    return int(_order(seed, images, epoch)[within])


@lru_cache(maxsize=2)
def _order(seed: int, images: int, epoch: int) -> npt.NDArray[np.uint32]:
    """Order of an epoch: the stable sort of as many uniform numbers."""
    uniforms = Stream(seed, Purpose.ORDER).raw(epoch, images) >> np.uint64(11)
    return np.argsort(uniforms, kind="stable").astype(np.uint32)
