"""AGC, SAM and NFNets in TensorFlow and Keras, as one backend."""

from __future__ import annotations

import agc_tensorflow.units  # noqa: F401 - first: it says what is missing, and the way out
from agc_conformance.backends.tensorflow.clipping import Clipping
from agc_conformance.backends.tensorflow.layers import Layers
from agc_conformance.backends.tensorflow.nfnets import NFNets
from agc_conformance.backends.tensorflow.sharpness import Sharpness
from agc_conformance.backends.tensorflow.training import Training

__all__ = ["TensorFlowBackend"]


class TensorFlowBackend(Layers, Clipping, Sharpness, NFNets, Training):
    """:mod:`agc_tensorflow` behind the protocol of backends."""
