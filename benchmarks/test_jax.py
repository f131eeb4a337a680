"""JAX on the CPU: ours and ``optax.adaptive_grad_clip``, both jitted with donated gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import agc_jax
from agc import AGC
from benchmarks.common import Measure, bound, draw, flax_tree
from benchmarks.shapes import declared, out_last, shapes_of

CONTESTANTS = ("ours", "optax", "bound")


class Tensors:
    """A model's parameters as a Flax tree, and the gradients of every round."""

    def __init__(self, model: str, condition: str) -> None:
        drawn = {
            name: [jax.numpy.asarray(a) for a in draw(out_last(name, shape), condition, seed)]
            for seed, (name, shape) in enumerate(shapes_of(model).items())
        }
        self.parameters = flax_tree({name: weight for name, (weight, _) in drawn.items()})
        self.gradients = flax_tree({name: gradient for name, (_, gradient) in drawn.items()})
        self.steps: dict[str, tuple[Any, Any]] = {}
        for contestant, clip in {
            "ours": agc_jax.adaptive_grad_clip(
                AGC(clipping=0.01, units=declared(shapes_of(model), "... i o -> o", "kernel")),
                units=agc_jax.units(self.parameters),
            ),
            "optax": optax.adaptive_grad_clip(0.01),
        }.items():
            step = jax.jit(clip.update, donate_argnums=0)
            self.steps[contestant] = step, clip.init(self.parameters)

    def fresh(self) -> Any:
        """Return a copy of the gradients, which may be donated."""
        return jax.block_until_ready(jax.tree.map(lambda g: g.copy(), self.gradients))

    def run(self, contestant: str, gradients: Any) -> Any:
        step, state = self.steps[contestant]
        return jax.block_until_ready(step(gradients, state, self.parameters))


@pytest.fixture(scope="module")
def tensors(model: str, condition: str) -> Tensors:
    return Tensors(model, condition)


def test_speed(
    measure: Measure, tensors: Tensors, model: str, condition: str, turn: int, contestant: str
) -> None:
    case = {"framework": "jax", "model": model, "condition": condition, "contestant": contestant}
    run: Callable[..., Any]
    if contestant == "bound":
        arrays = map(jax.tree.leaves, (tensors.parameters, tensors.gradients))
        run, setup = bound(*arrays, condition), None
    else:
        run, setup = tensors.run, lambda: ((contestant, tensors.fresh()), {})
    measure(run, setup, **case, turn=turn)


def test_contestants_do_the_same_work(tensors: Tensors, condition: str) -> None:
    ours, _ = tensors.run("ours", tensors.fresh())
    theirs, _ = tensors.run("optax", tensors.fresh())
    gradients = dict(jax.tree_util.tree_leaves_with_path(tensors.gradients))
    compared = 0
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        changed = np.asarray(mine != gradients[path])
        assert changed.all() if condition == "all" else not changed.any()
        if "embedding" not in str(path):  # optax's units of an embedding are its columns
            np.testing.assert_allclose(mine, other, rtol=1e-5)
            compared += 1
    assert compared == sum("embedding" not in str(path) for path in gradients)
