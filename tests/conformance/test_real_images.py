"""Training on real images: the NumPy network, the tasks, and a comparison that must notice
mistakes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agc.reference import clip_units
from agc.units import Units
from agc_conformance.backend import Backend, TrainingTask, TrainStep, Unsupported
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.report.figures import training_figures
from agc_conformance.training import ask as real_images
from agc_conformance.training.ask import TASKS, drift_bound, reference_run, result_ids, run_task
from agc_conformance.training.network import PARAMETERS, loss_and_gradients

F = np.float32
Arrays = Mapping[str, Any]


class Float32(Backend):
    """The task in float32 NumPy: plain code on purpose, and a place to put each mistake."""

    name = "float32"
    nudge = 0.0

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        o, plan = task.optimizer, real_images.reference_plan(task)
        random = np.random.RandomState(7)
        before = {
            name: (array * (1 + self.nudge * random.uniform(-1, 1, array.shape))).astype(F)
            for name, array in task.weights.items()
        }
        momentum = {name: np.zeros_like(array) for name, array in before.items()}
        for index, (images, labels) in enumerate(task.batches):
            loss, gradients, perturbed, restored = self.estimate(task, before, (images, labels))
            measured = self.measured(perturbed, restored)
            clipped = {
                name: self.clip(name, gradients[name], array, plan[name].threshold(index), plan)
                for name, array in measured.items()
            }
            after = {}
            for name, w in restored.items():
                u = clipped[name] + F(o.weight_decay) * w
                momentum[name] = F(o.momentum) * momentum[name] + u
                after[name] = w - F(o.lr) * self.direction(o, u, momentum[name])
            yield TrainStep(loss, before, gradients, clipped, after, plan, perturbed, restored)
            before = after

    def estimate(
        self, task: TrainingTask, w: Arrays, batch: Any
    ) -> tuple[float, Arrays, Arrays, Arrays]:
        """Loss, gradients to clip, where they were taken, and the weights afterwards."""
        if task.sharpness is None:
            return *loss_and_gradients(w, *batch), w, w
        loss, ascent = loss_and_gradients(w, *self.ascent_part(batch, task.sharpness.fraction))
        e = self.perturbation(task, w, ascent)
        perturbed = {name: w[name] + e[name] for name in w}
        _, descent = loss_and_gradients(perturbed, *batch)
        return loss, descent, perturbed, self.restore(w, perturbed, e)

    def ascent_part(self, batch: Any, fraction: float) -> Any:
        return [array[: math.ceil(fraction * len(array))] for array in batch]

    def perturbation(self, task: TrainingTask, w: Arrays, ascent: Arrays) -> Arrays:
        norm = np.sqrt(sum(np.sum(g**2) for g in ascent.values()))
        return {name: F(task.sharpness.rho) * g / norm for name, g in ascent.items()}

    def restore(self, w: Arrays, perturbed: Arrays, e: Arrays) -> Arrays:
        return w

    def measured(self, perturbed: Arrays, restored: Arrays) -> Arrays:
        """Weights whose norms limit the gradients."""
        return restored

    def direction(self, optimizer: Any, u: Any, m: Any) -> Any:
        return u + F(optimizer.momentum) * m if optimizer.nesterov else m

    def clip(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        return g if threshold is None else self.limited(name, g, w, threshold, plan).astype(F)

    def limited(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        return clip_units(g, w, self.units(name, plan), clipping=threshold).gradient

    def units(self, name: Any, plan: Any) -> Units:
        return plan[name].units


class AdditiveEps(Float32):
    def limited(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        axes = plan[name].axes.reduce
        g_norm, w_norm = (np.sqrt(np.sum(a**2, axes, keepdims=True)) for a in (g, w))
        limit = F(threshold) * (w_norm + F(1e-3))
        return np.where(g_norm > limit, g * (limit / g_norm), g)


class OneLayerForgotten(Float32):
    def clip(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        return g if name == "conv2.bias" else super().clip(name, g, w, threshold, plan)


class ExclusionForgotten(Float32):
    def clip(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        return super().clip(name, g, w, threshold or 0.05, plan)


class UnitsByInput(Float32):
    def units(self, name: Any, plan: Any) -> Units:
        return Units("o c h w -> c") if name == "conv2.weight" else super().units(name, plan)


class BiasByElement(Float32):
    def units(self, name: Any, plan: Any) -> Units:
        return Units("o -> o") if name.endswith("bias") else super().units(name, plan)


class WholeTensors(Float32):
    def units(self, name: Any, plan: Any) -> Units:
        return Units("... ->")


class ScheduleIgnored(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        constant = {"head.*": 0.1, "*": 0.06} if "*" in str(task.rule.clipping) else 0.05
        return super().train(replace(task, rule=replace(task.rule, clipping=constant)))


class DecayBeforeClipping(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        decay = task.optimizer.weight_decay
        for step in super().train(replace(task, optimizer=replace(task.optimizer, weight_decay=0))):
            gradients = {k: g - F(decay) * step.before[k] for k, g in step.gradients.items()}
            yield replace(step, gradients=gradients)

    def clip(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        return super().clip(name, g + F(1e-3) * w, w, threshold, plan)


class NesterovForgotten(Float32):
    def direction(self, optimizer: Any, u: Any, m: Any) -> Any:
        return m


class MomentumForgotten(Float32):
    def direction(self, optimizer: Any, u: Any, m: Any) -> Any:
        return u


class ClipsTheMomentum(Float32):
    """Clips what the optimizer made of the gradient, as if AGC came last."""

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        o, plan = task.optimizer, real_images.reference_plan(task)
        before = dict(task.weights)
        momentum = {name: np.zeros_like(array) for name, array in before.items()}
        for index, (images, labels) in enumerate(task.batches):
            loss, gradients = loss_and_gradients(before, images, labels)
            after, clipped = {}, {}
            for name, w in before.items():
                u = gradients[name] + F(o.weight_decay) * w
                momentum[name] = F(o.momentum) * momentum[name] + u
                d = self.direction(o, u, momentum[name])
                clipped[name] = self.clip(name, d, w, plan[name].threshold(index), plan)
                after[name] = w - F(o.lr) * clipped[name]
            yield TrainStep(loss, before, gradients, clipped, after, plan)
            before = after


class OneBatchTwice(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        return super().train(replace(task, batches=[task.batches[0], *task.batches[:-1]]))


class HalfPrecisionNorms(Float32):
    def limited(self, name: Any, g: Any, w: Any, threshold: Any, plan: Any) -> Any:
        half = (g.astype(np.float16), w.astype(np.float16))
        return g * clip_units(*half, plan[name].units, clipping=threshold).scale


class ClipsTheAscent(Float32):
    def perturbation(self, task: TrainingTask, w: Arrays, ascent: Arrays) -> Arrays:
        plan = real_images.reference_plan(task)
        clipped = {n: self.clip(n, g, w[n], plan[n].threshold(0), plan) for n, g in ascent.items()}
        return super().perturbation(task, w, clipped)


class RestoresBySubtraction(Float32):
    def restore(self, w: Arrays, perturbed: Arrays, e: Arrays) -> Arrays:
        return {name: perturbed[name] - e[name] for name in w}


class NeverRestores(Float32):
    def restore(self, w: Arrays, perturbed: Arrays, e: Arrays) -> Arrays:
        return perturbed


class ClipsAgainstThePerturbed(Float32):
    def measured(self, perturbed: Arrays, restored: Arrays) -> Arrays:
        return perturbed


class NormPerLayer(Float32):
    def perturbation(self, task: TrainingTask, w: Arrays, ascent: Arrays) -> Arrays:
        return {name: F(0.05) * g / np.sqrt(np.sum(g**2)) for name, g in ascent.items()}


class WholeBatchAscends(Float32):
    def ascent_part(self, batch: Any, fraction: float) -> Any:
        return batch


class LastPartAscends(Float32):
    def ascent_part(self, batch: Any, fraction: float) -> Any:
        return [array[-math.ceil(fraction * len(array)) :] for array in batch]


class FloorOfTheFraction(Float32):
    def ascent_part(self, batch: Any, fraction: float) -> Any:
        return [array[: int(fraction * len(array))] for array in batch]


class GradientAtTheWeights(Float32):
    def estimate(self, task: TrainingTask, w: Arrays, batch: Any) -> Any:
        loss, _, perturbed, restored = super().estimate(task, w, batch)
        return loss, loss_and_gradients(w, *batch)[1], perturbed, restored


class SharpnessForgotten(Float32):
    def perturbation(self, task: TrainingTask, w: Arrays, ascent: Arrays) -> Arrays:
        return {name: np.zeros_like(array) for name, array in w.items()}


class DecayInTheGradients(Float32):
    def estimate(self, task: TrainingTask, w: Arrays, batch: Any) -> Any:
        loss, gradients, perturbed, restored = super().estimate(task, w, batch)
        decayed = {n: g + F(1e-3) * perturbed[n] for n, g in gradients.items()}
        return loss, decayed, perturbed, restored


class ReportsThePerturbedLoss(Float32):
    def estimate(self, task: TrainingTask, w: Arrays, batch: Any) -> Any:
        _, gradients, perturbed, restored = super().estimate(task, w, batch)
        return loss_and_gradients(perturbed, *batch)[0], gradients, perturbed, restored


def results(records: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {r["id"].rsplit("-", 1)[1]: r for r in records if r["type"] == "result"}


@pytest.fixture(scope="module", params=list(TASKS))
def right(request: pytest.FixtureRequest) -> list[Mapping[str, Any]]:
    """Records of a right implementation."""
    return list(run_task(Float32(), request.param))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_gradient_of_the_network_equals_finite_differences(name: str) -> None:
    random = np.random.RandomState(3)
    shapes = {
        "conv1.weight": (3, 2, 3, 3), "conv1.bias": (3,), "conv2.weight": (4, 3, 3, 3),
        "conv2.bias": (4,), "head.weight": (5, 4), "head.bias": (5,),
    }  # fmt: skip
    weights = {key: random.standard_normal(shape) for key, shape in shapes.items()}
    images, labels = random.standard_normal((2, 2, 5, 6)), np.array([1, 4])
    _, gradients = loss_and_gradients(weights, images, labels)
    numeric = np.empty(shapes[name])
    for place in np.ndindex(shapes[name]):
        losses = []
        for sign in (1, -1):
            moved = weights[name].copy()
            moved[place] += sign * 1e-5
            losses.append(loss_and_gradients({**weights, name: moved}, images, labels)[0])
        numeric[place] = (losses[0] - losses[1]) / 2e-5
    np.testing.assert_allclose(gradients[name], numeric, rtol=1e-7, atol=1e-9)


def test_the_loss_of_the_network_is_the_mean_cross_entropy_in_nats() -> None:
    weights = {
        "conv1.weight": np.zeros((1, 1, 3, 3)), "conv1.bias": np.zeros(1),
        "conv2.weight": np.zeros((1, 1, 3, 3)), "conv2.bias": np.zeros(1),
        "head.weight": np.zeros((4, 1)), "head.bias": np.array([0.0, 0.0, 0.0, np.log(3)]),
    }  # fmt: skip
    loss, _ = loss_and_gradients(weights, np.ones((2, 1, 4, 4)), np.array([0, 3]))
    assert loss == pytest.approx((np.log(6) + np.log(2)) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_bit_for_bit_every_time(name: str) -> None:
    first, second = TASKS[name](3), TASKS[name](3)
    assert real_images._digest(first) == real_images._digest(second)
    assert first.rule == second.rule
    assert first.optimizer == second.optimizer
    images, labels = first.batches[0]
    assert images.dtype == F
    assert labels.dtype == np.int64


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_learns_and_the_clipped_fraction_varies(name: str) -> None:
    run = list(reference_run(TASKS[name](50)))
    losses = [step.loss for step, _ in run]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    fractions = {
        layer: [result.stats[layer].clipped / result.stats[layer].units for _, result in run]
        for layer in run[0][1].stats
    }
    for layer in ("conv1.weight", "conv2.weight"):
        assert min(fractions[layer]) < 0.4
        assert max(fractions[layer]) > 0.8
    if "head.weight" in fractions:
        assert {0.0, 1.0} <= set(fractions["head.weight"])


def test_a_right_implementation_passes_everything(right: list[Mapping[str, Any]]) -> None:
    found = results(right)
    (name,) = {record["task"] for record in right if record["type"] == "train"}
    assert [record["id"] for record in found.values()] == result_ids(name)
    assert {record["status"] for record in found.values()} == {"passed"}
    assert found["clip"]["max_ulp"] <= 1
    assert sum(found["clip"]["histogram"]) > 50_000


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_agrees_with_itself(name: str) -> None:
    records = list(run_task(ReferenceBackend(), name, steps=3))
    assert {record["status"] for record in results(records).values()} == {"passed"}
    layers = [layer for r in records if r["type"] == "train" for layer in r["layers"].values()]
    assert {layer["drift"] for layer in layers} == {0.0}


def test_every_step_is_recorded_with_numbers_per_layer(right: list[Mapping[str, Any]]) -> None:
    train = [record for record in right if record["type"] == "train"]
    assert [record["step"] for record in train] == list(range(50))
    for record in train:
        assert record["loss"] == pytest.approx(record["reference_loss"], rel=1e-4)
        layer = record["layers"]["conv2.weight"]
        assert layer["units"] == 16
        assert 0 <= layer["clipped"] <= 16
        assert layer["drift"] < 0.1 * drift_bound(record["step"])


@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_are_well_conditioned(name: str) -> None:
    nudged = Float32()
    nudged.nudge = 1e-6
    records = list(run_task(nudged, name))
    worst = max(
        layer["drift"] / drift_bound(record["step"])
        for record in records
        if record["type"] == "train"
        for layer in record["layers"].values()
    )
    assert worst < 0.25


MISTAKES = {
    # what is wrong: (task, which results say so)
    AdditiveEps: ("digits", {"clip", "run"}),
    OneLayerForgotten: ("digits", {"clip", "run"}),
    ExclusionForgotten: ("digits", {"clip", "run"}),
    UnitsByInput: ("digits", {"clip", "run"}),
    BiasByElement: ("digits", {"clip", "run"}),
    WholeTensors: ("photographs", {"clip", "run"}),
    HalfPrecisionNorms: ("digits", {"clip", "run"}),
    ScheduleIgnored: ("photographs", {"plan", "clip", "run"}),
    DecayBeforeClipping: ("digits", {"clip", "update", "run"}),
    NesterovForgotten: ("digits", {"update", "run"}),
    MomentumForgotten: ("photographs", {"update", "run"}),
    ClipsTheMomentum: ("photographs", {"clip", "update", "run"}),
    OneBatchTwice: ("photographs", {"run"}),
    ClipsTheAscent: ("sam-digits", {"perturb", "run"}),
    RestoresBySubtraction: ("sam-digits", {"descent", "update"}),
    NeverRestores: ("sam-digits", {"descent", "clip", "update", "run"}),
    ClipsAgainstThePerturbed: ("sam-digits", {"clip", "run"}),
    NormPerLayer: ("sam-digits", {"perturb", "run"}),
    WholeBatchAscends: ("sam-digits", {"perturb", "run"}),
    LastPartAscends: ("sam-digits", {"perturb", "run"}),
    FloorOfTheFraction: ("sam-digits", {"perturb", "run"}),
    GradientAtTheWeights: ("sam-digits", {"descent", "run"}),
    SharpnessForgotten: ("sam-digits", {"perturb", "run"}),
    DecayInTheGradients: ("sam-digits", {"descent", "run"}),
    ReportsThePerturbedLoss: ("sam-digits", {"run"}),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed_by_the_result_that_is_there_for_it(mistake: type[Backend]) -> None:
    task, expected = MISTAKES[mistake]
    found = results(list(run_task(mistake(), task, steps=8)))
    assert {kind for kind, record in found.items() if record["status"] == "failed"} == expected


def change(**fields: Callable[[Any], Any]) -> Callable[[TrainStep], TrainStep]:
    """Return a function that changes fields of a step by functions of what they hold."""
    return lambda step: replace(step, **{k: f(getattr(step, k)) for k, f in fields.items()})


CHANGES = {
    "dtype": change(after=lambda w: {k: v.astype(np.float16) for k, v in w.items()}),
    "shape": change(gradients=lambda g: {**g, "head.weight": np.zeros((16, 10), F)}),
    "missing": change(clipped=lambda g: {k: v for k, v in g.items() if k != "head.bias"}),
    "poisoned": change(clipped=lambda g: {**g, "head.bias": np.full(10, np.nan, F)}),
    "planless": change(plan=lambda plan: None),
    "silent": change(perturbed=lambda w: None),
    "lost": change(perturbed=lambda w: {k: v * F(np.nan) for k, v in w.items()}),
    "jump": change(before=lambda w: {k: np.nextafter(v, F(9)) for k, v in w.items()}),
}


class Odd(Float32):
    """Changes one thing about one step."""

    def __init__(self, changed: str) -> None:
        super().__init__()
        self.change = CHANGES[changed]

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        for index, step in enumerate(super().train(task)):
            yield self.change(step) if index == 1 else step


def test_clauses_of_the_task_with_sam() -> None:
    found = results(list(run_task(Float32(), "sam-digits", steps=2)))
    clauses = {kind: record["clause"] for kind, record in found.items()}
    assert clauses == {
        "plan": "AGC-6", "perturb": "SAM-1", "descent": "SAM-3", "clip": "SAM-6", "update": "SAM-6",
        "run": "SAM-7",
    }  # fmt: skip
    assert result_ids("digits") == [f"real-digits-{k}" for k in ("plan", "clip", "update", "run")]


def test_a_step_in_which_weights_are_not_finite_never_passes() -> None:
    found = results(list(run_task(Odd("lost"), "sam-digits", steps=3)))
    failed = {kind for kind, record in found.items() if record["status"] == "failed"}
    assert failed == {"perturb", "descent"}


def test_what_sam_leaves_untold_is_no_success() -> None:
    found = results(list(run_task(Odd("silent"), "sam-digits", steps=3)))
    message = "step 1: the backend does not tell the perturbed weights of SAM"
    for kind in ("perturb", "descent", "clip", "update", "run"):
        assert found[kind]["status"] == "failed"
        assert found[kind]["detail"].startswith(message)
    assert results(list(run_task(Odd("silent"), "digits", steps=3)))["run"]["status"] == "passed"


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ("dtype", "run", "after of conv1.weight is float16 (8, 1, 3, 3), it should be float32"),
        ("shape", "clip", "gradients of head.weight is float32 (16, 10)"),
        ("missing", "update", "clipped has no head.bias"),
        ("poisoned", "clip", "head.bias is excluded, but its gradient was changed"),
        ("poisoned", "run", "clipped gradient of head.bias is nan off"),
        ("planless", "plan", "the backend yields no plan"),
        ("jump", "update", "conv1.weight is not what it was after the step before"),
    ],
)
def test_what_a_backend_yields_is_checked(changed: str, kind: str, message: str) -> None:
    record = results(list(run_task(Odd(changed), "digits", steps=3)))[kind]
    assert record["status"] == "failed"
    assert record["detail"].startswith("step 1: ")
    assert message in record["detail"]


class Short(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        yield from list(super().train(task))[:-1]


class Long(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        steps = list(super().train(task))
        yield from [*steps, steps[-1]]


class Broken(Float32):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        yield next(super().train(task))
        raise ValueError("out of memory")


class Unable(Backend):
    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        raise Unsupported("no convolutions here")


@pytest.mark.parametrize(
    ("backend", "status", "message"),
    [
        (Short, "failed", "step 2: the run ends here; 3 steps were asked for"),
        (Long, "error", r"step 3: RuntimeError: the backend goes on after 3 steps \(ask.py:\d+\)"),
        (Broken, "error", r"step 1: ValueError: out of memory \(test_real_images.py:\d+\)"),
        (Unable, "unsupported", "no convolutions here"),
    ],
)
def test_a_run_that_does_not_go_to_its_end_never_passes(
    backend: type[Backend], status: str, message: str
) -> None:
    found = results(list(run_task(backend(), "digits", steps=3)))
    assert {record["status"] for record in found.values()} == {status}
    assert len(found) == 4
    assert all(re.fullmatch(message, record["detail"]) for record in found.values())


def test_progress_is_reported_after_every_step() -> None:
    seen: list[tuple[int, int]] = []
    list(run_task(Float32(), "digits", steps=3, progress=lambda *done: seen.append(done)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_figure_is_small_deterministic_svg_with_every_clipped_layer(
    right: list[Mapping[str, Any]],
) -> None:
    (name,) = {record["task"] for record in right if record["type"] == "train"}
    drawn = training_figures(right)
    assert list(drawn) == [name]
    svg = drawn[name]
    assert svg.startswith("<svg")
    assert svg == training_figures(right)[name]
    assert len(svg) < 40_000
    assert "conv2.weight" in svg
    assert ("head.weight" in svg) == (name == "photographs")


def test_the_figure_of_a_run_with_a_broken_step_shows_a_gap() -> None:
    records = list(run_task(Odd("missing"), "digits", steps=3))
    known = ["units" in record["layers"]["conv2.weight"] for record in records[:3]]
    assert known == [True, False, True]
    assert "conv2.weight" in training_figures(records)["digits"]
