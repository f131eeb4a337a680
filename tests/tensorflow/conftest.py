"""Set-up of TensorFlow for tests: quiet, and two CPU devices for distribution strategies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # C++ notes about the build and the CPU; errors stay
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import pytest
import tensorflow as tf

VIRTUAL = 2
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * VIRTUAL
)

# Keras variables do not know NumPy 2's keyword yet; Keras itself trips over it when it saves a
# model.
KERAS_ARRAY = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(KERAS_ARRAY))


@pytest.fixture(scope="session")
def mirrored() -> Any:
    """One strategy for all tests: TensorFlow mixes up the collectives of two in one process."""
    from agc_conformance.backends.tensorflow.sharpness import mirrored

    return mirrored(VIRTUAL)


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Give every test the same random numbers and layer names."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
