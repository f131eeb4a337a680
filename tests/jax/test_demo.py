"""The demo's training."""

import pytest

from agc_jax.commands import train
from tests.contract.demo import DemoContract

pytestmark = pytest.mark.usefixtures("quick")


class TestDemo(DemoContract):
    train = staticmethod(train)
