"""AGC, SAM and NFNets in JAX, as one backend."""

from __future__ import annotations

import agc_jax.units  # noqa: F401 - first: it says what is missing, and the way out
from agc_conformance.backends.jax.clipping import Clipping
from agc_conformance.backends.jax.layers import Layers
from agc_conformance.backends.jax.nfnets import NFNets
from agc_conformance.backends.jax.sharpness import Sharpness
from agc_conformance.backends.jax.training import Training

__all__ = ["JaxBackend"]


class JaxBackend(Layers, Clipping, Sharpness, NFNets, Training):
    """:mod:`agc_jax` behind the protocol of backends."""
