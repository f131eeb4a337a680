"""Profiles against the code they reproduce, over the table of shapes on which implementations disagree.

``SHAPES`` are the weights of the layers as Flax stores them. optax is run as it is; the profile is run by
the reference. DeepMind's own files are not a package: their rule is optax's below rank 5.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from agc import AGC, Units
from agc.errors import UnitsError
from agc.plan import Parameter, make_plan
from agc.reference import adaptive_clip

SHAPES = {
    "scalar": (),
    "bias": (7,),
    "linear": (6, 5),
    "linear 1->5": (1, 5),
    "linear 6->1": (6, 1),
    "fused qkv": (8, 24),
    "embedding": (9, 4),
    "conv1d": (3, 4, 5),
    "conv2d": (3, 3, 4, 5),
    "conv2d 1->5 1x1": (1, 1, 1, 5),
    "conv2d 6->1 1x1": (1, 1, 6, 1),
    "conv2d grouped": (3, 3, 2, 6),
    "conv2d depthwise": (3, 3, 1, 5),
    "conv3d": (3, 3, 2, 4, 5),
    "conv3d 1->5 1x1": (1, 1, 1, 1, 5),
    "conv transpose 2d": (3, 3, 4, 5),
    "conv transpose 2d, transposed kernel": (3, 3, 5, 4),
    "attention query": (6, 2, 4),
    "attention output": (2, 4, 6),
    "attention bias": (2, 4),
    "stacked linear": (3, 6, 5),
    "stacked bias": (3, 5),
    "position embedding": (1, 7, 4),
    "class token": (1, 1, 6),
    "layer scale": (1, 1, 5),
}
BELOW_RANK_5 = [name for name, shape in SHAPES.items() if len(shape) < 5]


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
    layout: Any = "out-last",
    **changes: Any,
) -> Any:
    rule = AGC.profile(name, **changes)
    plan = make_plan([Parameter("p", w.shape, units, layout)], rule)
    return adaptive_clip({"p": w}, {"p": g}, plan, rule).gradients["p"]


@jax.jit
def _optax(w: Any, g: Any, clipping: float, eps: float) -> Any:
    clipped, _ = optax.adaptive_grad_clip(clipping, eps=eps).update(g, optax.EmptyState(), w)
    return clipped


def by_optax(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    with jax.enable_x64(True):
        return np.asarray(_optax(w, g, clipping, eps))


def assert_close(got: Any, want: Any) -> None:
    """Compare with the reference in units in the last place, up to the rounding of the package itself.

    In float64 the reference rounds as well.
    """
    spacing = np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    assert np.max(np.abs(got - want) / spacing) <= (16 if got.dtype == np.float64 else 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_profile_equals_optax(shape: str, dtype: Any) -> None:
    changed = set()
    for seed in range(6):
        w, g = draw(SHAPES[shape], seed, dtype)
        want = by_profile("optax", w, g)
        got = by_optax(w, g)
        assert got.dtype == dtype
        assert_close(got, want)
        changed |= set((want != g).ravel().tolist())
    assert True in changed, "nothing was clipped, so nothing was tested"


def test_zero_weights_and_zero_gradients_too() -> None:
    w, g = draw((6, 5), 0, np.float64)
    w[:, 1], g[:, 2], w[:, 3], g[:, 3] = 0, 0, 0, 0
    assert_close(by_optax(w, g), by_profile("optax", w, g))


@pytest.mark.parametrize("norm", [2e-8, 3e-7, 9e-7, 1.1e-6], ids="{:g}".format)
def test_the_second_epsilon_where_it_can_be_reached(norm: float) -> None:
    # clipping * eps = 1e-8 is below the 1e-6 in the division: these units shrink by too much.
    w, g = np.zeros((4, 1)), np.full((4, 1), norm / 2)
    want = by_profile("optax", w, g, clipping=1e-3, eps=1e-5)
    assert_close(by_optax(w, g, clipping=1e-3, eps=1e-5), want)
    assert np.linalg.norm(want) / 1e-8 == pytest.approx(min(1.0, norm / 1e-6))


def test_at_such_a_limit_optax_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros(1), np.full(1, 1e-3 * 1e-5)
    assert_close(by_optax(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    np.testing.assert_array_equal(by_profile("optax", w, g, clipping=1e-3, eps=1e-5), g)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 3, 2), (1, 1, 1, 1, 2, 3)], ids=str)
def test_rank_6_is_an_error_in_both(shape: tuple[int, ...]) -> None:
    w, g = draw(shape, 0, np.float64)
    with pytest.raises(ValueError, match="axis parameter"):
        by_optax(w, g)
    with pytest.raises(UnitsError, match=r"parameter 'p': the unit rule 'optax' is not defined"):
        by_profile("optax", w, g)


@pytest.mark.parametrize("shape", BELOW_RANK_5)
def test_the_deepmind_profile_equals_optax_below_rank_5(shape: str) -> None:
    w, g = draw(SHAPES[shape], 1, np.float64)
    assert_close(by_optax(w, g), by_profile("deepmind", w, g, exclude=[]))


def test_the_deepmind_profile_raises_for_rank_5_as_that_code_does() -> None:
    w, g = draw(SHAPES["conv3d"], 1, np.float64)
    with pytest.raises(UnitsError, match=r"parameter 'p': the unit rule 'deepmind' is not defined"):
        by_profile("deepmind", w, g, exclude=[])


PLAIN = {
    "linear": ((6, 5), (1, 0)),
    "linear 1->5": ((1, 5), (1, 0)),
    "linear 6->1": ((6, 1), (1, 0)),
    "conv1d": ((3, 4, 5), (2, 1, 0)),
    "conv2d": ((3, 2, 4, 5), (3, 2, 0, 1)),
    "conv2d 1->5 1x1": ((1, 1, 1, 5), (3, 2, 0, 1)),
    "conv3d": ((3, 2, 2, 4, 5), (4, 3, 0, 1, 2)),
}


@pytest.mark.parametrize("layer", PLAIN)
def test_a_run_moves_to_a_stack_that_stores_the_output_first(layer: str) -> None:
    shape, to_out_first = PLAIN[layer]
    w, g = draw(shape, 1, np.float64)
    g *= 10
    want = by_profile(
        "optax",
        w.transpose(to_out_first),
        g.transpose(to_out_first),
        units=Units("o i ... -> o"),
        layout="out-first",
    )
    assert_close(by_optax(w, g).transpose(to_out_first), want)
    assert not np.array_equal(want, g.transpose(to_out_first))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dreamerv3_profile_is_its_formula_over_the_whole_tensor(shape: str) -> None:
    for seed in range(3):
        w, g = draw(SHAPES[shape], seed, np.float64)
        g = 30 * g
        formula = g / max(1, np.linalg.norm(g) / (0.3 * max(1e-3, np.linalg.norm(w))))
        assert_close(np.asarray(formula), by_profile("dreamerv3", w, g))
