"""A fingerprint of a batch, to tell whether two machines train on the same bits."""

from __future__ import annotations

import hashlib

import numpy as np

from agc.data.batches import Batch
from agc.data.evaluation import EvaluationBatch

__all__ = ["digest"]


def digest(batch: Batch | EvaluationBatch) -> str:
    """Return the SHA-256, in hexadecimal, of all arrays: name, dtype, shape and bytes."""
    bits = hashlib.sha256()
    for name, array in batch._asdict().items():
        if array is not None:
            little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
            bits.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
            bits.update(little.tobytes())
    return bits.hexdigest()
