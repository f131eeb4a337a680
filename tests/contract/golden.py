"""Models against the numbers of DeepMind's code."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from agc_conformance.nfnets.golden import GOLDEN, LIMITS
from tests.contract.driver import Outputs
from tests.helpers import Array, norm

EXACT, SINGLE = LIMITS["float64"], LIMITS["float32"]


def same(found: float, expected: float, digits: float = 1e-12) -> None:
    # The golden values are rounded, so half a digit is added to the limit.
    assert found == pytest.approx(expected, rel=EXACT.gradient, abs=0.51 * digits)


def check_golden(variant: str, found: Outputs, parameters: Mapping[str, Array]) -> None:
    """Compare a model in float64 with the golden values."""
    golden = GOLDEN[variant]
    assert abs(float(found.loss) - golden.loss) <= EXACT.loss
    for row, expected in zip(found.logits, golden.logits, strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=1.5e-12)
    same(np.sum(found.logits), golden.logits_sum)
    same(norm([found.logits]), golden.logits_norm)
    same(norm([found.features["pooled"]]), golden.pooled_norm)
    np.testing.assert_allclose(found.signals["avg_var"], golden.avg_var, rtol=0, atol=5.1e-10)
    for index, expected in golden.res_avg_var.items():
        same(found.signals["res_avg_var"][index], expected, 1e-9)
    for name, expected in golden.gradients.items():
        digit = 10.0 ** (math.floor(math.log10(expected)) - 12)
        limit = EXACT.skip_gain if name.endswith("skip_gain") else EXACT.gradient
        gradient = norm([found.gradients[name]])
        assert gradient == pytest.approx(expected, rel=limit, abs=0.51 * digit)
    same(norm(found.gradients.values()), golden.gradient_norm)
    same(norm(parameters.values()), golden.parameter_norm, 1e-9)
