"""Cost of SAM in TensorFlow: ``train_on_batch`` of a small convolutional network, as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest

from agc import SAM
from agc_tensorflow.sam import SharpnessAwareModel
from benchmarks.common import SAM_CONTESTANTS, Measure, sam_batch

CONTESTANTS = SAM_CONTESTANTS


class Training:
    """One batch, and a network and optimizer for each contestant: ``compile`` binds them."""

    def __init__(self) -> None:
        self.batch = sam_batch()
        self.models: dict[str, Any] = {}

    def network(self) -> Any:
        keras.utils.set_random_seed(0)
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                layers.Conv2D(32, 3, padding="same", activation="relu"),
                layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
                layers.Conv2D(128, 3, strides=2, padding="same", activation="relu"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(10),
            ]
        )

    def contestant(self, name: str) -> Callable[[], Any]:
        if name not in self.models:
            model = self.network()
            if name != "plain":
                rule = SAM(fraction=0.2 if name == "fraction" else 1.0)
                model = SharpnessAwareModel(model, rule)
            model.compile(
                keras.optimizers.SGD(0.01, 0.9),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
            self.models[name] = model
        return lambda: self.models[name].train_on_batch(*self.batch)


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


def test_cost(measure: Measure, training: Training, turn: int, contestant: str) -> None:
    case = {"framework": "tensorflow", "model": "convnet", "condition": "step"}
    measure(training.contestant(contestant), **case, turn=turn, contestant=contestant)
