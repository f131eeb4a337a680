"""The optimizer of trajectories, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agc_conformance.backend import Optimizer
from agc_conformance.data import encode_numbers
from agc_conformance.generate.parameters import Data
from agc_conformance.generate.unit_table import Array

__all__ = ["MOMENTUM", "NFNET", "optimizer_step", "weights_to_json"]

MOMENTUM: Final[dict[str, Any]] = {"lr": 0.25, "momentum": 0.875}
"""Rates of trajectories; short binary fractions, exact in float32."""
NFNET: Final[dict[str, Any]] = {**MOMENTUM, "nesterov": True, "weight_decay": 0.0625}
"""The optimizer of the NFNet recipe, at similar rates."""


def optimizer_step(
    optimizer: Optimizer,
    weights: dict[str, Array],
    momenta: dict[str, Array],
    gradients: Mapping[str, Any],
) -> None:
    """Replace weights and momenta by those after one step.

    The formula is :class:`~agc_conformance.backend.Optimizer`'s, written again: a slip in one of
    the two shows.
    """
    for name, w in list(weights.items()):
        decay = optimizer.weight_decay * w
        u = gradients[name] if optimizer.decoupled else gradients[name] + decay
        momenta[name] = m = optimizer.momentum * momenta[name] + u
        move = u + optimizer.momentum * m if optimizer.nesterov else m
        weights[name] = w - optimizer.lr * (move + decay if optimizer.decoupled else move)


def weights_to_json(weights: Mapping[str, Array]) -> Data:
    """Return the expected weights after a step, as they stand in a file."""
    return {name: {"values": encode_numbers(w)} for name, w in weights.items()}
