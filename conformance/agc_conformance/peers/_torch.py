"""NumPy arrays to torch tensors and back, bfloat16 and sparse gradients too, and the suite's loss for SAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from agc.backend import Array, Examples
from agc.reference import RowSparse

__all__ = ["Recorder", "mean_loss", "to_numpy", "to_torch"]


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


def mean_loss(parameters: Mapping[str, Any], examples: Examples) -> Any:
    """Return the loss of :class:`agc.backend.Examples`."""
    losses = []
    for name, curvature in examples.curvatures.items():
        a, c = to_torch(curvature), to_torch(examples.centers[name])
        losses.append((0.5 * a * (parameters[name].to(a.dtype) - c) ** 2).flatten(1).sum(1))
    return torch.stack(losses).sum(0).mean()


class Recorder(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer that remembers the gradients and moves nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.received: list[Any] = []

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        """Remember the gradients, in the order of the parameters."""
        self.received = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]
