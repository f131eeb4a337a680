"""Trainings that share a trainer."""

import pytest

from tests.contract.demo import DemoContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestDemo(DemoContract):
    driver = JaxDriver()

    def other_trainer(self, recipe, used):
        """A second time by the same one: to compile takes longer than all else."""
        return used
