"""TensorFlow on the CPU: ours and a plain port of the JAX formulation, as a graph and under XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from benchmarks.common import Measure, bound, draw
from benchmarks.shapes import declared, out_last, shapes_of

CONTESTANTS = ("ours", "naive", "ours xla", "naive xla", "bound", "new arrays")


def naive(gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Clip as public TensorFlow ports do.

    The axes follow from the rank; tensors are clipped one by one, and all of them are rewritten.
    """

    def norm(x: Any) -> Any:
        axes = {2: 0, 3: 0, 4: (0, 1, 2)}.get(len(x.shape))
        return tf.reduce_sum(x**2, axis=axes, keepdims=True) ** 0.5

    clipped = []
    for gradient, variable in zip(gradients, variables, strict=True):
        limit = 0.01 * tf.maximum(norm(variable), 1e-3)
        size = norm(gradient)
        scaled = gradient * (limit / tf.maximum(size, 1e-6))
        clipped.append(tf.where(size < limit, gradient, scaled))
    return clipped


def new_arrays(gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Do the least that a framework must which cannot write in place: read both, write all.

    Compiled by XLA, one fused operation a tensor.
    """
    return [g + np.float32(0.5) * v for g, v in zip(gradients, variables, strict=True)]


class Tensors:
    """A model's variables and gradients, and the contestants' compiled functions."""

    def __init__(self, model: str, condition: str) -> None:
        self.variables: list[Any] = []
        self.gradients: list[Any] = []
        for seed, (name, shape) in enumerate(shapes_of(model).items()):
            weight, gradient = draw(out_last(name, shape), condition, seed)
            self.variables.append(tf.Variable(weight, name=name.replace(".", "/")))
            self.gradients.append(tf.constant(gradient))
        rule = AGC(clipping=0.01, units=declared(shapes_of(model), "... i o -> o"))
        plain: dict[str, Callable[[Any], Any]] = {
            "ours": lambda g: agc_tensorflow.adaptive_clip_gradients(g, self.variables, rule),
            "naive": lambda g: naive(g, self.variables),
        }
        self.functions: dict[str, Callable[[Any], Any]] = {
            name + suffix: tf.function(function, jit_compile=xla, autograph=False)
            for name, function in plain.items()
            for suffix, xla in (("", False), (" xla", True))
        }
        self.functions["new arrays"] = tf.function(
            lambda g: new_arrays(g, self.variables), jit_compile=True, autograph=False
        )

    def run(self, contestant: str) -> Any:
        clipped = self.functions[contestant](self.gradients)
        clipped[-1].numpy()  # waits: the CPU device runs a function to its end
        return clipped


@pytest.fixture(scope="module")
def tensors(model: str, condition: str) -> Tensors:
    return Tensors(model, condition)


def test_speed(
    measure: Measure, tensors: Tensors, model: str, condition: str, turn: int, contestant: str
) -> None:
    case = {"framework": "tensorflow", "model": model, "condition": condition}
    run: Callable[[], Any]
    if contestant == "bound":
        variables, gradients = (
            [array.numpy() for array in arrays] for arrays in (tensors.variables, tensors.gradients)
        )
        run = bound(variables, gradients, condition)
    else:
        run = lambda: tensors.run(contestant)  # noqa: E731
    measure(run, **case, turn=turn, contestant=contestant)


def test_contestants_do_the_same_work(tensors: Tensors, condition: str) -> None:
    results = [tensors.run(name) for name in ("ours", "ours xla", "naive", "naive xla")]
    inputs = tensors.variables, tensors.gradients
    for variable, gradient, mine, *others in zip(*inputs, *results, strict=True):
        changed = mine.numpy() != gradient.numpy()
        assert changed.all() if condition == "all" else not changed.any()
        if "embedding" in variable.name:  # whose units are columns in the port
            del others[1:]
        for other in others:
            np.testing.assert_allclose(mine, other, rtol=1e-5)
