"""What a schedule says of a step is what :class:`agc.Schedule` says, in graphs and outside."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from agc import Schedule
from agc.errors import ConfigError
from agc_tensorflow.schedules import value_at

POINTS = [(2, 0.1), (4, 0.3), (8, 0.2), (10**7, 0.05)]
STEPS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10**6, 10**7 - 1, 10**7, 10**7 + 1, 2**24 + 1, 2**31 - 1]


@pytest.mark.parametrize(("dtype", "rtol"), [(tf.float32, 2e-7), (tf.float64, 1e-15)])
@pytest.mark.parametrize("points", [POINTS, POINTS[:1]], ids=["lines", "one point"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_schedules(points, mode, dtype, rtol):
    schedule = Schedule(points)
    eager = lambda step: value_at("x", schedule, step, dtype)  # noqa: E731
    function = eager if mode == "eager" else tf.function(eager, jit_compile=mode == "xla")
    values = [function(tf.constant(step, tf.int64)) for step in STEPS]
    assert {(value.dtype, tuple(value.shape)) for value in values} == {(dtype, ())}
    np.testing.assert_allclose(values, [schedule(step) for step in STEPS], rtol=rtol)
    for step, value in points:  # exactly, whatever the rounding of the line before it
        assert float(function(tf.constant(step, tf.int64))) == dtype.as_numpy_dtype(value)


def test_numbers_variables_and_functions():
    step = keras.Variable(3, dtype="int64")
    assert float(value_at("x", 0.3, step, tf.float64)) == 0.3
    assert float(value_at("x", Schedule(POINTS), step, tf.float64)) == Schedule(POINTS)(3)
    assert float(value_at("x", lambda step: 1 / (1 + step), 3, tf.float64)) == 0.25
    bad = lambda step: 0.0 * tf.cast(step, tf.float64)  # noqa: E731
    with pytest.raises(ConfigError, match=r"^x: the schedule returned"):
        value_at("x", bad, 3, tf.float64)
    inside = tf.function(lambda step: value_at("x", bad, step, tf.float64))
    assert math.isnan(float(inside(tf.constant(3))))
