"""The benchmarks, tried out on small tensors."""

from tests.contract.benchmarks import BenchmarksContract
from tests.jax.driver import JaxDriver


class TestBenchmarks(BenchmarksContract):
    driver = JaxDriver()
