"""Parameters to and from the neutral form."""

from __future__ import annotations

import numpy as np
import pytest

import agc_tensorflow
from agc import SAM
from agc import nfnet as core
from tests.contract.weights import WeightsContract
from tests.tensorflow.driver import TensorFlowDriver


class TestWeights(WeightsContract):
    driver = TensorFlowDriver()


def test_mixed_precision_keeps_what_is_stored():
    arrays = core.seeded_parameters("tiny")
    model = agc_tensorflow.nfnet("tiny", dtype="mixed_bfloat16")
    agc_tensorflow.from_neutral(model, arrays)
    for name, value in agc_tensorflow.to_neutral(model).items():
        np.testing.assert_array_equal(value, arrays[name].astype("float32"))


def test_wrapped_models():
    model = agc_tensorflow.nfnet("tiny")
    wrapped = agc_tensorflow.SharpnessAwareModel(model, SAM())
    assert list(agc_tensorflow.to_neutral(wrapped)) == list(agc_tensorflow.to_neutral(model))
    agc_tensorflow.from_neutral(wrapped, core.seeded_parameters("tiny"))
    assert float(model.stages[0].blocks[0].skip_gain) == pytest.approx(0.351593891613)
