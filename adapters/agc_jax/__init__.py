"""Adaptive gradient clipping for JAX: an optax transformation, and the same by hand.

>>> import optax
>>> from agc import AGC
>>> tx = optax.chain(adaptive_grad_clip(AGC(clipping=0.01)), optax.sgd(0.1, 0.9, nesterov=True))

``nfnet("F0", rngs=rngs)`` is a model, ``sgd_nfnet(model, lr)`` its optimizer.
"""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'agc_jax needs JAX, optax and Flax ({error}): pip install "agc-sam[jax]"'
    ) from error

from agc_jax.clip import adaptive_clip_gradients
from agc_jax.nfnet import NFNet, nfnet
from agc_jax.optimizer import AdaptiveGradClipState, adaptive_grad_clip, stats
from agc_jax.recipe import sgd_nfnet
from agc_jax.sam import SamStats, sam_value_and_grad
from agc_jax.stats import PerParameter, Stats
from agc_jax.units import ModelUnits, plan, register_units, units
from agc_jax.verify import Verification, verify_sam
from agc_jax.weights import from_neutral, to_neutral

__all__ = [
    "AdaptiveGradClipState",
    "ModelUnits",
    "NFNet",
    "PerParameter",
    "SamStats",
    "Stats",
    "Verification",
    "adaptive_clip_gradients",
    "adaptive_grad_clip",
    "from_neutral",
    "nfnet",
    "plan",
    "register_units",
    "sam_value_and_grad",
    "sgd_nfnet",
    "stats",
    "to_neutral",
    "units",
    "verify_sam",
]
