"""Documentation that mentions this folder's framework."""

from tests.contract.readme import test_snippet  # noqa: F401
