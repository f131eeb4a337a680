"""Parameters to and from the neutral form."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import SAM
from agc import nfnet as core
from agc.errors import ParameterError


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_round_trip(dtype):
    arrays = {name: value.astype(dtype) for name, value in core.seeded_parameters("tiny").items()}
    model = agc_tensorflow.nfnet("tiny", dtype=dtype)
    agc_tensorflow.from_neutral(model, arrays)
    found = agc_tensorflow.to_neutral(model)
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == dtype
        assert found[name].flags.c_contiguous
        assert found[name].tobytes() == value.tobytes()
        assert found[name].shape == value.shape


def test_layout():
    arrays = core.seeded_parameters("tiny")
    model = agc_tensorflow.nfnet("tiny", dtype="float64")
    agc_tensorflow.from_neutral(model, arrays)
    weight = arrays["stages.1.0.conv1.weight"]  # h w i o
    found = model.stages[1].blocks[0].conv1.weight.numpy()
    np.testing.assert_array_equal(found[2, 1, 3, 5], weight[2, 1, 3, 5])
    dense = arrays["head.weight"]  # i o
    np.testing.assert_array_equal(model.head.weight.numpy()[4, 7], dense[4, 7])


def test_copies():
    model = agc_tensorflow.nfnet("tiny")
    arrays = agc_tensorflow.to_neutral(model)
    before = {name: value.copy() for name, value in arrays.items()}
    for variable in model.trainable_variables:
        variable.assign_add(tf.ones_like(variable))
    assert all(np.array_equal(arrays[name], before[name]) for name in before)
    for value in arrays.values():
        value.flags.writeable = False  # as arrays of a mapped file
    agc_tensorflow.from_neutral(model, arrays)
    for name, value in agc_tensorflow.to_neutral(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_bfloat16():
    model = agc_tensorflow.nfnet("tiny", dtype="bfloat16")
    arrays = agc_tensorflow.to_neutral(model)
    assert {value.dtype.name for value in arrays.values()} == {"float32"}
    own = {name: value.astype(tf.bfloat16.as_numpy_dtype) for name, value in arrays.items()}
    for given in (arrays, own):
        other = agc_tensorflow.nfnet("tiny", dtype="bfloat16")
        agc_tensorflow.from_neutral(other, given)
        for p, q in zip(model.trainable_variables, other.trainable_variables, strict=True):
            np.testing.assert_array_equal(p, q)
    half = {name: value.astype("float16") for name, value in arrays.items()}
    agc_tensorflow.from_neutral(other, half)
    for name, value in agc_tensorflow.to_neutral(other).items():
        expected = tf.cast(half[name], tf.bfloat16)
        np.testing.assert_array_equal(value, tf.cast(expected, tf.float32))


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


def test_other_arrays_are_refused_and_nothing_changes(check_refused):
    model = agc_tensorflow.nfnet("tiny")
    check_refused(
        lambda: agc_tensorflow.to_neutral(model),
        lambda arrays: agc_tensorflow.from_neutral(model, arrays),
    )


def test_other_models_are_refused():
    with pytest.raises(ParameterError, match=r"made by nfnet.*got Dense"):
        agc_tensorflow.to_neutral(keras.layers.Dense(3))
    with pytest.raises(ParameterError, match="is folded and has no gains"):
        agc_tensorflow.to_neutral(agc_tensorflow.nfnet("tiny").fold())


def test_another_byte_order():
    arrays = core.seeded_parameters("tiny")
    model = agc_tensorflow.nfnet("tiny", dtype="float64")
    agc_tensorflow.from_neutral(model, {n: value.astype(">f8") for n, value in arrays.items()})
    for name, value in agc_tensorflow.to_neutral(model).items():
        np.testing.assert_array_equal(value, arrays[name])
