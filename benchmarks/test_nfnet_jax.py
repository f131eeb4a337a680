"""NFNet-F0 in JAX: ours in Flax, and plain functions after DeepMind's program; both jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agc_jax
from agc.nfnet import seeded_parameters
from benchmarks.common import Measure, nfnet_batch
from benchmarks.plain_nfnet import forward as plain_forward

CONTESTANTS = ("ours", "plain functions")
CONDITIONS = ("forward", "step")
TURNS = 6
Program = tuple[Callable[..., Any], tuple[Any, ...]]


class Models:
    """Both models with the same parameters and batch; dropout and stochastic depth off."""

    def __init__(self) -> None:
        images, labels = nfnet_batch()
        self.batch = jnp.asarray(images), jnp.asarray(labels)
        neutral = seeded_parameters("F0")
        model = agc_jax.nfnet("F0", dropout=0.0, stochastic_depth=0.0, rngs=nnx.Rngs(0))
        agc_jax.from_neutral(model, neutral)
        model.eval()
        self.graph, params, rest = nnx.split(model, nnx.Param, ...)
        self.plain = {name: jnp.asarray(array, jnp.float32) for name, array in neutral.items()}

        def ours(params: Any, images: jax.Array) -> jax.Array:
            return nnx.merge(self.graph, params, rest)(images)

        clip = optax.masked(
            optax.adaptive_grad_clip(0.01), {n: n != "head.weight" for n in neutral}
        )
        decay = optax.add_decayed_weights(2e-5, {name: neutral[name].ndim > 1 for name in neutral})
        peer = optax.chain(clip, decay, optax.sgd(1e-3, 0.9, nesterov=True))
        mine = agc_jax.sgd_nfnet(model, 1e-3)
        self.programs: dict[tuple[str, str], Program] = {
            ("ours", "forward"): (jax.jit(ours), (params, self.batch[0])),
            ("plain functions", "forward"): (jax.jit(plain_forward), (self.plain, self.batch[0])),
            ("ours", "step"): (_step(ours, mine), (params, mine.init(params), *self.batch)),
            ("plain functions", "step"): (
                _step(plain_forward, peer),
                (self.plain, peer.init(self.plain), *self.batch),
            ),
        }

    def contestant(self, name: str, condition: str) -> Callable[[], Any]:
        program, arguments = self.programs[name, condition]
        return lambda: jax.block_until_ready(program(*arguments))


def _step(model: Callable[..., jax.Array], tx: optax.GradientTransformation) -> Any:
    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 1000), 0.1)
        return optax.softmax_cross_entropy(model(params, images), targets).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        gradients = jax.grad(loss)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def test_speed(
    measure: Measure, models: Models, condition: str, turn: int, contestant: str
) -> None:
    run = models.contestant(contestant, condition)
    case = {"framework": "jax", "model": "F0", "condition": condition}
    rounds = 5 if condition == "forward" else 2
    measure(run, rounds=rounds, **case, turn=turn, contestant=contestant)


def test_contestants_do_the_same_work(models: Models) -> None:
    ours, plain = (models.contestant(name, "forward")() for name in CONTESTANTS)
    np.testing.assert_allclose(ours, plain, atol=2e-5 * float(np.abs(plain).max()))


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_peak_memory(benchmark: Any, models: Models, contestant: str) -> None:
    """Temporary memory of the compiled step, in copies of the parameters."""
    program, arguments = models.programs[contestant, "step"]
    benchmark.group = "jax F0 peak memory"
    benchmark.pedantic(models.contestant(contestant, "step"), rounds=1)
    memory = program.lower(*arguments).compile().memory_analysis()
    case = {"framework": "jax", "model": "F0", "condition": "step", "contestant": contestant}
    share = memory.temp_size_in_bytes / (4 * 71_489_284)
    assert share > 0
    benchmark.extra_info.update(case, peak_memory=share)
