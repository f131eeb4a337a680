"""The step of ``agc train``: as the specification says in float64, and the same after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc import Schedule
from agc import nfnet as core
from agc.data import Batch, Batches, Evaluation, normalise, open_source, soft_labels
from agc.errors import ConfigError, ParameterError
from agc.plan import Parameter, make_plan
from agc.recipe import Recipe, load_recipe, numbers
from agc.recipe.tables import Rate
from agc.reference import adaptive_clip, sharpness_aware_gradients
from agc.reference.nfnet import NFNet
from agc.training import Launch, State, Training, trained_names
from agc.weights import store
from tests.contract import Contract
from tests.helpers import Array, relative

STEPS = 3
SMALL = [
    "train.batch=16",
    f"train.steps={STEPS}",
    "schedule.warmup_steps=1",
    "sam.group=8",
    "optimizer.rate.per=8",  # a peak of 1.6
    "optimizer.weight_decay=0.01",
    "checkpoint.every_steps=100",
]
THRESHOLDS = {"stem.*": 0.02, "*": Schedule([(0, 0.04), (2, 0.01)])}


def recipe_of(case: str) -> Recipe:
    """Return a recipe whose steps follow from its batches alone."""
    recipe = load_recipe("conformance", SMALL)
    assert recipe.sam
    assert recipe.agc
    recipe = replace(recipe, agc=replace(recipe.agc, clipping=THRESHOLDS))
    match case:
        case "group":
            return recipe
        case "batch":  # the ascent's examples are spread over the batch
            return replace(recipe, sam=replace(recipe.sam, group="batch"))
        case "plain":  # the pipeline normalises
            augment = replace(recipe.augment, randaugment=None)
            return replace(recipe, sam=None, augment=augment)
        case "part":
            return replace(recipe, train=replace(recipe.train, only=["head.*", "*.conv1.*"]))
        case "bare":  # a rate that needs no clipping
            raw = replace(recipe.evaluate, weights=("raw",))
            slow = replace(recipe.optimizer, rate=Rate(peak=0.1))
            return replace(recipe, sam=None, agc=None, ema=None, evaluate=raw, optimizer=slow)
    raise AssertionError(case)


def start_of(recipe: Recipe) -> State:
    """Return a state in which every branch counts, with a momentum and an average."""

    seeded = core.seeded_parameters("mini", recipe.model.num_classes)

    def times(factor: float) -> dict[str, Array]:
        return {name: (factor * value).astype(np.float32) for name, value in seeded.items()}

    ema = times(0.5) if recipe.ema else None
    return State(step=0, parameters=times(1.0), momentum=times(0.01), ema=ema)


def batches_of(recipe: Recipe) -> Batches:
    return Batches(recipe, open_source(recipe, "train"))


class Reference:
    """The step in float64, written from the specification."""

    def __init__(self, recipe: Recipe, state: State) -> None:
        self.recipe, self.table = recipe, numbers(recipe)
        self.weights, self.buffers = self.wide(state.parameters), self.wide(state.momentum)
        self.average = self.wide(state.ema or {})
        self.specs = core.parameters("mini", recipe.model.num_classes)
        self.trained = trained_names(recipe)
        self.specs = tuple(spec for spec in self.specs if spec.name in self.trained)
        known = [Parameter(s.name, s.shape, s.units, "out-last") for s in self.specs]
        self.plan = recipe.agc and make_plan(known, recipe.agc, head=core.HEAD)

    def wide(self, arrays: Mapping[str, Any]) -> dict[str, Array]:
        return {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def gradients(self, weights: Mapping[str, Any], batch: Any) -> tuple[float, dict[str, Array]]:
        images, targets, *masks = batch
        rate = self.recipe.model.dropout
        forward = NFNet("mini", weights, dropout=rate)(images, core.Masks(*masks))
        shifted = forward.logits - forward.logits.max(1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        gradients = forward.backward((np.exp(log_probabilities) - targets) / len(targets))
        loss = float(-np.sum(targets * log_probabilities) / len(targets))
        constant = {
            name: np.zeros_like(w) for name, w in weights.items() if name not in self.trained
        }
        return loss, {name: gradients[name] for name in weights} | constant

    def step(self, step: int, batch: Batch) -> tuple[float, int]:
        """Make a step; return the loss and how many units were clipped."""
        recipe = self.recipe
        assert recipe.model.num_classes
        images = batch.images
        if images.dtype == np.uint8:
            images = normalise(images, recipe.input.mean, recipe.input.std)
        targets = soft_labels(batch, recipe.model.num_classes, recipe.train.smoothing)
        assert all(mask is not None and not mask.all() for mask in batch.masks)
        arrays: list[Any] = [images, targets, *batch.masks]
        if recipe.sam is None:
            loss, found = self.gradients(self.weights, arrays)
        else:
            sam, size = recipe.sam, recipe.train.batch
            groups = 1 if sam.group == "batch" else size // sam.group
            if groups == 1:
                first = list(sam.ascent(size))
                order = first + [n for n in range(size) if n not in first]
                arrays = [array[order] for array in arrays]
            rule = replace(sam.rule, microbatches=groups)
            sharp = sharpness_aware_gradients(self.gradients, self.weights, arrays, rule, step=step)
            loss, found = sharp.loss, dict(sharp.gradients)  # type: ignore[arg-type]
        clipped = 0
        if recipe.agc and self.plan:
            weights, found = ({k: of[k] for k in self.trained} for of in (self.weights, found))
            result = adaptive_clip(weights, found, self.plan, recipe.agc, step=step)
            found, clipped = dict(result.gradients), result.total.clipped  # type: ignore[arg-type]
        rate, momentum = float(self.table.rate[step]), recipe.optimizer.momentum
        for spec in self.specs:
            gradient = found[spec.name]
            if spec.decays:
                gradient = gradient + recipe.optimizer.weight_decay * self.weights[spec.name]
            buffer = self.buffers[spec.name] = momentum * self.buffers[spec.name] + gradient
            self.weights[spec.name] = self.weights[spec.name] - rate * (
                gradient + momentum * buffer
            )
        if self.table.ema_decay is not None:
            decay = float(self.table.ema_decay[step])
            self.average = {
                name: decay * value + (1 - decay) * self.weights[name]
                for name, value in self.average.items()
            }
        return loss, clipped


def shrink(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...] = (32, 64)) -> None:
    """Give ``mini`` so many stages of one block, since most of the time is compilation."""
    small = replace(core.variant("mini"), depths=(1,) * len(widths), widths=widths)
    for module in (core.variants, store):
        monkeypatch.setattr(module, "VARIANTS", {**core.VARIANTS, "mini": small})


class TrainingContract(Contract):
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shrink(monkeypatch)

    def trained(
        self, recipe: Recipe, state: State, steps: range, **launch: Any
    ) -> Iterator[tuple[Any, State]]:
        """Yield what each step reports, and the state after it."""
        trainer = self.driver.trainer(recipe, Launch(**launch))
        trainer.load(state)
        batches, table = batches_of(recipe), numbers(recipe)
        for step in steps:
            metrics = trainer.step(batches[step], table.at(step))
            yield metrics, trainer.state()

    @pytest.mark.parametrize(
        ("case", "microbatch"), [("group", 4), ("batch", None), ("plain", 4), ("bare", None)]
    )
    def test_steps(self, case, microbatch):
        recipe = recipe_of(case)
        start = start_of(recipe)
        reference = Reference(recipe, start)
        batches = batches_of(recipe)
        steps = self.trained(recipe, start, range(STEPS), microbatch=microbatch)
        for step, (metrics, state) in enumerate(steps):
            loss, clipped = reference.step(step, batches[step])
            assert float(metrics.loss) == pytest.approx(loss, rel=1e-5)
            assert (metrics.perturbed_loss is not None) == (
                recipe.sam is not None and step % 2 == 0
            )
            assert state.step == step + 1
            if recipe.agc:
                assert int(metrics.clipped) == clipped > 0
            else:
                assert metrics.clipped is None
            self.equal(state.parameters, reference.weights)
            self.equal(state.momentum, reference.buffers)
            self.equal(state.ema or {}, reference.average)

    def test_part_of_the_model(self):
        if self.driver.trains_parts:
            self.test_steps("part", None)
        else:
            with pytest.raises(ConfigError, match=r"train\.only=\['head\.\*'.* leave it out"):
                self.driver.trainer(recipe_of("part"), Launch())

    def equal(self, found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
        assert list(found) == list(expected)
        assert {array.dtype.name for array in found.values()} <= {"float32"}
        flat = [
            np.concatenate([np.ravel(array) for array in arrays.values()] or [np.ones(1)])
            for arrays in (found, expected)
        ]
        assert relative(*flat) <= 2e-6

    @pytest.mark.parametrize("compute", ["float32", "bfloat16"])
    def test_resume_is_bit_equal(self, tmp_path, compute):
        """Also where the model draws its own masks."""
        recipe = self.recipe_to_resume(compute)
        self.run(recipe, tmp_path / "whole")
        stopped = self.training(recipe, tmp_path / "stopped")
        assert not stopped.run(lambda: stopped.made == 1)
        self.run(recipe, tmp_path / "stopped")
        whole, ours = (tmp_path / name / "step-000003" for name in ("whole", "stopped"))
        for name in ("parameters", "momentum", "ema"):
            file = f"{name}.safetensors"
            assert (ours / file).read_bytes() == (whole / file).read_bytes()

    def recipe_to_resume(self, compute: str) -> Recipe:
        changes = ["train.masks=[]", "data.test.images=9"]
        return load_recipe("conformance", [*SMALL, *changes, f"precision.compute={compute}"])

    def training(self, recipe: Recipe, folder: Path) -> Training:
        launch = Launch()
        sources = (open_source(recipe, part) for part in ("train", "test"))
        trainer = self.driver.trainer(recipe, launch)
        return Training(recipe, trainer, *sources, folder, launch=launch, resume=True)

    def run(self, recipe: Recipe, folder: Path) -> None:
        assert self.training(recipe, folder).run()

    def test_bfloat16(self):
        """Only the passes are in it, and the loss is close."""
        recipe = recipe_of("plain")
        low = replace(recipe, precision=replace(recipe.precision, compute="bfloat16"))
        start = start_of(recipe)
        pairs = zip(*(self.trained(r, start, range(2)) for r in (recipe, low)), strict=True)
        for (exact, state), (rough, rough_state) in pairs:
            assert float(rough.loss) == pytest.approx(float(exact.loss), abs=3e-2)
            assert float(rough.loss) != float(exact.loss)
            for (_, arrays), (_, others) in zip(state.parts(), rough_state.parts(), strict=True):
                assert {array.dtype.name for array in others.values()} == {"float32"}
                assert relative(others["head.weight"], arrays["head.weight"]) < 0.2

    def test_evaluation(self):
        """Every image once, nothing dropped; raw weights and average are not mixed up."""
        recipe = recipe_of("plain")
        trainer = self.driver.trainer(recipe, Launch())
        state = start_of(recipe)
        trainer.load(state)
        images = Evaluation(recipe, open_source(recipe, "test"), batch=32)
        for weights, arrays in (("raw", state.parameters), ("ema", state.ema)):
            loss, top1, top5 = 0.0, 0, 0
            for batch in images:
                logits = NFNet("mini", arrays)(batch.images).logits
                log_sums = np.log(np.exp(logits).sum(1))
                for n in np.flatnonzero(batch.weight):
                    own = logits[n, batch.labels[n]]
                    loss += log_sums[n] - own
                    top1 += np.sum(logits[n] > own) < 1
                    top5 += np.sum(logits[n] > own) < 5
            totals = trainer.evaluate(images, weights)
            assert (totals.top1, totals.top5, totals.images) == (top1, top5, 75)
            assert totals.loss == pytest.approx(loss, rel=1e-5)
        # The next step is as if nothing had been between.
        ((metrics, _),) = self.trained(recipe, state, range(1))
        again = trainer.step(batches_of(recipe)[0], numbers(recipe).at(0))
        assert float(again.loss) == float(metrics.loss)

    @pytest.mark.parametrize(
        ("value", "classes", "hits"),
        [(0.0, 10, (8, 40)), (np.nan, 10, (0, 0)), (np.nan, 3, (0, 0))],
    )
    def test_equal_logits(self, value, classes, hits):
        """The lowest class comes first, as argmax has it; NaN is never right."""
        recipe = recipe_of("plain")
        recipe = replace(recipe, model=replace(recipe.model, num_classes=classes))
        state = start_of(recipe)
        head = {
            name: np.full_like(state.parameters[name], value)
            for name in ("head.weight", "head.bias")
        }
        trainer = self.driver.trainer(recipe, Launch())
        trainer.load(replace(state, parameters={**state.parameters, **head}))
        images = Evaluation(recipe, open_source(recipe, "test"), batch=75)  # labels 0, 1, .. 9, 0
        totals = trainer.evaluate(images, "raw")
        assert (totals.top1, totals.top5) == hits

    def test_what_is_refused(self):
        recipe = recipe_of("plain")
        state = start_of(recipe)
        trainer = self.driver.trainer(recipe, Launch())
        for part, arrays in state.parts():
            fewer = {name: array for name, array in arrays.items() if name != "head.bias"}
            with pytest.raises(ParameterError, match=r"head\.bias"):
                trainer.load(replace(state, **{part: fewer}))
        with pytest.raises(ConfigError, match="device='toaster'"):
            self.driver.trainer(recipe, Launch(device="toaster"))
