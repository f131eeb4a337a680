"""The step of ``agc train`` in TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

from agc.errors import ConfigError
from agc.recipe import Recipe, load_recipe
from agc.training import Launch
from agc_tensorflow.train import trainer
from tests.contract.training import TrainingContract
from tests.tensorflow.driver import TensorFlowDriver


class TracedOnce(TensorFlowDriver):
    """Gives all trainings the same trainer, which takes over each one's state."""

    made: Any = None

    def trainer(self, recipe: Recipe, launch: Launch) -> Any:
        self.made = self.made or super().trainer(recipe, launch)
        return self.made


class TestTraining(TrainingContract):
    driver = TensorFlowDriver()

    @pytest.fixture(autouse=True)
    def compiled(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Trace where it matters, and only once; elsewhere that costs too much."""
        compiles = request.node.name in (
            "test_level_5[trajectory]",
            "test_resume_is_bit_equal[float32]",
        )
        once = TracedOnce()
        if compiles:
            self.driver = once
        tf.config.run_functions_eagerly(not compiles)
        yield
        tf.config.run_functions_eagerly(False)
        if compiles:
            functions = [f for f in vars(once.made).values() if isinstance(f, _FUNCTION)]
            counts = [function.experimental_get_tracing_count() for function in functions]
            assert max(counts) == 1
            assert sum(counts) >= 4  # steps alone do not classify


_FUNCTION = type(tf.function(trainer))


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        (["precision.compute=bfloat16", "precision.standardise=bfloat16"], "standardise=float32"),
        (["sam.nonfinite=raise"], "nonfinite=skip_step"),
    ],
)
def test_recipes_that_are_not_offered(changes, cure):
    with pytest.raises(ConfigError, match=f"set .*{cure}"):
        trainer(load_recipe("conformance", changes), Launch())
