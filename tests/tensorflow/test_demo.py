"""Trainings that share a trainer."""

from collections.abc import Iterator

import pytest
import tensorflow as tf

from tests.contract.demo import DemoContract
from tests.tensorflow.driver import TensorFlowDriver


class TestDemo(DemoContract):
    driver = TensorFlowDriver()

    @pytest.fixture(autouse=True)
    def eager(self) -> Iterator[None]:
        """Trace nothing, which would take longer than all else."""
        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)
