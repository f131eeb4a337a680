"""Documentation that mentions no framework."""

from tests.contract.readme import test_snippet  # noqa: F401
