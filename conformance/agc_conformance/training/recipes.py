"""Level 5: the same recipe is the same run.

A backend trains what :func:`agc.recipe.load_recipe` reads, from the same state on the same batches
as :class:`agc_conformance.training.reference.ReferenceTrainer` in float64. Recipes, batches and
tables of numbers are the core's own, and have vectors (``L5-recipe-*``, ``L5-batch-*``,
``L5-schedule-*``). What a backend computes has these results:

================= ======== ====================================================================
``L5-trajectory`` RECIPE-5 state, losses and clipped units after each step: every augmentation,
                           both masks, SAM in groups, four micro-batches
``L5-mask``       RECIPE-4 other masks on the same images: what they keep is what counts
``L5-evaluate``   RECIPE-6 weights and average; the images do not fill the last batch
``L5-resume``     RECIPE-7 from a written checkpoint, bit for bit as if never stopped
``L5-migrate``    RECIPE-7 from a checkpoint that the reference wrote half-way
``L5-accumulate`` RECIPE-5 the whole batch at once
``L5-processes``  RECIPE-5 two processes: the whole run, an evaluation, an ascent on both
``L5-sam``        RECIPE-5 the ascent on a fraction spread over the whole batch, and after AGC the
                           norm of all gradients is limited
``L5-finetune``   RECIPE-8 a file's weights under a new head; what AGC leaves out is the new one
================= ======== ====================================================================

Since every backend goes on from the same checkpoint, and is compared with the same run, a training
may move from each to each other. Another launch of the same recipe is compared with the same steps.

The state before the first step has skip gains of about 0.5, a momentum and an average that differ
from the weights: at the official start, errors in the branches stay invisible.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from agc import nfnet
from agc.data import Batch, Batches, Evaluation, open_source
from agc.recipe import Recipe, load_recipe, numbers
from agc.reference import Result
from agc.training import Checkpoints, Launch, Metrics, State, Trainer, initial_state
from agc.weights import save
from agc_conformance.backend import Backend, Unsupported
from agc_conformance.records import ModelRecord, Status, describe, make_result
from agc_conformance.training.reference import ReferenceTrainer
from agc_conformance.verdict import Verdict

__all__ = [
    "FULL",
    "KINDS",
    "LIMITS",
    "SHORT",
    "TASK",
    "Plan",
    "result_ids",
    "run_recipes",
    "seeded_state",
]

Array = npt.NDArray[Any]

TASK: Final = "recipe"
"""Name of the training in ``train`` and ``model`` records."""

KINDS: Final[dict[str, str]] = {
    "trajectory": "RECIPE-5",
    "mask": "RECIPE-4",
    "evaluate": "RECIPE-6",
    "resume": "RECIPE-7",
    "migrate": "RECIPE-7",
    "accumulate": "RECIPE-5",
    "processes": "RECIPE-5",
    "sam": "RECIPE-5",
    "finetune": "RECIPE-8",
}
"""Kind of result to clause."""

LIMITS: Final[Mapping[str, float]] = {"parameters": 1e-6, "momentum": 1e-5, "ema": 1e-6}
"""Largest relative L2 error in float32 of each part of the state; rounding makes a fifth of it."""
_LOSS: Final = 1e-5
_PROCESSES: Final = 2
_PERTURBS: Final = 2
"""A step that perturbs and whose rate is not 0; the one before it does not perturb."""
_MAX_NORM: Final = 0.2
"""Less than half of the norm of all gradients in that step."""
_NEAR: Final = 1e-5
"""How near to its limit, relative to it, a unit may be clipped or not."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes
    ----------
    changes : tuple of str
        To the recipe ``conformance``.
    microbatches : tuple of int
        Examples of a micro-batch in the whole run, then in other launches.
    """

    changes: tuple[str, ...]
    microbatches: tuple[int, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the whole run."""
        return load_recipe("conformance", self.changes)


_STRONG: Final = ("model.variant=micro", "optimizer.weight_decay=0.01", "checkpoint.keep=1")
FULL: Final = Plan((*_STRONG, "seed=20210212"), (8, 32))
"""All 50 steps of the recipe ``conformance``.

Of a smaller model, since most of the time is compilation, and with more weight decay, so that
errors in it show. With this seed no input of a ReLU is within 4e-6 of 0, where rounding would
choose between two gradients.
"""
SHORT: Final = Plan(
    (
        *_STRONG,
        "train.batch=16",
        "train.steps=4",
        "schedule.warmup_steps=1.5",
        "optimizer.rate.per=8",
        "sam.group=8",
        'agc.clipping={"stem.*" = 0.02, "*" = {"@schedule" = [[0, 0.04], [2, 0.01]]}}',
    ),
    (4, 16),
)
"""Four steps with a high rate, for tests and mutants."""


def result_ids(select: str | None = None) -> list[str]:
    """Return the ids of the results, all or those whose id or clause a glob matches."""
    return [f"L5-{kind}" for kind in _chosen(select)]


def _chosen(select: str | None) -> list[str]:
    return [
        kind
        for kind, clause in KINDS.items()
        if select is None or fnmatchcase(f"L5-{kind}", select) or fnmatchcase(clause, select)
    ]


def run_recipes(
    backend: Backend,
    plan: Plan = FULL,
    *,
    select: str | None = None,
    progress: Callable[[int], None] | None = None,
    watch: Callable[[str], None] | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Ask a backend all questions of level 5.

    Parameters
    ----------
    backend : Backend
        Its :meth:`~agc_conformance.backend.Backend.trainer` is called, once for each recipe and
        launch.
    plan : Plan
    select : str, optional
        Glob on ids and clauses.
    progress : callable, optional
        Called with 1 after each question.
    watch : callable, optional
        Called with the id of each result before it.

    Yields
    ------
    record
        ``result`` records, and of ``L5-trajectory`` a ``train`` record a step and a ``model``
        record with the errors. An exception makes results ``error``, and
        :class:`~agc_conformance.backend.Unsupported` makes them ``unsupported``.
    """
    study = _Study(backend, plan)
    for kind in _chosen(select):
        if watch is not None:
            watch(f"L5-{kind}:float32")
        start = time.perf_counter()
        status: Status = "passed"
        try:
            verdict = _ASK[kind](study)
            if verdict.problem:
                status = "failed"
        except Unsupported as reason:
            status, verdict = "unsupported", Verdict(str(reason))
        except (Exception, SystemExit) as error:
            status, verdict = "error", Verdict(describe(error))
        yield make_result(
            f"L5-{kind}",
            clause=KINDS[kind],
            level="L5",
            dtype="float32",
            status=status,
            detail=(verdict.problem or verdict.note)[:600],
            seconds=time.perf_counter() - start,
        )
        if kind == "trajectory" and status in ("passed", "failed"):
            yield from _records(study, verdict)
        if progress is not None:
            progress(1)


def _records(study: _Study, verdict: Verdict) -> Iterator[Mapping[str, Any]]:
    for step, (metrics, want) in enumerate(zip(study.metrics, study.expected, strict=False)):
        loss = float(metrics.loss)
        yield {
            "type": "train",
            "task": TASK,
            "step": step,
            "loss": loss if np.isfinite(loss) else None,
            "reference_loss": want.loss,
            "layers": {},
        }

    def short(values: Mapping[str, float]) -> dict[str, float | None]:
        return {n: float(f"{x:.3g}") if np.isfinite(x) else None for n, x in values.items()}

    record: ModelRecord = {
        "type": "model",
        "model": TASK,
        "kind": "trajectory",
        "dtype": "float32",
        "errors": short(verdict.errors),
        "limits": short(verdict.limits),
    }
    yield record


# --- what is expected -----------------------------------------------------------------------------


class _Expected(NamedTuple):
    """One step of the reference, and the state after it."""

    loss: float
    perturbed_loss: float | None
    clipping: Result | None
    state: State


def seeded_state(recipe: Recipe) -> State:
    """Return a state before the first step in which every branch counts."""
    model = recipe.model.options()
    seeded = nfnet.seeded_parameters(model.variant, model.num_classes, model.in_channels)

    def times(factor: float) -> dict[str, npt.NDArray[np.float32]]:
        return {name: (factor * value).astype(np.float32) for name, value in seeded.items()}

    ema = times(0.5) if recipe.ema else None
    return State(step=0, parameters=times(1.0), momentum=times(0.01), ema=ema)


def follow(recipe: Recipe, state: State, batches: Mapping[int, Batch]) -> list[_Expected]:
    """Return the steps of the reference on some batches, by number, in order."""
    reference = ReferenceTrainer(recipe)
    reference.load(state)
    table, steps = numbers(recipe), []
    for step, batch in batches.items():
        metrics = reference.step(batch, table.at(step))
        perturbed = metrics.perturbed_loss
        steps.append(
            _Expected(
                float(metrics.loss),
                None if perturbed is None else float(perturbed),
                reference.clipping,
                reference.state(),
            )
        )
    return steps


@lru_cache(maxsize=1)
def _run(recipe: Recipe, model: nfnet.Options) -> tuple[dict[int, Batch], list[_Expected]]:  # noqa: ARG001
    """Return the batches of a recipe and the reference's whole run; a model has one definition."""
    source = Batches(recipe, open_source(recipe, "train"))
    batches = {step: source[step] for step in range(len(source))}
    return batches, follow(recipe, seeded_state(recipe), batches)


# --- a backend under test -------------------------------------------------------------------------


@dataclass
class _Study:
    """A backend's trainings of one plan; what several questions need is computed once."""

    backend: Backend
    plan: Plan
    trainers: dict[Any, Trainer] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)

    @cached_property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @cached_property
    def batches(self) -> dict[int, Batch]:
        return _run(self.recipe, self.recipe.model.options())[0]

    @cached_property
    def expected(self) -> list[_Expected]:
        return _run(self.recipe, self.recipe.model.options())[1]

    @property
    def half(self) -> int:
        return self.recipe.steps // 2

    def trainer(self, recipe: Recipe | None = None, microbatch: int | None = None) -> Trainer:
        """Return a trainer, the same one for the same recipe and launch: it may be compiled."""
        key = recipe or self.recipe, microbatch or self.plan.microbatches[0]
        if key not in self.trainers:
            self.trainers[key] = self.backend.trainer(key[0], Launch(microbatch=key[1]))
        return self.trainers[key]

    @cached_property
    def spread(self) -> Recipe:
        """The recipe with an ascent on a fraction spread over the batch, and ``max_norm``."""
        sam = self.recipe.sam
        assert sam is not None
        limited = replace(self.recipe.optimizer, max_norm=_MAX_NORM)
        return replace(self.recipe, sam=replace(sam, group="batch"), optimizer=limited)

    def compare_spread(self, trainer: Trainer) -> Verdict:
        """Compare a step of :attr:`spread` that perturbs."""
        start = replace(seeded_state(self.spread), step=_PERTURBS)
        return self.compare(trainer, self.spread, start, {_PERTURBS: self.batches[_PERTURBS]})

    def train(
        self, trainer: Trainer, recipe: Recipe, batches: Mapping[int, Batch]
    ) -> Iterator[tuple[Metrics, State]]:
        """Yield what each step reports, and the state after it."""
        table = numbers(recipe)
        for step, batch in batches.items():
            metrics = trainer.step(batch, table.at(step))
            yield metrics, trainer.state()

    @cached_property
    def states(self) -> list[State]:
        """The backend's states after each step of the whole run."""
        trainer, states = self.trainer(), []
        trainer.load(seeded_state(self.recipe))
        for metrics, state in self.train(trainer, self.recipe, self.batches):
            self.metrics.append(metrics)
            states.append(state)
        return states

    def compare(
        self,
        trainer: Trainer,
        recipe: Recipe,
        state: State,
        batches: Mapping[int, Batch],
        expected: Sequence[_Expected] | None = None,
    ) -> Verdict:
        """Train from a state, and compare each step with the reference's, or with others."""
        expected = follow(recipe, state, batches) if expected is None else expected
        trainer.load(state)
        verdict = Verdict()
        steps = self.train(trainer, recipe, batches)
        for (metrics, now), want in zip(steps, expected, strict=True):
            _compare_step(verdict, metrics, now, want)
        return verdict


def _compare_step(verdict: Verdict, metrics: Metrics, state: State, want: _Expected) -> None:
    """Compare one step: losses, clipped units, every part of the state."""
    step = want.state.step - 1

    def fail(message: str) -> None:
        verdict.add(Verdict(f"step {step}: {message}"))

    if state.step != want.state.step:
        fail(f"the state says that {state.step} steps were made")
    losses = {"loss": want.loss, "perturbed_loss": want.perturbed_loss}
    for name, right in losses.items():
        got = getattr(metrics, name)
        if (got is None) != (right is None):
            fail(f"{name} is {got}, it should be {right}")
        elif right is not None and not abs(float(got) - right) <= _LOSS * abs(right):
            fail(f"{name} is {float(got):.8g}, it should be {right:.8g}")
    _compare_clipping(fail, metrics, want.clipping)
    parts = dict(state.parts())
    for name, arrays in want.state.parts():
        error = _distance(parts.get(name), arrays)
        place = f"step {step}" if name == "parameters" else f"step {step}, {name}"
        verdict.errors[place], verdict.limits[place] = error, LIMITS[name]
        if not error <= LIMITS[name]:
            fail(f"{name} is {error:.2g} off, {LIMITS[name]:g} is allowed")
    if len(parts) != len(dict(want.state.parts())):
        fail(f"the state has {list(parts)}")
    shares = (error / verdict.limits[place] for place, error in verdict.errors.items())
    verdict.note = f"{max(shares):.0%} of the error allowed"


def _compare_clipping(
    fail: Callable[[str], None], metrics: Metrics, clipping: Result | None
) -> None:
    if clipping is None:
        if metrics.clipped is not None:
            fail("units are clipped, and the recipe has no AGC")
        return
    units, clipped = metrics.units, metrics.clipped
    if units is None or clipped is None or int(float(units)) != clipping.total.units:
        fail(f"AGC looked at {units} units, it should be {clipping.total.units}")
        return
    least, most = (
        sum(
            int(np.sum(unit.gradient_norm > factor * unit.limit))
            for unit in clipping.clipped.values()
        )
        for factor in (1 + _NEAR, 1 - _NEAR)
    )
    if not least <= int(float(clipped)) <= most:
        fail(f"{int(float(clipped))} units are clipped, it should be {least} to {most}")


def _distance(got: Mapping[str, Array] | None, want: Mapping[str, Array]) -> float:
    """Return the L2 norm of the error of all arrays by that of the right ones."""
    if got is None or list(got) != list(want):
        return np.inf
    if any(got[n].dtype != np.float32 or got[n].shape != want[n].shape for n in want):
        return np.inf
    flat, right = (
        np.concatenate([np.ravel(array).astype(np.float64) for array in arrays.values()])
        for arrays in (got, want)
    )
    return float(np.linalg.norm(flat - right) / np.linalg.norm(right))


def _same(got: State, want: State, what: str) -> Verdict:
    """Compare two states bit for bit."""
    if got.step != want.step:
        return Verdict(f"{what}: step {got.step}, it should be {want.step}")
    parts = dict(got.parts())
    for part, arrays in want.parts():
        for name, array in arrays.items():
            mine = parts.get(part, {}).get(name)
            if mine is None or mine.tobytes() != np.asarray(array, np.float32).tobytes():
                return Verdict(f"{what}: {part} {name!r} has other bits")
    return Verdict(note="the same bits")


# --- the questions --------------------------------------------------------------------------------


def _trajectory(study: _Study) -> Verdict:
    verdict = Verdict()
    states = study.states
    for metrics, state, want in zip(study.metrics, states, study.expected, strict=True):
        _compare_step(verdict, metrics, state, want)
    return verdict


def _mask(study: _Study) -> Verdict:
    """Compare a step that does not perturb on images whose masks keep what they dropped."""
    recipe, state, verdict = (
        study.recipe,
        replace(seeded_state(study.recipe), step=_PERTURBS - 1),
        Verdict(),
    )
    batch = study.batches[_PERTURBS - 1]
    assert batch.keep is not None
    assert batch.dropout is not None
    others = {
        "keep": batch._replace(keep=~batch.keep),
        "dropout": batch._replace(dropout=~batch.dropout),
    }
    for name, other in others.items():
        got = study.compare(study.trainer(), recipe, state, {state.step: other})
        got.problem = got.problem and f"{name}: {got.problem}"
        verdict.add(got)
        verdict.note = got.note
    return verdict


def _evaluate(study: _Study) -> Verdict:
    return _evaluated(study.recipe, study.trainer())


def _evaluated(recipe: Recipe, trainer: Trainer) -> Verdict:
    """Compare what a trainer makes of all test images."""
    state = seeded_state(recipe)
    reference = ReferenceTrainer(recipe)
    for each in (trainer, reference):
        each.load(state)
    evaluation = Evaluation(recipe, open_source(recipe, "test"), batch=recipe.train.batch)
    images = [evaluation[n] for n in range(len(evaluation))]
    for weights in recipe.evaluate.weights or ():
        got, want = (each.evaluate(images, weights) for each in (trainer, reference))
        counts = [[t.top1, t.top5, t.images] for t in (got, want)]
        if counts[0] != counts[1]:
            return Verdict(f"{weights}: top-1, top-5, images are {counts[0]}, not {counts[1]}")
        if not abs(got.loss - want.loss) <= _LOSS * want.loss:
            return Verdict(f"{weights}: the loss is {got.loss:.8g}, it should be {want.loss:.8g}")
    return _same(trainer.state(), state, "after the evaluation")


def _resume(study: _Study) -> Verdict:
    """Go on from a file, in a trainer that has trained something else meanwhile."""
    half, trainer = study.half, study.trainer()
    states = study.states
    trainer.load(_through_file(study.recipe, states[half - 1]))
    last = min(half + 3, study.recipe.steps)
    state = trainer.state()
    while state.step < last:
        coming = {state.step: study.batches[state.step]}
        ((_, state),) = study.train(trainer, study.recipe, coming)
    return _same(state, states[last - 1], f"{last - half} steps after a stop at {half}")


def _migrate(study: _Study) -> Verdict:
    half = study.half
    state = _through_file(study.recipe, _rounded(study.expected[half - 1].state))
    coming = {step: batch for step, batch in study.batches.items() if step >= half}
    return study.compare(
        study.trainer(), study.recipe, state, coming, expected=study.expected[half:]
    )


def _accumulate(study: _Study) -> Verdict:
    """Compare a step that does not perturb in other launches; the whole run has the others."""
    verdict, start = Verdict(), replace(seeded_state(study.recipe), step=_PERTURBS - 1)
    one = {start.step: study.batches[start.step]}
    for size in study.plan.microbatches[1:]:
        trainer = study.trainer(microbatch=size)
        got = study.compare(trainer, study.recipe, start, one)
        got.problem = got.problem and f"micro-batches of {size}: {got.problem}"
        verdict.add(got)
        verdict.note = got.note
    return verdict


def _processes(study: _Study) -> Verdict:
    with study.backend.processes(_PROCESSES) as trainer:
        made = trainer(study.recipe, Launch(microbatch=study.plan.microbatches[0]))
        start = seeded_state(study.recipe)
        verdict = study.compare(made, study.recipe, start, study.batches, expected=study.expected)
        verdict.add(_evaluated(study.recipe, made))
        spread = study.compare_spread(trainer(study.spread, Launch()))
        spread.problem = spread.problem and f"ascent on the whole batch: {spread.problem}"
        verdict.add(spread)
    return verdict


def _sam(study: _Study) -> Verdict:
    return study.compare_spread(study.trainer(study.spread, study.spread.train.batch))


def _finetune(study: _Study) -> Verdict:
    """Begin from a file of other classes; images are normalised by the pipeline here."""
    base = study.recipe
    model = replace(base.model, num_classes=7, init="file", head="new")
    augment = replace(base.augment, randaugment=None)
    recipe = replace(base, model=model, augment=augment, sam=None)
    old = seeded_state(base)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save(file, base.model.options(), old.parameters)
        state = initial_state(recipe, file)
    trainer = study.trainer(recipe, recipe.train.batch)
    trainer.load(state)
    begun = trainer.state()
    body = {n: a for n, a in old.parameters.items() if not n.startswith(f"{nfnet.HEAD}.")}
    for part in (begun.parameters, begun.ema or {}):
        for name, array in body.items():
            if part[name].tobytes() != array.tobytes():
                return Verdict(f"{name!r} is not that of the file before the first step")
    verdict = _same(begun, state, "before the first step")
    if verdict.problem:
        return verdict
    batches = Batches(recipe, open_source(recipe, "train"))
    return study.compare(trainer, recipe, state, {step: batches[step] for step in range(2)})


def _through_file(recipe: Recipe, state: State) -> State:
    """Write a checkpoint and read it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), recipe)
        checkpoints.save(state)
        return checkpoints.load()


def _rounded(state: State) -> State:
    parts: dict[str, Any] = {
        part: {name: array.astype(np.float32) for name, array in arrays.items()}
        for part, arrays in state.parts()
    }
    return replace(state, **parts)


_ASK: Final[Mapping[str, Callable[[_Study], Verdict]]] = {
    "trajectory": _trajectory,
    "mask": _mask,
    "evaluate": _evaluate,
    "resume": _resume,
    "migrate": _migrate,
    "accumulate": _accumulate,
    "processes": _processes,
    "sam": _sam,
    "finetune": _finetune,
}
