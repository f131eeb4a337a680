"""The network of :class:`agc_conformance.backend.TrainingTask` in NumPy, forward and backward.

It is written to be read, and computes in the dtype of its weights: float64 for the reference. A
test compares every gradient with finite differences.

Shapes: ``n`` images, ``c`` channels in, ``o`` channels out, ``h`` by ``w`` pixels, ``k`` classes;
``i`` and ``j`` run over the 3x3 window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PARAMETERS", "loss_and_gradients"]

Array = npt.NDArray[Any]

PARAMETERS = (
    "conv1.weight",
    "conv1.bias",
    "conv2.weight",
    "conv2.bias",
    "head.weight",
    "head.bias",
)
"""Names of the parameters, in the network's order."""


def loss_and_gradients(
    weights: Mapping[str, Array], images: Array, labels: Array
) -> tuple[float, dict[str, Array]]:
    """Return the mean softmax cross-entropy of a batch, and its gradient for every parameter.

    Parameters
    ----------
    weights : mapping of name to array
        The six arrays of :data:`PARAMETERS`, out-first: ``(o, c, 3, 3)``, ``(o,)``, ``(k, o)``,
        ``(k,)``.
    images : array, shape (n, c, h, w)
        Images, in the dtype of the weights.
    labels : array of int, shape (n,)
        Classes, from 0 to k - 1.

    Returns
    -------
    loss : float
        Mean over the batch, in nats.
    gradients : dict of name to array
        Same names, shapes and dtype as the weights.
    """
    w1, b1, w2, b2, w3, b3 = (weights[name] for name in PARAMETERS)

    before1 = _convolve(images, w1, b1, stride=1)
    hidden1 = _silu(before1)
    before2 = _convolve(hidden1, w2, b2, stride=2)
    hidden2 = _silu(before2)
    pooled = hidden2.mean(axis=(2, 3))
    logits = pooled @ w3.T + b3

    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = -log_probabilities[rows, labels].mean()

    d_logits = np.exp(log_probabilities)
    d_logits[rows, labels] -= 1
    d_logits /= len(labels)
    d_pooled = d_logits @ w3
    pixels = hidden2.shape[2] * hidden2.shape[3]
    d_before2 = d_pooled[:, :, None, None] / pixels * _silu_slope(before2)
    d_hidden1, d_w2, d_b2 = _convolve_backward(d_before2, hidden1, w2, stride=2)
    d_before1 = d_hidden1 * _silu_slope(before1)
    _, d_w1, d_b1 = _convolve_backward(d_before1, images, w1, stride=1)
    gradients = (d_w1, d_b1, d_w2, d_b2, d_logits.T @ pooled, d_logits.sum(axis=0))
    return float(loss), dict(zip(PARAMETERS, gradients, strict=True))


def _sigmoid(x: Array) -> Array:
    # exp may overflow to infinity; 1 / infinity is the right result, 0.
    with np.errstate(over="ignore"):
        result: Array = 1 / (1 + np.exp(-x))
    return result


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _silu_slope(x: Array) -> Array:
    s = _sigmoid(x)
    slope: Array = s * (1 + x * (1 - s))
    return slope


def _windows(x: Array, stride: int) -> Array:
    """Return all 3x3 windows of images padded with one ring of zeros, shape (n, c, h, w, i, j)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows[:, :, ::stride, ::stride]


def _convolve(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    out: Array = np.einsum("nchwij,ocij->nohw", _windows(x, stride), weight, optimize=True)
    return out + bias[:, None, None]


def _convolve_backward(
    d_out: Array, x: Array, weight: Array, stride: int
) -> tuple[Array, Array, Array]:
    """Return the gradients for the input, the weight and the bias of :func:`_convolve`."""
    d_weight: Array = np.einsum("nohw,nchwij->ocij", d_out, _windows(x, stride), optimize=True)
    n, c, height, width = x.shape
    padded = np.zeros((n, c, height + 2, width + 2), x.dtype)
    rows, columns = stride * d_out.shape[2], stride * d_out.shape[3]
    for i in range(3):
        for j in range(3):
            padded[:, :, i : i + rows : stride, j : j + columns : stride] += np.einsum(
                "nohw,oc->nchw", d_out, weight[:, :, i, j], optimize=True
            )
    return padded[:, :, 1:-1, 1:-1], d_weight, d_out.sum(axis=(0, 2, 3))
