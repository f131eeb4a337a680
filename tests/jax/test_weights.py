"""Parameters to and from the neutral form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import agc_jax
from agc import nfnet as core
from agc.errors import ParameterError


def make(dtype=jnp.float32):
    return agc_jax.nfnet("tiny", rngs=nnx.Rngs(0), param_dtype=dtype)


def zeroed(model):
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_round_trip(dtype):
    arrays = {name: value.astype(dtype) for name, value in core.seeded_parameters("tiny").items()}
    with jax.enable_x64(dtype == "float64"):
        model = make(dtype)
    agc_jax.from_neutral(model, arrays)  # whatever the mode
    found = agc_jax.to_neutral(model)
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == dtype
        assert found[name].flags.c_contiguous
        assert found[name].tobytes() == value.tobytes()
        assert found[name].shape == value.shape


def test_layout():
    arrays = core.seeded_parameters("tiny")
    model = make()
    agc_jax.from_neutral(model, arrays)
    weight = arrays["stages.1.0.conv1.weight"].astype(np.float32)  # h w i o
    np.testing.assert_array_equal(model.stages[1][0].conv1.weight[2, 1, 3, 5], weight[2, 1, 3, 5])
    dense = arrays["head.weight"].astype(np.float32)  # i o
    np.testing.assert_array_equal(model.head.weight[7, 4], dense[7, 4])


def test_copies():
    model = make()
    arrays = agc_jax.to_neutral(model)
    before = {name: value.copy() for name, value in arrays.items()}
    zeroed(model)
    assert all(np.array_equal(arrays[name], before[name]) for name in before)
    for value in arrays.values():
        value.flags.writeable = False  # as arrays of a mapped file
    agc_jax.from_neutral(model, arrays)
    for value in arrays.values():
        value.flags.writeable = True
        value[...] = 7
    assert np.array_equal(agc_jax.to_neutral(model)["head.weight"], before["head.weight"])


def test_bfloat16():
    model = make(jnp.bfloat16)
    arrays = agc_jax.to_neutral(model)
    assert {value.dtype.name for value in arrays.values()} == {"float32"}
    other = make(jnp.bfloat16)
    zeroed(other)
    agc_jax.from_neutral(other, arrays)
    found = agc_jax.to_neutral(other)
    assert all(np.array_equal(found[name], value) for name, value in arrays.items())
    assert other.head.weight[...].dtype == jnp.bfloat16
    half = {name: value.astype(jnp.bfloat16) for name, value in arrays.items()}
    agc_jax.from_neutral(other, half)
    assert np.array_equal(agc_jax.to_neutral(other)["head.weight"], arrays["head.weight"])


def test_sharding_stays():
    """Parameters that lie on several devices still do, and the neutral form is the whole."""
    model = make()
    mesh = jax.make_mesh((2,), ("outputs",), devices=jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P(None, "outputs"))
    model.head.weight = nnx.Param(jax.device_put(model.head.weight[...], split))
    arrays = core.seeded_parameters("tiny")
    agc_jax.from_neutral(model, arrays)
    assert model.head.weight[...].sharding == split
    whole = agc_jax.to_neutral(model)["head.weight"]
    np.testing.assert_array_equal(whole, arrays["head.weight"].astype(np.float32))


def test_other_arrays_are_refused_and_nothing_changes(check_refused):
    model = make()
    check_refused(
        lambda: agc_jax.to_neutral(model), lambda arrays: agc_jax.from_neutral(model, arrays)
    )


def test_other_models_are_refused():
    with pytest.raises(ParameterError, match=r"made by nfnet.*got Linear"):
        agc_jax.to_neutral(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ParameterError, match=r"'stem\.conv0\.gain': it is folded"):
        agc_jax.to_neutral(make().fold())
    with pytest.raises(ParameterError, match=r"ShapeDtypeStruct.*not under nnx\.eval_shape"):
        agc_jax.from_neutral(nnx.eval_shape(make), core.seeded_parameters("tiny"))
