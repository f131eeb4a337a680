"""The models, and what a Keras user expects of a model."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import nfnet as core
from agc.nfnet import seeded_batch
from agc_conformance.nfnets.golden import LIMITS
from agc_tensorflow.units import named_variables
from tests.contract.nfnet import NARROW, SHALLOW, NFNetContract, exact, images_of, normal
from tests.helpers import relative
from tests.tensorflow.driver import WRAPPERS, TensorFlowDriver

driver = TensorFlowDriver()


class TestNFNet(NFNetContract):
    driver = driver


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The seeded ``tiny`` in float64, for tests that leave it as it is."""
    return driver.seeded()


def test_gradients_in_mixed_precision():
    images, labels = seeded_batch(2, 32)
    model = driver.seeded(dtype="mixed_bfloat16")
    found = driver.outputs(model, images.astype("float32"), labels).gradients
    expected = exact(driver).gradients
    errors = [relative(found[name], gradient) for name, gradient in expected.items()]
    assert statistics.median(errors) <= LIMITS["bfloat16"].gradient_median


# Weight standardisation and grouped convolutions


def conv_and_images(dtype: str = "float64") -> tuple[Any, tf.Tensor]:
    return TestNFNet().conv(dtype)[0], tf.constant(normal(9, 2, 9, 12, 6), dtype)


@pytest.mark.parametrize("mode", WRAPPERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_gradients_of_groups_exist_on_the_cpu(dtype, mode):
    """TensorFlow's own fail in most of these cases; which ones depends on oneDNN."""

    def gradients(dtype: str, mode: str) -> Any:
        conv, images = conv_and_images(dtype)

        def run(images: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(tf.cast(conv(images), "float64")))
            return tape.gradient(loss, [variable.value for variable in conv.weights])

        return WRAPPERS[mode](run)(images)

    limit = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[dtype]
    expected = gradients("float64", "eager")
    for found, wanted in zip(gradients(dtype, mode), expected, strict=True):
        assert found.dtype == dtype
        assert relative(found, wanted) <= limit


@pytest.mark.parametrize(("mode", "expected"), [("graph", 2), ("xla", 1)])
def test_groups_are_split_only_where_they_must_be(mode, expected):
    conv, images = conv_and_images()
    graph = WRAPPERS[mode](conv.call).get_concrete_function(images).graph
    assert [op.type for op in graph.get_operations()].count("Conv2D") == expected


TRAINING = """
import keras
import numpy as np
import agc_tensorflow
from agc.nfnet import Variant

def train():
    keras.utils.set_random_seed(0)
    variant = Variant("least", (1,), 0.0, 32, 32, (16,), 4, 10)
    model = agc_tensorflow.nfnet(variant, stochastic_depth=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(agc_tensorflow.sgd_nfnet(model, 0.1), loss, run_eagerly=True)
    images = np.random.RandomState(0).standard_normal((4, 32, 32, 3)).astype("float32")
    return [model.train_on_batch(images, np.arange(4)) for _ in range(3)]
"""


def test_training_with_and_without_one_dnn():
    """oneDNN is on unless the environment says otherwise, and decides which gradients TensorFlow
    has.
    """
    here: dict[str, Any] = {}
    exec(TRAINING, here)
    losses = [float(loss) for loss in here["train"]()]
    other = "1" if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" else "0"
    run = subprocess.run(
        [sys.executable, "-c", f"{TRAINING}\nprint(*train())"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": other},
    )
    assert run.returncode == 0, run.stderr
    assert [float(loss) for loss in run.stdout.split()] == pytest.approx(losses, rel=1e-4)
    assert losses[2] < losses[0]


# Options and parameters


def test_training_mode_reaches_the_blocks():
    model = driver.seeded(dropout=0.0, stochastic_depth=1.0)
    images = images_of(2, 32)
    seeds = [block.seed for stage in model.stages for block in stage.blocks]
    assert seeds[0] is None
    before = [seed.state.numpy() for seed in seeds[1:]]
    assert relative(model(images, training=True), model(images)) > 1e-3
    after = [seed.state.numpy() for seed in seeds[1:]]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


def test_names_are_the_same_with_the_model_and_without():
    model = agc_tensorflow.nfnet("tiny")
    for source in (model, model.trainable_variables):
        assert named_variables(source).keys() == {s.name for s in core.parameters("tiny")}


# Uses


@pytest.mark.parametrize("dtype", driver.dtypes)
def test_a_folded_model_is_for_inference_and_saved(dtype, tmp_path):
    images = images_of(2, 33, 40, dtype="float64" if dtype == "float64" else "float32")
    folded = driver.seeded(SHALLOW, dtype).fold()
    assert not folded.trainable_variables
    before = folded(images)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    assert loaded.folded
    assert not loaded.trainable_variables
    np.testing.assert_array_equal(loaded(images), before)


def test_a_twin_is_trained_and_saved(tmp_path):
    """In half precision; its statistics move in training alone."""
    twin = driver.blank(NARROW, dtype="mixed_bfloat16").batch_normalised()
    images = images_of(2, 16, dtype="float32")
    moving = [v for v in twin.non_trainable_variables if "moving" in v.name]
    assert len(moving) == 2 * sum(spec.kind == "conv" for spec in core.parameters(NARROW))
    start = [value.numpy() for value in moving]
    assert twin(images).dtype == tf.bfloat16
    assert all(np.array_equal(*pair) for pair in zip(start, moving, strict=True))
    twin(images, training=True)
    assert not any(np.array_equal(*pair) for pair in zip(start, moving, strict=True))
    twin.save(tmp_path / "twin.keras")
    loaded = keras.models.load_model(tmp_path / "twin.keras")
    assert (loaded.normalised, loaded.folded) == (True, False)
    np.testing.assert_array_equal(loaded(images), twin(images))


def compiled(variant: Any, *, jit_compile: bool) -> Any:
    model = driver.seeded(variant, dtype="float32", dropout=0.1)
    model.compile(
        agc_tensorflow.sgd_nfnet(model, 0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def test_compile_fit_evaluate_save_and_load(tmp_path):
    model = compiled(SHALLOW, jit_compile=False)
    images = images_of(10, 24, dtype="float32")
    labels = np.arange(10)
    history = model.fit(images, labels, batch_size=10, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    units = sum(entry.count for entry in model.optimizer.plan if entry.clipped)
    assert model.optimizer.stats().total().units == units
    before = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.options == model.options
    assert loaded.optimizer.plan == model.optimizer.plan
    assert loaded.evaluate(images, labels, verbose=0) == pytest.approx(before, rel=1e-6)
    found, expected = ([*m.weights, *m.optimizer.variables] for m in (loaded, model))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
def test_fit_compiled_by_xla():
    model = compiled(core.Variant("least", (1,), 0.0, 32, 32, (16,), 4, 10), jit_compile=True)
    images = images_of(10, 24, dtype="float32")
    history = model.fit(images, np.arange(10), batch_size=10, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]


def test_configuration_round_trip():
    model = agc_tensorflow.nfnet(
        SHALLOW, 7, dropout=0.3, activation="silu", ws_eps="timm", dtype="mixed_bfloat16", name="n"
    )
    other = keras.models.clone_model(model)
    assert (other.options, other.dtype_policy, other.name) == (
        model.options,
        model.dtype_policy,
        "n",
    )
    assert other.stages[0].blocks[0].conv0.dtype_policy.name == "mixed_bfloat16"


def test_in_a_functional_model(tiny):
    inputs = keras.Input((None, None, 3), dtype="float64")
    model = keras.Model(inputs, keras.layers.Softmax(dtype="float64")(tiny(inputs)))
    images = images_of(2, 32)
    assert model.output_shape == (None, 10)
    np.testing.assert_allclose(model(images), tf.nn.softmax(tiny(images)), rtol=1e-12)
