"""Adaptive gradient clipping for TensorFlow and Keras 3: in ``fit`` and in your own loops."""

import os as _os

_WRONG_BACKEND = (
    "agc_tensorflow needs Keras on TensorFlow, but its backend is {!r}; set the environment variable "
    "KERAS_BACKEND=tensorflow before keras is imported (for JAX and PyTorch there are agc_jax and agc_torch)"
)
# Asked first: Keras fails to import where the framework of its backend is not installed.
if (_backend := _os.environ.get("KERAS_BACKEND", "tensorflow")) != "tensorflow":
    raise ImportError(_WRONG_BACKEND.format(_backend))

try:
    import keras as _keras
    import tensorflow as tf  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'agc_tensorflow needs TensorFlow and Keras 3 ({error}): pip install "agc-sam[tensorflow]"'
    ) from error

if (_backend := _keras.config.backend()) != "tensorflow":
    raise ImportError(_WRONG_BACKEND.format(_backend))

from agc_tensorflow.clip import adaptive_clip_gradients
from agc_tensorflow.nfnet import NFNet, nfnet
from agc_tensorflow.optimizer import AdaptiveGradClip
from agc_tensorflow.recipe import CoupledSGD, sgd_nfnet
from agc_tensorflow.sam import SamStats, SharpnessAwareModel, sam_value_and_gradients
from agc_tensorflow.stats import AGCLogger, Stats
from agc_tensorflow.units import plan, register_units, units
from agc_tensorflow.verify import Verification, verify_sam
from agc_tensorflow.weights import from_neutral, to_neutral

__all__ = [
    "AGCLogger",
    "AdaptiveGradClip",
    "CoupledSGD",
    "NFNet",
    "SamStats",
    "SharpnessAwareModel",
    "Stats",
    "Verification",
    "adaptive_clip_gradients",
    "from_neutral",
    "nfnet",
    "plan",
    "register_units",
    "sam_value_and_gradients",
    "sgd_nfnet",
    "to_neutral",
    "units",
    "verify_sam",
]
