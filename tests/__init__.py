"""Tests: ``contract`` is what holds for every framework, the other folders what is peculiar to
one.
"""

import pytest

pytest.register_assert_rewrite("tests.contract", "tests.helpers")
