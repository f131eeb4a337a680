"""Training, as far as no framework is needed: loop, states as neutral arrays, checkpoints, log.

Read ``trainer``, what a framework gives; ``loop``, what is done with it; then ``state``,
``checkpoints``, ``log`` and ``stop``.
"""

from agc.training.checkpoints import Checkpoints
from agc.training.initial import initial_state
from agc.training.log import read_log
from agc.training.loop import Training
from agc.training.part import trained_names
from agc.training.shared import SharedTrainers, step_of
from agc.training.state import State
from agc.training.stop import stop_signals
from agc.training.trainer import (
    Hosts,
    Launch,
    Metrics,
    ShardedTrainer,
    Totals,
    Trainer,
    ascent_first,
    check_offered,
)

__all__ = [
    "Checkpoints",
    "Hosts",
    "Launch",
    "Metrics",
    "ShardedTrainer",
    "SharedTrainers",
    "State",
    "Totals",
    "Trainer",
    "Training",
    "ascent_first",
    "check_offered",
    "initial_state",
    "read_log",
    "step_of",
    "stop_signals",
    "trained_names",
]
