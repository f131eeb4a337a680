"""DeepMind's optimizer, from Keras' own parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc import nfnet as core
from agc.errors import ParameterError
from agc_tensorflow.units import named_variables
from tests.contract.recipe import RecipeContract
from tests.tensorflow.driver import TensorFlowDriver, floatx


@pytest.fixture
def float64() -> Iterator[None]:
    """Learning rates are stored in Keras' default dtype, and 0.1 in float32 is another number."""
    with floatx("float64"):
        yield


class TestRecipe(RecipeContract):
    driver = TensorFlowDriver()


def test_what_is_frozen_is_not_decayed():
    model = agc_tensorflow.nfnet("tiny", dtype="float64")
    agc_tensorflow.from_neutral(model, core.seeded_parameters("tiny"))
    model.stem.trainable = False
    before = agc_tensorflow.to_neutral(model)
    optimizer = agc_tensorflow.sgd_nfnet(model, 0.5, momentum=0.0, weight_decay=0.25)
    optimizer.apply(
        [tf.zeros_like(v) for v in model.trainable_variables], model.trainable_variables
    )
    after = agc_tensorflow.to_neutral(model)
    for spec in core.parameters("tiny"):
        decays = spec.decays and not spec.name.startswith("stem.")
        expected = before[spec.name] * (1 - 0.5 * 0.25 * decays)
        np.testing.assert_allclose(after[spec.name], expected, rtol=1e-15)


def by_hand(rates: list[float], decay: float) -> np.ndarray:
    """DeepMind's rule on one kernel whose gradient is always the same."""
    w, buffer = np.ones((2, 1)), np.zeros((2, 1))
    for rate in rates:
        g = np.array([[0.5], [-0.25]]) + decay * w
        buffer = 0.9 * buffer + g
        w = w - rate * (g + 0.9 * buffer)
    return w


def by_optimizer(optimizer: Any, rates: list[float]) -> np.ndarray:
    variable = keras.Variable(np.ones((2, 1)), dtype="float64")
    optimizer.build([variable])
    for rate in rates:
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant([[0.5], [-0.25]], "float64")])
    return np.asarray(variable)


def test_momentum_does_not_contain_the_learning_rate(float64):
    """Keras' own SGD is the same while the learning rate stays, and another optimizer when it
    changes.
    """
    constant, changing = [0.1] * 4, [0.1, 0.2, 0.05, 0.0]
    for rates in (constant, changing):
        found = by_optimizer(agc_tensorflow.CoupledSGD(0.1), rates)
        np.testing.assert_allclose(found, by_hand(rates, 0.0), rtol=1e-14)
    keras_sgd = [
        by_optimizer(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), rates)
        for rates in (constant, changing)
    ]
    np.testing.assert_allclose(keras_sgd[0], by_hand(constant, 0.0), rtol=1e-6)
    assert np.abs(keras_sgd[1] - by_hand(changing, 0.0)).max() > 0.02


def test_weight_decay_is_coupled(float64):
    rates = [0.1, 0.1, 0.1]
    found = by_optimizer(agc_tensorflow.CoupledSGD(0.1, weight_decay=0.3), rates)
    np.testing.assert_allclose(found, by_hand(rates, 0.3), rtol=1e-14)
    keras_sgd = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.3)
    assert np.abs(by_optimizer(keras_sgd, rates) - by_hand(rates, 0.3)).max() > 0.01


def test_excluding_from_weight_decay(float64):
    optimizer = agc_tensorflow.CoupledSGD(0.1, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["variable"])
    np.testing.assert_allclose(by_optimizer(optimizer, [0.1]), by_hand([0.1], 0.0), rtol=1e-14)


def test_plain_momentum(float64):
    optimizer = agc_tensorflow.CoupledSGD(0.1, nesterov=False)
    reference = keras.optimizers.SGD(0.1, momentum=0.9)
    found, expected = (by_optimizer(o, [0.1, 0.1, 0.1]) for o in (optimizer, reference))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


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


def test_a_schedule_and_a_round_trip(tmp_path):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.05, 0.01])
    variant = core.Variant("shallow", (1, 1), 0.0, 32, 32, (16, 16), 8, 4)
    model = agc_tensorflow.nfnet(variant, stochastic_depth=0.0)
    optimizer = agc_tensorflow.sgd_nfnet(model, schedule, momentum=0.8, weight_decay=3e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    images, labels = core.seeded_batch(4, 16)
    model.fit(images, labels % 4, epochs=2, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    inner = loaded.optimizer.inner_optimizer
    assert type(inner) is agc_tensorflow.CoupledSGD
    assert (inner.momentum, inner.nesterov, inner.weight_decay) == (0.8, True, 3e-5)
    assert loaded.optimizer.rule == AGC.profile("deepmind")
    for each in (model, loaded):
        each.fit(images, labels % 4, epochs=3, batch_size=4, verbose=0)
    for name, variable in named_variables(model).items():
        np.testing.assert_array_equal(named_variables(loaded)[name], variable)


def test_a_model_must_be_built():
    with pytest.raises(ParameterError, match="is not built"):
        agc_tensorflow.sgd_nfnet(keras.Sequential([keras.layers.Dense(2)]), 0.1)
