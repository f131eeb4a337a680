"""Profiles against the packages they reproduce, over the table of shapes on which those packages disagree.

``SHAPES`` are the weights of the layers as PyTorch stores them. The published code is run as it is; the
profile is run by the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer.optimizer.agc import agc as kozistr_agc

from agc import AGC, Units
from agc.plan import Parameter, make_plan
from agc.reference import adaptive_clip
from agc_conformance.backends.peers import timm as timm_peer

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


def draw(shape: tuple[int, ...], seed: int, dtype: Any) -> tuple[Any, Any]:
    """Weights and gradients with another scale at every index of every axis."""
    random = np.random.RandomState(seed)

    def scaled(spread: float) -> Any:
        array = random.standard_normal(shape)
        for axis, size in enumerate(shape):
            scales = np.exp(spread * random.standard_normal(size))
            array = array * scales.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        return np.asarray(array)

    return scaled(1.0).astype(dtype), (0.03 * scaled(1.0)).astype(dtype)


def by_profile(
    name: str,
    w: Any,
    g: Any,
    *,
    units: Units | None = None,
    layout: Any = "out-first",
    **changes: Any,
) -> Any:
    rule = AGC.profile(name, **changes)
    plan = make_plan([Parameter("p", w.shape, units, layout)], rule)
    return adaptive_clip({"p": w}, {"p": g}, plan, rule).gradients["p"]


def by_timm(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    parameter = torch.nn.Parameter(torch.tensor(w))
    parameter.grad = torch.tensor(g)
    timm_peer.load().adaptive_clip_grad(parameter, clip_factor=clipping, eps=eps)
    return parameter.grad.numpy()


def by_pytorch_optimizer(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    return kozistr_agc(torch.tensor(w), torch.tensor(g), agc_eps=eps, agc_clip_val=clipping).numpy()


PACKAGES = {"timm": by_timm, "pytorch_optimizer": by_pytorch_optimizer}


def assert_close(got: Any, want: Any) -> None:
    """Compare with the reference in units in the last place, up to the rounding of the package itself.

    In float64 the reference rounds as well.
    """
    spacing = np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    assert np.max(np.abs(got - want) / spacing) <= (16 if got.dtype == np.float64 else 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("package", PACKAGES)
def test_the_profile_equals_the_package(package: str, shape: str, dtype: Any) -> None:
    changed = set()
    for seed in range(6):
        w, g = draw(SHAPES[shape], seed, dtype)
        want = by_profile(package, w, g)
        assert_close(PACKAGES[package](w, g), want)
        changed |= set((want != g).ravel().tolist())
    assert True in changed, "nothing was clipped, so nothing was tested"


@pytest.mark.parametrize("package", PACKAGES)
def test_zero_weights_and_zero_gradients_too(package: str) -> None:
    w, g = draw((5, 6), 0, np.float64)
    w[1], g[2], w[3], g[3] = 0, 0, 0, 0
    assert_close(PACKAGES[package](w, g), by_profile(package, w, g))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("norm", [2e-8, 3e-7, 9e-7, 1.1e-6], ids="{:g}".format)
def test_the_second_epsilon_where_it_can_be_reached(package: str, norm: float) -> None:
    # clipping * eps = 1e-8 is below the 1e-6 in the division: these units shrink by too much.
    w, g = np.zeros((1, 4)), np.full((1, 4), norm / 2)
    got = PACKAGES[package](w, g, clipping=1e-3, eps=1e-5)
    want = by_profile(package, w, g, clipping=1e-3, eps=1e-5)
    assert_close(got, want)
    shrunk = np.linalg.norm(want) / 1e-8
    assert shrunk == pytest.approx(min(1.0, norm / 1e-6))


def test_below_such_a_limit_pytorch_optimizer_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros((1, 4)), np.full((1, 4), 2e-9)
    assert_close(by_pytorch_optimizer(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    assert_close(by_timm(w, g, clipping=1e-3, eps=1e-5), g)
    for package in PACKAGES:
        np.testing.assert_array_equal(by_profile(package, w, g, clipping=1e-3, eps=1e-5), g)


def test_at_such_a_limit_timm_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros(1), np.full(1, 1e-3 * 1e-5)
    assert_close(by_timm(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    np.testing.assert_array_equal(by_profile("timm", w, g, clipping=1e-3, eps=1e-5), g)


PLAIN = {
    "linear": ((5, 6), (1, 0)),
    "linear 1->5": ((5, 1), (1, 0)),
    "linear 6->1": ((1, 6), (1, 0)),
    "conv1d": ((5, 4, 3), (2, 1, 0)),
    "conv2d": ((5, 4, 3, 2), (2, 3, 1, 0)),
    "conv3d": ((5, 4, 3, 2, 2), (2, 3, 4, 1, 0)),
}


@pytest.mark.parametrize("layer", PLAIN)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_moves_to_a_stack_that_stores_the_output_last(package: str, layer: str) -> None:
    shape, to_out_last = PLAIN[layer]
    w, g = draw(shape, 1, np.float64)
    want = by_profile(
        package,
        w.transpose(to_out_last),
        g.transpose(to_out_last),
        units=Units("... i o -> o"),
        layout="out-last",
    )
    assert_close(PACKAGES[package](w, g).transpose(to_out_last), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_composer_profile_has_no_epsilon(shape: str) -> None:
    for seed in range(3):
        w, g = draw(SHAPES[shape], seed, np.float64)
        if w.ndim > 1:
            w[0] = 0
        axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
        w_norm, g_norm = (np.sqrt(np.sum(a * a, axes, keepdims=True)) for a in (w, g))
        formula = g * np.minimum(0.01 * w_norm / g_norm, 1)
        assert_close(formula.reshape(g.shape), by_profile("composer", w, g))
