"""The PyTorch peers as subjects: they run on problems, and the layers they get wrong show up as
wrong.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from agc import Schedule
from agc.reference import RowSparse
from agc_conformance.backend import Optimizer, Unsupported
from agc_conformance.backends.peers.pytorch_optimizer import PytorchOptimizerPeer
from agc_conformance.backends.peers.timm import TimmPeer
from tests.contract.peers import PeersContract, problem, sharp
from tests.helpers import draw

PEERS = {"timm": TimmPeer, "pytorch_optimizer": PytorchOptimizerPeer}


class TestPeers(PeersContract):
    peers = PEERS
    sam = PytorchOptimizerPeer
    digits = 1e-7
    framework = "torch"
    # Layer: shape, units, and who clips it as Eq. 3 says.
    layers: ClassVar = {
        "linear": ((5, 6), "o i -> o", {"timm", "pytorch_optimizer"}),
        "linear 1->5": ((5, 1), "o i -> o", {"timm", "pytorch_optimizer"}),
        "conv1d": ((5, 4, 3), "o i k -> o", {"timm"}),
        "conv2d": ((5, 4, 3, 3), "o i h w -> o", {"timm", "pytorch_optimizer"}),
        "conv2d 1->5 1x1": ((5, 1, 1, 1), "o i h w -> o", {"timm", "pytorch_optimizer"}),
        "conv2d depthwise": ((5, 1, 3, 3), "o i h w -> o", {"timm", "pytorch_optimizer"}),
        "conv3d": ((5, 4, 3, 3, 2), "o i ... -> o", {"timm", "pytorch_optimizer"}),
        "conv transpose 2d": ((4, 5, 3, 3), "i o h w -> o", set()),
        "hf conv1d": ((6, 5), "i o -> o", set()),
        "stacked linear": ((3, 5, 6), "l o i -> l o", set()),
        "stacked bias": ((3, 5), "l o -> l", {"timm", "pytorch_optimizer"}),
        "bias": ((7,), "o ->", {"timm", "pytorch_optimizer"}),
        "class token": ((1, 1, 6), "a b d ->", {"timm"}),
        "layer scale": ((5, 1, 1), "c a b ->", set()),
    }
    vectors: ClassVar = {
        "L1-layer-conv2d": {"timm": "passed", "pytorch_optimizer": "passed"},
        "L1-layer-conv1d": {"timm": "passed", "pytorch_optimizer": "failed"},
        "L1-layer-conv-transpose2d": {"timm": "failed", "pytorch_optimizer": "failed"},
        "L1-nan-gradient-propagate": {"timm": "passed", "pytorch_optimizer": "failed"},
        "L1-no-second-eps": {"timm": "failed", "pytorch_optimizer": "failed"},
        "L1-sparse-rows": {"timm": "error", "pytorch_optimizer": "error"},
    }
    # pytorch_optimizer has the formula of davda54.
    sharpness: ClassVar = {
        "SAM-1": {
            "L1-sam-global-norm:float32": "passed",
            "L1-sam-global-norm:float16": "passed",
            "L1-sam-squares-overflow:float32": "failed",  # its norm is infinite: no perturbation
            "L1-sam-squares-underflow:float32": "failed",  # its norm is 0
        },
        "SAM-2": {
            "L1-sam-zero-gradient:float32": "passed",
            "L1-sam-zero-gradient:float16": "failed",  # rho / 1e-12 is infinite in half precision
            "L1-sam-tiny-gradient:float32": "failed",  # 1e-12 shortens e
            "L1-sam-tiny-gradient-eps:float32": "passed",  # which profile davda54 reproduces
        },
        "SAM-3": {
            "L1-sam-restore:float32": "passed",
            "L1-sam-restore:bfloat16": "passed",
            "L2-sam-momentum:float32": "passed",
        },
        "SAM-4": {"L1-sam-unused:float32": "passed", "L1-sam-no-gradient:float32": "unsupported"},
        "SAM-5": {"L1-sam-nan:float32": "failed", "L2-sam-skip-step:float32": "failed"},
        "SAM-6": {"L2-sam-weight-decay:float32": "passed", "L2-sam-agc:float32": "passed"},
        "SAM-7": {"L1-sam-fraction:float32": "unsupported"},
        "SAM-8": {"L1-sam-microbatches:float32": "unsupported"},
        "SAM-9": {
            "L1-sam-global-scope-alone:float32": "passed",
            "L3-sam-replicas-global:float32": "unsupported",
        },
        "SAM-10": {
            "L1-sam-adaptive:float32": "failed",  # no eta
            "L1-sam-adaptive-eta-zero:float32": "failed",  # and vectors are scaled too
        },
        "SAM-11": {
            "L1-sam-every-step-1:float32": "unsupported",
            "L1-sam-only:float32": "unsupported",
        },
        "SAM-12": {"L1-sam-loss:float32": "unsupported"},  # its step returns nothing
        "SAM-13": {"L3-sam-restart-agc:float32": "passed"},
    }
    unsupported: ClassVar = [
        ({"rho": Schedule([(0, 0.1)])}, "rho that is not one number"),
        ({"fraction": 0.2}, "fraction=0.2"),
        ({"microbatches": 2}, "microbatches=2"),
        ({"every": 2}, "every=2"),
        ({"only": ["p"]}, "only and exclude"),
        ({"nonfinite": "raise"}, "nonfinite='raise'"),
    ]


@pytest.mark.parametrize("peer", PEERS)
def test_a_sparse_gradient_reaches_the_peer_and_it_raises(peer: str) -> None:
    sparse = RowSparse(np.array([1, 3]), np.ones((2, 4)), (5, 4))
    with pytest.raises(RuntimeError, match="norm_sparse"):  # what PyTorch itself says
        PEERS[peer]().clip(problem(np.ones((5, 4)), sparse, "v d -> v"))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ({"clipping": None}, "clipping that is not one number"),
        ({"clipping": {"*": 0.1}}, "clipping that is not one number"),
        ({"clipping": Schedule([(0, 0.1)])}, "clipping that is not one number"),
        ({"exclude": ["p"]}, "exclude"),
        ({"nonfinite": "zero"}, "nonfinite='zero'"),
        ({"granularity": "tensor"}, "granularity='tensor'"),
        ({"unit_rule": "optax"}, "unit_rule='optax'"),
    ],
)
def test_an_option_that_a_peer_lacks_is_unsupported(
    peer: str, rule: dict[str, Any], option: str
) -> None:
    with pytest.raises(Unsupported, match=f"{peer} has no argument for {option}"):
        PEERS[peer]().clip(problem(*draw((3, 2)), **rule))


def test_timm_has_no_sam() -> None:
    with pytest.raises(Unsupported, match="timm has no SAM"):
        TimmPeer().sharpen(sharp())


def test_timm_takes_steps_with_the_optimizer_of_its_training_script() -> None:
    w, (g1, g2) = np.array([1.0, 2.0]), (np.array([30.0, 40.0]), np.array([0.003, 0.004]))
    steps = TimmPeer().trajectory(
        problem(w, g1), Optimizer(lr=1, momentum=0.5, nesterov=True), [{"p": g1}, {"p": g2}]
    )
    limit = 0.01 * np.sqrt(5)
    c1 = g1 * limit / 50
    w1 = w - (c1 + 0.5 * c1)
    np.testing.assert_allclose(steps[0]["p"], w1)
    np.testing.assert_allclose(steps[1]["p"], w1 - (g2 + 0.5 * (0.5 * c1 + g2)))
    with pytest.raises(Unsupported, match="decoupled"):
        TimmPeer().trajectory(problem(w, g1), Optimizer(lr=1, decoupled=True), [])
