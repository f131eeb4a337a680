"""DeepMind's optimizer for NFNets, as numbers: what the adapters' ``sgd_nfnet`` have in common."""

from __future__ import annotations

from typing import Final

from agc.errors import ConfigError

__all__ = ["MOMENTUM", "SMOOTHING", "WEIGHT_DECAY", "check_recipe", "decays"]

MOMENTUM: Final = 0.9
"""Nesterov's; its buffer does not contain the learning rate."""
WEIGHT_DECAY: Final = 2e-5
"""Coupled: times the weight, it is added to the clipped gradient."""
SMOOTHING: Final = 0.1
"""Label smoothing of the loss."""


def decays(rank: int) -> bool:
    """Tell whether a parameter of this rank is decayed: weights are, gains and biases are not."""
    return rank > 1


def check_recipe(momentum: float, weight_decay: float) -> None:
    """Raise ConfigError unless momentum is in [0, 1) and weight decay a finite number >= 0."""
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must be a number in [0, 1), got {momentum!r}")
    if weight_decay is None or not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay must be a number >= 0, got {weight_decay!r}")
