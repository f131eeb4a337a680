"""PyTorch's part of ``agc classify``, ``demo`` and ``train``; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from agc import AGC
from agc.nfnet import SMOOTHING, Options
from agc_torch.nfnet import NFNet, nfnet
from agc_torch.optimizer import attached
from agc_torch.recipe import sgd_nfnet
from agc_torch.train import trainer
from agc_torch.weights import from_neutral

__all__ = ["classifier", "train", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = NFNet(options).eval()
    from_neutral(model, arrays)

    def logits(images: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    return logits


def train(
    initial: Mapping[str, Any],
    batches: Iterator[tuple[Any, Any]],
    rates: Sequence[float],
    clipping: float | None,
    test: tuple[Any, Any],
) -> Iterator[tuple[float, float]]:
    """Train ``tiny``; see :meth:`agc.cli.frameworks.Framework.train`."""
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
        classes = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(-1)
        yield (classes == torch.from_numpy(labels)).double().mean().item(), 0.0
