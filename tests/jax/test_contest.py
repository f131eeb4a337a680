"""Steps whose times are compared."""

import pytest

from tests.contract.contest import ContestContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestContest(ContestContract):
    driver = JaxDriver()
