"""Parameters to and from the neutral form."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from agc import nfnet as core
from agc.errors import ParameterError
from tests.contract import Contract
from tests.contract.nfnet import SHALLOW


class WeightsContract(Contract):
    def make(self, dtype: str = "float32") -> Any:
        return self.driver.blank("tiny", dtype=dtype)

    def read(self, model: Any) -> dict[str, Any]:
        return self.driver.adapter.to_neutral(model)

    def write(self, model: Any, arrays: Any) -> None:
        self.driver.adapter.from_neutral(model, arrays)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_round_trip(self, dtype):
        arrays = {n: value.astype(dtype) for n, value in core.seeded_parameters("tiny").items()}
        model = self.make(dtype)
        self.write(model, arrays)
        found = self.read(model)
        assert list(found) == list(arrays)
        for name, value in arrays.items():
            assert found[name].dtype == dtype
            assert found[name].flags.c_contiguous
            assert found[name].tobytes() == value.tobytes()
            assert found[name].shape == value.shape

    def test_layout(self):
        arrays = core.seeded_parameters("tiny")
        model = self.make("float64")
        self.write(model, arrays)
        found = self.driver.parameters(model)
        weight, dense = (np.asarray(found[f"{n}.weight"]) for n in ("stages.1.0.conv1", "head"))
        if self.driver.channels_first:
            weight, dense = weight[5, 3, 2, 1], dense[4, 7]  # o i h w, o i
        else:
            weight, dense = weight[2, 1, 3, 5], dense[7, 4]  # h w i o, i o
        np.testing.assert_array_equal(weight, arrays["stages.1.0.conv1.weight"][2, 1, 3, 5])
        np.testing.assert_array_equal(dense, arrays["head.weight"][7, 4])

    def test_copies(self):
        model = self.driver.seeded(dtype="float32")
        arrays = self.read(model)
        before = {name: value.copy() for name, value in arrays.items()}
        self.write(model, {name: value + 1 for name, value in arrays.items()})
        assert all(np.array_equal(arrays[name], before[name]) for name in before)
        for value in arrays.values():
            value.flags.writeable = False  # as arrays of a mapped file
        self.write(model, arrays)
        for value in arrays.values():
            value.flags.writeable = True
            value[...] = 7
        after = self.read(model)
        assert all(np.array_equal(after[name], before[name]) for name in before)

    def test_bfloat16(self):
        model = self.driver.seeded(dtype="bfloat16")
        arrays = self.read(model)
        assert {value.dtype.name for value in arrays.values()} == {"float32"}
        for dtype in ("float32", ml_dtypes.bfloat16):
            other = self.make("bfloat16")
            self.write(other, {name: value.astype(dtype) for name, value in arrays.items()})
            found = self.read(other)
            assert all(np.array_equal(found[name], value) for name, value in arrays.items())
            stored = {str(p.dtype) for p in self.driver.parameters(other).values()}
            assert stored <= {"bfloat16", "torch.bfloat16"}
        half = {name: value.astype("float16") for name, value in arrays.items()}
        self.write(other, half)
        for name, value in self.read(other).items():
            np.testing.assert_array_equal(value, half[name].astype(ml_dtypes.bfloat16))

    def test_other_arrays_are_refused_and_nothing_changes(self):
        model = self.driver.seeded(dtype="float32")
        before = self.read(model)
        wrong = dict(core.seeded_parameters("tiny"))
        wrong["stages.3.2.conv2.wait"] = wrong.pop("stages.3.2.conv2.weight")
        wrong["head.bias"] = np.zeros(11)
        with pytest.raises(ParameterError) as caught:
            self.write(model, wrong)
        message = str(caught.value)
        assert "1 missing: stages.3.2.conv2.weight;" in message
        assert "1 unknown: stages.3.2.conv2.wait;" in message
        assert "head.bias (has (11,), needs (10,))" in message
        after = self.read(model)
        assert all(np.array_equal(before[name], after[name]) for name in before)

    def test_other_models_are_refused(self):
        layer = self.driver.two_layers()
        with pytest.raises(ParameterError, match=rf"made by nfnet.*got {type(layer).__name__}"):
            self.read(layer)
        with pytest.raises(ParameterError, match="is folded"):
            self.read(self.driver.blank(SHALLOW).fold())

    def test_another_byte_order(self):
        arrays = core.seeded_parameters("tiny")
        model = self.make("float64")
        self.write(model, {name: value.astype(">f8") for name, value in arrays.items()})
        for name, value in self.read(model).items():
            np.testing.assert_array_equal(value, arrays[name])
