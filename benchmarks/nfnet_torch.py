"""NFNet-F0 in PyTorch, ours and timm's ``dm_nfnet_f0``, with the same weights and images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import agc_torch
from agc import nfnet as core
from agc.weights.forms import FORMS
from benchmarks.common import nfnet_batch
from benchmarks.without_torchvision import import_timm, timm_model

__all__ = ["SGD", "batch", "clipped_by_timm", "like", "models", "ours", "start", "tiny_timm"]

SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 2e-5}
"""The peer's optimizer."""


def batch(*size: int) -> tuple[Tensor, Tensor]:
    """Return images and labels; ``size`` is that of :func:`benchmarks.common.nfnet_batch`."""
    images, labels = nfnet_batch(*size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def models() -> tuple[nn.Module, nn.Module]:
    """Return ours and timm's, dropout and stochastic depth off."""
    model = ours("F0")
    return model, like(model)


def like(model: nn.Module) -> nn.Module:
    """Return timm's model, and give it and ours the same weights."""
    theirs: nn.Module = timm_model("dm_nfnet_f0").eval()
    start(model, theirs)
    return theirs


def start(model: nn.Module, theirs: nn.Module) -> None:
    """Give both models the same weights."""
    neutral, form = core.seeded_parameters("F0"), FORMS["timm"]
    agc_torch.from_neutral(model, neutral)
    theirs.load_state_dict(
        {
            form.rename(spec): torch.from_numpy(form.encode(spec, neutral[spec.name])).float()
            for spec in core.parameters("F0")
        }
    )


def tiny_timm() -> nn.Module:
    """Return a narrow one of timm for rehearsals, whose stem and weights are not those of ours."""
    timm = import_timm()
    narrow = core.variant("tiny")
    configuration = replace(
        timm.models.nfnet.model_cfgs["dm_nfnet_f0"],
        channels=narrow.widths,
        group_size=narrow.group_width,
        num_features=2 * narrow.widths[-1],
    )
    theirs = timm.models.nfnet.NormFreeNet(configuration, num_classes=narrow.num_classes)
    narrowed: nn.Module = theirs.eval()
    return narrowed


def ours(variant: str) -> nn.Module:
    """Return ours, dropout and stochastic depth off."""
    return agc_torch.nfnet(
        variant, dropout=0.0, stochastic_depth=0.0, activation="gelu_erf", ws_eps="timm"
    )


def clipped_by_timm(model: nn.Module) -> list[nn.Parameter]:
    """Return what timm's training script clips: everything but the head."""
    head = {id(parameter) for parameter in model.head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]
