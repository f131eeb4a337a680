"""What holds for every framework, said once.

Each module has one class of tests. A framework's test file subclasses it and names its driver, which alone
knows the framework::

    class TestNFNet(NFNetContract):
        driver = TorchDriver()
"""

from __future__ import annotations

import pytest

from tests.contract.driver import Driver


class Contract:
    """Tests of one subject, in the language of a driver.

    A test that takes ``mode``, ``stored_as`` or ``way`` runs for each of the driver's.
    """

    driver: Driver

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, choices in (
            ("mode", self.driver.modes),
            ("stored_as", self.driver.dtypes),
            ("way", self.driver.ways),
        ):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, choices)
