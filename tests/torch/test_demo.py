"""Trainings that share a trainer."""

from tests.contract.demo import DemoContract
from tests.torch.driver import TorchDriver


class TestDemo(DemoContract):
    driver = TorchDriver()
