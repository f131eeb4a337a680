r"""The executable definition of AGC and SAM, in float64 NumPy, written to be read.

It is slow and allocates freely. What it returns is exact to float64 rounding and has not been
rounded to the gradient's dtype; whoever compares does that. It raises on everything the
specification does not define.
"""

from agc.reference.clipping import (
    Clipped,
    Result,
    RowSparse,
    Stats,
    adaptive_clip,
    clip_units,
    to_floats,
    unit_norms,
)
from agc.reference.sharpness import (
    GradientFunction,
    SharpnessAware,
    perturbation,
    sharpness_aware_gradients,
)

__all__ = [
    "Clipped",
    "GradientFunction",
    "Result",
    "RowSparse",
    "SharpnessAware",
    "Stats",
    "adaptive_clip",
    "clip_units",
    "perturbation",
    "sharpness_aware_gradients",
    "to_floats",
    "unit_norms",
]
