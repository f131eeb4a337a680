"""Adaptive gradient clipping for PyTorch.

``attach(optimizer, model, rule)`` clips inside every ``optimizer.step()``;
``adaptive_clip_grad_(model, rule)`` clips by hand, where ``clip_grad_norm_`` would stand;
``plan(model, rule)`` says beforehand what will be clipped, and by which units. ``nfnet("F0")`` is a
model, ``sgd_nfnet(model, lr)`` its optimizer.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        'agc_torch needs PyTorch, which is not installed: pip install "agc-sam[torch]"'
    ) from error

from agc_torch.clip import adaptive_clip_grad_
from agc_torch.nfnet import NFNet, nfnet
from agc_torch.optimizer import Handle, attach, attached
from agc_torch.recipe import sgd_nfnet
from agc_torch.sam import SamStats, SharpnessAware
from agc_torch.stats import Stats
from agc_torch.units import plan, register_units, units
from agc_torch.verify import Verification, verify_sam
from agc_torch.weights import from_neutral, to_neutral

__all__ = [
    "Handle",
    "NFNet",
    "SamStats",
    "SharpnessAware",
    "Stats",
    "Verification",
    "adaptive_clip_grad_",
    "attach",
    "attached",
    "from_neutral",
    "nfnet",
    "plan",
    "register_units",
    "sgd_nfnet",
    "to_neutral",
    "units",
    "verify_sam",
]
