"""Profiles against optax, over the table of shapes on which implementations disagree.

DeepMind's own files are not a package: their rule is optax's below rank 5.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pytest

from agc.errors import UnitsError
from tests.contract.peers import ProfilesContract, assert_close
from tests.helpers import draw

# The weights of the layers as Flax stores them.
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


@jax.jit
def _optax(w: Any, g: Any, clipping: float, eps: float) -> Any:
    clipped, _ = optax.adaptive_grad_clip(clipping, eps=eps).update(g, optax.EmptyState(), w)
    return clipped


def by_optax(w: Any, g: Any, clipping: float = 0.01, eps: float = 1e-3) -> Any:
    with jax.enable_x64(True):
        return np.asarray(_optax(w, g, clipping, eps))


class TestProfiles(ProfilesContract):
    packages: ClassVar = {"optax": by_optax}
    shapes = SHAPES
    layout = "out-last"
    other = "out-first"
    plain: ClassVar = {
        "linear": ((6, 5), (1, 0)),
        "linear 1->5": ((1, 5), (1, 0)),
        "linear 6->1": ((6, 1), (1, 0)),
        "conv1d": ((3, 4, 5), (2, 1, 0)),
        "conv2d": ((3, 2, 4, 5), (3, 2, 0, 1)),
        "conv2d 1->5 1x1": ((1, 1, 1, 5), (3, 2, 0, 1)),
        "conv3d": ((3, 2, 2, 4, 5), (4, 3, 0, 1, 2)),
    }


by_profile = TestProfiles().profile


def test_at_such_a_limit_optax_shrinks_what_the_profile_leaves_alone() -> None:
    w, g = np.zeros(1), np.full(1, 1e-3 * 1e-5)
    assert_close(by_optax(w, g, clipping=1e-3, eps=1e-5), 0.01 * g)
    np.testing.assert_array_equal(by_profile("optax", w, g, clipping=1e-3, eps=1e-5), g)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 3, 2), (1, 1, 1, 1, 2, 3)], ids=str)
def test_rank_6_is_an_error_in_both(shape: tuple[int, ...]) -> None:
    w, g = draw(shape, 0, small=True)
    with pytest.raises(ValueError, match="axis parameter"):
        by_optax(w, g)
    with pytest.raises(UnitsError, match=r"parameter 'p': the unit rule 'optax' is not defined"):
        by_profile("optax", w, g)


@pytest.mark.parametrize("shape", BELOW_RANK_5)
def test_the_deepmind_profile_equals_optax_below_rank_5(shape: str) -> None:
    w, g = draw(SHAPES[shape], 1, small=True)
    assert_close(by_optax(w, g), by_profile("deepmind", w, g, exclude=[]))


def test_the_deepmind_profile_raises_for_rank_5_as_that_code_does() -> None:
    w, g = draw(SHAPES["conv3d"], 1, small=True)
    with pytest.raises(UnitsError, match=r"parameter 'p': the unit rule 'deepmind' is not defined"):
        by_profile("deepmind", w, g, exclude=[])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dreamerv3_profile_is_its_formula_over_the_whole_tensor(shape: str) -> None:
    for seed in range(3):
        w, g = draw(SHAPES[shape], seed, small=True)
        g = 30 * g
        formula = g / max(1, np.linalg.norm(g) / (0.3 * max(1e-3, np.linalg.norm(w))))
        assert_close(np.asarray(formula), by_profile("dreamerv3", w, g))
