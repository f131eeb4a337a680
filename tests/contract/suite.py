"""An adapter under the conformance suite, and the suite's backend for it."""

from __future__ import annotations

import pytest

from agc import AGC
from agc_conformance.backend import Backend, Layer, Unavailable, Unsupported
from agc_conformance.training.ask import result_ids, run_task


class VectorsContract:
    """All vectors.

    Attributes
    ----------
    unsupported : frozenset of str
        Questions that the framework has no answer to.
    """

    unsupported: frozenset[str]

    def test_all_vectors_pass(self, run_suite):
        statuses = run_suite("--no-train", "--no-models")
        assert len(statuses) >= 399
        assert {key for key, status in statuses.items() if status != "passed"} == self.unsupported


class ModelsContract:
    """NFNets; the suite's main job asks for the rest of them."""

    def test_gradients_and_clipping(self, run_suite):
        statuses = run_suite("--select", "NFNET-[24]")
        assert set(statuses.values()) == {"passed"}
        assert {key.rpartition(":")[2] for key in statuses} == {"float32", "float64", "bfloat16"}
        assert len(statuses) == 13


class BackendContract:
    """What running all vectors does not ask the backend.

    Attributes
    ----------
    backend : Backend
        The adapter's.
    absent : tuple of (str, str)
        Layers that the framework does not have, and what is said of each.
    """

    backend: Backend
    absent: tuple[tuple[str, str], ...]

    @pytest.mark.parametrize("task", ["digits", "sam-digits"])
    def test_training(self, task):
        records = run_task(self.backend, task, steps=4)
        results = {record["id"]: record for record in records if record["type"] == "result"}
        assert list(results) == result_ids(task)
        assert {record["status"] for record in results.values()} == {"passed"}, results

    def test_layers_that_the_framework_does_not_have(self):
        for kind, reason in self.absent:
            with pytest.raises(Unsupported, match=reason):
                self.backend.layer_plan(Layer(kind, {}), AGC())

    def test_devices(self):
        assert self.backend.device_name() == "cpu"
        with pytest.raises(Unavailable, match="tpu"):
            type(self.backend)("tpu")
