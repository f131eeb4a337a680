"""Steps whose times are compared."""

from tests.contract.contest import ContestContract
from tests.tensorflow.driver import TensorFlowDriver


class TestContest(ContestContract):
    driver = TensorFlowDriver()
