"""What a schedule says of a step is what :class:`agc.Schedule` says, traced or not."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agc import Schedule
from agc.errors import ConfigError
from agc_jax.schedules import value_at

POINTS = [(2, 0.1), (4, 0.3), (8, 0.2), (10**7, 0.05)]
STEPS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10**6, 10**7 - 1, 10**7, 10**7 + 1, 2**24 + 1, 2**31 - 1]


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["lines", "one point"])
def test_schedules(points, dtype, rtol):
    schedule = Schedule(points)
    with jax.enable_x64(dtype is np.float64):
        eager = partial(value_at, "x", schedule, dtype=dtype)
        for function in (eager, jax.jit(eager)):
            values = [function(jnp.asarray(step, np.int32)) for step in STEPS]
            assert {(value.dtype, value.shape) for value in values} == {(np.dtype(dtype), ())}
            np.testing.assert_allclose(values, [schedule(step) for step in STEPS], rtol=rtol)
        assert value_at("x", schedule, 3).dtype == dtype  # the widest that JAX is set to
        assert float(eager(3)) == pytest.approx(schedule(3), rel=rtol)


def test_a_schedule_is_no_loop():
    text = str(jax.make_jaxpr(partial(value_at, "x", Schedule(POINTS)))(jnp.int32(3)))
    assert "while" not in text
    assert "scan" not in text


def test_numbers_and_functions():
    assert value_at("x", 0.3, jnp.asarray(7)) == 0.3
    assert value_at("x", lambda step: 1 / (1 + step), 3) == 0.25
    assert float(jax.jit(lambda step: value_at("x", lambda s: -s, step))(3)) == -3
    with pytest.raises(ConfigError, match=r"^x: the schedule returned -1"):
        value_at("x", lambda step: -step, 1)
