"""The step of ``agc train`` in JAX."""

from __future__ import annotations

import pytest

from agc.errors import ConfigError
from agc.recipe import load_recipe, numbers
from agc.training import Launch
from agc_jax.train import trainer
from tests.contract.training import TrainingContract, batches_of, recipe_of, start_of
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestTraining(TrainingContract):
    driver = JaxDriver()

    @pytest.mark.parametrize(
        ("case", "microbatch"), [("group", 4), ("batch", 4), ("plain", None), ("bare", None)]
    )
    def test_steps(self, case, microbatch):
        """Not every case with both: to compile a step takes longer than all that is tested."""
        super().test_steps(case, microbatch)


def test_recipes_that_are_not_offered():
    low = ["precision.compute=bfloat16", "precision.standardise=bfloat16"]
    with pytest.raises(ConfigError, match=r"set precision\.standardise=float32"):
        trainer(load_recipe("conformance", low), Launch())


def test_nothing_is_compiled_again(monkeypatch):
    """Not for other rates, thresholds and radii, nor after a state was loaded."""
    recipe = recipe_of("group")
    batches, table = batches_of(recipe), numbers(recipe)
    made = trainer(recipe, Launch(microbatch=4))
    made.load(start_of(recipe))
    for step in range(2):  # one perturbs, one does not
        made.step(batches[step], table.at(step))
    monkeypatch.delattr("agc_jax.train._gradient")
    made.load(made.state())
    made.step(batches[2], table.at(2))
