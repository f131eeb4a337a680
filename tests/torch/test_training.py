"""The step of ``agc train`` in PyTorch."""

from __future__ import annotations

import pytest

from agc.errors import ConfigError
from agc.recipe import load_recipe
from agc.training import Launch
from agc_torch.train import trainer
from tests.contract.training import TrainingContract
from tests.torch.driver import TorchDriver


class TestTraining(TrainingContract):
    driver = TorchDriver()


def test_recipes_that_are_not_offered():
    low = ["precision.compute=bfloat16", "precision.standardise=bfloat16"]
    with pytest.raises(ConfigError, match=r"set precision\.standardise=float32"):
        trainer(load_recipe("conformance", low), Launch())
