"""NumPy arrays to torch tensors and back, bfloat16 and sparse gradients too."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from agc.backend import Array
from agc.reference import RowSparse

__all__ = ["to_numpy", "to_torch"]


def to_torch(array: Array | RowSparse) -> Any:
    """Return a tensor with the array's own dtype; row-sparse becomes sparse COO."""
    if isinstance(array, RowSparse):
        indices = torch.from_numpy(np.array(array.indices, np.int64))[None]
        return torch.sparse_coo_tensor(
            indices, to_torch(array.values), array.shape, check_invariants=True
        )
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Any) -> Array | RowSparse:
    """Return an array with the tensor's own dtype; sparse COO becomes row-sparse."""
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        values = to_numpy(tensor.values())
        assert not isinstance(values, RowSparse)
        return RowSparse(tensor.indices()[0].numpy(), values, tuple(tensor.shape))
    if tensor.dtype == torch.bfloat16:
        narrow: Array = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return narrow
    array: Array = tensor.numpy()
    return array
