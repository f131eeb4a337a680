"""Devices that this machine need not have, and that lack something; tensors have no memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agc_torch
from agc import AGC, SAM, Schedule
from agc_torch import norms


class NoFloat64(TorchDispatchMode):  # type: ignore[misc]
    """Refuses float64, as a GPU that has none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                assert leaf.dtype not in (torch.float64, torch.complex128), func
        return result


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_has_float64", lambda device: device.type != "meta")


def with_gradients(dtype: torch.dtype) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, dtype=dtype), nn.Linear(8, 4, dtype=dtype)
    model = nn.Sequential(*layers).to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.usefixtures("no_float64")
def test_agc_without_float64(dtype: torch.dtype) -> None:
    model = with_gradients(dtype)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "capturable": True}], lr=0.1)
    rule = AGC(clipping=Schedule([(0, 0.1), (9, 0.01)]), nonfinite="zero")
    limit = None if dtype.is_complex else 1.0
    handle = agc_torch.attach(optimizer, model, rule, max_norm=limit)
    with NoFloat64():
        for _ in range(2):
            optimizer.step()
        stats = handle.stats()
        assert stats is not None
        assert stats.max_ratio.dtype == torch.float32


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.usefixtures("no_float64")
def test_sam_without_float64(dtype: torch.dtype, adaptive: bool) -> None:
    model = with_gradients(dtype)
    sharpness = agc_torch.SharpnessAware(
        model, SAM(rho=0.05, adaptive=adaptive, nonfinite="skip_perturb")
    )
    with NoFloat64(), sharpness.perturbed():
        assert sharpness.is_perturbed


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)],
)
def test_widest_dtype(device: str, dtype: torch.dtype) -> None:
    assert norms.wide(torch.device(device)) == dtype


@pytest.mark.parametrize("has_fp64", [False, True])
def test_widest_dtype_of_intel(has_fp64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    expected = torch.float64 if has_fp64 else torch.float32
    assert norms.wide(torch.device("xpu", 0)) == expected
