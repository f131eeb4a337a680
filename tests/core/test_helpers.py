"""What tests measure with notices an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import close, norm, relative


def test_errors_are_noticed():
    with pytest.raises(AssertionError):
        close([1.0, 2.0], [1.0, 2.001], 1e-4)
    with pytest.raises(AssertionError):
        close([1.0], [1.0, 1.0], 1e-4)
    with pytest.raises(AssertionError):
        close([1.0, np.nan], [1.0, 2.0], 1e-4)
    assert relative([3.0, 4.0], [3.0, 0.0]) == pytest.approx(4 / 3)
    assert norm([[1.0, 2.0], [2.0]]) == 3
