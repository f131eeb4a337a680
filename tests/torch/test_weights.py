"""Parameters to and from the neutral form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agc_torch
from agc import nfnet as core
from agc.errors import ParameterError
from tests.contract.weights import WeightsContract
from tests.torch.driver import TorchDriver


class TestWeights(WeightsContract):
    driver = TorchDriver()


# What PyTorch itself warns of when its compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_wrapped_models():
    model = agc_torch.nfnet("tiny")
    wrapped = torch.compile(model)
    assert list(agc_torch.to_neutral(wrapped)) == list(agc_torch.to_neutral(model))
    agc_torch.from_neutral(wrapped, core.seeded_parameters("tiny"))
    assert model.stages[0][0].skip_gain.item() == pytest.approx(0.351593891613)


def test_a_model_without_values_is_refused():
    with pytest.raises(ParameterError, match=r"'meta'.*to_empty"):
        agc_torch.from_neutral(
            agc_torch.nfnet("tiny", device="meta"), core.seeded_parameters("tiny")
        )


def test_arrays_with_negative_strides():
    arrays = core.seeded_parameters("tiny")
    odd = {**arrays, "head.bias": arrays["head.bias"][::-1].copy()[::-1]}
    model = agc_torch.nfnet("tiny", dtype=torch.float64)
    agc_torch.from_neutral(model, odd)
    np.testing.assert_array_equal(agc_torch.to_neutral(model)["head.bias"], arrays["head.bias"])
