"""The benchmarks, tried out on small tensors."""

from tests.contract.benchmarks import BenchmarksContract
from tests.tensorflow.driver import TensorFlowDriver


class TestBenchmarks(BenchmarksContract):
    driver = TensorFlowDriver()
