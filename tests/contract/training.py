"""The step of ``agc train``: as the specification says in float64, and the same after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc import Schedule
from agc.data import Batches, Evaluation, open_source
from agc.errors import ConfigError, NonFiniteError, ParameterError
from agc.nfnet import decays
from agc.recipe import Recipe, load_recipe, numbers
from agc.recipe.tables import Precision, Rate
from agc.training import (
    Checkpoints,
    Launch,
    State,
    Trainer,
    Training,
    initial_state,
    read_log,
)
from agc_conformance.backend import Backend
from agc_conformance.training.recipes import KINDS, SHORT, run_recipes, seeded_state
from agc_conformance.training.reference import ReferenceTrainer
from tests.contract import Contract
from tests.contract.driver import Driver
from tests.helpers import Array, relative

STEPS = 3
SMALL = [
    "model.variant=micro",
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


def batches_of(recipe: Recipe) -> Batches:
    return Batches(recipe, open_source(recipe, "train"))


class Trained(Backend):
    """The trainings of a driver, as the suite asks for them."""

    dtypes = frozenset({"float32", "float64"})

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        return self.driver.trainer(recipe, launch)


class TrainingContract(Contract):
    def trained(
        self, recipe: Recipe, state: State, steps: range, trainer: Trainer | None = None
    ) -> Iterator[tuple[Any, State]]:
        """Yield what each step reports, and the state after it."""
        trainer = trainer or self.driver.trainer(recipe, Launch())
        trainer.load(state)
        batches, table = batches_of(recipe), numbers(recipe)
        for step in steps:
            metrics = trainer.step(batches[step], table.at(step))
            yield metrics, trainer.state()

    @pytest.mark.long
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "processes"])
    def test_level_5(self, kind):
        records = run_recipes(Trained(self.driver), SHORT, select=f"L5-{kind}")
        results = [record for record in records if record["type"] == "result"]
        assert [r["dtype"] for r in results] == ["float32", "float64"][: len(results)]
        for result in results:
            assert result["status"] == "passed", result["detail"]

    @pytest.mark.long
    def test_a_killed_process(self):
        """Without SAM and clipping; for all of a recipe the suite's main job asks."""
        plan = replace(SHORT, changes=(*SHORT.changes, "sam=", "agc="))
        records = run_recipes(self.driver.backend(), plan, select="L5-resume")
        (result,) = records
        assert result["status"] == "passed", result["detail"]
        assert "after 3 of which a process was killed, and step 2 was left" in result["detail"]

    @pytest.mark.long
    def test_processes(self):
        """Without SAM and clipping; for all of a recipe the suite's main job asks."""
        with self.driver.backend().processes(2) as trainer:
            self.test_steps(trainer=trainer)

    def test_steps(self, case="bare", microbatch=None, trainer=None):
        recipe = recipe_of(case)
        start = seeded_state(recipe)
        made = (trainer or self.driver.trainer)(recipe, Launch(microbatch=microbatch))
        reference = ReferenceTrainer(recipe)
        reference.load(start)
        batches, table = batches_of(recipe), numbers(recipe)
        for step, (metrics, state) in enumerate(self.trained(recipe, start, range(STEPS), made)):
            expected = reference.step(batches[step], table.at(step))
            assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-5)
            assert metrics.perturbed_loss is None or recipe.sam
            assert metrics.clipped == expected.clipped
            for (_, found), (_, right) in zip(
                state.parts(), reference.state().parts(), strict=True
            ):
                self.equal(found, right)

    @pytest.mark.parametrize("policy", ["propagate", "zero", "raise"])
    def test_a_limited_norm_that_is_not_finite(self, policy):
        """The policy of AGC decides for all gradients, also those that AGC leaves alone."""
        recipe = recipe_of("plain")
        assert recipe.agc
        rule = replace(recipe.agc, exclude=("*",), nonfinite=policy)
        limited = replace(recipe.optimizer, max_norm=0.2)
        recipe = replace(recipe, agc=rule, optimizer=limited)
        start, batch = seeded_state(recipe), batches_of(recipe)[0]
        poisoned = batch._replace(images=np.full_like(batch.images, np.nan))
        trainer = self.driver.trainer(recipe, Launch())
        trainer.load(start)
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="norm of all gradients together"):
                trainer.step(poisoned, numbers(recipe).at(0))
        else:
            trainer.step(poisoned, numbers(recipe).at(0))
        factor = {"propagate": np.nan, "zero": recipe.optimizer.momentum, "raise": 1.0}[policy]
        for name, buffer in trainer.state().momentum.items():
            if not decays(buffer.ndim):
                wanted = factor * start.momentum[name]
                np.testing.assert_allclose(buffer, wanted, rtol=1e-6, err_msg=name)

    def test_part_of_the_model(self):
        self.test_steps("part")

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

    def test_float64(self, tmp_path):
        """All that a folder has: checkpoints in both forms, and evaluations."""
        recipe = recipe_of("plain")
        recipe = replace(recipe, precision=Precision(compute="float64"))
        training = self.training(recipe, tmp_path)
        assert training.run()
        reference = ReferenceTrainer(recipe)
        *_, (_, expected) = self.trained(recipe, initial_state(recipe), range(STEPS), reference)
        state = Checkpoints(tmp_path, recipe).load()
        assert list(dict(state.parts())) == ["parameters", "momentum", "ema"]
        for (part, arrays), (_, right) in zip(state.parts(), expected.parts(), strict=True):
            assert {array.dtype.name for array in arrays.values()} == {"float64"}
            flat = (np.concatenate([*map(np.ravel, of.values())]) for of in (arrays, right))
            assert relative(*flat) <= 1e-13, part
        found = [r for r in read_log(tmp_path / "log.jsonl") if r["type"] == "evaluation"]
        images = Evaluation(recipe, open_source(recipe, "test"), batch=75)
        for record in found[-2:]:
            totals = reference.evaluate(images, record["weights"])
            assert record["loss"] == pytest.approx(totals.loss / totals.images, rel=1e-13)
        trainer = self.driver.trainer(recipe, Launch())
        trainer.load(state)
        trainer.save_sharded(tmp_path / "sharded")
        trainer.load(initial_state(recipe))
        trainer.load_sharded(tmp_path / "sharded", STEPS)
        for (part, arrays), (_, right) in zip(trainer.state().parts(), state.parts(), strict=True):
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, right[name], part, strict=True)

    def test_bfloat16(self):
        """Only the passes are in it, with or without standardisation, and the loss is close."""
        recipe = recipe_of("plain")
        low, lower = (
            replace(recipe, precision=Precision(compute="bfloat16", standardise=dtype))
            for dtype in ("float32", "bfloat16")
        )
        start = seeded_state(recipe)
        steps = zip(
            self.trained(recipe, start, range(2), ReferenceTrainer(recipe)),
            *(self.trained(changed, start, range(2)) for changed in (low, lower)),
            strict=True,
        )
        for (exact, state), *roughs in steps:
            assert len({float(done.loss) for done, _ in [(exact, state), *roughs]}) == 3
            for rough, rough_state in roughs:
                assert float(rough.loss) == pytest.approx(float(exact.loss), abs=3e-2)
                for (_, arrays), (_, others) in zip(
                    state.parts(), rough_state.parts(), strict=True
                ):
                    assert {array.dtype.name for array in others.values()} == {"float32"}
                    assert relative(others["head.weight"], arrays["head.weight"]) < 0.2

    @pytest.mark.parametrize(
        ("value", "classes", "hits"),
        [(0.0, 10, (8, 40)), (np.nan, 10, (0, 0)), (np.nan, 3, (0, 0))],
    )
    def test_equal_logits(self, value, classes, hits):
        """The lowest class comes first, as argmax has it; NaN is never right."""
        recipe = recipe_of("plain")
        recipe = replace(recipe, model=replace(recipe.model, num_classes=classes))
        state = seeded_state(recipe)
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
        state = seeded_state(recipe)
        trainer = self.driver.trainer(recipe, Launch())
        for part, arrays in state.parts():
            fewer = {name: array for name, array in arrays.items() if name != "head.bias"}
            with pytest.raises(ParameterError, match=r"head\.bias"):
                trainer.load(replace(state, **{part: fewer}))
        with pytest.raises(ConfigError, match="device='toaster'"):
            self.driver.trainer(recipe, Launch(device="toaster"))
