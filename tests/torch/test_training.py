"""The step of ``agc train`` in PyTorch."""

from __future__ import annotations

import pytest

import agc_torch.train
from agc.errors import ConfigError
from agc.recipe import load_recipe
from agc.training import Launch
from tests.contract.training import TrainingContract
from tests.torch.driver import TorchDriver


class TestTraining(TrainingContract):
    driver = TorchDriver()


def test_recipes_that_are_not_offered(monkeypatch):
    monkeypatch.setattr(agc_torch.train, "_MASKS", None)
    with pytest.raises(ConfigError, match="masks of stochastic_depth and dropout as yet"):
        agc_torch.train.trainer(load_recipe("conformance"), Launch())
    low = ["train.masks=[]", "precision.compute=bfloat16", "precision.standardise=bfloat16"]
    with pytest.raises(ConfigError, match=r"set precision\.standardise=float32"):
        agc_torch.train.trainer(load_recipe("conformance", low), Launch())
