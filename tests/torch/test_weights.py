"""Parameters to and from the neutral form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import agc_torch
from agc import nfnet as core
from agc.errors import ParameterError


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_round_trip(dtype):
    arrays = {name: value.astype(dtype) for name, value in core.seeded_parameters("tiny").items()}
    model = agc_torch.nfnet("tiny", dtype=getattr(torch, dtype))
    agc_torch.from_neutral(model, arrays)
    found = agc_torch.to_neutral(model)
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == dtype
        assert found[name].flags.c_contiguous
        assert found[name].tobytes() == value.tobytes()
        assert found[name].shape == value.shape


def test_layout():
    arrays = core.seeded_parameters("tiny")
    model = agc_torch.nfnet("tiny", dtype=torch.float64)
    agc_torch.from_neutral(model, arrays)
    weight = arrays["stages.1.0.conv1.weight"]  # h w i o
    np.testing.assert_array_equal(
        model.stages[1][0].conv1.weight.detach()[5, 3, 2, 1], weight[2, 1, 3, 5]
    )
    dense = arrays["head.weight"]  # i o
    np.testing.assert_array_equal(model.head.weight.detach()[4, 7], dense[7, 4])


def test_copies():
    model = agc_torch.nfnet("tiny")
    arrays = agc_torch.to_neutral(model)
    before = {name: value.copy() for name, value in arrays.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(np.array_equal(arrays[name], before[name]) for name in before)
    for value in arrays.values():
        value.flags.writeable = False  # as arrays of a mapped file
    agc_torch.from_neutral(model, arrays)
    assert np.array_equal(agc_torch.to_neutral(model)["head.weight"], before["head.weight"])


def test_bfloat16():
    model = agc_torch.nfnet("tiny", dtype=torch.bfloat16)
    arrays = agc_torch.to_neutral(model)
    assert {value.dtype.name for value in arrays.values()} == {"float32"}
    other = agc_torch.nfnet("tiny", dtype=torch.bfloat16)
    agc_torch.from_neutral(other, arrays)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    half = {name: value.astype("float16") for name, value in arrays.items()}
    agc_torch.from_neutral(other, half)


# What PyTorch itself warns of when its compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_wrapped_models():
    model = agc_torch.nfnet("tiny")
    wrapped = torch.compile(model)
    assert list(agc_torch.to_neutral(wrapped)) == list(agc_torch.to_neutral(model))
    agc_torch.from_neutral(wrapped, core.seeded_parameters("tiny"))
    assert model.stages[0][0].skip_gain.item() == pytest.approx(0.351593891613)


def test_other_arrays_are_refused_and_nothing_changes(check_refused):
    model = agc_torch.nfnet("tiny")
    check_refused(
        lambda: agc_torch.to_neutral(model), lambda arrays: agc_torch.from_neutral(model, arrays)
    )


def test_other_models_are_refused():
    with pytest.raises(ParameterError, match=r"made by nfnet.*got Linear"):
        agc_torch.to_neutral(nn.Linear(2, 3))
    with pytest.raises(ParameterError, match=r"'stem\.conv0\.gain': it is folded"):
        agc_torch.to_neutral(agc_torch.nfnet("tiny").fold())
    with pytest.raises(ParameterError, match=r"'meta'.*to_empty"):
        agc_torch.from_neutral(
            agc_torch.nfnet("tiny", device="meta"), core.seeded_parameters("tiny")
        )


def test_arrays_that_pytorch_does_not_read_by_itself():
    arrays = core.seeded_parameters("tiny")
    odd = {name: value.astype(">f8") for name, value in arrays.items()}
    odd["head.bias"] = odd["head.bias"][::-1].copy()[::-1]
    model = agc_torch.nfnet("tiny", dtype=torch.float64)
    agc_torch.from_neutral(model, odd)
    for name, value in agc_torch.to_neutral(model).items():
        np.testing.assert_array_equal(value, arrays[name])
