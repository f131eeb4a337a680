"""Steps whose times ``agc reproduce bn-step-time`` compares."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from agc import nfnet as core
from tests.contract import Contract


class ContestContract(Contract):
    def test_contest(self):
        random = np.random.default_rng(0)
        images, labels = random.standard_normal((4, 32, 32, 3), np.float32), np.arange(4)
        commands: Any = import_module(f"{self.driver.adapter.__name__}.commands")
        options = core.options("micro", 10, dropout=0.0, stochastic_depth=0.0)
        contest = commands.contest(options, images, labels)
        assert "device" in json.loads(json.dumps(contest.facts))
        losses = {name: [step() for _ in range(3)] for name, step in contest.steps.items()}
        # Each makes steps: its loss falls, with AGC less, and the twin is another model.
        assert all(first > second > third for first, second, third in losses.values())
        plain, clipped, twin = (losses[name] for name in ("plain", "clipped", "twin"))
        assert clipped[0] == pytest.approx(plain[0], rel=1e-6)
        assert clipped[0] - clipped[2] < 0.9 * (plain[0] - plain[2])
        assert twin[0] != pytest.approx(plain[0], rel=1e-4)
