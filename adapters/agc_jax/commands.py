"""JAX's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

import agc_jax
from agc.nfnet import Options
from agc_jax.train import trainer

__all__ = ["classifier", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = agc_jax.NFNet(options, rngs=nnx.Rngs(0))
    agc_jax.from_neutral(model, arrays)
    model.eval()
    run = nnx.jit(lambda model, images: model(images))
    return lambda images: np.asarray(run(model, images))
