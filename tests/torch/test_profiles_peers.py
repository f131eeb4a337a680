"""Profiles against the packages they reproduce, over the table of shapes on which those packages
disagree.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_optimizer.optimizer.agc import agc as kozistr_agc

from agc_conformance.backends.peers import timm as timm_peer
from tests.contract.peers import ProfilesContract, assert_close
from tests.helpers import draw

# The weights of the layers as PyTorch stores them.
SHAPES = {
    "scalar": (),
    "bias": (7,),
    "linear": (5, 6),
    "linear 1->5": (5, 1),
    "linear 6->1": (1, 6),
    "fused qkv": (24, 8),
    "embedding": (9, 4),
    "conv1d": (5, 4, 3),
    "conv1d pointwise": (5, 4, 1),
    "conv2d": (5, 4, 3, 3),
    "conv2d 1->5 1x1": (5, 1, 1, 1),
    "conv2d 6->1 1x1": (1, 6, 1, 1),
    "conv2d grouped": (6, 2, 3, 3),
    "conv2d depthwise": (5, 1, 3, 3),
    "conv3d": (5, 4, 3, 3, 2),
    "conv transpose 2d": (4, 5, 3, 3),
    "hf conv1d": (6, 5),
    "stacked linear": (3, 5, 6),
    "stacked bias": (3, 5),
    "position embedding": (1, 7, 4),
    "class token": (1, 1, 6),
    "layer scale": (5, 1, 1),
    "rank 6": (2, 3, 2, 2, 3, 2),
}


def by_timm(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    parameter = torch.nn.Parameter(torch.tensor(w))
    parameter.grad = torch.tensor(g)
    timm_peer.load().adaptive_clip_grad(parameter, clip_factor=clipping, eps=eps)
    return parameter.grad.numpy()


def by_pytorch_optimizer(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    return kozistr_agc(torch.tensor(w), torch.tensor(g), agc_eps=eps, agc_clip_val=clipping).numpy()


class TestProfiles(ProfilesContract):
    packages: ClassVar = {"timm": by_timm, "pytorch_optimizer": by_pytorch_optimizer}
    shapes = SHAPES
    layout = "out-first"
    other = "out-last"
    plain: ClassVar = {
        "linear": ((5, 6), (1, 0)),
        "linear 1->5": ((5, 1), (1, 0)),
        "linear 6->1": ((1, 6), (1, 0)),
        "conv1d": ((5, 4, 3), (2, 1, 0)),
        "conv2d": ((5, 4, 3, 2), (2, 3, 1, 0)),
        "conv3d": ((5, 4, 3, 2, 2), (2, 3, 4, 1, 0)),
    }


by_profile = TestProfiles().profile


def test_below_such_a_limit_pytorch_optimizer_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros((1, 4)), np.full((1, 4), 2e-9)
    assert_close(by_pytorch_optimizer(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    assert_close(by_timm(w, g, clipping=1e-3, eps=1e-5), g)
    for package in TestProfiles.packages:
        np.testing.assert_array_equal(by_profile(package, w, g, clipping=1e-3, eps=1e-5), g)


def test_at_such_a_limit_timm_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros(1), np.full(1, 1e-3 * 1e-5)
    assert_close(by_timm(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    np.testing.assert_array_equal(by_profile("timm", w, g, clipping=1e-3, eps=1e-5), g)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_composer_profile_has_no_epsilon(shape: str) -> None:
    for seed in range(3):
        w, g = draw(SHAPES[shape], seed, small=True)
        if w.ndim > 1:
            w[0] = 0
        axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
        w_norm, g_norm = (np.sqrt(np.sum(a * a, axes, keepdims=True)) for a in (w, g))
        formula = g * np.minimum(0.01 * w_norm / g_norm, 1)
        assert_close(formula.reshape(g.shape), by_profile("composer", w, g))
