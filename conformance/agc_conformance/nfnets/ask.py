"""Studies: NFNets with seeded parameters, asked of a backend and compared with float64 NumPy.

The parameters and images are those of :mod:`agc.nfnet`, which every framework can make by itself. A
result is called ``model-<study>-<kind>``:

============== ======== =====================================================================
``logits``     NFNET-1  in float64, float32 and bfloat16
``outputs``    NFNET-1  after the stem and after each block
``odd``        NFNET-1  logits of images of 45 by 51 pixels
``odd-back``   NFNET-2  gradients of every tensor for them
``single``     NFNET-1  logits of one image of 50 by 38 pixels
``batch``      NFNET-1  logits of 64 images of 16 pixels, of which four blocks leave one
``depth``      NFNET-1  training mode: each image keeps its residual branch as it is, or loses it
``loss``       NFNET-2
``gradients``  NFNET-2  of every tensor
``signals``    NFNET-3
``plan``       NFNET-4  units, thresholds and exclusions
``decisions``  NFNET-4  which units are clipped
``clip``       NFNET-4  clipped gradients
``optimizer``  NFNET-5  weights after each step of DeepMind's optimizer, whose learning rate changes
``trajectory`` NFNET-5  weights after each step of AGC and the framework's own SGD
============== ======== =====================================================================

Errors are relative (largest error by largest logit; L2 norm of the error by that of the tensor),
not in units in the last place: each number is the result of hundreds of sums. The limits are
:data:`agc_conformance.nfnets.golden.LIMITS`; in float32 the error of each known mistake of a port
is larger.

In bfloat16 the logits, the loss and the median gradient are compared, and no training: a parameter
in bfloat16 loses every update smaller than half its last place.

In float64, all studies are also compared with :data:`agc_conformance.nfnets.golden.GOLDEN`,
independently of the reference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from agc.nfnet import Masks, Variant, blocks, seeded_batch, seeded_parameters
from agc_conformance.backend import (
    Backend,
    ModelForward,
    ModelProblem,
    ModelRecipe,
    ModelStep,
    Unsupported,
)
from agc_conformance.data import dtype_of
from agc_conformance.nfnets.golden import (
    GOLDEN,
    LIMITS,
    OPTIMIZER,
    Golden,
    Limits,
    OptimizerStep,
)
from agc_conformance.nfnets.reference import ReferenceModels
from agc_conformance.records import ModelRecord, Status, describe, make_result
from agc_conformance.verdict import Verdict, accumulation_dtype

__all__ = ["KINDS", "STUDIES", "Study", "count_results", "result_ids", "run_study"]

Array = npt.NDArray[Any]

KINDS: Final[dict[str, str]] = {
    "logits": "NFNET-1",
    "outputs": "NFNET-1",
    "odd": "NFNET-1",
    "odd-back": "NFNET-2",
    "single": "NFNET-1",
    "batch": "NFNET-1",
    "depth": "NFNET-1",
    "loss": "NFNET-2",
    "gradients": "NFNET-2",
    "signals": "NFNET-3",
    "plan": "NFNET-4",
    "decisions": "NFNET-4",
    "clip": "NFNET-4",
    "optimizer": "NFNET-5",
    "trajectory": "NFNET-5",
}
"""Kind of result to clause."""


@dataclass(frozen=True)
class Study:
    """A variant on images of one size.

    Attributes
    ----------
    variant : str
        Name of the variant.
    pixels : int
        Side of the two square images.
    rates : tuple of float
        Learning rates of DeepMind's optimizer. They change, since a constant rate does not show
        whether the momentum buffer contains it.
    trajectory : int
        Number of steps of the framework's own SGD.
    sizes : bool
        Whether images of other sizes and training mode are asked for.
    full : bool
        Whether it runs only with ``--full``.
    """

    variant: str
    pixels: int
    rates: tuple[float, ...]
    trajectory: int
    sizes: bool = True
    full: bool = False


_RATES: Final = (0.1, 0.1, *(0.05 * (1 + math.cos(math.pi * step / 48)) for step in range(1, 49)))
STUDIES: Final[dict[str, Study]] = {
    "tiny": Study("tiny", 32, _RATES, 50),
    "F0": Study("F0", 64, (0.1, 0.1, 0.05), 3, sizes=False, full=True),
    "NF-ResNet-tiny": Study("NF-ResNet-tiny", 32, (0.1, 0.1, 0.05), 3, sizes=False, full=True),
}
"""Studies by name."""

_RATE: Final = 0.125
"""Learning rate of SGD; Keras rounds it and the momentum, 0.875, to float32: both are exact."""
_DEPTH: Final = Variant("two blocks", (1, 1), 0.0, 16, 16, (32, 64), 8, 10)
"""The second block is dropped with half of the model's rate, the first block never."""
_DEPTH_IMAGES: Final = 128


Verdicts = dict[str, Verdict]


class _Ask(NamedTuple):
    kinds: tuple[str, ...]
    dtype: str
    ask: Callable[[Backend, Study, str], Verdicts]


def result_ids(name: str, select: str | None = None) -> list[str]:
    """Return the ids of the results of a study in :data:`STUDIES`, all or those selected."""
    kinds = dict.fromkeys(
        kind for ask in _asks(STUDIES[name]) for kind in _chosen(ask, name, select)
    )
    return [f"model-{name}-{kind}" for kind in kinds]


def count_results(name: str, select: str | None = None) -> int:
    """Return how many results a study has."""
    return sum(len(_chosen(ask, name, select)) for ask in _asks(STUDIES[name]))


def run_study(
    backend: Backend,
    name: str,
    *,
    select: str | None = None,
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16"),
    progress: Callable[[int], None] | None = None,
    watch: Callable[[str], None] | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Ask a backend all questions of a study.

    Parameters
    ----------
    backend : Backend
        Its three methods ``model_*`` are called.
    name : str
        A name in :data:`STUDIES`.
    select : str, optional
        Glob on ids and clauses.
    dtypes : sequence of str
        Dtypes to ask for.
    progress : callable, optional
        Called with the number of results after each question.
    watch : callable, optional
        Called with the names of the results (``id:dtype``) before each question.

    Yields
    ------
    record
        ``result`` records, and ``model`` records with the errors per layer. An exception makes
        results ``error``, and :class:`~agc_conformance.backend.Unsupported` makes them
        ``unsupported``.
    """
    study = STUDIES[name]
    for ask in _asks(study):
        kinds = _chosen(ask, name, select)
        if not kinds or ask.dtype not in dtypes:
            continue
        if watch is not None:
            watch(", ".join(f"model-{name}-{kind}:{ask.dtype}" for kind in kinds))
        start = time.perf_counter()
        status: Status = "passed"
        verdicts: Verdicts
        try:
            if ask.dtype not in backend.dtypes:
                raise Unsupported(f"the backend does not take {ask.dtype}")
            # More threads slow down small products such as those of ``tiny``.
            with nullcontext() if study.full else threadpool_limits(1):
                verdicts = ask.ask(backend, study, ask.dtype)
        except Unsupported as reason:
            status, verdicts = "unsupported", {kind: Verdict(str(reason)) for kind in kinds}
        except (Exception, SystemExit) as error:
            status, verdicts = "error", {kind: Verdict(describe(error)) for kind in kinds}
        seconds = (time.perf_counter() - start) / len(kinds)
        for kind in kinds:
            verdict = verdicts[kind]
            yield make_result(
                f"model-{name}-{kind}",
                clause=KINDS[kind],
                level="L4",
                dtype=ask.dtype,
                status="failed" if verdict.problem and status == "passed" else status,
                detail=(verdict.problem or verdict.note)[:600],
                seconds=seconds,
            )
            if verdict.errors:
                yield _record(name, kind, ask.dtype, verdict)
        if progress is not None:
            progress(len(kinds))


def _record(name: str, kind: str, dtype: str, verdict: Verdict) -> ModelRecord:
    def short(numbers: Mapping[str, float]) -> dict[str, float | None]:
        return {n: float(f"{x:.3g}") if np.isfinite(x) else None for n, x in numbers.items()}

    return {
        "type": "model",
        "model": name,
        "kind": kind,
        "dtype": dtype,
        "errors": short(verdict.errors),
        "limits": short(verdict.limits),
    }


def _asks(study: Study) -> list[_Ask]:
    asks = [
        _Ask(("logits", "outputs", "signals"), dtype, _forward) for dtype in ("float64", "float32")
    ]
    asks.append(_Ask(("logits",), "bfloat16", _forward))
    if study.sizes:
        asks.append(_Ask(("loss", "gradients"), "bfloat16", _gradients))
    if study.sizes:
        asks += [_Ask((kind,), "float32", _SIZES[kind]) for kind in _SIZES]
    for dtype in ("float64", "float32"):
        asks.append(_Ask(("loss", "gradients", "plan", "decisions", "clip"), dtype, _gradients))
        asks.append(_Ask(("optimizer",), dtype, _optimizer))
        asks.append(_Ask(("trajectory",), dtype, _trajectory))
    return asks


def _chosen(ask: _Ask, name: str, select: str | None) -> list[str]:
    if select is None:
        return list(ask.kinds)
    return [
        kind
        for kind in ask.kinds
        if fnmatchcase(f"model-{name}-{kind}", select) or fnmatchcase(KINDS[kind], select)
    ]


# --- problems and expected results ----------------------------------------------------------------


@cache
def _problem(
    variant: str | Variant, height: int, width: int, images: int = 2, dtype: str = "float64"
) -> ModelProblem:
    batch, labels = seeded_batch(images, height, width)
    parameters = seeded_parameters(variant)
    kind = dtype_of(dtype)
    return ModelProblem(
        variant,
        {name: array.astype(kind) for name, array in parameters.items()},
        batch.astype(kind),
        labels % len(parameters["head.bias"]),
    )


_REFERENCE: Final = ReferenceModels()


@cache
def _expected_forward(*size: Any) -> ModelForward:
    return _REFERENCE.forward(_problem(*size))


@cache
def _expected_gradients(variant: str, height: int, width: int) -> Any:
    problem = _problem(variant, height, width)
    loss, gradients = _REFERENCE.loss_and_gradients(problem, problem.parameters)
    plan = _REFERENCE.plan(problem)
    return loss, gradients, plan, _REFERENCE.clipping(plan, problem.parameters, gradients)


@cache
def _reference_steps(size: tuple[Any, ...], recipe: ModelRecipe) -> list[ModelStep]:
    """Return all steps of the reference, before the backend's: their threads slow each other."""
    return list(_REFERENCE.training(_problem(*size), recipe))


def _fresh(problem: ModelProblem) -> ModelProblem:
    """Copy the arrays, since a backend may change them in place."""
    parameters = {name: array.copy() for name, array in problem.parameters.items()}
    return replace(
        problem, parameters=parameters, images=problem.images.copy(), labels=problem.labels.copy()
    )


# --- comparisons ----------------------------------------------------------------------------------


def _forward(backend: Backend, study: Study, dtype: str) -> Verdicts:
    size = (study.variant, study.pixels, study.pixels)
    asked = replace(_fresh(_problem(*size, dtype=dtype)), outputs=dtype != "bfloat16")
    got = backend.model_forward(asked)
    want = _expected_forward(*size)
    limit = LIMITS[dtype].logits
    verdicts = {"logits": _compare({"logits": (got.logits, want.logits)}, limit, _largest)}
    if dtype == "bfloat16":
        return verdicts
    golden = GOLDEN.get(study.variant)
    if golden and dtype == "float64" and not verdicts["logits"].problem:
        verdicts["logits"].problem = _compare_golden_logits(np.asarray(got.logits), golden)
    pairs = {name: (got.outputs.get(name), value) for name, value in want.outputs.items()}
    verdicts["outputs"] = _compare(pairs, limit, _norm)
    # A mean cancels: its square is only as exact as the sum of that square and the variance.
    scales = {
        "avg_sq_mean": want.signals["avg_sq_mean"] + want.signals["avg_var"],
        "avg_var": want.signals["avg_var"],
        "res_avg_var": want.signals["res_avg_var"],
    }
    names = ["stem", *(block.name for block in blocks(study.variant))]
    signals = {}
    for kind, scale in scales.items():
        have = np.asarray(got.signals.get(kind, np.nan), np.float64)
        places = names[-len(scale) :]
        if have.shape != scale.shape:
            message = f"{kind} has the shape {have.shape}, not {scale.shape}"
            return {**verdicts, "signals": Verdict(message)}
        for place, value, right, unit in zip(places, have, want.signals[kind], scale, strict=True):
            signals[f"{kind} {place}"] = (value / unit, right / unit)
    verdicts["signals"] = _compare(signals, limit, lambda error, _: float(np.abs(error)))
    return verdicts


def _size(
    kind: str, height: int, width: int, images: int, variant: str | None = None
) -> Callable[[Backend, Study, str], Verdicts]:
    def ask(backend: Backend, study: Study, dtype: str) -> Verdicts:
        size = (variant or study.variant, height, width, images)
        got = backend.model_forward(_fresh(_problem(*size, dtype=dtype)))
        pair = {"logits": (got.logits, _expected_forward(*size).logits)}
        return {kind: _compare(pair, LIMITS[dtype].logits, _largest)}

    return ask


def _depth(backend: Backend, study: Study, dtype: str) -> Verdicts:  # noqa: ARG001
    """Check stochastic depth: the logits of each image are those with the branch or without it."""
    size = (_DEPTH, _DEPTH.train_pixels, _DEPTH.train_pixels, _DEPTH_IMAGES)
    asked = replace(_fresh(_problem(*size, dtype=dtype)), stochastic_depth=1.0)
    got = np.asarray(backend.model_forward(asked).logits)
    problem = _problem(*size)
    network = _REFERENCE.network(_DEPTH, problem.parameters)
    kept = network(problem.images).logits
    without = Masks(np.array([[True, False]] * _DEPTH_IMAGES), None)
    lost = network(problem.images, without).logits
    if got.shape != kept.shape:
        return {"depth": Verdict(f"the logits have the shape {got.shape}, not {kept.shape}")}
    errors = np.stack([np.abs(got - want).max(1) for want in (lost, kept)]) / np.abs(kept).max()
    nearest, worst = errors.argmin(0), float(errors.min(0).max())
    limit = LIMITS[dtype].logits
    verdict = Verdict(
        note=f"{worst:.2g}, {limit:g} allowed; {nearest.mean():.0%} kept, of 50% expected"
    )
    if not worst <= limit:
        verdict.problem = (
            f"an image's logits are {worst:.2g} from those with the residual branch and from those "
            f"without it, {limit:g} is allowed: is what is kept rescaled?"
        )
    elif abs(nearest.mean() - 0.5) > 0.25:  # more than five standard deviations
        verdict.problem = f"{nearest.mean():.0%} of the branches are kept, not about 50%"
    return {"depth": verdict}


_ODD: Final = (45, 51)
"""Height and width at which pooling, and padding under stride 2, meet an edge."""


def _odd_back(backend: Backend, study: Study, dtype: str) -> Verdicts:
    got = backend.model_gradients(_fresh(_problem(study.variant, *_ODD, dtype=dtype)))
    _, gradients, *_ = _expected_gradients(study.variant, *_ODD)
    pairs = {name: (got.gradients.get(name), value) for name, value in gradients.items()}
    return {"odd-back": _compare_gradients(pairs, LIMITS[dtype])}


_SIZES: Final = {
    "odd": _size("odd", *_ODD, 2),
    "odd-back": _odd_back,
    "single": _size("single", 50, 38, 1),
    # Enough numbers for a compiler to compute averages otherwise than those of few images.
    "batch": _size("batch", 16, 16, 64, "mini"),
    "depth": _depth,
}


def _gradients(backend: Backend, study: Study, dtype: str) -> Verdicts:
    size = (study.variant, study.pixels, study.pixels)
    got = backend.model_gradients(_fresh(_problem(*size, dtype=dtype)))
    loss, gradients, plan, clipping = _expected_gradients(*size)
    limits = LIMITS[dtype]
    raw = {name: (got.gradients.get(name), value) for name, value in gradients.items()}
    clipped = {name: (got.clipped.get(name), value) for name, value in clipping.gradients.items()}
    golden = GOLDEN.get(study.variant)
    compared = _compare_gradients(raw, limits)
    if golden and dtype == "float64" and not compared.problem:
        compared.problem = _compare_golden_gradients(got.gradients, golden)
    return {
        "loss": _compare(
            {"loss": (got.loss, loss)}, limits.loss, lambda error, _: float(np.abs(error))
        ),
        "gradients": compared,
        "clip": _compare_gradients(clipped, limits),
        "plan": _compare_plans(got.plan.decisions(), plan.decisions()),
        "decisions": _compare_decisions(got.gradients, got.clipped, plan, clipping, limits, dtype),
    }


def _compare_gradients(pairs: Mapping[str, tuple[Any, Array]], limits: Limits) -> Verdict:
    each = {
        name: limits.skip_gain if name.endswith("skip_gain") else limits.gradient for name in pairs
    }
    verdict = _compare(pairs, each, _norm)
    if not verdict.problem:
        middle = float(np.median(list(verdict.errors.values())))
        verdict.note += f"; median {middle:.2g}, {limits.gradient_median:g} allowed"
        if middle > limits.gradient_median:
            verdict.problem = verdict.note
    return verdict


def _compare_plans(got: Mapping[str, Any], want: Mapping[str, Any]) -> Verdict:
    wrong = [
        f"{name} is {got.get(name, 'missing')}, not {want.get(name, 'there')}"
        for name in {**want, **got}
        if got.get(name) != want.get(name)
    ]
    units = sum(
        count for count, threshold, off in want.values() if threshold is not None and not off
    )
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Verdict("; ".join(wrong[:3]) + more, f"{units} units in {len(want)} parameters")


def _compare_decisions(
    gradients: Mapping[str, Array],
    clipped: Mapping[str, Array],
    plan: Any,
    clipping: Any,
    limits: Limits,
    dtype: str,
) -> Verdict:
    """Check that the same units are clipped, except where rounding may decide.

    A unit is left out if its norm is as near to the limit as the error that is allowed for
    gradients.
    """
    wrong: list[str] = []
    total = near_limit = 0
    for entry in plan:
        before, after = gradients.get(entry.name), clipped.get(entry.name)
        if any(got is None or np.shape(got) != entry.shape for got in (before, after)):
            return Verdict(f"{entry.name}: no gradient of shape {entry.shape} came back")
        axes = entry.axes
        changed = np.asarray(before) != np.asarray(after)
        moved = changed.reshape(axes.view).any(axes.reduce, keepdims=True)
        if entry.name not in clipping.clipped:
            wrong += [f"{entry.name} is excluded, and was clipped"] if moved.any() else []
            continue
        unit = clipping.clipped[entry.name]
        off = limits.skip_gain if entry.name.endswith("skip_gain") else limits.gradient
        off = max(off, 4 * float(np.finfo(accumulation_dtype(dtype)).eps))
        near = np.abs(unit.gradient_norm - unit.limit) <= off * unit.limit
        total += int(moved.sum())
        near_limit += int(near.sum())
        bad = (moved.ravel() != unit.clipped.ravel()) & ~near.ravel()
        if bad.any():
            wrong.append(f"{entry.name}: {int(bad.sum())} of {bad.size} units")
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    note = f"{total} units are clipped, {near_limit} of all too near to tell"
    return Verdict("other decisions: " + "; ".join(wrong[:4]) + more if wrong else "", note)


def _optimizer(backend: Backend, study: Study, dtype: str) -> Verdicts:
    golden = OPTIMIZER if study.variant == "tiny" and dtype == "float64" else ()
    return {"optimizer": _train(backend, study, dtype, ModelRecipe("nfnet", study.rates), golden)}


def _trajectory(backend: Backend, study: Study, dtype: str) -> Verdicts:
    recipe = ModelRecipe("sgd", (_RATE,) * study.trajectory)
    return {"trajectory": _train(backend, study, dtype, recipe)}


def _train(
    backend: Backend,
    study: Study,
    dtype: str,
    recipe: ModelRecipe,
    golden: Sequence[OptimizerStep] = (),
) -> Verdict:
    """Compare the loss before and all parameters after each step."""
    size = (study.variant, study.pixels, study.pixels)
    start = _problem(*size)
    training = backend.model_training(_fresh(_problem(*size, dtype=dtype)), recipe)
    wanted = (
        iter(_reference_steps(size, recipe))
        if not study.full
        else _REFERENCE.training(start, recipe)
    )
    limits = LIMITS[dtype]
    allowed = (limits.trained_loss, limits.trained_element, limits.trained)
    verdict, worst, steps = Verdict(), [0.0, 0.0, 0.0], 0
    for got in training:
        if steps == len(recipe.rates):
            return Verdict(f"the training goes on after {steps} steps")
        steps += 1
        want = next(wanted)
        for name, value in want.parameters.items():
            have = got.parameters.get(name)
            if have is None or np.shape(have) != value.shape:
                return Verdict(f"step {steps}: {name} did not come back in its shape")
        differences = {
            name: np.asarray(got.parameters[name], np.float64) - value
            for name, value in want.parameters.items()
        }
        errors = (
            abs(got.loss - want.loss),
            max(float(np.max(np.abs(value))) for value in differences.values()),
            _total(differences) / _total(want.parameters),
        )
        verdict.errors[f"step {steps}"] = errors[2]
        verdict.limits[f"step {steps}"] = limits.trained
        worst = [
            max(old, e) if np.isfinite(e) else np.inf for old, e in zip(worst, errors, strict=True)
        ]
        for what, error, limit in zip(_TRAINED, errors, allowed, strict=True):
            if not error <= limit and not verdict.problem:
                verdict.problem = f"step {steps}: {what} {error:.2g} off, {limit:g} is allowed"
        if steps <= len(golden) and not verdict.problem:
            verdict.problem = _compare_golden(steps, got, golden[steps - 1], start.parameters)
    if steps != len(recipe.rates):
        return Verdict(f"the training ends after {steps} of {len(recipe.rates)} steps")
    verdict.note = f"{steps} steps: " + ", ".join(
        f"{what} {error:.2g} off of {limit:g}"
        for what, error, limit in zip(_TRAINED, worst, allowed, strict=True)
    )
    return verdict


_TRAINED: Final = ("the loss is", "a parameter is", "all parameters together are")


def _compare_golden(
    number: int, step: ModelStep, golden: OptimizerStep, start: Mapping[str, Array]
) -> str:
    """Compare with the numbers of DeepMind's own code."""
    moved = {name: np.asarray(step.parameters[name]) - start[name] for name in start}
    head_bias = np.asarray(step.parameters["head.bias"])
    for name, have, want in (
        ("the loss", step.loss, golden.loss),
        ("the norm of all parameters", _total(step.parameters), golden.parameter_norm),
        ("the distance from the start", _total(moved), golden.distance),
        ("a skip gain", float(step.parameters["stages.0.0.skip_gain"]), golden.skip_gain),
        ("the norm of head.bias", float(np.linalg.norm(head_bias)), golden.head_bias_norm),
    ):
        if not abs(have - want) <= 1e-11:
            return f"step {number}: {name} is {have:.13g}, DeepMind's code has {want:.13g}"
    return ""


def _compare_golden_logits(logits: Array, golden: Golden) -> str:
    """Compare with the logits of DeepMind's own code."""
    for row, wanted in zip(logits, golden.logits, strict=True):
        for have, want in zip(row, wanted, strict=False):  # golden has the first logits only
            if not abs(have - want) <= 1e-11:
                return f"a logit is {have:.13g}, DeepMind's code has {want:.13g}"
    norm = float(np.linalg.norm(logits))
    if not abs(norm - golden.logits_norm) <= 1e-11:
        return (
            f"the norm of the logits is {norm:.13g}, DeepMind's code has {golden.logits_norm:.13g}"
        )
    return ""


def _compare_golden_gradients(gradients: Mapping[str, Array], golden: Golden) -> str:
    """Compare norms of gradients with those of DeepMind's own code."""
    wanted = {**golden.gradients, "all together": golden.gradient_norm}
    for name, want in wanted.items():
        have = _total(gradients) if name == "all together" else _total({name: gradients[name]})
        if not abs(have - want) <= 1e-10 * want:
            return f"{name}: the norm is {have:.13g}, DeepMind's code has {want:.13g}"
    return ""


def _total(arrays: Mapping[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in arrays.values())))


Measure = Callable[[Array, Array], float]


def _largest(error: Array, want: Array) -> float:
    return float(np.max(np.abs(error)) / np.max(np.abs(want)))


def _norm(error: Array, want: Array) -> float:
    size = float(np.linalg.norm(want))
    return float(np.linalg.norm(error)) / size if size > 0 else float(np.linalg.norm(error))


def _compare(
    pairs: Mapping[str, tuple[Any, Any]], limits: Mapping[str, float] | float, measure: Measure
) -> Verdict:
    """Compare named arrays; the error of NaN is infinite."""
    each = dict.fromkeys(pairs, limits) if isinstance(limits, float) else dict(limits)
    verdict = Verdict(limits=each)
    for name, (got, want) in pairs.items():
        if np.shape(got) != np.shape(want):
            verdict.problem = (
                f"{name}: nothing came back"
                if got is None
                else f"{name} came back with the shape {np.shape(got)}, not {np.shape(want)}"
            )
            return verdict
        error = measure(np.asarray(got, np.float64) - want, np.asarray(want))
        verdict.errors[name] = error if np.isfinite(error) else np.inf
    over = {name: error / each[name] for name, error in verdict.errors.items()}
    worst = max(over, key=lambda name: over[name])
    verdict.note = f"{worst}: {verdict.errors[worst]:.2g}, {each[worst]:g} allowed"
    if over[worst] > 1:
        count = sum(ratio > 1 for ratio in over.values())
        verdict.problem = (
            f"{verdict.note}; {count} of {len(over)} are over" if len(over) > 1 else verdict.note
        )
    return verdict
