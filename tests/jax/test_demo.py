"""Trainings that share a trainer."""

import pytest

from tests.contract.demo import DemoContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestDemo(DemoContract):
    driver = JaxDriver()
