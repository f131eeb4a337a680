"""NFNets, through the adapter's own backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tensorflow as tf

from agc_conformance.backends.tensorflow.backend import TensorFlowBackend
from agc_conformance.nfnets.ask import run_study
from tests.contract.suite import ModelsContract


class TestModels(ModelsContract):
    @pytest.fixture
    def run_suite(self) -> Callable[..., dict[str, str]]:
        """Ask here, and without graphs, which take most of the time; the main job has them."""

        def run(option: str, pattern: str) -> dict[str, str]:
            assert option == "--select"
            tf.config.run_functions_eagerly(True)
            try:
                records = [*run_study(TensorFlowBackend(), "tiny", select=pattern)]
            finally:
                tf.config.run_functions_eagerly(False)
            results = [record for record in records if record["type"] == "result"]
            return {f"{result['id']}:{result['dtype']}": result["status"] for result in results}

        return run
