"""The conformance backend, and what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agc import AGC, Units
from agc.errors import SelectorError
from agc.reference import RowSparse
from agc_conformance.backend import Problem, Unsupported
from agc_conformance.backends.jax.backend import JaxBackend
from agc_conformance.training.ask import digits
from tests.contract.suite import BackendContract

BACKEND = JaxBackend()


class TestBackend(BackendContract):
    backend = BACKEND
    absent = (("bilinear", "Flax has no bilinear layer"), ("rope", "Flax has no layer 'rope'"))


def problem(gradient: Any, **options: Any) -> Problem:
    weights = {"w": np.ones((4, 3), np.float32)}
    return Problem(AGC(**options), weights, {"w": gradient}, {"w": Units("i o -> o")})


def test_what_jax_does_not_have() -> None:
    dense = problem(np.ones((4, 3), np.float32))
    sparse = problem(RowSparse(np.array([0]), np.ones((1, 3), np.float32), (4, 3)))
    declared = replace(digits(1), rule=AGC(units={"head.weight": "o i -> o"}))
    for message, ask in {
        "no row-sparse gradients": lambda: BACKEND.clip(sparse),
        "16 shards need as many devices, there are 8": lambda: BACKEND.scenario_sharded(dense, 16),
        "declares units for the layout": lambda: next(iter(BACKEND.train(declared))),
    }.items():
        with pytest.raises(Unsupported, match=message):
            ask()


def test_errors_reach_the_suite() -> None:
    with pytest.raises(SelectorError):
        BACKEND.clip(problem(np.ones((4, 3), np.float32), exclude=["v"]))
