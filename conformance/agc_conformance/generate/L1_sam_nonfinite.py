"""NaN and infinity in the gradient of the ascent pass, and after it."""

from __future__ import annotations

from typing import Final

import numpy as np

from agc_conformance.generate.sam_build import DOWN_TO_FLOAT16, sharpen_vector
from agc_conformance.generate.sam_case import EIGHT_EXAMPLES, SIX_EXAMPLES, TEN_EXAMPLES

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: NaN and infinity"

_NAN: Final = SIX_EXAMPLES.poisoned(2, np.nan)
_INFINITY: Final = SIX_EXAMPLES.poisoned(2, -np.inf)
_NAN_IN_FIRST_HALF: Final = EIGHT_EXAMPLES.poisoned(1, np.nan)
_NAN_IN_SECOND_HALF: Final = TEN_EXAMPLES.poisoned(9, np.nan)

VECTORS: Final = [
    sharpen_vector(
        "L1-sam-nan",
        5,
        ["NonFiniteAscent"],
        "A NaN in the ascent gradient: no step, and the weights are intact.",
        _NAN,
        {"rho": 1.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-inf",
        5,
        ["NonFiniteAscent"],
        "An infinity in the ascent gradient.",
        _INFINITY,
        {"rho": 1.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-nan-raise",
        5,
        ["NonFiniteAscent"],
        "The policy 'raise'.",
        _NAN,
        {"nonfinite": "raise"},
        error=("NonFiniteError", ["norm"]),
    ),
    sharpen_vector(
        "L1-sam-nan-skip-perturb",
        5,
        ["NonFiniteAscent"],
        "The policy 'skip_perturb': the plain gradient, poisoned where it is.",
        _NAN,
        {"rho": 1.0, "nonfinite": "skip_perturb"},
    ),
    sharpen_vector(
        "L1-sam-inf-skip-perturb",
        5,
        ["NonFiniteAscent"],
        "The same with an infinity.",
        _INFINITY,
        {"rho": 1.0, "nonfinite": "skip_perturb"},
    ),
    sharpen_vector(
        "L1-sam-nan-descent",
        5,
        ["NonFiniteAscent"],
        "A NaN behind the ascent examples: the step is taken, one element is NaN.",
        _NAN_IN_SECOND_HALF,
        {"rho": 1.0, "fraction": 0.5},
    ),
    sharpen_vector(
        "L1-sam-nan-microbatch",
        5,
        ["NonFiniteAscent"],
        "One poisoned micro-batch is not perturbed, the other is.",
        _NAN_IN_FIRST_HALF,
        {"rho": 1.0, "microbatches": 2, "nonfinite": "skip_perturb"},
    ),
    sharpen_vector(
        "L1-sam-nan-microbatch-skip",
        5,
        ["NonFiniteAscent"],
        "One poisoned micro-batch is enough to skip the step.",
        _NAN_IN_FIRST_HALF,
        {"rho": 1.0, "microbatches": 2},
    ),
    sharpen_vector(
        "L1-sam-nan-excluded",
        5,
        ["NonFiniteAscent", "ExcludedInNorm"],
        "A NaN in a parameter that is not perturbed is not in the norm.",
        _NAN,
        {"rho": 1.0, "exclude": ["head.weight"]},
    ),
]
