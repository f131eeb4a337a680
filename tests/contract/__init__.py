"""What holds for every framework, said once.

Each module has a class of tests. A framework's test file subclasses it and names its driver, which
alone knows the framework::

    class TestNFNet(NFNetContract):
        driver = TorchDriver()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from tests.contract.driver import Driver


class Parametrized:
    """Tests that run for each of what a subclass chooses."""

    def choices(self) -> Mapping[str, Iterable[Any]]:
        """Return values by argument: a test that has the argument runs for each."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in self.choices().items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)


class Contract(Parametrized):
    """Tests of one subject, in the language of a driver."""

    driver: Driver

    def choices(self) -> Mapping[str, Iterable[Any]]:
        driver = self.driver
        return {"mode": driver.modes, "stored_as": driver.dtypes, "way": driver.ways}
