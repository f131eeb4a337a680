"""The demo's training."""

from agc_jax.commands import train
from tests.contract.demo import DemoContract


class TestDemo(DemoContract):
    train = staticmethod(train)
