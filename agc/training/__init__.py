"""Training, as far as no framework is needed: states as neutral arrays, and checkpoints of them."""

from agc.training.checkpoints import Checkpoints
from agc.training.state import State

__all__ = ["Checkpoints", "State"]
