"""The demo's training."""

import pytest

from agc_jax.commands import train
from tests.contract.demo import DemoContract


@pytest.mark.usefixtures("quick")
class TestDemo(DemoContract):
    train = staticmethod(train)
