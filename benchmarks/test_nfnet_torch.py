"""NFNet-F0 in PyTorch: ours, and timm's ``dm_nfnet_f0``; forward, and a training step with AGC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import agc_torch
from agc import nfnet as core
from agc_conformance.backends.peers import timm as timm_peer
from agc_torch.nfnet import WSConv2d
from benchmarks import nfnet_torch
from benchmarks.common import Measure
from benchmarks.memory_torch import peak_memory
from benchmarks.nfnet_torch import batch

CONTESTANTS = ("ours", "timm", "standardisation")
CONDITIONS = ("forward", "step")
TURNS = 6
timm_agc = timm_peer.load()


class Models:
    """Both models with the same batch; dropout and stochastic depth off."""

    def __init__(self) -> None:
        self.images, self.labels = batch()
        self.ours, self.timm = nfnet_torch.models()
        self.convolutions = [m for m in self.ours.modules() if isinstance(m, WSConv2d)]
        self.optimizer = agc_torch.sgd_nfnet(self.ours, lr=1e-3)
        self.peer = torch.optim.SGD(self.timm.parameters(), **nfnet_torch.SGD)
        self.clipped = nfnet_torch.clipped_by_timm(self.timm)

    def contestant(self, name: str, condition: str) -> Callable[[], Any]:
        if name == "standardisation":
            return self.standardise if condition == "step" else self.standardise_forward
        if condition == "forward":
            model = self.ours if name == "ours" else self.timm

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    return model(self.images)

            return forward
        return self.step if name == "ours" else self.peer_step

    def step(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.ours(self.images), self.labels, label_smoothing=0.1).backward()
        self.optimizer.step()

    def peer_step(self) -> None:
        self.peer.zero_grad()
        cross_entropy(self.timm(self.images), self.labels, label_smoothing=0.1).backward()
        timm_agc.adaptive_clip_grad(self.clipped, clip_factor=0.01)
        self.peer.step()

    def standardise_forward(self) -> None:
        with torch.no_grad():
            for convolution in self.convolutions:
                convolution.standardised()

    def standardise(self) -> None:
        for convolution in self.convolutions:
            weight = convolution.standardised()
            weight.backward(weight.detach())


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def test_speed(
    measure: Measure, models: Models, condition: str, turn: int, contestant: str
) -> None:
    run = models.contestant(contestant, condition)
    case = {"framework": "torch", "model": "F0", "condition": condition}
    rounds = 5 if condition == "forward" else 2
    measure(run, rounds=rounds, **case, turn=turn, contestant=contestant)


def test_contestants_do_the_same_work(models: Models) -> None:
    nfnet_torch.start(models.ours, models.timm)  # other tests train
    ours, theirs = (models.contestant(name, "forward")() for name in ("ours", "timm"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (models.ours, models.timm)]
    assert sizes == [71_489_284, 71_489_284]


@pytest.mark.parametrize("contestant", ["ours", "standardisation"])
def test_share_of_standardisation(measure: Measure, models: Models, contestant: str) -> None:
    """Time a step and its weight standardisation, on images of the size that F0 is trained on."""
    models.images, models.labels = batch(16, core.variant("F0").train_pixels)
    try:
        run = models.contestant(contestant, "step")
        case = {"framework": "torch", "model": "F0 in training", "condition": "step"}
        measure(run, rounds=2, **case, turn=0, contestant=contestant)
    finally:
        models.images, models.labels = batch()


@pytest.mark.parametrize("contestant", ["ours", "timm"])
def test_peak_memory(benchmark: Any, models: Models, contestant: str) -> None:
    """Peak memory during a step that begins without gradients, in copies of the parameters."""
    optimizer = {"ours": models.optimizer, "timm": models.peer}[contestant]
    run = models.contestant(contestant, "step")
    run()
    benchmark.group = "torch F0 peak memory"
    case = {"framework": "torch", "model": "F0", "condition": "step", "contestant": contestant}
    peak = peak_memory(benchmark, run, optimizer.zero_grad)
    benchmark.extra_info.update(case, peak_memory=peak / (4 * 71_489_284))
