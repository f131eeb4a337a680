"""Trainers that compute within a context, such as one of full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from agc.data import Batch, EvaluationBatch
from agc.recipe import Numbers
from agc.recipe.tables import Weights
from agc.training import Metrics, State, Totals, Trainer

__all__ = ["Within"]


class Within:
    """A trainer whose steps and evaluations run in a context.

    Parameters
    ----------
    trainer : Trainer
    context : callable
        Makes the context, anew each time.
    """

    def __init__(
        self, trainer: Trainer, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._trainer, self._context = trainer, context
        self.facts, self.hosts = trainer.facts, trainer.hosts

    def load(self, state: State) -> None:
        """Take over a state."""
        self._trainer.load(state)

    def state(self) -> State:
        """Return a copy of the state."""
        return self._trainer.state()

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        with self._context():
            return self._trainer.step(batch, numbers)

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images."""
        with self._context():
            return self._trainer.evaluate(batches, weights)
