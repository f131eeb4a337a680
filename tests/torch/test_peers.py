"""The PyTorch peers as subjects: they run on problems, and the layers they get wrong show up as wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from agc import AGC, SAM, Schedule, Units
from agc.reference import RowSparse, clip_units
from agc_conformance.backend import (
    Backend,
    Examples,
    Optimizer,
    Problem,
    SharpnessProblem,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.peers.pytorch_optimizer import PytorchOptimizerPeer
from agc_conformance.backends.peers.timm import TimmPeer
from agc_conformance.runner import run_case
from agc_conformance.vectors import load_vectors

PEERS = {"timm": TimmPeer, "pytorch_optimizer": PytorchOptimizerPeer}

# Layer: shape, units, and who clips it as Eq. 3 says.
TABLE = {
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


@pytest.mark.parametrize("layer", TABLE)
def test_which_layers_are_clipped_as_in_equation_3(peer: Backend, layer: str) -> None:
    shape, units, right = TABLE[layer]
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
    with pytest.raises(RuntimeError, match="norm_sparse"):  # what PyTorch itself says
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


# Vector of SAM: what pytorch_optimizer, with davda54's formula, makes of it. Misses are why the clauses are there.
SHARPNESS = {
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
    "SAM-11": {"L1-sam-every-step-1:float32": "unsupported", "L1-sam-only:float32": "unsupported"},
    "SAM-12": {"L1-sam-loss:float32": "unsupported"},  # its step returns nothing
    "SAM-13": {"L3-sam-restart-agc:float32": "passed"},
}


@pytest.mark.parametrize("clause", SHARPNESS)
def test_which_clauses_of_sam_pytorch_optimizer_meets(clause: str) -> None:
    vectors = {vector.id: vector for vector in load_vectors() if vector.clause == clause}
    found = {}
    for case in SHARPNESS[clause]:
        name, _, dtype = case.partition(":")
        found[case] = run_case(PytorchOptimizerPeer(), vectors[name], dtype)["status"]
    assert found == SHARPNESS[clause]


def sharp(**rule: Any) -> SharpnessProblem:
    """Weights 3 and 4, both attracted by 0: the ascent gradient is (3, 4), of norm 5."""
    examples = Examples({"p": np.ones((2, 2))}, {"p": np.zeros((2, 2))})
    return SharpnessProblem(SAM(**rule), {"p": np.array([3.0, 4.0])}, examples)


def test_pytorch_optimizer_takes_its_gradient_at_the_perturbed_weights() -> None:
    outcome = PytorchOptimizerPeer().sharpen(sharp(rho=0.5))
    np.testing.assert_allclose(outcome.gradients["p"], [3.3, 4.4], rtol=1e-7)
    np.testing.assert_array_equal(outcome.weights["p"], [3, 4])
    assert outcome.loss is None


def test_pytorch_optimizer_goes_on_from_a_checkpoint() -> None:
    problem, sgd = sharp(rho=0.5), Optimizer(lr=0.1, momentum=0.5)
    batches = [problem.examples] * 4
    peer = PytorchOptimizerPeer()
    straight = peer.sharpness_trajectory(problem, sgd, batches)
    resumed = peer.sharpness_trajectory(problem, sgd, batches, restart=2)
    np.testing.assert_array_equal([w["p"] for w in straight], [w["p"] for w in resumed])
    first = 3 - 0.1 * 3.3
    np.testing.assert_allclose(straight[0]["p"], [first, first * 4 / 3], rtol=1e-7)
    with pytest.raises(Unsupported, match="decoupled"):
        peer.sharpness_trajectory(problem, Optimizer(lr=1, decoupled=True), batches)


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ({"rho": Schedule([(0, 0.1)])}, "rho that is not one number"),
        ({"fraction": 0.2}, "fraction=0.2"),
        ({"microbatches": 2}, "microbatches=2"),
        ({"every": 2}, "every=2"),
        ({"only": ["p"]}, "only and exclude"),
        ({"nonfinite": "raise"}, "nonfinite='raise'"),
    ],
)
def test_an_option_of_sam_that_pytorch_optimizer_lacks_is_unsupported(
    rule: dict[str, Any], option: str
) -> None:
    with pytest.raises(Unsupported, match=f"pytorch_optimizer has no argument for {option}"):
        PytorchOptimizerPeer().sharpen(sharp(**rule))


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


def test_peers_say_what_they_are(peer: Backend) -> None:
    assert peer.role == "subject"
    assert {peer.name, "torch"} <= set(peer.versions())
    with pytest.raises(Unavailable, match="CPU only"):
        type(peer)("cuda")
