"""Accelerate, schedule-free optimizers, timm, and loggers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import schedulefree
from torch import nn

import agc_torch
from agc.errors import SelectorError
from agc_torch.integrations import timm as integration
from benchmarks.without_torchvision import import_timm
from tests.integrations.network import RULE, Network, X, Y, by_hand, check_same, sgd


def accelerated(folder: Path, steps: int, resume: bool, parts: int, precision: str) -> Network:
    accelerate.state.AcceleratorState._reset_state()  # which has the precision of the last one
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision
    )
    network = Network()
    model, optimizer = accelerator.prepare(network, sgd(network))
    handle = agc_torch.attach(optimizer, model, RULE)
    accelerator.register_for_checkpointing(handle)
    if resume:
        accelerator.load_state(str(folder))
    for _ in range(steps):
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(model(x, y)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(str(folder))
    assert handle.steps == (6 if resume else steps)
    return network


@pytest.mark.parametrize(("parts", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_accelerate(parts, precision, tmp_path):
    accelerated(tmp_path, 4, resume=False, parts=parts, precision=precision)
    network = accelerated(tmp_path, 2, resume=True, parts=parts, precision=precision)
    bf16 = precision == "bf16"
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {}
    check_same(network, by_hand(bf16=bf16), **tolerance)


def test_schedule_free():
    """AGC compares with the weights at which the gradient was taken."""
    model = Network()
    other = copy.deepcopy(model)
    attached, plain = (
        schedulefree.AdamWScheduleFree(m.parameters(), lr=0.1) for m in (model, other)
    )
    handle = agc_torch.attach(attached, model, RULE)
    for optimizer, network in ((attached, model), (plain, other)):
        optimizer.train()
        for step in range(6):
            optimizer.zero_grad()
            network(X, Y)["loss"].backward()
            if optimizer is plain:
                agc_torch.adaptive_clip_grad_(network, RULE, step=step)
            optimizer.step()
        optimizer.eval()
    assert handle.steps == 6
    check_same(model, other, rtol=0, atol=0)


def vision_transformer(**options: Any) -> nn.Module:
    timm = import_timm()
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(**(sizes | {"num_classes": 3} | options))


def test_timm():
    model = vision_transformer()
    assert integration.classifier(model) == ["head"]
    model.pretrained_cfg = {"classifier": ("head", "head_dist")}  # as of distilled ones
    assert integration.classifier(nn.DataParallel(model)) == ["head"]
    with integration.attach_agc(sgd(model), model, 0.02, exclude=["pos_embed"]) as handle:
        plan = handle.plan
    assert {entry.name for entry in plan if entry.excluded} == {
        "head.weight",
        "head.bias",
        "pos_embed",
    }
    assert {entry.clipping for entry in plan if entry.clipped} == {0.02}
    assert integration.classifier(vision_transformer(num_classes=0)) == []
    with pytest.raises(SelectorError, match="Network has neither pretrained_cfg"):
        integration.classifier(Network())
