"""DeepMind's optimizer, from Keras' own parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc import nfnet as core
from tests.contract.nfnet import SHALLOW
from tests.contract.recipe import RecipeContract
from tests.tensorflow.driver import TensorFlowDriver, floatx


class TestRecipe(RecipeContract):
    driver = TensorFlowDriver()


def test_what_is_frozen_is_not_decayed():
    model = TestRecipe.driver.seeded(SHALLOW)
    model.stem.trainable = False
    before = agc_tensorflow.to_neutral(model)
    optimizer = agc_tensorflow.sgd_nfnet(model, 0.5, momentum=0.0, weight_decay=0.25)
    optimizer.apply(
        [tf.zeros_like(v) for v in model.trainable_variables], model.trainable_variables
    )
    after = agc_tensorflow.to_neutral(model)
    for spec in core.parameters(SHALLOW):
        decays = spec.decays and not spec.name.startswith("stem.")
        expected = before[spec.name] * (1 - 0.5 * 0.25 * decays)
        np.testing.assert_allclose(after[spec.name], expected, rtol=1e-15)


def trained(make: Callable[..., Any], rates: list[float], **options: Any) -> np.ndarray:
    """Return a kernel whose gradient is always the same."""
    variable = keras.Variable(np.ones((2, 1)), dtype="float64")
    with floatx("float64"):
        optimizer = make(0.1, **options)
        optimizer.build([variable])
    for rate in rates:
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant([[0.5], [-0.25]], "float64")])
    return np.asarray(variable)


def test_momentum_does_not_contain_the_learning_rate():
    """As in PyTorch: a change of the learning rate acts on all of the step at once."""
    rates = [0.1, 0.2, 0.05, 0.0]
    w, buffer, gradient = np.ones((2, 1)), np.zeros((2, 1)), np.array([[0.5], [-0.25]])
    for rate in rates:
        buffer = 0.9 * buffer + gradient
        w = w - rate * (gradient + 0.9 * buffer)
    np.testing.assert_allclose(trained(agc_tensorflow.CoupledSGD, rates), w, rtol=1e-14)


def test_plain_momentum():
    """While the learning rate stays, Keras' own SGD is the same."""
    rates = [0.1, 0.1, 0.1]
    found = trained(agc_tensorflow.CoupledSGD, rates, nesterov=False)
    expected = trained(keras.optimizers.SGD, rates, momentum=0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # Keras' momentum is float32


def test_sparse_gradients():
    optimizer = agc_tensorflow.CoupledSGD(0.5, weight_decay=0.1)
    other = agc_tensorflow.CoupledSGD(0.5, weight_decay=0.1)
    table, same = (keras.Variable(np.ones((4, 2)), dtype="float32") for _ in range(2))
    slices = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 3]), tf.constant([4, 2]))
    for _ in range(2):
        optimizer.apply([slices], [table])
        other.apply([tf.convert_to_tensor(slices)], [same])
    np.testing.assert_array_equal(table, same)
    assert len({*np.asarray(table)[:, 0].tolist()}) == 2


def test_settings_and_schedule_survive_a_round_trip():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.05, 0.01])
    model = TestRecipe.driver.blank(SHALLOW)
    made = agc_tensorflow.sgd_nfnet(model, schedule, momentum=0.8, weight_decay=3e-5)
    loaded = agc_tensorflow.AdaptiveGradClip.from_config(made.get_config())
    inner = loaded.inner_optimizer
    assert type(inner) is agc_tensorflow.CoupledSGD
    assert (inner.momentum, inner.nesterov, inner.weight_decay) == (0.8, True, 3e-5)
    assert inner.get_config() == made.inner_optimizer.get_config()
    assert loaded.rule == AGC.profile("deepmind")
