"""An adapter under the conformance suite, and the suite's backend for it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from agc import AGC
from agc_conformance.backend import Backend, Layer, Unavailable, Unsupported
from agc_conformance.core.ask import CORE_KINDS
from agc_conformance.runner import cases
from agc_conformance.training.ask import result_ids, run_task
from agc_conformance.vectors import load_vectors

PARTS = ("L[025]-*", "L1-[!s]*", "L1-s*", "L3-*")
"""Globs of ids that together are all vectors, so that processes share the work."""


class VectorsContract:
    """All vectors.

    Attributes
    ----------
    unsupported : frozenset of str
        Questions that the framework has no answer to.
    """

    unsupported: frozenset[str]

    @pytest.mark.long
    @pytest.mark.parametrize("part", PARTS)
    def test_vectors_pass(self, part, run_suite):
        statuses = run_suite("--no-train", "--no-models", "--select", part)
        asked = cases(load_vectors(), select=part, without=CORE_KINDS)
        assert list(statuses) == [f"{vector.id}:{dtype}" for vector, dtype in asked]
        ours = {key for key in self.unsupported if fnmatchcase(key, part)}
        assert {key for key, status in statuses.items() if status != "passed"} == ours

    def test_parts_are_the_whole(self):
        for vector in load_vectors():
            assert sum(fnmatchcase(vector.id, part) for part in PARTS) == 1, vector.id


class ModelsContract:
    """NFNets; the suite's main job asks for the rest of them."""

    @pytest.mark.long
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
