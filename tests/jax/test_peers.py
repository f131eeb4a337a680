"""optax as a subject: it runs on problems, and the layers it gets wrong show up as wrong."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from agc import Units
from agc.reference import RowSparse, clip_units
from agc_conformance.backend import Optimizer, Unsupported
from agc_conformance.backends.peers.optax import OptaxPeer
from tests.contract.peers import PeersContract, problem
from tests.helpers import draw


class TestPeers(PeersContract):
    peers: ClassVar = {"optax": OptaxPeer}
    sam = OptaxPeer
    digits = 1e-12
    framework = "jax"
    unsupported: ClassVar = [
        ({"adaptive": True}, "adaptive"),
        ({"eps": 1e-12}, "eps=1e-12"),
        ({"fraction": 0.2}, "fraction=0.2"),
    ]
    # Layer: shape, units, and who clips it as Eq. 3 says.
    layers: ClassVar = {
        "linear": ((6, 5), "i o -> o", {"optax"}),
        "linear 1->5": ((1, 5), "i o -> o", set()),
        "conv1d": ((3, 4, 5), "k i o -> o", set()),
        "conv2d": ((3, 3, 4, 5), "h w i o -> o", {"optax"}),
        "conv2d 1->5 1x1": ((1, 1, 1, 5), "h w i o -> o", set()),
        "conv2d depthwise": ((3, 3, 1, 5), "h w i o -> o", {"optax"}),
        "conv3d": ((2, 3, 3, 4, 5), "... i o -> o", {"optax"}),
        "conv transpose 2d": ((3, 3, 4, 5), "h w i o -> o", {"optax"}),
        "conv transpose 2d, transposed kernel": ((3, 3, 5, 4), "h w o i -> o", set()),
        "attention query": ((6, 2, 4), "i h d -> h d", {"optax"}),
        "attention output": ((2, 4, 6), "h d o -> o", set()),
        "attention bias": ((2, 4), "h d ->", set()),
        "embedding": ((9, 4), "v d -> v", set()),
        "stacked linear": ((3, 6, 5), "l i o -> l o", set()),
        "stacked bias": ((3, 5), "l o -> l", set()),
        "bias": ((7,), "o ->", {"optax"}),
        "class token": ((1, 1, 6), "a b d ->", {"optax"}),
        "layer scale": ((1, 1, 5), "a b c ->", {"optax"}),
    }
    vectors: ClassVar = {
        "L1-layer-conv2d": {"optax": "passed"},
        "L1-layer-dense-1-to-5": {"optax": "failed"},
        "L1-layer-conv1d": {"optax": "failed"},
        "L1-layer-conv-transpose2d": {"optax": "passed"},
        "L1-nan-gradient-propagate": {"optax": "passed"},
        "L1-no-second-eps": {"optax": "failed"},
        "L1-sparse-rows": {"optax": "unsupported"},
    }
    sharpness: ClassVar = {
        "SAM-1": {
            "L1-sam-global-norm:float32": "passed",
            "L1-sam-global-norm:bfloat16": "passed",
            "L1-sam-global-norm:float16": "failed",  # the norm is accumulated in half precision
            "L1-sam-squares-overflow:float32": "failed",
            "L1-sam-squares-underflow:float32": "failed",  # its norm is 0, and divided by
        },
        "SAM-2": {
            "L1-sam-zero-gradient:float32": "failed",  # 0 / 0
            "L1-sam-zero-layer:float32": "passed",
            "L1-sam-tiny-gradient:float32": "passed",
            "L1-sam-tiny-gradient-eps:float32": "unsupported",
        },
        "SAM-3": {"L1-sam-restore:float32": "passed", "L2-sam-momentum:float32": "passed"},
        "SAM-4": {"L1-sam-unused:float32": "passed"},
        "SAM-5": {"L1-sam-nan:float32": "failed", "L2-sam-skip-step:float32": "failed"},
        "SAM-6": {"L2-sam-weight-decay:float32": "passed", "L2-sam-agc:float32": "passed"},
        "SAM-7": {"L1-sam-fraction:float32": "unsupported"},
        "SAM-8": {"L1-sam-microbatches:float32": "unsupported"},
        "SAM-9": {
            "L1-sam-global-scope-alone:float32": "passed",
            "L3-sam-replicas-global:float32": "unsupported",
        },
        "SAM-10": {"L1-sam-adaptive-eta:float32": "unsupported"},
        "SAM-11": {"L1-sam-only:float32": "unsupported", "L1-sam-unmatched:float32": "unsupported"},
        "SAM-12": {"L1-sam-loss:float32": "unsupported"},  # grad_fn returns gradients only
        "SAM-13": {"L3-sam-restart-agc:float32": "passed"},
    }


def test_jax_has_no_sparse_gradient_to_hand_over() -> None:
    sparse = RowSparse(np.array([1, 3]), np.ones((2, 4)), (5, 4))
    with pytest.raises(Unsupported, match="row-sparse"):
        OptaxPeer().clip(problem(np.ones((5, 4)), sparse, "v d -> v"))


def test_its_own_profile_is_supported() -> None:
    w, g = draw((1, 5))
    by_profile = problem(w, g, unit_rule="optax", div_eps=1e-6)
    got = OptaxPeer().clip(by_profile).gradients["p"]
    np.testing.assert_allclose(got, clip_units(g, w, Units("... ->")).gradient)


def test_optax_takes_steps_with_decay_after_clipping() -> None:
    w, (g1, g2) = np.array([1.0, 2.0]), (np.array([30.0, 40.0]), np.array([0.003, 0.004]))
    sgd = Optimizer(lr=1, momentum=0.5, nesterov=True, weight_decay=0.1)
    steps = OptaxPeer().trajectory(problem(w, g1), sgd, [{"p": g1}, {"p": g2}])
    u1 = g1 * 0.01 * np.sqrt(5) / 50 + 0.1 * w
    w1 = w - (u1 + 0.5 * u1)
    u2 = g2 + 0.1 * w1
    np.testing.assert_allclose(steps[0]["p"], w1)
    np.testing.assert_allclose(steps[1]["p"], w1 - (u2 + 0.5 * (0.5 * u1 + u2)))
    with pytest.raises(Unsupported, match="decoupled"):
        OptaxPeer().trajectory(problem(w, g1), Optimizer(lr=1, decoupled=True), [])
