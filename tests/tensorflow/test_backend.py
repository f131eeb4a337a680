"""The conformance backend, and what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from agc import AGC, Units
from agc.errors import NonFiniteError
from agc.reference import RowSparse
from agc_conformance.backend import Problem, Unavailable, Unsupported
from agc_conformance.backends.tensorflow.backend import TensorFlowBackend
from tests.contract.suite import BackendContract

BACKEND = TensorFlowBackend(device="cpu")


class TestBackend(BackendContract):
    backend = BACKEND
    absent = (("bilinear", "no bilinear"), ("rope", "no layer 'rope'"))


def problem(gradient: object, **options: Any) -> Problem:
    weights = {"w": np.ones((4, 3), np.float32)}
    return Problem(AGC(**options), weights, {"w": gradient}, {"w": Units("v d -> v")})


def test_errors_come_through_a_graph():
    poisoned = problem(np.full((4, 3), np.inf, np.float32), nonfinite="raise")
    with pytest.raises(NonFiniteError, match=r"parameters(.|\n)*w"):
        BACKEND.scenario_compiled(poisoned)


def test_sparse_gradients_come_back_sparse_from_the_optimizer():
    rows = RowSparse(np.array([3, 1, 3]), np.ones((3, 3), np.float32), (4, 3))
    found = BACKEND.scenario_optimizer(problem(rows)).gradients["w"]
    assert isinstance(found, RowSparse)
    assert sorted(found.indices.tolist()) == [1, 3]


def test_what_it_cannot_do():
    dense = problem(np.ones((4, 3), np.float32))
    with pytest.raises(Unsupported, match="MirroredStrategy"):
        BACKEND.scenario_sharded(dense, 2)
    with pytest.raises(Unsupported, match="refuses a step in which no variable has a gradient"):
        BACKEND.scenario_idle(dense)


def test_without_a_gpu(monkeypatch):
    devices = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: [] if kind == "GPU" else devices(kind)
    )
    with pytest.raises(Unavailable, match="sees no cuda device"):
        TensorFlowBackend(device="cuda")
    assert BACKEND.versions()["tensorflow"] == tf.__version__
