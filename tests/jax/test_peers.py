"""optax as a subject: it runs on problems, and the layers it gets wrong show up as wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from agc import AGC, SAM, Units
from agc.reference import RowSparse, clip_units
from agc_conformance.backend import (
    Examples,
    Optimizer,
    Problem,
    SharpnessProblem,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.peers.optax import OptaxPeer
from agc_conformance.runner import run_case
from agc_conformance.vectors import load_vectors

# Layer: shape, units, and whether optax clips it as Eq. 3 says.
TABLE = {
    "linear": ((6, 5), "i o -> o", True),
    "linear 1->5": ((1, 5), "i o -> o", False),
    "conv1d": ((3, 4, 5), "k i o -> o", False),
    "conv2d": ((3, 3, 4, 5), "h w i o -> o", True),
    "conv2d 1->5 1x1": ((1, 1, 1, 5), "h w i o -> o", False),
    "conv2d depthwise": ((3, 3, 1, 5), "h w i o -> o", True),
    "conv3d": ((2, 3, 3, 4, 5), "... i o -> o", True),
    "conv transpose 2d": ((3, 3, 4, 5), "h w i o -> o", True),
    "conv transpose 2d, transposed kernel": ((3, 3, 5, 4), "h w o i -> o", False),
    "attention query": ((6, 2, 4), "i h d -> h d", True),
    "attention output": ((2, 4, 6), "h d o -> o", False),
    "attention bias": ((2, 4), "h d ->", False),
    "embedding": ((9, 4), "v d -> v", False),
    "stacked linear": ((3, 6, 5), "l i o -> l o", False),
    "stacked bias": ((3, 5), "l o -> l", False),
    "bias": ((7,), "o ->", True),
    "class token": ((1, 1, 6), "a b d ->", True),
    "layer scale": ((1, 1, 5), "a b c ->", True),
}


def draw(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Weights and gradients with another scale at every index of every axis."""
    random = np.random.RandomState(0)
    arrays = []
    for _ in range(2):
        array = random.standard_normal(shape)
        for axis, size in enumerate(shape):
            scales = np.exp(1.5 * random.standard_normal(size))
            array = array * scales.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        arrays.append(array)
    return arrays[0], arrays[1]


def problem(w: Any, g: Any, units: str = "... ->", **rule: Any) -> Problem:
    return Problem(AGC(**rule), {"p": w}, {"p": g}, {"p": Units(units)})


@pytest.mark.parametrize("layer", TABLE)
def test_which_layers_are_clipped_as_in_equation_3(layer: str) -> None:
    shape, units, right = TABLE[layer]
    w, g = draw(shape)
    got = OptaxPeer().clip(problem(w, g, units)).gradients["p"]
    want = clip_units(g, w, Units(units)).gradient
    assert np.allclose(got, want, rtol=1e-12) == right
    assert not np.array_equal(want, g)


VECTORS = {
    "L1-layer-conv2d": "passed",
    "L1-layer-dense-1-to-5": "failed",
    "L1-layer-conv1d": "failed",
    "L1-layer-conv-transpose2d": "passed",
    "L1-nan-gradient-propagate": "passed",
    "L1-no-second-eps": "failed",
    "L1-sparse-rows": "unsupported",
}


@pytest.mark.parametrize("vector", VECTORS)
def test_the_suite_sees_what_optax_gets_wrong(vector: str) -> None:
    (found,) = [one for one in load_vectors() if one.id == vector]
    assert run_case(OptaxPeer(), found, "float32")["status"] == VECTORS[vector]


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_dtypes_go_through(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    w, g = (np.array([[1.0, 2.0], [0.5, 4.0]]).T.astype(kind) * kind.type(k) for k in (1, 0.5))
    got = OptaxPeer().clip(problem(w, g)).gradients["p"]
    assert got.dtype == kind
    assert np.allclose(got.astype(complex), 0.01 * w.astype(complex), rtol=0.01)
    assert dtype in OptaxPeer.dtypes


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    w, g = draw((3, 2))
    gradients = OptaxPeer().clip(Problem(AGC(), {"a": w, "b": w}, {"a": g, "b": None})).gradients
    assert gradients["b"] is None
    assert gradients["a"].shape == (3, 2)


def test_jax_has_no_sparse_gradient_to_hand_over() -> None:
    sparse = RowSparse(np.array([1, 3]), np.ones((2, 4)), (5, 4))
    with pytest.raises(Unsupported, match="row-sparse"):
        OptaxPeer().clip(problem(np.ones((5, 4)), sparse, "v d -> v"))


def test_an_option_that_optax_lacks_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="optax has no argument for nonfinite='zero'"):
        OptaxPeer().clip(problem(*draw((3, 2)), nonfinite="zero"))


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


# Vector of SAM: what optax.contrib.sam makes of it. Misses are why the clauses are there.
SHARPNESS = {
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


@pytest.mark.parametrize("clause", SHARPNESS)
def test_which_clauses_of_sam_optax_meets(clause: str) -> None:
    vectors = {vector.id: vector for vector in load_vectors() if vector.clause == clause}
    found = {}
    for case in SHARPNESS[clause]:
        name, _, dtype = case.partition(":")
        found[case] = run_case(OptaxPeer(), vectors[name], dtype)["status"]
    assert found == SHARPNESS[clause]


def sharp(**rule: Any) -> SharpnessProblem:
    """Weights 3 and 4, both attracted by 0: the ascent gradient is (3, 4), of norm 5."""
    examples = Examples({"p": np.ones((2, 2))}, {"p": np.zeros((2, 2))})
    return SharpnessProblem(SAM(**rule), {"p": np.array([3.0, 4.0])}, examples)


def test_optax_takes_its_gradient_at_the_perturbed_weights() -> None:
    outcome = OptaxPeer().sharpen(sharp(rho=0.5))
    np.testing.assert_allclose(outcome.gradients["p"], [3.3, 4.4], rtol=1e-12)
    np.testing.assert_array_equal(outcome.weights["p"], [3, 4])
    assert outcome.loss is None


def test_optax_goes_on_from_a_checkpoint() -> None:
    problem, sgd = sharp(rho=0.5), Optimizer(lr=0.1, momentum=0.5)
    batches = [problem.examples] * 4
    straight = OptaxPeer().sharpness_trajectory(problem, sgd, batches)
    resumed = OptaxPeer().sharpness_trajectory(problem, sgd, batches, restart=2)
    np.testing.assert_array_equal([w["p"] for w in straight], [w["p"] for w in resumed])
    first = 3 - 0.1 * 3.3
    np.testing.assert_allclose(straight[0]["p"], [first, first * 4 / 3], rtol=1e-12)
    with pytest.raises(Unsupported, match="decoupled"):
        OptaxPeer().sharpness_trajectory(problem, Optimizer(lr=1, decoupled=True), batches)


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ({"adaptive": True}, "adaptive"),
        ({"eps": 1e-12}, "eps=1e-12"),
        ({"fraction": 0.2}, "fraction=0.2"),
    ],
)
def test_an_option_of_sam_that_optax_lacks_is_unsupported(
    rule: dict[str, Any], option: str
) -> None:
    with pytest.raises(Unsupported, match=f"optax has no argument for {option}"):
        OptaxPeer().sharpen(sharp(**rule))


def test_optax_says_what_it_is() -> None:
    peer = OptaxPeer()
    assert peer.role == "subject"
    assert {"optax", "jax"} <= set(peer.versions())
    with pytest.raises(Unavailable, match="CPU only"):
        OptaxPeer("cuda")
