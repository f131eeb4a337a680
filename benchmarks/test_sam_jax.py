"""Cost of SAM in JAX: a jitted training step of a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from agc import SAM
from agc_jax.sam import sam_value_and_grad
from benchmarks.common import SAM_CONTESTANTS, SAM_PASSES, SAM_ROUNDS, Measure, sam_batch

CONTESTANTS = SAM_CONTESTANTS + SAM_PASSES


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, padding=1, rngs=rngs)
        self.conv3 = nnx.Conv(64, 128, (3, 3), strides=2, padding=1, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.head(x.mean((1, 2)))


class Training:
    """The network's parameters, its optimizer and one batch."""

    def __init__(self) -> None:
        self.graph, self.params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
        images, labels = sam_batch()
        self.batch = (jnp.asarray(images), jnp.asarray(labels))
        self.tx = optax.sgd(0.01, 0.9)
        self.state = self.tx.init(self.params)
        self.steps: dict[str, Callable[..., Any]] = {}

    def loss(self, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(self.graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def two_passes(self, ascent: int) -> Callable[..., Any]:
        """Return the least that makes the second pass depend on one of so many examples."""
        function = jax.value_and_grad(self.loss)

        def passes(params: Any, images: jax.Array, labels: jax.Array) -> Any:
            _, gradients = function(params, images[:ascent], labels[:ascent])
            moved = jax.tree.map(lambda w, g: w + 0.05 * g, params, gradients)
            return function(moved, images, labels)

        return passes

    def contestant(self, name: str) -> Callable[[], Any]:
        if name not in self.steps:
            function = jax.value_and_grad(self.loss)
            fraction = 0.2 if name.endswith("fraction") else 1.0
            if name in SAM_PASSES:
                function = self.two_passes(round(fraction * len(self.batch[0])))
            elif name != "plain":
                rule = SAM(fraction=fraction)
                function = sam_value_and_grad(self.loss, rule, batch_argnums=(1, 2))

            @jax.jit
            def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
                _, gradients = function(params, images, labels)
                updates, state = self.tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            self.steps[name] = step
        step = self.steps[name]
        return lambda: jax.block_until_ready(step(self.params, self.state, *self.batch))


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


def test_cost(measure: Measure, training: Training, turn: int, contestant: str) -> None:
    case = {"framework": "jax", "model": "convnet", "condition": "step"}
    measure(
        training.contestant(contestant), **case, rounds=SAM_ROUNDS, turn=turn, contestant=contestant
    )


def test_peak_memory(benchmark: Any) -> None:
    """Temporary memory that SAM adds to a compiled step, in copies of the parameters.

    The parameters are large beside everything else.
    """
    width = 1024
    params = {name: jnp.ones((width, width)) for name in "abcd"}
    x = jnp.ones((8, width))
    tx = optax.sgd(0.1, 0.9)
    state = tx.init(params)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for weight in params.values():
            x = jnp.tanh(x @ weight)
        return x.sum()

    def compiled(value_and_grad: Callable[..., Any]) -> Any:
        def step(params: Any, state: Any, x: jax.Array) -> Any:
            _, gradients = value_and_grad(params, x)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()

    plain, sam = compiled(jax.value_and_grad(loss)), compiled(sam_value_and_grad(loss, SAM()))
    benchmark.group = "jax sam peak memory"
    benchmark.pedantic(lambda: None, rounds=1)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (plain, sam)]
    assert sizes[1] > 0
    benchmark.extra_info.update(
        framework="jax", model="matrices", condition="step", contestant="sam"
    )
    benchmark.extra_info["peak_memory"] = (sizes[1] - sizes[0]) / (4 * 4 * width**2)
