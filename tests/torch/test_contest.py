"""Steps whose times are compared."""

from tests.contract.contest import ContestContract
from tests.torch.driver import TorchDriver


class TestContest(ContestContract):
    driver = TorchDriver()
