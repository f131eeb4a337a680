"""Cost of SAM in PyTorch: a training step of a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from agc import SAM
from agc_torch.sam import SharpnessAware
from benchmarks.common import SAM_CONTESTANTS, SAM_PASSES, SAM_ROUNDS, Measure, sam_batch
from benchmarks.memory_torch import peak_memory

CONTESTANTS = SAM_CONTESTANTS + SAM_PASSES


class Training:
    """The network, its optimizer and one batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        images, labels = sam_batch()
        self.batch = (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(labels),
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def closure(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss

    def contestant(self, name: str) -> Callable[[], Any]:

        def plain() -> None:
            self.closure(*self.batch)
            self.optimizer.step()

        if name == "plain":
            return plain
        fraction = 0.2 if name.endswith("fraction") else 1.0
        if name in SAM_PASSES:
            first = [tensor[: round(fraction * len(tensor))] for tensor in self.batch]

            def two_passes() -> None:
                self.closure(*first)
                plain()

            return two_passes
        sam = SharpnessAware(self.model, SAM(fraction=fraction))
        return lambda: sam.step(self.optimizer, self.closure, batch=self.batch)


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


def test_cost(measure: Measure, training: Training, turn: int, contestant: str) -> None:
    case = {"framework": "torch", "model": "convnet", "condition": "step"}
    measure(
        training.contestant(contestant), **case, rounds=SAM_ROUNDS, turn=turn, contestant=contestant
    )


def test_peak_memory(benchmark: Any) -> None:
    """Extra memory of SAM between its passes, in copies of the parameters; one is expected."""
    size = 1 << 22  # one large parameter; activations would hide its copies
    weight = nn.Parameter(torch.randn(size))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    gradient, received = torch.randn(size), torch.empty(size)

    def closure() -> torch.Tensor:
        weight.grad = received.copy_(gradient)
        return torch.zeros(())

    sam = SharpnessAware(model, SAM())
    benchmark.group = "torch sam peak memory"
    benchmark.extra_info.update(
        framework="torch", model="vector", condition="step", contestant="sam"
    )
    peak = peak_memory(benchmark, lambda: sam.step(optimizer, closure), lambda: None)
    benchmark.extra_info["peak_memory"] = peak / (4 * size)
