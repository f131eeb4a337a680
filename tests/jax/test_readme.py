"""Documentation that mentions this folder's framework."""

import pytest

from tests.contract.readme import test_snippet  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick")
