"""JAX's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import agc_jax
from agc import AGC
from agc.cli.frameworks import Contest
from agc.nfnet import Options
from agc_jax.train import trainer

__all__ = ["classifier", "contest", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_jax.NFNet(options, rngs=nnx.Rngs(0))
    agc_jax.from_neutral(model, arrays)
    model.eval()
    run = nnx.jit(lambda model, images: model(images))
    return lambda images: np.asarray(run(model, images))


def contest(options: Options, images: Any, labels: Any) -> Contest:
    """Return steps to be timed; see :meth:`agc.cli.frameworks.Framework.contest`."""
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def step(model: agc_jax.NFNet, rule: AGC) -> Callable[[], float]:
        transformation = agc_jax.sgd_nfnet(model, 1e-3, rule=rule)

        @nnx.jit  # type: ignore[untyped-decorator]
        def update(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            def loss(model: Any) -> jax.Array:
                return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        # Cached, as to take apart a model at every step takes longer than a small step.
        run = nnx.cached_partial(update, model, nnx.Optimizer(model, transformation, wrt=nnx.Param))
        return lambda: float(run(x, y))  # one program: with the loss all is computed

    model, none = agc_jax.NFNet(options, rngs=nnx.Rngs(0)), AGC(clipping=None)
    return Contest(
        {"jax": jax.__version__, "device": jax.devices()[0].platform},
        {
            "twin": step(model.batch_normalised(), none),
            "plain": step(agc_jax.NFNet(options, rngs=nnx.Rngs(0)), none),
            "clipped": step(model, AGC.profile("deepmind")),
        },
    )
