"""AGC, SAM and NFNets in PyTorch, as one backend."""

from __future__ import annotations

import agc_torch.units  # noqa: F401 - first: it says what is missing, and the way out
from agc_conformance.backends.torch.clipping import Clipping
from agc_conformance.backends.torch.layers import Layers
from agc_conformance.backends.torch.nfnets import NFNets
from agc_conformance.backends.torch.sharpness import Sharpness
from agc_conformance.backends.torch.training import Training

__all__ = ["TorchBackend"]


class TorchBackend(Layers, Clipping, Sharpness, NFNets, Training):
    """:mod:`agc_torch` behind the protocol of backends."""
