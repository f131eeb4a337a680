"""What a framework gives to a training: the step, the evaluation, and the state in neutral form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
import numpy.typing as npt

from agc.checks import check_count
from agc.data import Batch, EvaluationBatch
from agc.errors import ConfigError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training.state import State

__all__ = ["Launch", "Metrics", "Totals", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a recipe is run on this machine; no result depends on it beyond rounding.

    Attributes
    ----------
    microbatch : int, optional
        Examples of one forward and backward pass; all that share a gradient if None. It must divide
        ``train.batch``.
    device : str, optional
        The framework's name of a device, such as ``"cuda:1"``; its choice if None.
    threads : int
        Threads that make batches ahead of their use.
    log_every : int
        Steps after which numbers are read from the device and logged, those of all steps.
    init : Path, optional
        File that a recipe with ``model.init = "file"`` begins from, of any form that
        :func:`agc.weights.open_weights` reads.
    """

    microbatch: int | None = None
    device: str | None = None
    threads: int = 2
    log_every: int = 10
    init: Path | None = None

    def __post_init__(self) -> None:
        for name in ("microbatch", "threads", "log_every"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name)))

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError unless a recipe can be run in this way."""
        if (self.init is not None) != (recipe.model.init == "file"):
            raise ConfigError(
                f'model.init="{recipe.model.init}": give a file of weights (--init FILE) with '
                'model.init="file", and with nothing else'
            )
        if self.microbatch is not None and recipe.train.batch % self.microbatch:
            raise ConfigError(
                f"microbatch={self.microbatch} does not divide train.batch={recipe.train.batch}"
            )


def check_offered(recipe: Recipe, framework: str, *, parts: bool = False) -> None:
    """Raise ConfigError if a recipe asks for what a framework's step does not do.

    Parameters
    ----------
    recipe : Recipe
    framework : str
        Its name in the message.
    parts : bool
        Whether it trains :func:`agc.training.trained_names` alone.
    """
    if recipe.precision.standardise != "float32":
        raise ConfigError(
            f'precision.standardise="{recipe.precision.standardise}": {framework}\'s NFNets standardise '
            "their weights in float32; set precision.standardise=float32"
        )
    if recipe.train.only and not parts:
        raise ConfigError(
            f"train.only={list(recipe.train.only)}: training a part of the model is not offered in "
            f"{framework} as yet; leave it out to train all parameters"
        )


def ascent_first(recipe: Recipe) -> npt.NDArray[np.int64] | None:
    """Return an order of the batch in which SAM's ascent examples, spread over it, come first.

    None if the examples are taken in their own order.
    """
    if recipe.sam is None or recipe.sam.group != "batch" or recipe.sam.rule.fraction == 1:
        return None
    ascent = recipe.sam.ascent(recipe.train.batch)
    order = [*ascent, *sorted({*range(recipe.train.batch)}.difference(ascent))]
    return np.array(order, np.int64)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one step did: numbers, or scalars that stay on the device until somebody reads them.

    Attributes
    ----------
    loss : scalar
        Mean over the batch, at the weights before the step; with SAM over the examples of the
        ascent pass.
    perturbed_loss : scalar, optional
        Mean over the batch at the perturbed weights, if the step perturbed them.
    units, clipped : scalar, optional
        Units that AGC looked at, and how many of them it scaled down; absent without AGC.
    max_ratio : scalar, optional
        Largest ratio of a unit's gradient norm to its weight norm (:class:`agc.reference.Stats`).
    """

    loss: SupportsFloat
    perturbed_loss: SupportsFloat | None = None
    units: SupportsFloat | None = None
    clipped: SupportsFloat | None = None
    max_ratio: SupportsFloat | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over all test images.

    Attributes
    ----------
    loss : float
        Sum of cross entropies, without label smoothing.
    top1, top5 : int
        Images whose class is the likeliest one, or among the five likeliest.
    images : int
    """

    loss: float
    top1: int
    top5: int
    images: int


class Trainer(Protocol):
    """A training in a framework; made for a recipe and a launch, with no values as yet.

    Attributes
    ----------
    facts : mapping of str to JSON data
        Framework, versions and device, for logs and checkpoints.
    """

    facts: Mapping[str, Any]

    def load(self, state: State) -> None:
        """Take over a state: its parameters, momentum, average and step.

        Raises
        ------
        ParameterError
            If its arrays are not those of the recipe's model.
        """
        ...

    def state(self) -> State:
        """Return a copy of the state, in the neutral form; its facts are :attr:`facts`."""
        ...

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step: ascent of SAM, gradient, AGC, decay, momentum, rate, average (AGC-7).

        Parameters
        ----------
        batch : Batch
            Of this step.
        numbers : Numbers
            Of this step, scalars.
        """
        ...

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images in float32, by the raw weights or by their average."""
        ...
