"""The PyTorch peers as subjects: they run on problems, and the layers they get wrong show up as wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from agc import AGC, Schedule, Units
from agc.backend import Backend, Optimizer, Problem, Unavailable, Unsupported
from agc.reference import RowSparse, clip_units
from agc_conformance.peers.pytorch_optimizer import PytorchOptimizerPeer
from agc_conformance.peers.timm import TimmPeer
from agc_conformance.runner import run_case
from agc_conformance.vectors import load_vectors

PEERS = {"timm": TimmPeer, "pytorch_optimizer": PytorchOptimizerPeer}

# Layer: shape, units, and who clips it as Eq. 3 says.
LAYERS = {
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


def draw(shape: tuple[int, ...], dtype: Any = np.float64) -> tuple[Any, Any]:
    """Weights and gradients with another scale at every index of every axis."""
    random = np.random.RandomState(0)
    arrays = []
    for _ in range(2):
        array = random.standard_normal(shape)
        for axis, size in enumerate(shape):
            scales = np.exp(1.5 * random.standard_normal(size))
            array = array * scales.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        arrays.append(array.astype(dtype))
    return arrays[0], arrays[1]


def problem(w: Any, g: Any, units: str = "... ->", **rule: Any) -> Problem:
    return Problem(AGC(**rule), {"p": w}, {"p": g}, {"p": Units(units)})


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Backend:
    made: Backend = PEERS[request.param]()
    return made


@pytest.mark.parametrize("layer", LAYERS)
def test_which_layers_are_clipped_as_in_equation_3(peer: Backend, layer: str) -> None:
    shape, units, right = LAYERS[layer]
    w, g = draw(shape)
    got = peer.clip(problem(w, g, units)).gradients["p"]
    want = clip_units(g, w, Units(units)).gradient
    assert np.allclose(got, want, rtol=1e-12) == (peer.name in right)
    assert not np.array_equal(want, g)


VECTORS = {
    "L1-layer-conv2d": {"timm": "passed", "pytorch_optimizer": "passed"},
    "L1-layer-conv1d": {"timm": "passed", "pytorch_optimizer": "failed"},
    "L1-layer-conv-transpose2d": {"timm": "failed", "pytorch_optimizer": "failed"},
    "L1-nan-gradient-propagate": {"timm": "passed", "pytorch_optimizer": "failed"},
    "L1-no-second-eps": {"timm": "failed", "pytorch_optimizer": "failed"},
    "L1-sparse-rows": {"timm": "error", "pytorch_optimizer": "error"},
}


@pytest.mark.parametrize("vector", VECTORS)
def test_the_suite_sees_what_a_peer_gets_wrong(peer: Backend, vector: str) -> None:
    (found,) = [one for one in load_vectors() if one.id == vector]
    assert run_case(peer, found, "float32")["status"] == VECTORS[vector][peer.name]


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_dtypes_go_through(peer: Backend, dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    w, g = (np.array([[1.0, 2.0], [0.5, 4.0]]).astype(kind) * kind.type(k) for k in (1, 0.5))
    got = peer.clip(problem(w, g)).gradients["p"]
    assert got.dtype == kind
    assert np.allclose(got.astype(complex), 0.01 * w.astype(complex), rtol=0.01)
    assert dtype in peer.dtypes


def test_a_parameter_without_a_gradient_is_left_alone(peer: Backend) -> None:
    w, g = draw((3, 2))
    both = Problem(AGC(), {"a": w, "b": w}, {"a": g, "b": None})
    gradients = peer.clip(both).gradients
    assert gradients["b"] is None
    assert gradients["a"].shape == (3, 2)


def test_what_was_handed_over_is_not_changed(peer: Backend) -> None:
    w, g = draw((3, 2))
    before = w.copy(), g.copy()
    peer.clip(problem(w, g))
    np.testing.assert_array_equal((w, g), before)


def test_a_sparse_gradient_reaches_the_peer_and_it_raises(peer: Backend) -> None:
    sparse = RowSparse(np.array([1, 3]), np.ones((2, 4)), (5, 4))
    with pytest.raises((RuntimeError, NotImplementedError)):
        peer.clip(problem(np.ones((5, 4)), sparse, "v d -> v"))


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
    peer: Backend, rule: dict[str, Any], option: str
) -> None:
    with pytest.raises(Unsupported, match=f"{peer.name} has no argument for {option}"):
        peer.clip(problem(*draw((3, 2)), **rule))


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


def test_peers_say_what_they_are(peer: Backend) -> None:
    assert peer.role == "subject"
    assert {peer.name, "torch"} <= set(peer.versions())
    with pytest.raises(Unavailable, match="CPU only"):
        type(peer)("cuda")
