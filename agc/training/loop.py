"""The loop of a training, the same for every framework.

Steps, evaluations and checkpoints follow from the number of steps made, so that a training that was
stopped and went on leaves the same folder behind as one that was not:

=================  ======================================================================
``log.jsonl``      a line for each step, evaluation, start and end
``step-000123/``   checkpoints, the last few
=================  ======================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from agc import __version__
from agc.data import Batch, Batches, Evaluation, Source, feed
from agc.errors import AGCError, ConfigError, FormatError, NonFiniteError
from agc.recipe import Numbers, Recipe, numbers
from agc.training.checkpoints import Checkpoints
from agc.training.initial import initial_state
from agc.training.log import Log
from agc.training.state import State
from agc.training.trainer import Launch, Metrics, ShardedTrainer, Trainer
from agc.weights.folders import sharded_way_out

__all__ = ["Training", "evaluation_due"]

Record = dict[str, Any]


class Training:
    """A training in a folder: one that begins, or one that goes on.

    Parameters
    ----------
    recipe : Recipe
    trainer : Trainer
        A framework's; it takes over the state.
    train, test : Source
        The images.
    folder : Path
        For checkpoints and log; made if it does not exist, in a folder that does.
    launch : Launch
    resume : bool
        Whether to go on from the newest checkpoint there, if there is one.
    allow_changed : bool
        Whether that may be one of another recipe, if its arrays fit.
    report : callable, optional
        Is given each record of the log as soon as it is written.

    Attributes
    ----------
    made : int
        Steps that have been made.

    Raises
    ------
    ConfigError
        If the folder cannot be written to, or has checkpoints and ``resume`` is False; if the
        recipe cannot be run in this way, or asks for what this release does not do.
    FormatError
        If the data are not the recipe's, or the checkpoint or the log cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: Trainer,
        train: Source,
        test: Source,
        folder: Path,
        *,
        launch: Launch,
        resume: bool = False,
        allow_changed: bool = False,
        report: Callable[[Record], None] | None = None,
    ) -> None:
        self._hosts = hosts = trainer.hosts
        launch.check(recipe, hosts.count)
        self._recipe, self._trainer, self._launch = recipe, trainer, launch
        self._report = report if hosts.first else None
        part = {"host": hosts.index, "hosts": hosts.count}
        self._batches = Batches(recipe, train, **part)
        size = launch.microbatch or recipe.train.batch // hosts.count
        size = min(size, -(-len(test) // hosts.count)) * hosts.count
        self._evaluation = Evaluation(recipe, test, batch=size, **part)
        self._checkpoints = Checkpoints(folder, recipe, allow_changed=allow_changed)
        state = self._first_state(folder, resume)
        if not hosts.same(state.step):
            raise ConfigError(
                f"{folder}: the hosts see different checkpoints, this one of step {state.step}; "
                "choose a folder that all hosts share"
            )
        self._load(state)
        self.made = state.step
        self._began = {key: state.facts[key] for key in ("init",) if key in state.facts}
        self._log = Log(folder / "log.jsonl", state.step, write=hosts.first)
        self._evaluations = [r for r in self._log.records if r["type"] == "evaluation"]
        self._waiting: list[tuple[int, Numbers, Metrics]] = []
        self._since = 0.0

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until ``stop`` says so: the step under way is finished and saved.

        Several hosts ask each other whether one of them is to stop only when they log, save or
        evaluate, since to ask is to wait.

        Returns
        -------
        bool
            Whether the training is at its end.

        Raises
        ------
        NonFiniteError
            If a loss or a weight is not finite. The message names the step and the checkpoint that
            is kept; no checkpoint that is not finite is written.
        FormatError, ShapeError
            If an image cannot be read.
        OSError
            If the disk is full, or the like; the older checkpoints stay.
        """
        start = {"type": "start", "step": self.made, "time": time.time(), "agc": __version__}
        self._write(
            [start | {"recipe_id": self._recipe.id} | dict(self._trainer.facts) | self._began]
        )
        try:
            finished = self._steps(stop)
        except NonFiniteError as error:
            self._end("diverged")
            kept = self._checkpoints.steps()
            way_out = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint yet"
            raise NonFiniteError(f"{error}; {way_out}") from None
        self._end("finished" if finished else "stopped")
        return finished

    def _first_state(self, folder: Path, resume: bool) -> State:
        steps = self._checkpoints.steps()
        if not steps:
            return initial_state(self._recipe, self._launch.init)
        if not resume:
            raise ConfigError(
                f"{folder} has a checkpoint of step {steps[-1]}: say that the training goes on "
                "from there (--resume), or choose another folder"
            )
        step = steps[-1]
        if step > self._recipe.steps:
            raise ConfigError(
                f"{folder} has a checkpoint of step {step}, and the recipe has "
                f"{self._recipe.steps} steps; choose another folder"
            )
        if self._checkpoints.sharded(step):
            facts = self._checkpoints.facts(step)
            return State(step=step, parameters={}, momentum={}, facts=facts)
        return self._checkpoints.load(step)

    def _load(self, state: State) -> None:
        """Let the trainer take over a state, or read what is sharded in its own form."""
        sharded = self._checkpoints.sharded(state.step)
        if sharded is None:
            self._trainer.load(state)
            return
        mine, other = (facts.get("framework") for facts in (self._trainer.facts, state.facts))
        if mine != other:
            path = self._checkpoints.path(state.step)
            raise FormatError(f"{path}: written by {other}, not {mine}: {sharded_way_out(path)}")
        cast("ShardedTrainer", self._trainer).load_sharded(sharded, state.step)

    def _steps(self, stop: Callable[[], bool]) -> bool:
        recipe, launch, table = self._recipe, self._launch, numbers(self._recipe)
        alone = self._hosts.count == 1
        if self._must_evaluate() and not self._evaluate(stop):
            return False
        coming = feed(self._batches, range(self.made, recipe.steps), threads=launch.threads)
        with closing(coming):
            self._since = time.perf_counter()
            for batch in coming:
                now = table.at(self.made)
                self._waiting.append((self.made, now, self._step(batch, now)))
                self.made += 1
                evaluate = self._must_evaluate()
                save = self.made % recipe.checkpoint.every_steps == 0 or self.made == recipe.steps
                pause = save or evaluate or len(self._waiting) >= launch.log_every
                stopping = (alone or pause) and self._hosts.any(stop())
                save = save or stopping
                if pause or stopping:
                    self._log_steps()
                if save:
                    self._save()
                if evaluate and not stopping and not self._evaluate(stop):
                    stopping = True
                    if not save:
                        self._save()
                if save or evaluate:
                    self._since = time.perf_counter()
                if stopping:
                    return False
        return True

    def _step(self, batch: Batch, now: Numbers) -> Metrics:
        try:
            return self._trainer.step(batch, now)
        except NonFiniteError as error:  # of a rule with nonfinite="raise"
            self._log_steps()
            raise NonFiniteError(f"step {self.made}: {error}") from None

    def _must_evaluate(self) -> bool:
        """Tell whether an evaluation is due at this step, and has not been made before."""
        if not evaluation_due(self._recipe, self.made):
            return False
        done = {(record["step"], record["weights"]) for record in self._evaluations}
        wanted = {(self.made, weights) for weights in self._recipe.evaluate.weights or ()}
        return not wanted <= done

    def _evaluate(self, stop: Callable[[], bool]) -> bool:
        """Evaluate and log it; return False, and log nothing, if the training is to stop first.

        Several hosts finish what they began, as none can go on without the others.
        """
        if self._hosts.count > 1:
            stop = _never
        records = []
        for weights in self._recipe.evaluate.weights or ():
            every = range(len(self._evaluation))
            with closing(feed(self._evaluation, every, threads=self._launch.threads)) as coming:
                batches = takewhile(lambda _: not stop(), coming)
                totals = self._trainer.evaluate(batches, weights)
            if stop():
                return False
            record = {
                "type": "evaluation",
                "step": self.made,
                "weights": weights,
                "loss": totals.loss / totals.images,
                "top1": totals.top1 / totals.images,
                "top5": totals.top5 / totals.images,
                "images": totals.images,
            }
            records.append(record)
        self._evaluations += records
        self._write(records)
        return True

    def _log_steps(self) -> None:
        """Read what the last steps did, and log it; raise NonFiniteError for the first bad loss."""
        waiting, self._waiting = self._waiting, []
        losses = [float(metrics.loss) for _, _, metrics in waiting]  # waits for the device
        seconds = time.perf_counter() - self._since
        speed = len(waiting) * self._recipe.train.batch / max(seconds, 1e-9)
        self._since += seconds
        records = []
        for (step, now, metrics), loss in zip(waiting, losses, strict=True):
            records.append(_step_record(step, now, metrics) | {"images_per_second": speed})
            if not math.isfinite(loss):
                self._write(records)
                raise NonFiniteError(f"the loss is {loss} at step {step}")
        self._write(records)

    def _save(self) -> None:
        """Write a checkpoint: the last one in the portable form, others as the launch says."""
        last = {record["weights"]: record for record in self._evaluations}
        facts = {**self._trainer.facts, **self._began, "evaluation": last}
        checkpoints, step = self._checkpoints, self.made
        if self._launch.sharded and step < self._recipe.steps:
            trainer, part = cast("ShardedTrainer", self._trainer), checkpoints.sharded_part(step)
            self._write_together(lambda: checkpoints.begin_sharded(step), first=True)
            self._write_together(lambda: trainer.save_sharded(part))
            self._write_together(lambda: checkpoints.complete_sharded(step, facts), first=True)
        else:
            state = replace(self._trainer.state(), facts=facts)
            self._write_together(lambda: checkpoints.save(state), first=True)

    def _write_together(self, write: Callable[[], object], *, first: bool = False) -> None:
        """Write in all hosts or the first; if one cannot, no host goes on."""
        error: Exception | None = None
        if self._hosts.first or not first:
            try:
                write()
            except Exception as raised:  # raised again below, when all hosts know of it
                error = raised
        if self._hosts.any(error is not None):
            raise error or AGCError(f"another host wrote no checkpoint of step {self.made}")

    def _end(self, reason: str) -> None:
        self._write([{"type": "end", "step": self.made, "time": time.time(), "reason": reason}])
        self._hosts.any(False)  # whoever started the hosts may end all of them when one has ended

    def _write(self, records: list[Record]) -> None:
        self._log.write(records)
        for record in records if self._report else ():
            assert self._report
            self._report(record)


def evaluation_due(recipe: Recipe, made: int) -> bool:
    """Tell whether the test images are classified after so many steps."""
    every: float
    if recipe.evaluate.every_steps is not None:
        every = recipe.evaluate.every_steps
    else:
        assert recipe.evaluate.every_epochs is not None
        every = recipe.evaluate.every_epochs * recipe.epoch
    return made == recipe.steps or made // every > max(0, made - 1) // every


def _never() -> bool:
    return False


def _step_record(step: int, now: Numbers, metrics: Metrics) -> Record:
    values: Mapping[str, Any] = {
        "loss": metrics.loss,
        "perturbed_loss": metrics.perturbed_loss,
        "rate": now.rate,
        "rho": now.rho,
        "ema_decay": now.ema_decay,
        "max_ratio": metrics.max_ratio,
    }
    record: Record = {"type": "step", "step": step}
    record |= {key: float(value) for key, value in values.items() if value is not None}
    if metrics.units is not None and metrics.clipped is not None:
        record["clipped"] = float(metrics.clipped) / max(1.0, float(metrics.units))
    return record
