"""The numbers that change with the step: evaluated once, in float64, and rounded to float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.config import SAM
from agc.recipe.recipe import Recipe
from agc.schedule import WarmupCosine, WarmupDecay, schedule_value

__all__ = ["Numbers", "numbers"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Numbers:
    """The rate, the clipping threshold and so on of every step, or of one.

    Attributes
    ----------
    rate : float32 array, shape (steps,)
        Learning rate.
    clipping : mapping of str to float32 array, shape (steps,)
        Name pattern to threshold of AGC, in the recipe's order; ``"*"`` if there is one threshold
        for all. Empty without AGC.
    rho : float32 array, shape (steps,), or None
        Radius of SAM; 0 at steps that do not perturb. None without SAM.
    ema_decay : float32 array, shape (steps,), or None
        Decay of the average that follows the update. None without an average.
    """

    rate: Array
    clipping: Mapping[str, Array]
    rho: Array | None
    ema_decay: Array | None

    def at(self, step: int) -> Numbers:
        """Return the numbers of one step: scalars, shape ()."""
        return Numbers(
            np.asarray(self.rate[step]),
            {pattern: np.asarray(table[step]) for pattern, table in self.clipping.items()},
            None if self.rho is None else np.asarray(self.rho[step]),
            None if self.ema_decay is None else np.asarray(self.ema_decay[step]),
        )


def numbers(recipe: Recipe) -> Numbers:
    """Return the numbers of every step of a recipe."""

    def table(value: Callable[[int], float]) -> Array:
        return np.array([value(step) for step in range(recipe.steps)], np.float64).astype(
            np.float32
        )

    rate = WarmupCosine(
        peak=recipe.peak, steps=recipe.steps, warmup=recipe.warmup, end=recipe.schedule.end
    )
    clipping: Any = {} if recipe.agc is None else recipe.agc.clipping
    if not isinstance(clipping, Mapping):
        clipping = {"*": clipping}
    return Numbers(
        rate=table(rate),
        clipping={
            pattern: table(partial(_threshold, value)) for pattern, value in clipping.items()
        },
        rho=None if recipe.sam is None else table(partial(_radius, recipe.sam.rule)),
        ema_decay=(
            None
            if recipe.ema is None
            else table(WarmupDecay(decay=recipe.ema.decay, warmup=recipe.ema.warmup))
        ),
    )


def _threshold(clipping: Any, step: int) -> float:
    return schedule_value("clipping", clipping, step) if callable(clipping) else float(clipping)


def _radius(rule: SAM, step: int) -> float:
    return rule.radius(step) if rule.perturbs(step) else 0.0
