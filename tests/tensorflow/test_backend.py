"""The conformance backend."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from agc import AGC, Units
from agc.reference import RowSparse
from agc_conformance.backend import Problem, Unavailable
from agc_conformance.backends.tensorflow.backend import TensorFlowBackend
from tests.contract.suite import BackendContract

BACKEND = TensorFlowBackend(device="cpu")


class TestBackend(BackendContract):
    backend = BACKEND
    absent = (("bilinear", "no bilinear"), ("rope", "no layer 'rope'"))


def test_sparse_gradients_come_back_sparse_from_the_optimizer():
    rows = RowSparse(np.array([3, 1, 3]), np.ones((3, 3), np.float32), (4, 3))
    problem = Problem(AGC(), {"w": np.ones((4, 3), "f")}, {"w": rows}, {"w": Units("v d -> v")})
    found = BACKEND.scenario_optimizer(problem).gradients["w"]
    assert isinstance(found, RowSparse)
    assert sorted(found.indices.tolist()) == [1, 3]


def test_without_a_gpu(monkeypatch):
    devices = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: [] if kind == "GPU" else devices(kind)
    )
    with pytest.raises(Unavailable, match="sees no cuda device"):
        TensorFlowBackend(device="cuda")
    assert BACKEND.versions()["tensorflow"] == tf.__version__
