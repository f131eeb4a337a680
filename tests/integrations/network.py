"""A network whose every step sees the same batch, trained by hand as trainers should."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import agc_torch
from agc import AGC, SAM, Schedule

RULE = AGC(clipping=Schedule([(0, 0.5), (4, 0.01)]), exclude=["head.bias"])
SHARPNESS = SAM(rho=Schedule([(0, 0.2), (4, 0.02)]))
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([[3.0], [-2.0], [1.0], [5.0]])
DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.head(self.stem(x).tanh()), labels)}


def sgd(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)


def by_hand(
    steps: Iterable[int] = range(6),
    *,
    rule: AGC | None = RULE,
    max_norm: float | None = None,
    sharpness: SAM | None = None,
    bf16: bool = False,
) -> Network:
    model = Network()
    optimizer = sgd(model)
    handle = rule and agc_torch.attach(optimizer, model, rule, max_norm=max_norm)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(X, Y)["loss"]
        loss.backward()
        return loss

    sam = sharpness and agc_torch.SharpnessAware(model, sharpness)
    for _ in steps:
        if sam:
            sam.step(optimizer, closure)
        else:
            closure()
            optimizer.step()
    assert handle is None or handle.steps == len(list(steps))
    return model


def check_same(got: nn.Module, want: nn.Module, **tolerance: Any) -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    for mine, other in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
