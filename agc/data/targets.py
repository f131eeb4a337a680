"""What follows from a batch before the model: soft labels, and the normalisation of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.data.batches import Batch
from agc.nfnet.images import normalise

__all__ = ["normalisation_table", "soft_labels"]


def soft_labels(
    batch: Batch, num_classes: int, smoothing: float, dtype: npt.DTypeLike = np.float32
) -> npt.NDArray[Any]:
    """Return the distribution over the classes that each example is trained towards.

    Parameters
    ----------
    batch : Batch
    num_classes : int
    smoothing : float
        Share that is spread over all classes, after mixing.
    dtype : dtype
        What they are rounded to from float64.

    Returns
    -------
    array, shape (examples, classes)
        Rows sum to 1.
    """
    rows = np.arange(len(batch.labels))
    ratio = batch.ratio.astype(np.float64)
    soft = np.zeros((len(rows), num_classes))
    soft[rows, batch.labels] += ratio
    soft[rows, batch.mix_labels] += 1 - ratio
    return ((1 - smoothing) * soft + smoothing / num_classes).astype(dtype)


def normalisation_table(mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return the normalised value of each byte and channel, shape (256, channels).

    A gather from it has the same bits on every device, and those of :func:`agc.data.normalise`;
    a subtraction and a division on the device need not have.
    """
    values = np.arange(256, dtype=np.uint8)[:, None]
    return normalise(np.repeat(values, len(mean), axis=1), mean, std)
