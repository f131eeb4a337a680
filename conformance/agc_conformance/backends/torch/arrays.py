"""NumPy arrays to tensors and back, bfloat16 and row-sparse gradients too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc.reference import RowSparse
from agc_conformance.backend import Optimizer, Problem

__all__ = [
    "Recorder",
    "gradient_arrays",
    "mean_loss",
    "plain_sgd",
    "set_gradient",
    "to_array",
    "to_gradient",
    "to_parameters",
    "to_tensor",
]

Array = npt.NDArray[Any]


def to_tensor(value: Array | RowSparse | None, device: str = "cpu") -> Any:
    """Return a tensor with the array's own dtype; row-sparse becomes sparse COO."""
    if value is None:
        return None
    if isinstance(value, RowSparse):
        rows = torch.from_numpy(np.array(value.indices, np.int64))
        values = to_tensor(value.values, device)
        return torch.sparse_coo_tensor(
            rows[None].to(device), values, value.shape, check_invariants=True
        )
    array = np.array(value, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_array(tensor: Tensor) -> Array:
    """Return a copy of a dense tensor with its own dtype."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.uint16).numpy().copy()
        return bits.view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())


def to_gradient(gradient: Tensor | None) -> Array | RowSparse | None:
    """Return a copy of a gradient; sparse COO becomes row-sparse."""
    if gradient is None or gradient.layout != torch.sparse_coo:
        return None if gradient is None else to_array(gradient)
    gradient = gradient.coalesce()
    rows = gradient.indices()[0].cpu().numpy()
    return RowSparse(rows, to_array(gradient.values()), tuple(gradient.shape))


def to_parameters(problem: Problem, device: str) -> dict[str, Tensor]:
    """Return parameters with their gradients."""
    tensors = {}
    for name, value in problem.parameters.items():
        tensor = to_tensor(value, device)
        if tensor.is_floating_point() or tensor.is_complex():
            tensor = nn.Parameter(tensor)
        set_gradient(tensor, to_tensor(problem.gradients.get(name), device))
        tensors[name] = tensor
    return tensors


def set_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """Set a tensor's gradient, of any dtype or shape: AGC itself must refuse what does not fit."""
    if gradient is None or (gradient.shape == tensor.shape and gradient.dtype == tensor.dtype):
        tensor.grad = gradient
    else:
        tensor.grad = torch.zeros_like(tensor)
        tensor.grad.data = gradient


def gradient_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a copy of the gradient of every tensor."""
    return {name: to_gradient(tensor.grad) for name, tensor in tensors.items()}


def plain_sgd(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> torch.optim.SGD:
    """Return ``torch.optim.SGD``, without decoupled weight decay, which it does not have."""
    return torch.optim.SGD(
        tensors.values(),
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=0.0 if optimizer.decoupled else optimizer.weight_decay,
    )


def mean_loss(weights: Mapping[str, Tensor], curvatures: Any, centers: Any) -> Tensor:
    """Return the loss of :class:`agc_conformance.backend.Examples` for tensors by name."""
    losses = []
    for name, a in curvatures.items():
        away = weights[name].to(a.dtype) - centers[name]
        losses.append((0.5 * a * away**2).flatten(1).sum(1))
    return torch.stack(losses).sum(0).mean()


class Recorder(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer that records the gradients and moves nothing.

    Attributes
    ----------
    received : list of (array, RowSparse or None), or None
        In the order of the parameters; None before the first step.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.received: list[Any] | None = None

    def step(self, closure: Any = None) -> None:
        """Record the gradients."""
        self.received = [to_gradient(p.grad) for p in self.param_groups[0]["params"]]
