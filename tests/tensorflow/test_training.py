"""The step of ``agc train`` in TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from agc.errors import NonFiniteError
from agc.recipe import Recipe, numbers
from agc.training import Launch
from agc_conformance.training.recipes import seeded_state
from agc_tensorflow.train import trainer
from tests.contract.training import TrainingContract, batches_of, recipe_of
from tests.tensorflow.driver import TensorFlowDriver


class TracedOnce(TensorFlowDriver):
    """Gives all trainings of a dtype the same trainer, which takes over each one's state."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def trainer(self, recipe: Recipe, launch: Launch) -> Any:
        dtype = recipe.precision.state
        if dtype not in self.made:
            self.made[dtype] = super().trainer(recipe, launch)
        return self.made[dtype]


class TestTraining(TrainingContract):
    driver = TensorFlowDriver()

    @pytest.fixture(autouse=True)
    def compiled(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Trace where it matters, and only once; elsewhere that costs too much.

        A process that is killed traces too.
        """
        compiles = request.node.name in (
            "test_level_5[trajectory]",
            "test_resume_is_bit_equal[float32]",
            "test_a_killed_process",
        )
        once = TracedOnce()
        if compiles:
            self.driver = once
        tf.config.run_functions_eagerly(not compiles)
        yield
        tf.config.run_functions_eagerly(False)
        for made in once.made.values():
            functions = [f for f in vars(made).values() if isinstance(f, _FUNCTION)]
            counts = [function.experimental_get_tracing_count() for function in functions]
            assert max(counts) == 1
            assert sum(counts) >= 4  # steps alone do not classify

    def test_nonfinite_ascent_raises(self):
        """And nothing has changed."""
        recipe = recipe_of("group")
        assert recipe.sam
        rule = replace(recipe.sam.rule, nonfinite="raise")
        recipe = replace(recipe, sam=replace(recipe.sam, rule=rule))
        state = seeded_state(recipe)
        bias = np.full_like(state.parameters["head.bias"], np.nan)
        state = replace(state, parameters={**state.parameters, "head.bias": bias})
        made = self.driver.trainer(recipe, Launch())
        made.load(state)
        with pytest.raises(NonFiniteError, match=r"ascent gradient.*skip_step"):
            made.step(batches_of(recipe)[0], numbers(recipe).at(0))
        for (_, ours), (_, wanted) in zip(made.state().parts(), state.parts(), strict=True):
            for name, array in wanted.items():
                np.testing.assert_array_equal(ours[name], array)


_FUNCTION = type(tf.function(trainer))
