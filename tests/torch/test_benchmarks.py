"""The benchmarks, tried out on small tensors."""

from tests.contract.benchmarks import BenchmarksContract
from tests.torch.driver import TorchDriver


class TestBenchmarks(BenchmarksContract):
    driver = TorchDriver()
