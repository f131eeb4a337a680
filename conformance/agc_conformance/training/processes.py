"""Processes of this machine that train, started from another one that is none of them.

Each process imports the framework anew and makes its own trainer, as ``agc train`` does in each of
several processes. What drives those that train together is a :class:`agc.training.Trainer` that
takes whole batches; one that trains alone has the core's own loop, and is killed in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from agc.data import PARTS, Batch, EvaluationBatch, open_source
from agc.data.batches import block_of
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.training import Hosts, Launch, Metrics, State, Totals, Trainer, Training, read_log
from agc_conformance.records import describe

__all__ = ["Make", "Process", "anew", "free_addresses", "started", "train_and_kill", "training"]

Make = Callable[[Recipe, Launch], Trainer]
"""Makes a trainer."""


class Process(NamedTuple):
    """How one of several processes is launched.

    Attributes
    ----------
    environment : mapping of str to str
        Set before the framework is imported.
    launch : mapping of str to value
        Fields of :class:`agc.training.Launch` that tell this process from the others.
    """

    environment: Mapping[str, str]
    launch: Mapping[str, Any]


def free_addresses(count: int) -> list[str]:
    """Return addresses on loopback with ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


@contextmanager
def started(make: str, processes: Sequence[Process]) -> Iterator[Callable[[Recipe, Launch], Any]]:
    """Start processes, and end them.

    Parameters
    ----------
    make : str
        ``"module:function"``: makes a trainer of a recipe and a launch, in each process.
    processes : sequence of Process

    Yields
    ------
    callable (recipe, launch) -> Trainer
        Makes a trainer of all processes together; the one that it made before is lost.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        crew = [
            stack.enter_context(_member(make, p, Path(folder), n)) for n, p in enumerate(processes)
        ]
        yield lambda recipe, launch: _Together(crew, processes, recipe, launch)


class _Member(NamedTuple):
    """A process that was started, and the file that it prints into."""

    connection: Connection
    log: Path


@contextmanager
def _member(make: str, process: Process, folder: Path, number: int) -> Iterator[_Member]:
    context = multiprocessing.get_context("spawn")  # a fork would have the framework's threads
    ours, theirs = context.Pipe()
    log = folder / f"log{number}"
    arguments = (theirs, make, dict(process.environment), log)
    child = context.Process(target=_serve, args=arguments, daemon=True)
    child.start()
    theirs.close()  # so that the end of the child is the end of the pipe
    try:
        yield _Member(ours, log)
    finally:
        child.kill()  # none waits for another that has ended
        child.join()
        ours.close()


class _Together:
    """The trainers of several processes as one; see :class:`agc.training.Trainer`."""

    def __init__(
        self, crew: Sequence[_Member], processes: Sequence[Process], recipe: Recipe, launch: Launch
    ) -> None:
        self._crew = crew
        self.hosts = Hosts()  # this process has whole batches
        launches = [(recipe, replace(launch, **process.launch)) for process in processes]
        self.facts: Mapping[str, Any] = self._ask("make", launches)[0]

    def load(self, state: State) -> None:
        """Take over a state."""
        self._ask("load", [(state,) for _ in self._crew])

    def state(self) -> State:
        """Return a copy of the first process's state."""
        state: State = self._ask("state", [() for _ in self._crew])[0]
        return state

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step, and raise RuntimeError if the processes differ in what they say of it."""
        metrics: Metrics = self._same("step", [(part, numbers) for part in self._parts(batch)])
        return metrics

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images."""
        parts = zip(*map(self._parts, batches), strict=True)
        totals: Totals = self._same("evaluate", [(part, weights) for part in parts])
        return totals

    def _parts(self, batch: Batch | EvaluationBatch) -> list[Any]:
        """Return each process's part of a batch."""
        count, size = len(self._crew), len(batch.labels)
        blocks = [block_of("the batch", size, number, count) for number in range(count)]
        kind: Any = type(batch)
        return [
            kind(*(None if rows is None else rows[block.start : block.stop] for rows in batch))
            for block in blocks
        ]

    def _same(self, what: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        first, *others = self._ask(what, arguments)
        for number, other in enumerate(others, 1):
            if repr(other) != repr(first):
                raise RuntimeError(f"{what}: process {number} says {other}, process 0 says {first}")
        return first

    def _ask(self, what: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Let all processes do something at the same time, and return what each returns."""
        for member, given in zip(self._crew, arguments, strict=True):
            member.connection.send((what, given))
        answers: dict[int, Any] = {}
        waiting = {member.connection: number for number, member in enumerate(self._crew)}
        while waiting:
            # Whichever answers first: one that failed may leave the others waiting for it.
            for connection in wait([*waiting]):
                assert isinstance(connection, Connection)
                number = waiting.pop(connection)
                try:
                    problem, answers[number] = connection.recv()
                except EOFError:
                    said = self._crew[number].log.read_text(errors="replace")[-400:]
                    problem = f"it ended: {said}"
                if problem:
                    raise RuntimeError(f"process {number}, {what}: {problem}")
        return [answers[number] for number in range(len(self._crew))]


def _serve(connection: Connection, make: str, environment: Mapping[str, str], log: Path) -> None:
    """Be one of the processes: answer until the one that asks is gone."""
    os.environ.update(environment)
    _print_into(log)
    module, _, name = make.partition(":")
    trainer: Trainer | None = None
    while True:
        try:
            what, given = connection.recv()
        except EOFError:
            os._exit(0)
        problem, answer = "", None
        try:
            if what == "make":
                trainer = None
                trainer = getattr(import_module(module), name)(*given)
                assert trainer is not None
                answer = trainer.facts
            else:
                answer = getattr(trainer, what)(*given)
            if isinstance(answer, Metrics):
                answer = _read(answer)
        except Exception as error:  # whatever it is, it ends the question
            traceback.print_exc()
            problem = describe(error)
        connection.send((problem, answer))


def _print_into(log: Path) -> None:
    """Let this process print into a file, also what is not Python."""
    with log.open("w") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)


def _read(metrics: Metrics) -> Metrics:
    """Return metrics without the device."""
    values: dict[str, Any] = {
        name: None if value is None else float(value) for name, value in vars(metrics).items()
    }
    return Metrics(**values)


# --- a process that is killed ---------------------------------------------------------------------


def anew(backend: Callable[..., Any], device: str, recipe: Recipe, launch: Launch) -> Trainer:
    """Return a trainer of a backend that is made for it, in whatever process this is called."""
    made: Trainer = backend(device=device).trainer(recipe, launch)
    return made


def training(
    recipe: Recipe,
    trainer: Trainer,
    folder: Path,
    launch: Launch,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Training:
    """Return the training that goes on in a folder."""
    train, test = (open_source(recipe, part) for part in PARTS)
    return Training(recipe, trainer, train, test, folder, launch=launch, resume=True, report=report)


def train_and_kill(make: Make, recipe: Recipe, launch: Launch, folder: Path, steps: int) -> None:
    """Let another process train in a folder, until SIGKILL ends it after a step.

    Parameters
    ----------
    make : callable
        That pickle can send to the process.
    recipe : Recipe
    launch : Launch
        Whose ``log_every`` is 1.
    folder : Path
        With a checkpoint to go on from.
    steps : int
        Made when the signal comes; the training is longer.

    Raises
    ------
    RuntimeError
        If the process ends in another way; the message has the last that it printed.
    """
    log = folder.with_suffix(".log")
    arguments = (make, recipe, launch, folder, steps, log)
    child = multiprocessing.get_context("spawn").Process(target=_train, args=arguments, daemon=True)
    child.start()
    try:
        child.join()
    finally:
        child.kill()  # if this process is to end first
        child.join()
    made = [record for record in _log_of(folder) if record["type"] == "step"]
    if child.exitcode != -signal.SIGKILL or len(made) != steps:
        said = log.read_text(errors="replace") if log.exists() else ""
        last = " ".join(said.split())[-400:]
        raise RuntimeError(
            f"the process ended with status {child.exitcode} after {len(made)} steps: {last}"
        )


def _log_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    return read_log(file) if file.exists() else []


def _train(make: Make, recipe: Recipe, launch: Launch, folder: Path, steps: int, log: Path) -> None:
    """Be the process that is killed, in the middle of its loop."""
    _print_into(log)

    def report(record: Mapping[str, Any]) -> None:
        if record["type"] == "step" and record["step"] + 1 == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    training(recipe, make(recipe, launch), folder, launch, report).run()
