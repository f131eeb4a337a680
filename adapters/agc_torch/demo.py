"""PyTorch's part of ``agc demo``: the training; see :mod:`agc.demo`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from agc import AGC
from agc.nfnet import SMOOTHING
from agc_torch.nfnet import nfnet
from agc_torch.optimizer import attached
from agc_torch.recipe import sgd_nfnet
from agc_torch.weights import from_neutral

__all__ = ["train"]


def train(
    initial: Mapping[str, Any],
    batches: Iterator[tuple[Any, Any]],
    rates: Sequence[float],
    clipping: float | None,
    test: tuple[Any, Any],
) -> Iterator[tuple[float, float]]:
    """Train ``tiny``; see :class:`agc.demo.Train`."""
    model = nfnet("tiny", dropout=0.0, stochastic_depth=0.0).to(memory_format=torch.channels_last)
    from_neutral(model, initial)
    optimizer = sgd_nfnet(model, lr=0.0, rule=AGC.profile("deepmind", clipping=clipping))
    for rate, (images, labels) in zip(rates, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        loss = cross_entropy(logits, torch.from_numpy(labels), label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        handle = attached(optimizer)
        stats = handle and handle.stats()
        yield loss.item(), float(stats.clipped) / stats.units if stats and stats.units else 0.0
        if not math.isfinite(loss.item()):
            return
    with torch.no_grad():
        images, labels = test
        found = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(-1)
        yield (found == torch.from_numpy(labels)).double().mean().item(), 0.0
