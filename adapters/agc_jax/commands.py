"""JAX's part of ``agc classify``, ``demo`` and ``train``; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

import jax
import numpy as np
import optax
from flax import nnx

import agc_jax
from agc import AGC
from agc.nfnet import SMOOTHING, Options
from agc_jax.recipe import after_clipping
from agc_jax.train import trainer

__all__ = ["classifier", "train", "trainer"]

_NEVER: Final = 1e30
"""A threshold that no gradient reaches."""


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_jax.NFNet(options, rngs=nnx.Rngs(0))
    agc_jax.from_neutral(model, arrays)
    model.eval()
    run = nnx.jit(lambda model, images: model(images))
    return lambda images: np.asarray(run(model, images))


@cache
def _programs() -> tuple[nnx.Module, Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return model, optimizer, step and logits; compiled once for all thresholds and rates."""
    model = agc_jax.nfnet("tiny", dropout=0.0, stochastic_depth=0.0, rngs=nnx.Rngs(0))
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    units = agc_jax.units(model)

    def logits(params: Any, images: jax.Array) -> jax.Array:
        outputs: jax.Array = nnx.merge(graph, params, rest)(images)
        return outputs

    def optimizer(rate: Any, clipping: Any) -> optax.GradientTransformationExtraArgs:
        """Return :func:`agc_jax.sgd_nfnet` with a threshold that may be traced."""
        agc = agc_jax.adaptive_grad_clip(AGC.profile("deepmind"), units=units, clipping=clipping)
        return optax.chain(agc, *after_clipping(rate))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)
        return optax.softmax_cross_entropy(logits(params, images), targets).mean()

    @jax.jit  # type: ignore[untyped-decorator]
    def step(params: Any, state: Any, rate: Any, clipping: Any, *batch: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer(rate, clipping).update(gradients, state, params)
        stats = agc_jax.stats(state)
        return optax.apply_updates(params, updates), state, value, stats.clipped / stats.units

    return model, optimizer, step, jax.jit(logits)


def train(
    initial: Mapping[str, Any],
    batches: Iterator[tuple[Any, Any]],
    rates: Sequence[float],
    clipping: float | None,
    test: tuple[Any, Any],
) -> Iterator[tuple[float, float]]:
    """Train ``tiny``; see :meth:`agc.cli.frameworks.Framework.train`."""
    model, optimizer, step, logits = _programs()
    agc_jax.from_neutral(model, initial)
    params = nnx.state(model, nnx.Param)
    threshold = jax.numpy.asarray(_NEVER if clipping is None else clipping)
    state = optimizer(0.0, threshold).init(params)
    for rate, batch in zip(rates, batches, strict=True):
        params, state, loss, clipped = step(params, state, rate, threshold, *batch)
        yield float(loss), float(clipped)
        if not math.isfinite(loss):
            return
    images, labels = test
    yield float((logits(params, images).argmax(-1) == labels).mean()), 0.0
