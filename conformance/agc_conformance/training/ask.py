"""Training on real images, compared with the float64 reference at every step.

A small convolutional classifier (:class:`agc_conformance.backend.TrainingTask`) is trained on
scikit-learn's bundled images, with AGC in front of SGD, by the backend and by the reference; in one
task SAM comes before both. Two comparisons are made:

*Local*: the reference clips the backend's own gradients against the backend's own weights, so that
the comparison measures the clipping alone, in units in the last place. The optimizer's step is
redone in the same way, and so are SAM's two passes: the perturbation from the weights, the gradient
from the perturbed weights.

*Global*: the reference trains by itself in float64 from the same weights on the same batches.
Gradients, unit norms, clipped gradients, decisions and weights must stay together for the whole
run. Rounding makes any two runs drift apart; :func:`drift_bound` says how far is allowed, and why.

Each task has these results. The second clause is that of a task with SAM:

=========== ============== =======================================================================
``plan``    AGC-6          the parameters, units, thresholds and exclusions of the reference's plan
``perturb`` SAM-1          local: the perturbed weights; only with SAM
``descent`` SAM-3          local: the gradient there, and the weights restored; only with SAM
``clip``    AGC-2, SAM-6   local: clipped gradients and decisions, by the weights that are updated
``update``  AGC-7, SAM-6   local: clipping comes before weight decay and momentum
``run``     AGC-3, SAM-7   global: the whole run; with SAM, the ascent sees a fifth of the batch
=========== ============== =======================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc import AGC, SAM, Plan, Schedule, Units
from agc.plan import WHOLE, Parameter, make_plan
from agc.reference import (
    Result,
    adaptive_clip,
    sharpness_aware_gradients,
    unit_norms,
)
from agc_conformance.backend import Backend, Optimizer, TrainingTask, TrainStep, Unsupported
from agc_conformance.records import Status, describe, make_result
from agc_conformance.training.network import PARAMETERS, loss_and_gradients
from agc_conformance.verdict import LIMITS, Verdict, ulp_error

__all__ = [
    "TASKS",
    "digits",
    "drift_bound",
    "photographs",
    "reference_plan",
    "reference_run",
    "result_ids",
    "run_task",
    "sam_digits",
]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

_EPS: Final = float(np.finfo(np.float32).eps)
_UNITS: Final = {
    "conv1.weight": "o c h w -> o",
    "conv2.weight": "o c h w -> o",
    "head.weight": "k o -> k",
}
_CLAUSES: Final = {"plan": "AGC-6", "clip": "AGC-2", "update": "AGC-7", "run": "AGC-3"}
_SHARP_CLAUSES: Final = {
    "plan": "AGC-6",
    "perturb": "SAM-1",
    "descent": "SAM-3",
    "clip": "SAM-6",
    "update": "SAM-6",
    "run": "SAM-7",
}


def drift_bound(step: int) -> float:
    """Return how far a float32 run may be from the float64 run before a step.

    The bound is relative to the largest element: ``2**-15`` a step, 0.003 % at first, 0.15 % at
    step 50. Rounding alone drifts to a sixth of this at most, whatever algorithm a framework takes
    for its convolutions.

    The tasks are well conditioned: started from weights that differ by 1e-6, they stay below a
    quarter of the bound (a test checks that), so the order of summation on another machine does not
    matter. Wrong formulas are far outside: an additive epsilon doubles the limits of the biases at
    step 0.
    """
    return 2.0**-15 * (1 + step)


def digits(steps: int = 50) -> TrainingTask:
    """Build the first task: handwritten digits (8x8, grey, 10 classes).

    AGC leaves the head out; SGD has Nesterov momentum and weight decay.
    """
    return _digits(steps, seed=0)


def sam_digits(steps: int = 50) -> TrainingTask:
    """Build the third task: digits again, with SAM as for NFNets.

    The ascent pass sees a fifth of each batch.
    """
    return replace(_digits(steps, seed=2), sharpness=SAM(rho=0.05, fraction=0.2))


def _digits(steps: int, *, seed: int) -> TrainingTask:
    random = np.random.RandomState(seed)

    def batch() -> tuple[Array, Array]:
        images, labels = _load_digits()
        chosen = random.randint(len(images), size=64)
        return _batch(images[chosen], labels[chosen])

    return TrainingTask(
        rule=AGC(clipping=0.05, exclude=["head.*"]),
        optimizer=Optimizer(lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-3),
        weights=_weights(random, channels=1, classes=10),
        batches=[batch() for _ in range(steps)],
    )


@cache
def _load_digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:, None] - 8) / 6, data.target  # grey levels go from 0 to 16


@cache
def _load_photographs() -> list[Array]:
    from sklearn.datasets import load_sample_image

    names = ("china.jpg", "flower.jpg")
    return [(load_sample_image(name).transpose(2, 0, 1) - 110.0) / 64 for name in names]


def photographs(steps: int = 50) -> TrainingTask:
    """Build the second task: tell from which of two photographs a 24x24 RGB patch is.

    AGC has a schedule and leaves out nothing.
    """
    random = np.random.RandomState(1)
    size = 24

    def patch(label: int) -> Array:
        photo = _load_photographs()[label]
        top, left = (random.randint(extent - size + 1) for extent in photo.shape[1:])
        cut: Array = photo[:, top : top + size, left : left + size]
        return cut

    labels = [random.randint(2, size=32) for _ in range(steps)]
    return TrainingTask(
        rule=AGC(clipping={"head.*": 0.1, "*": Schedule([(0, 0.06), (40, 0.02)])}),
        optimizer=Optimizer(lr=0.05, momentum=0.9),
        weights=_weights(random, channels=3, classes=2),
        batches=[_batch(np.stack([patch(y) for y in chosen]), chosen) for chosen in labels],
    )


TASKS: Final[Mapping[str, Callable[[int], TrainingTask]]] = {
    "digits": digits,
    "photographs": photographs,
    "sam-digits": sam_digits,
}
"""Functions of the number of steps, by name; the same call gives the same task, bit for bit."""


def _weights(random: np.random.RandomState, *, channels: int, classes: int) -> dict[str, Array]:
    """Return He-initialised weights; biases are zero, so that the floor of the norm matters."""

    def normal(*shape: int) -> Array:
        drawn: Array = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        return drawn.astype(np.float32)

    first, second = 8, 16
    arrays = (
        normal(first, channels, 3, 3),
        np.zeros(first, np.float32),
        normal(second, first, 3, 3),
        np.zeros(second, np.float32),
        normal(classes, second),
        np.zeros(classes, np.float32),
    )
    return dict(zip(PARAMETERS, arrays, strict=True))


def _batch(images: Array, labels: Array) -> tuple[Array, Array]:
    return images.astype(np.float32), labels.astype(np.int64)


def reference_plan(task: TrainingTask) -> Plan:
    """Return the plan of a task in its own layout (out-first)."""
    parameters = [
        Parameter(name, array.shape, Units(_UNITS[name]) if name in _UNITS else WHOLE)
        for name, array in task.weights.items()
    ]
    return make_plan(parameters, task.rule, head="head")


class _Sgd:
    """:class:`agc_conformance.backend.Optimizer` in float64, with bounds of float32's error."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._momentum: dict[str, Array] = {}
        self._sizes: dict[str, Array] = {}
        self._errors: dict[str, Array] = {}

    def step(self, weights: Arrays, gradients: Arrays) -> dict[str, Array]:
        """Return the weights after a step."""
        o = self.optimizer
        after = {}
        for name, weight in weights.items():
            w, g = weight.astype(np.float64), gradients[name].astype(np.float64)
            u = g if o.decoupled else g + o.weight_decay * w
            m = self._momentum[name] = o.momentum * self._momentum.get(name, 0.0) + u
            # Magnitudes of the same sums: each float32 addition errs by a fraction of them.
            size = self._sizes[name] = o.momentum * self._sizes.get(name, 0.0) + np.abs(u)
            self._errors[name] = o.momentum * self._errors.get(name, 0.0) + size
            decay = o.weight_decay if o.decoupled else 0.0
            after[name] = w - o.lr * (u + o.momentum * m if o.nesterov else m) - o.lr * decay * w
        return after

    def tolerance(self, name: str, weight: Array) -> Array:
        """Return a bound of float32's error in each weight after the last step."""
        bound: Array = _EPS * (2 * np.abs(weight) + 4 * self.optimizer.lr * self._errors[name])
        return bound


def reference_run(task: TrainingTask) -> Iterator[tuple[TrainStep, Result]]:
    """Train in float64, yielding every step and its result of clipping."""
    plan = reference_plan(task)
    sgd = _Sgd(task.optimizer)
    weights = {name: array.astype(np.float64) for name, array in task.weights.items()}
    for index, batch in enumerate(task.batches):
        loss, gradients, perturbed = _gradients(task, weights, batch, index)
        result = adaptive_clip(weights, gradients, plan, task.rule, step=index)
        clipped = {name: np.asarray(array) for name, array in result.gradients.items()}
        after = sgd.step(weights, clipped)
        yield TrainStep(loss, weights, gradients, clipped, after, plan, perturbed, weights), result
        weights = after


def _gradients(
    task: TrainingTask, weights: Arrays, batch: tuple[Array, Array], step: int
) -> tuple[float, Arrays, Arrays]:
    """Return the clean loss, the gradients to clip, and the weights they belong to, in float64."""
    if task.sharpness is None:
        return *_evaluate(weights, batch), weights
    visited: list[Arrays] = []

    def evaluate(point: Arrays, part: Sequence[Array]) -> tuple[float, Arrays]:
        visited.append(point)
        return _evaluate(point, part)

    result = sharpness_aware_gradients(evaluate, weights, batch, task.sharpness, step=step)
    gradients = {name: np.asarray(array) for name, array in result.gradients.items()}
    return result.loss, gradients, visited[-1]


def _evaluate(weights: Arrays, batch: Sequence[Array]) -> tuple[float, Arrays]:
    images, labels = batch
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return loss_and_gradients(wide, images.astype(np.float64), labels)


class _Comparison:
    """Compares a backend's steps with the reference, one by one."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self.plan = reference_plan(task)
        self.clauses = _clauses(task)
        self.verdicts = {kind: Verdict() for kind in self.clauses}
        self._weights: Arrays = task.weights
        self._sgd = _Sgd(task.optimizer)
        self._reference = reference_run(task)
        self._scales: dict[str, float] = {}
        self.steps = 0

    def step(self, got: TrainStep) -> dict[str, Any]:
        """Compare one step; return its numbers, per layer."""
        index = self.steps
        self.steps += 1
        want, wanted = next(self._reference)
        layers: dict[str, dict[str, float]] = {name: {} for name in PARAMETERS}
        self._check_plan(index, got)
        if self._check_arrays(index, got):
            if self.task.sharpness is not None:
                self._check_sharpness(index, got)
            self._check_clip(index, got, layers)
            self._check_update(index, got)
            self._check_run(index, got, want, wanted, layers)
            self._weights = got.after
        return {
            "loss": _finite(got.loss),
            "reference_loss": want.loss,
            "layers": {
                name: {key: _finite(value) for key, value in numbers.items()}
                for name, numbers in layers.items()
            },
        }

    def _fail(self, kind: str, index: int, message: str) -> None:
        self.verdicts[kind].add(Verdict(f"step {index}: {message}"))

    def _check_plan(self, index: int, got: TrainStep) -> None:
        if got.plan is None:
            self._fail("plan", index, "the backend yields no plan")
            return
        theirs, ours = got.plan.decisions(), self.plan.decisions()
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                message = f"{name} is {theirs.get(name)}, it should be {ours.get(name)}"
                self._fail("plan", index, message)

    def _check_arrays(self, index: int, got: TrainStep) -> bool:
        """Tell whether all arrays are there; if not, every comparison fails."""
        problem = ""
        sharp = ("perturbed", "restored") if self.task.sharpness else ()
        for kind in ("before", "gradients", "clipped", "after", *sharp):
            arrays: Arrays | None = getattr(got, kind)
            if arrays is None:
                problem = problem or f"the backend does not tell the {kind} weights of SAM"
                continue
            for name, array in self.task.weights.items():
                if name not in arrays:
                    problem = problem or f"{kind} has no {name}"
                    continue
                shape, dtype = arrays[name].shape, arrays[name].dtype
                if shape != array.shape or dtype not in (np.float32, np.float64):
                    problem = problem or (
                        f"{kind} of {name} is {dtype} {shape}, it should be float32 {array.shape}"
                    )
        for kind in self.verdicts:
            if problem and kind != "plan":
                self._fail(kind, index, problem)
        return not problem

    def _check_sharpness(self, index: int, got: TrainStep) -> None:
        """Redo both passes of SAM from the backend's own weights (local).

        The backend's ascent gradient has the rounding of one float32 evaluation. The bound allows
        for it by :func:`drift_bound` at step 0, relative to the largest element of ``e``, and for
        the rounding of ``w + e``. Wrong formulas are far outside: AGC on the ascent gradient,
        another part of the batch or an ``e`` per layer change ``e`` by tenths of its length.
        """
        assert got.perturbed is not None
        assert got.restored is not None
        batch = self.task.batches[index]
        rounding = drift_bound(0)
        _, _, perturbed = _gradients(self.task, got.before, batch, index)
        _, gradients = _evaluate(got.perturbed, batch)
        radius = max(float(np.max(np.abs(perturbed[n] - got.before[n]))) for n in PARAMETERS)
        for name in PARAMETERS:
            error = np.abs(got.perturbed[name] - perturbed[name])
            if not (error <= rounding * radius + _EPS * np.abs(perturbed[name])).all():
                self._fail(
                    "perturb",
                    index,
                    f"{name} is {np.max(error):.3g} off from w + e; the largest element of e is {radius:.3g}",
                )
            drift = self._drift(f"descent gradient of {name}", got.gradients[name], gradients[name])
            if not drift <= rounding:
                self._fail(
                    "descent",
                    index,
                    f"gradient of {name} is {drift:.2g} off from that at the perturbed weights, "
                    f"{rounding:.2g} is allowed",
                )
            moved = got.restored[name] != got.before[name]
            if moved.any():
                message = f"{int(moved.sum())} of {moved.size} weights of {name} were not restored"
                self._fail("descent", index, message)

    def _check_clip(
        self, index: int, got: TrainStep, layers: Mapping[str, dict[str, float]]
    ) -> None:
        """Clip the backend's own gradients against its own weights (local)."""
        result = adaptive_clip(got.before, got.gradients, self.plan, self.task.rule, step=index)
        limit = LIMITS["float32"]
        for name in PARAMETERS:
            raw, clipped = got.gradients[name], got.clipped[name]
            expected = np.asarray(result.gradients[name])
            changed = raw != clipped
            if name in result.clipped:
                unit = result.clipped[name]
                acts = unit.clipped
                tie = np.abs(unit.gradient_norm - unit.limit) <= limit * _EPS * unit.limit
                axes = self.plan[name].axes
                moved = changed.any(axis=axes.reduce, keepdims=True)
                if (~tie & (moved != acts)).any():
                    self._fail("clip", index, f"{name}: other units are clipped than should be")
                # At the limit either decision is right: the factor is 1 to within the tolerance.
                expected = np.where(tie & ~moved, raw, expected)
                layers[name].update(units=axes.count, clipped=int(moved.sum()))
            elif changed.any():
                self._fail("clip", index, f"{name} is excluded, but its gradient was changed")
            error = ulp_error(clipped, expected, "float32")
            self.verdicts["clip"].measure(error)
            ulp = layers[name]["ulp"] = float(np.max(error))
            if ulp > limit:
                self._fail("clip", index, f"{name} is {ulp:.3g} ULP from the reference")

    def _check_update(self, index: int, got: TrainStep) -> None:
        """Redo the optimizer's step from the backend's own clipped gradients (local)."""
        expected = self._sgd.step(got.before, got.clipped)
        for name in PARAMETERS:
            if not np.array_equal(got.before[name], self._weights[name]):
                self._fail("update", index, f"{name} is not what it was after the step before")
            error = np.abs(got.after[name] - expected[name])
            if not (error <= self._sgd.tolerance(name, got.before[name])).all():
                self._fail(
                    "update",
                    index,
                    f"{name} after the step is off by {np.max(error):.3g}, more than rounding explains",
                )

    def _check_run(
        self,
        index: int,
        got: TrainStep,
        want: TrainStep,
        wanted: Result,
        layers: Mapping[str, dict[str, float]],
    ) -> None:
        """Compare with the reference's own training (global)."""
        bound = drift_bound(index)
        drift = self._drift("loss", np.asarray(got.loss), np.asarray(want.loss))
        if not drift <= bound:
            self._fail("run", index, f"the loss is {drift:.2g} off, {bound:.2g} is allowed")
        for name in PARAMETERS:
            units = self.plan[name].units
            gradient_norm = unit_norms(got.gradients[name], units)
            weight_norm = unit_norms(got.before[name], units)
            pairs = {
                "gradient": (got.gradients[name], want.gradients[name]),
                "gradient norm": (gradient_norm, unit_norms(want.gradients[name], units)),
                "weight norm": (weight_norm, unit_norms(want.before[name], units)),
                "clipped gradient": (got.clipped[name], want.clipped[name]),
                "weight": (got.after[name], want.after[name]),
            }
            drifts = {kind: self._drift(f"{kind} of {name}", *pair) for kind, pair in pairs.items()}
            for kind, drift in drifts.items():
                if not drift <= bound:
                    self._fail(
                        "run", index, f"{kind} of {name} is {drift:.2g} off, {bound:.2g} is allowed"
                    )
            layers[name]["drift"] = max(drifts.values())
            if name in wanted.clipped:
                unit = wanted.clipped[name]
                axes = self.plan[name].axes
                moved = (got.gradients[name] != got.clipped[name]).any(axes.reduce, keepdims=True)
                near = np.abs(unit.gradient_norm - unit.limit) <= bound * (
                    unit.limit + np.max(unit.gradient_norm)
                )
                if (~near & (moved != unit.clipped)).any():
                    self._fail(
                        "run", index, f"{name}: other units are clipped than in the reference"
                    )

    def _drift(self, what: str, got: Array, want: Array) -> float:
        """Return the largest difference, relative to the reference's largest element so far.

        A gradient may cancel to almost nothing in one step; rounding is relative to the terms
        before they cancel.
        """
        scale = self._scales[what] = max(float(np.max(np.abs(want))), self._scales.get(what, 0.0))
        difference = float(np.max(np.abs(got - want)))
        if difference == 0:
            return 0.0
        return difference / scale if scale > 0 else np.inf

    def results(self, name: str, digest: str) -> Iterator[Mapping[str, Any]]:
        """Yield the results."""
        planned = len(self.task.batches)
        for kind, verdict in self.verdicts.items():
            if self.steps != planned:
                message = f"the run ends here; {planned} steps were asked for"
                self._fail(kind, self.steps, message)
            yield _result(
                name,
                kind,
                self.clauses[kind],
                "failed" if verdict.problem else "passed",
                verdict.problem or f"{self.steps} steps; inputs {digest}",
                verdict.max_ulp,
                verdict.histogram,
            )


def _finite(value: float) -> float | None:
    """Return a number, or None for NaN and infinity, which JSON does not have."""
    return value if np.isfinite(value) else None


def run_task(
    backend: Backend,
    name: str,
    *,
    steps: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Train on a task and compare every step with the reference.

    Parameters
    ----------
    backend : Backend
        Its :meth:`~agc_conformance.backend.Backend.train` is called.
    name : str
        A name in :data:`TASKS`.
    steps : int, default 50
        Steps to train.
    progress : callable, optional
        Called with (steps done, steps in all) after every step.

    Yields
    ------
    record
        A ``train`` record for every step, then the ``result`` records. An exception makes these
        ``error``, and :class:`~agc_conformance.backend.Unsupported` makes them ``unsupported``.
    """
    task = TASKS[name](steps)
    comparison = _Comparison(task)
    try:
        for got in backend.train(task):
            if comparison.steps == steps:
                raise RuntimeError(f"the backend goes on after {steps} steps")
            numbers = comparison.step(got)
            yield {"type": "train", "task": name, "step": comparison.steps - 1, **numbers}
            if progress is not None:
                progress(comparison.steps, steps)
    except Unsupported as reason:
        for kind, clause in comparison.clauses.items():
            yield _result(name, kind, clause, "unsupported", str(reason))
        return
    except (Exception, SystemExit) as error:
        detail = f"step {comparison.steps}: {describe(error)}"
        for kind, clause in comparison.clauses.items():
            yield _result(name, kind, clause, "error", detail)
        return
    yield from comparison.results(name, _digest(task))


def result_ids(name: str) -> list[str]:
    """Return the ids of the results of a task in :data:`TASKS`."""
    return [f"real-{name}-{kind}" for kind in _clauses(TASKS[name](0))]


def _clauses(task: TrainingTask) -> Mapping[str, str]:
    return _CLAUSES if task.sharpness is None else _SHARP_CLAUSES


def _result(
    task: str,
    kind: str,
    clause: str,
    status: Status,
    detail: str,
    max_ulp: float | None = None,
    histogram: Sequence[int] = (),
) -> Mapping[str, Any]:
    return make_result(
        f"real-{task}-{kind}",
        clause=clause,
        level="L2",
        status=status,
        dtype="float32",
        flags=["RealImages"],
        max_ulp=max_ulp,
        histogram=histogram,
        detail=detail,
    )


def _digest(task: TrainingTask) -> str:
    """Return a fingerprint of weights and batches, which shows that all backends had the same."""
    sha = hashlib.sha256()
    for array in (*task.weights.values(), *(part for batch in task.batches for part in batch)):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:12]
