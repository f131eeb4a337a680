"""What importing the adapter needs and loads, and what it offers."""

from tests.contract.package import PackageContract
from tests.torch.driver import TorchDriver


class TestPackage(PackageContract):
    driver = TorchDriver()
    needed = ("torch",)
