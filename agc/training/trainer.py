"""What a framework gives to a training: the step, the evaluation, and the state in neutral form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
import numpy.typing as npt

from agc.checks import check_count
from agc.data import Batch, EvaluationBatch
from agc.data.batches import block_of
from agc.errors import ConfigError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training.state import State

__all__ = ["Hosts", "Launch", "Metrics", "ShardedTrainer", "Totals", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a recipe is run on this machine; no result depends on it beyond rounding.

    Attributes
    ----------
    microbatch : int, optional
        Examples of one forward and backward pass; all that a host has of a gradient if None. It
        must divide a host's part of ``train.batch``.
    device : str, optional
        The framework's name of a device, such as ``"cuda:1"``; its choice if None.
    threads : int
        Threads that make batches ahead of their use.
    log_every : int
        Steps after which numbers are read from the device and logged, those of all steps.
    engine : str, optional
        How the framework spreads the training over devices, by its name for that; its choice if
        None.
    sharded : bool
        Whether checkpoints on the way are written by all hosts in the framework's own form; the
        last one is always portable.
    init : Path, optional
        File that a recipe with ``model.init = "file"`` begins from, of any form that
        :func:`agc.weights.open_weights` reads.
    coordinator : str, optional
        Address and port of process 0, ``"10.0.0.1:1234"``, for a framework that is told so; what
        finds the processes by itself needs none.
    processes, process : int, optional
        How many processes train together, and which of them, from 0, this is. One without a
        coordinator trains alone, whatever is found.
    """

    microbatch: int | None = None
    device: str | None = None
    threads: int = 2
    log_every: int = 10
    engine: str | None = None
    sharded: bool = False
    init: Path | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        for name in ("microbatch", "threads", "log_every", "processes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name)))
        told = (self.coordinator, self.processes, self.process)
        if None in told and told not in ((None, None, None), (None, 1, None)):
            raise ConfigError(
                f"coordinator={self.coordinator!r}, processes={self.processes}, process={self.process}: "
                "give all three, or none to have them found"
            )
        if self.process is not None and self.processes is not None:
            process = check_count("process", self.process, 0)
            if process >= self.processes:
                raise ConfigError(
                    f"process must be less than processes={self.processes}, got {process}"
                )

    def check(self, recipe: Recipe, hosts: int = 1) -> None:
        """Raise ConfigError unless a recipe can be run in this way on so many hosts."""
        if (self.init is not None) != (recipe.model.init == "file"):
            raise ConfigError(
                f'model.init="{recipe.model.init}": give a file of weights (--init FILE) with '
                'model.init="file", and with nothing else'
            )
        part = len(block_of("train.batch", recipe.train.batch, 0, hosts))
        if self.microbatch is not None and part % self.microbatch:
            whole = f"train.batch={part}" if hosts == 1 else f"the {part} examples of each host"
            raise ConfigError(f"microbatch={self.microbatch} does not divide {whole}")


@dataclass(frozen=True)
class Hosts:
    """The processes that train together, each on its own part of every batch.

    The first of them writes log and checkpoints, into a folder that all of them can read.

    Attributes
    ----------
    index, count : int
        Which of how many this process is.
    total : callable
        Sums each of some numbers over all processes; all of them call it at the same places.
    """

    index: int = 0
    count: int = 1
    total: Callable[[list[float]], list[float]] = list

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        return self.total([float(flag)])[0] > 0

    def same(self, number: float) -> bool:
        """Tell whether a number is the first process's in all of them."""
        (first,) = self.total([number if self.first else 0.0])
        return not self.any(first != number)


def check_offered(
    launch: Launch,
    framework: str,
    *,
    engines: Collection[str] = (),
    coordinator: bool = False,
) -> None:
    """Raise ConfigError if a launch asks for what a framework does not do.

    Parameters
    ----------
    launch : Launch
    framework : str
        Its name in the message.
    engines : collection of str
        Its names of what spreads a training over devices.
    coordinator : bool
        Whether the launch may tell it of other processes.
    """
    if launch.processes is not None and not coordinator:
        raise ConfigError(
            f"{framework} learns of other processes from what launches it: leave coordinator and "
            "processes out"
        )
    if launch.engine is not None and launch.engine not in engines:
        choice = (
            f"choose one of {', '.join(engines)}, or" if engines else "it has no choice of them;"
        )
        raise ConfigError(
            f'engine="{launch.engine}": {framework} has no such engine; {choice} leave it out'
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
    hosts : Hosts
        The processes of this training. With several, all of them call each method at the same
        places, and what a method returns is about all of them together.
    """

    facts: Mapping[str, Any]
    hosts: Hosts

    def load(self, state: State) -> None:
        """Take over a state: its parameters, momentum, average and step.

        Raises
        ------
        ParameterError
            If its arrays are not those of the recipe's model.
        """
        ...

    def state(self) -> State:
        """Return a copy of the state, in the neutral form; its facts are :attr:`facts`.

        In other processes than the first, arrays may be left out.
        """
        ...

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step: ascent of SAM, gradient, AGC, decay, momentum, rate, average (AGC-7).

        Parameters
        ----------
        batch : Batch
            This host's part of the step's.
        numbers : Numbers
            Of this step, scalars.
        """
        ...

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images in ``precision.state``, by the raw weights or by their average.

        Parameters
        ----------
        batches : iterable of EvaluationBatch
            This host's parts; as many for each host.
        weights : {"raw", "ema"}

        Returns
        -------
        Totals
            Over the images of all hosts.
        """
        ...


class ShardedTrainer(Trainer, Protocol):
    """A trainer that can keep its state in its framework's own form, each host its part."""

    def save_sharded(self, folder: Path) -> None:
        """Write the parameters, momentum and average; all hosts call this with the same folder.

        Parameters
        ----------
        folder : Path
            Does not exist; the folder that it is to be in does. Nothing else need be kept: the
            caller keeps the step, the recipe and the facts, and renames the whole when all hosts
            have returned.

        Raises
        ------
        NonFiniteError
            In all hosts, if a number is NaN or infinite in one of them.
        OSError
            If the disk is full, or the like.
        """
        ...

    def load_sharded(self, folder: Path, step: int) -> None:
        """Take over a state that as many hosts, or fewer or more, wrote after so many steps.

        Raises
        ------
        FormatError
            If the folder cannot be read.
        ParameterError
            If its arrays are not those of the recipe's model.
        """
        ...
