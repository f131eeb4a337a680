"""Trainings whose steps are the same but for numbers share one trainer, and what it compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from agc.config import FrozenMap
from agc.recipe import Recipe
from agc.recipe.tables import Ema, Rate, RateSchedule
from agc.training.trainer import Launch, Trainer

__all__ = ["SharedTrainers", "step_of"]


def step_of(recipe: Recipe) -> Recipe:
    """Return a recipe of one step, the same for all recipes that have this step in common.

    They may differ in length and in what a step is given as numbers: rate, thresholds, decay of the
    average; and in the seed, unless the framework draws masks by itself.
    """
    agc = recipe.agc
    if agc:
        patterns = agc.clipping
        fixed = dict.fromkeys(patterns, 1.0) if isinstance(patterns, Mapping) else 1.0
        agc = replace(agc, clipping=fixed)
    options = recipe.model.options()
    drawn = [name for name in ("dropout", "stochastic_depth") if getattr(options, name)]
    return replace(
        recipe,
        seed=0 if set(drawn) <= set(recipe.train.masks) else recipe.seed,
        agc=agc,
        ema=recipe.ema and Ema(),
        optimizer=replace(recipe.optimizer, rate=Rate(peak=1.0)),
        schedule=RateSchedule(),
        train=replace(recipe.train, epochs=None, steps=1),
        notes=FrozenMap(),
    )


class SharedTrainers:
    """A framework's ``trainer``, which makes one trainer for all recipes with the same step.

    :meth:`Trainer.load` makes it anew, so one training must be over before the next begins.
    """

    def __init__(self, make: Callable[[Recipe, Launch], Trainer], launch: Launch) -> None:
        self._make, self._launch = make, launch
        self._made: dict[Recipe, Trainer] = {}

    def __call__(self, recipe: Recipe) -> Trainer:
        """Return the trainer of a recipe's step."""
        step = step_of(recipe)
        if step not in self._made:
            self._made[step] = self._make(step, self._launch)
        return self._made[step]
