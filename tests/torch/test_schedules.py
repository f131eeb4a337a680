"""What a schedule says of a step is what :class:`agc.Schedule` says, read on the host or traced."""

from __future__ import annotations

import pytest
import torch

from agc import Schedule
from agc.errors import ConfigError
from agc_torch.schedules import value_at

POINTS = [(2, 0.1), (4, 0.3), (8, 0.2), (10**7, 0.05)]
STEPS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10**6, 10**7 - 1, 10**7, 10**7 + 1, 2**24 + 1, 2**31 - 1]


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["lines", "one point"])
def test_schedules(points):
    schedule = Schedule(points)
    traced = torch.compile(lambda step: value_at("x", schedule, step), backend="eager")
    for step in STEPS:
        assert value_at("x", schedule, step) == schedule(step)
        assert value_at("x", schedule, torch.tensor(step)) == schedule(step)
        value = traced(torch.tensor(step))
        assert (value.dtype, value.shape) == (torch.float64, ())
        assert float(value) == pytest.approx(schedule(step), rel=1e-14)


def test_numbers_and_functions():
    assert value_at("x", 0.3, torch.tensor(7)) == 0.3
    assert value_at("x", lambda step: 1 / (1 + step), 3) == 0.25
    with pytest.raises(ConfigError, match=r"^x: the schedule returned -1.0 at step 1"):
        value_at("x", lambda step: 0.0 - step, torch.tensor(1))
