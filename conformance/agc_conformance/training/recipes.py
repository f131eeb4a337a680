"""Level 5: the same recipe is the same run.

A backend trains what :func:`agc.recipe.load_recipe` reads, from the same state on the same batches
as :class:`agc_conformance.training.reference.ReferenceTrainer` in float64. Recipes, batches and
tables of numbers are the core's own, and have vectors (``L5-recipe-*``, ``L5-batch-*``,
``L5-schedule-*``). What a backend computes has these results:

================= ======== ====================================================================
``L5-trajectory`` RECIPE-5 state, losses and clipped units after each step: every augmentation,
                           both masks, SAM in groups, four micro-batches; in float32 and float64
``L5-mask``       RECIPE-4 other masks on the same images: what they keep is what counts
``L5-evaluate``   RECIPE-6 weights and average; the images do not fill the last batch
``L5-resume``     RECIPE-7 from a written checkpoint, and from what SIGKILL left of a process, bit
                           for bit as if never stopped
``L5-migrate``    RECIPE-7 from a checkpoint that the reference wrote half-way, and the reference
                           from one of the backend
``L5-accumulate`` RECIPE-5 the whole batch at once
``L5-processes``  RECIPE-5 two processes: the whole run, an evaluation, an ascent on both
``L5-sam``        RECIPE-5 the ascent on a fraction spread over the whole batch, and after AGC the
                           norm of all gradients is limited
``L5-finetune``   RECIPE-8 a file's weights under a new head; what AGC leaves out is the new one
================= ======== ====================================================================

Backends do not know each other, so the reference stands between them. Each writes checkpoints that
the reference goes on from, and goes on from those of the reference, in the one form there is, and
ends where the reference's own run does: so a training may move from each framework to each other,
all ordered pairs of them. Another launch of the same recipe is compared with the same steps.

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
from agc.recipe.tables import Evaluate
from agc.reference import Result
from agc.training import Checkpoints, Launch, Metrics, State, Trainer, initial_state
from agc.weights import save
from agc_conformance.backend import Backend, Unsupported
from agc_conformance.records import ModelRecord, Status, describe, make_result
from agc_conformance.training.processes import Make, train_and_kill, training
from agc_conformance.training.reference import ReferenceTrainer
from agc_conformance.verdict import Verdict

__all__ = [
    "FULL",
    "KINDS",
    "LIMITS",
    "SHORT",
    "TASK",
    "Plan",
    "count_results",
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

LIMITS: Final[Mapping[str, Mapping[str, float]]] = {
    "float32": {"parameters": 1e-6, "momentum": 1e-5, "ema": 1e-6, "loss": 1e-5, "near": 1e-5},
    "float64": {"parameters": 1e-13, "momentum": 1e-13, "ema": 1e-13, "loss": 1e-13, "near": 1e-12},
}
"""Largest errors by the dtype of the state.

Of each part of the state in L2, and of a loss; and how near to its limit a unit may be clipped or
not: all relative. In float32 rounding makes a fifth of what is allowed, in float64 a fiftieth.
"""
_PROCESSES: Final = 2
_PERTURBS: Final = 2
"""A step that perturbs and whose rate is not 0; the one before it does not perturb."""
_MAX_NORM: Final = 0.2
"""Less than half of the norm of all gradients in that step."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes
    ----------
    changes : tuple of str
        To the recipe ``conformance``.
    microbatches : tuple of int
        Examples of a micro-batch in the whole run, then in other launches.
    killed : int
        Steps that a process has made when it is killed.
    """

    changes: tuple[str, ...]
    microbatches: tuple[int, ...]
    killed: int

    @property
    def recipe(self) -> Recipe:
        """The recipe of the whole run."""
        return load_recipe("conformance", self.changes)


_STRONG: Final = ("model.variant=micro", "optimizer.weight_decay=0.01", "checkpoint.keep=1")
FULL: Final = Plan((*_STRONG, "seed=20210212"), (8, 32), 23)
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
        "checkpoint.every_steps=2",
        'agc.clipping={"stem.*" = 0.02, "*" = {"@schedule" = [[0, 0.04], [2, 0.01]]}}',
    ),
    (4, 16),
    3,
)
"""Four steps with a high rate, for tests and mutants."""


def result_ids(select: str | None = None) -> list[str]:
    """Return the ids of the results, all or those whose id or clause a glob matches."""
    return [
        f"L5-{kind}"
        for kind, clause in KINDS.items()
        if select is None or fnmatchcase(f"L5-{kind}", select) or fnmatchcase(clause, select)
    ]


def count_results(select: str | None = None, dtypes: Sequence[str] = tuple(LIMITS)) -> int:
    """Return how many results there are, of which one id may have several, by dtype."""
    return len(_chosen(select, dtypes))


def _chosen(select: str | None, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    ids = result_ids(select)
    return [(kind, dtype) for kind, dtype in _ASK if f"L5-{kind}" in ids and dtype in dtypes]


def run_recipes(
    backend: Backend,
    plan: Plan = FULL,
    *,
    select: str | None = None,
    dtypes: Sequence[str] = tuple(LIMITS),
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
    dtypes : sequence of str
        Dtypes of the state to ask for.
    progress : callable, optional
        Called with 1 after each question.
    watch : callable, optional
        Called with the name (``id:dtype``) of each result before it.

    Yields
    ------
    record
        ``result`` records, and of ``L5-trajectory`` a ``model`` record with the errors, in float32
        after a ``train`` record a step. An exception makes results ``error``, and
        :class:`~agc_conformance.backend.Unsupported` makes them ``unsupported``.
    """
    study = _Study(backend, plan)
    for kind, dtype in _chosen(select, dtypes):
        if watch is not None:
            watch(f"L5-{kind}:{dtype}")
        start = time.perf_counter()
        status: Status = "passed"
        try:
            if dtype not in backend.dtypes:
                raise Unsupported(f"the backend does not take {dtype}")
            verdict = _ASK[kind, dtype](study)
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
            dtype=dtype,
            status=status,
            detail=(verdict.problem or verdict.note)[:600],
            seconds=time.perf_counter() - start,
        )
        if kind == "trajectory" and status in ("passed", "failed"):
            yield from _records(study, verdict, dtype)
        if progress is not None:
            progress(1)


def _records(study: _Study, verdict: Verdict, dtype: str) -> Iterator[Mapping[str, Any]]:
    metrics_of_steps = study.metrics if dtype == "float32" else []
    for step, (metrics, want) in enumerate(zip(metrics_of_steps, study.expected, strict=False)):
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
        "dtype": dtype,
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
    """Return a state before the first step in which every branch counts, float32 or widened."""
    model = recipe.model.options()
    seeded = nfnet.seeded_parameters(model.variant, model.num_classes, model.in_channels)

    def times(factor: float) -> dict[str, Array]:
        rounded = {name: (factor * value).astype(np.float32) for name, value in seeded.items()}
        return {name: value.astype(recipe.precision.state) for name, value in rounded.items()}

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
            _compare_step(verdict, metrics, now, want, recipe.precision.state)
        return verdict


def _compare_step(
    verdict: Verdict, metrics: Metrics, state: State, want: _Expected, dtype: str
) -> None:
    """Compare one step: losses, clipped units, every part of the state."""
    step, limits = want.state.step - 1, LIMITS[dtype]

    def fail(message: str) -> None:
        verdict.add(Verdict(f"step {step}: {message}"))

    if state.step != want.state.step:
        fail(f"the state says that {state.step} steps were made")
    losses = {"loss": want.loss, "perturbed_loss": want.perturbed_loss}
    for name, right in losses.items():
        got = getattr(metrics, name)
        if (got is None) != (right is None):
            fail(f"{name} is {got}, it should be {right}")
        elif right is not None and not abs(float(got) - right) <= limits["loss"] * abs(right):
            fail(f"{name} is {float(got):.16g}, it should be {right:.16g}")
    _compare_clipping(fail, metrics, want.clipping, limits["near"])
    parts = dict(state.parts())
    for name, arrays in want.state.parts():
        error = _distance(parts.get(name), arrays, dtype)
        place = f"step {step}" if name == "parameters" else f"step {step}, {name}"
        verdict.errors[place], verdict.limits[place] = error, limits[name]
        if not error <= limits[name]:
            fail(f"{name} is {error:.2g} off, {limits[name]:g} is allowed")
    if len(parts) != len(dict(want.state.parts())):
        fail(f"the state has {list(parts)}")
    shares = (error / verdict.limits[place] for place, error in verdict.errors.items())
    verdict.note = f"{max(shares):.0%} of the error allowed"


def _compare_clipping(
    fail: Callable[[str], None], metrics: Metrics, clipping: Result | None, near: float
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
        for factor in (1 + near, 1 - near)
    )
    if not least <= int(float(clipped)) <= most:
        fail(f"{int(float(clipped))} units are clipped, it should be {least} to {most}")


def _distance(got: Mapping[str, Array] | None, want: Mapping[str, Array], dtype: str) -> float:
    """Return the L2 norm of the error of all arrays by that of the right ones."""
    if got is None or list(got) != list(want):
        return np.inf
    if any(got[n].dtype != dtype or got[n].shape != want[n].shape for n in want):
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
            if mine is None or mine.tobytes() != array.tobytes():
                return Verdict(f"{what}: {part} {name!r} has other bits")
    return Verdict(note="the same bits")


# --- the questions --------------------------------------------------------------------------------


def _trajectory(study: _Study) -> Verdict:
    verdict = Verdict()
    states = study.states
    for metrics, state, want in zip(study.metrics, states, study.expected, strict=True):
        _compare_step(verdict, metrics, state, want, "float32")
    return verdict


def _wide(study: _Study) -> Verdict:
    """Compare the same run in float64, where no rounding hides a small mistake."""
    precision = replace(study.recipe.precision, compute="float64")
    recipe = replace(study.recipe, precision=precision)
    start, trainer = seeded_state(recipe), study.trainer(recipe)
    return study.compare(trainer, recipe, start, study.batches, expected=study.expected)


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
        if not abs(got.loss - want.loss) <= LIMITS["float32"]["loss"] * want.loss:
            return Verdict(f"{weights}: the loss is {got.loss:.8g}, it should be {want.loss:.8g}")
    return _same(trainer.state(), state, "after the evaluation")


def _resume(study: _Study) -> Verdict:
    verdict = _stopped(study)
    try:
        make = study.backend.elsewhere()
    except Unsupported as reason:
        return replace(verdict, note=f"{verdict.note} in one process; {reason}")
    return verdict if verdict.problem else _killed(study, make)


def _stopped(study: _Study) -> Verdict:
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


def _killed(study: _Study, make: Make) -> Verdict:
    """Let another process train until it is killed, and go on in this one, both by the core's loop.

    Evaluations are asked for elsewhere: here they would only be compiled.
    """
    steps = study.recipe.steps
    recipe = replace(study.recipe, evaluate=Evaluate(every_steps=steps))
    launch = Launch(microbatch=study.plan.microbatches[0], log_every=1)
    killed, last = study.plan.killed, min(study.plan.killed + 3, steps - 1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        Checkpoints(run, recipe).save(seeded_state(recipe))
        train_and_kill(make, recipe, launch, run, killed)
        resumed = training(recipe, study.trainer(), run, launch)
        began = resumed.made
        if not 0 < began <= killed:
            return Verdict(f"killed after {killed} steps, a process left a checkpoint of {began}")
        resumed.run(lambda: resumed.made == last)
    what = f"{last} steps, after {killed} of which a process was killed"
    verdict = _same(study.trainer().state(), study.states[last - 1], what)
    return replace(verdict, note=f"{verdict.note}: {what}, and step {began} was left")


def _migrate(study: _Study) -> Verdict:
    """Move from the reference to the backend at half of the run, and from the backend to it."""
    half, recipe = study.half, study.recipe
    coming = {step: batch for step, batch in study.batches.items() if step >= half}
    moves = {
        "from the reference": (_rounded(study.expected[half - 1].state), study.trainer()),
        "to the reference": (study.states[half - 1], ReferenceTrainer(recipe, dtype=np.float32)),
    }
    verdict, expected = Verdict(), study.expected[half:]
    for name, (state, trainer) in moves.items():
        got = study.compare(trainer, recipe, _through_file(recipe, state), coming, expected)
        got.problem = got.problem and f"{name}: {got.problem}"
        verdict.add(got)
        verdict.note = f"{verdict.note}{'; ' if verdict.note else ''}{name} {got.note}"
    return verdict


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


_ASK: Final[Mapping[tuple[str, str], Callable[[_Study], Verdict]]] = {
    ("trajectory", "float32"): _trajectory,
    ("trajectory", "float64"): _wide,
    ("mask", "float32"): _mask,
    ("evaluate", "float32"): _evaluate,
    ("resume", "float32"): _resume,
    ("migrate", "float32"): _migrate,
    ("accumulate", "float32"): _accumulate,
    ("processes", "float32"): _processes,
    ("sam", "float32"): _sam,
    ("finetune", "float32"): _finetune,
}
"""The questions, by kind of result and dtype of the state."""
