"""Adaptive gradient clipping for PyTorch.

``attach(optimizer, model, rule)`` clips inside every ``optimizer.step()``; ``adaptive_clip_grad_(model,
rule)`` clips by hand, where ``clip_grad_norm_`` would stand; ``plan(model, rule)`` says beforehand what
will be clipped, and by which units.
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
from agc_torch.optimizer import Handle, attach, attached
from agc_torch.sam import SamStats, SharpnessAware, Verification, verify_sam
from agc_torch.stats import Stats
from agc_torch.units import plan, register_units, units

__all__ = [
    "Handle",
    "SamStats",
    "SharpnessAware",
    "Stats",
    "Verification",
    "adaptive_clip_grad_",
    "attach",
    "attached",
    "plan",
    "register_units",
    "units",
    "verify_sam",
]
