"""The page on trainers and loggers."""

from tests.contract.readme import test_snippet  # noqa: F401
