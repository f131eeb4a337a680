"""Trainings that share a trainer, as those of ``agc demo`` do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from agc.cli.demo import experiment
from agc.cli.experiments import results, run
from agc.data import open_source
from agc.recipe import Recipe
from agc.training import Launch, Trainer, Training, read_log
from tests.contract import Contract


class DemoContract(Contract):
    def test_demo(self, tmp_path, monkeypatch):
        made = []

        def trainer(recipe, launch):
            made.append(self.driver.trainer(recipe, launch))
            return made[-1]

        framework: Any = SimpleNamespace(trainer=trainer)
        plan = experiment([0.01], [1e30, 0.2], seeds=1, steps=3, batch=64)
        plan = replace(plan, changes=[*plan.changes, "model.variant=micro"])
        run(plan, "any", framework, tmp_path / "all", Console(quiet=True))
        lost, found = results(plan, "any", tmp_path / "all")
        assert len(made) == 1  # rates and thresholds are numbers
        assert (lost.diverged, found.diverged) == (True, False)
        assert 0 < found.clipped < 0.5

        # Another trainer does the same: nothing was left of the run that diverged.
        recipe = plan.cells()[1].recipe
        sources = (open_source(recipe, part) for part in ("train", "test"))
        alone, launch = self.other_trainer(recipe, made[0]), Launch()
        Training(recipe, alone, *sources, tmp_path / "alone", launch=launch).run()
        log = read_log(tmp_path / "alone" / "log.jsonl")
        assert tuple(r["loss"] for r in log if r["type"] == "step") == found.losses

    def other_trainer(self, recipe: Recipe, used: Trainer) -> Trainer:
        """Return a trainer for this recipe alone; ``used`` has made it, after another one."""
        return self.driver.trainer(recipe, Launch())
