"""What importing the adapter needs and loads, and what it offers."""

from tests.contract.package import PackageContract
from tests.jax.driver import JaxDriver


class TestPackage(PackageContract):
    driver = JaxDriver()
    needed = ("jax", "flax", "optax")
