"""ASAM, selection, and steps that perturb or change the radius."""

from __future__ import annotations

from typing import Final

from agc_conformance.generate.sam_build import DOWN_TO_FLOAT16, sharpen_vector
from agc_conformance.generate.sam_case import (
    EIGHT_EXAMPLES,
    HARD_TO_RESTORE,
    SIX_EXAMPLES,
    TEN_EXAMPLES,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: ASAM, selection, schedules"

VECTORS: Final = [
    sharpen_vector(
        "L1-sam-adaptive",
        10,
        ["AsamBias", "AsamEta", "AsamSquare", "AsamNorm"],
        "ASAM with its authors' values: T = |w| + 0.01 for matrices, 1 for vectors.",
        SIX_EXAMPLES,
        {"profile": "samsung"},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-adaptive-eta",
        10,
        ["AsamEta", "AsamSquare", "AsamNorm"],
        "A large eta.",
        EIGHT_EXAMPLES,
        {"rho": 1.0, "adaptive": True, "eta": 0.5},
    ),
    sharpen_vector(
        "L1-sam-adaptive-eta-zero",
        10,
        ["AsamSquare", "AsamBias"],
        "eta = 0: a zero weight does not move.",
        HARD_TO_RESTORE,
        {"rho": 1.0, "adaptive": True, "eta": 0},
    ),
    sharpen_vector(
        "L1-sam-adaptive-microbatches",
        10,
        ["AsamSquare", "AsamNorm"],
        "ASAM with micro-batches and a fraction.",
        TEN_EXAMPLES,
        {"rho": 1.0, "adaptive": True, "microbatches": 2, "fraction": 0.5},
    ),
    sharpen_vector(
        "L1-sam-only",
        11,
        ["ExcludedInNorm", "ExcludedPerturbed"],
        "Only weights are perturbed; biases are neither moved nor in the norm.",
        SIX_EXAMPLES,
        {"rho": 1.0, "only": ["*.weight"]},
    ),
    sharpen_vector(
        "L1-sam-exclude",
        11,
        ["ExcludedInNorm", "ExcludedPerturbed"],
        "The head is left out.",
        EIGHT_EXAMPLES,
        {"rho": 1.0, "exclude": ["head.*"]},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-unmatched",
        11,
        ["SamUnverifiedPattern"],
        "A pattern that matches nothing.",
        SIX_EXAMPLES,
        {"exclude": ["haed.*"]},
        error=("SelectorError", ["haed.*"]),
    ),
    *(
        sharpen_vector(
            f"L1-sam-every-step-{step}",
            11,
            ["EveryOffByOne"],
            f"every=3: step {step} {'perturbs' if step % 3 == 0 else 'is plain'}.",
            SIX_EXAMPLES,
            {"rho": 1.0, "every": 3},
            step=step,
        )
        for step in (0, 1, 2, 3)
    ),
    *(
        sharpen_vector(
            f"L1-sam-schedule-step-{step}",
            11,
            ["RhoScheduleStep"],
            "The radius of step k is the schedule at k, counted from 0.",
            SIX_EXAMPLES,
            {"rho": {"@schedule": [[0, 0.5], [4, 2.5]]}},
            step=step,
        )
        for step in (0, 1, 3, 9)
    ),
]
