"""Parts of the batch, and reported losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.generate.sam_build import DOWN_TO_FLOAT16, sharpen_vector
from agc_conformance.generate.sam_case import EIGHT_EXAMPLES, SIX_EXAMPLES, TEN_EXAMPLES, SamCase

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: parts of the batch; losses"


def _batch_twice(case: SamCase) -> SamCase:
    """Return the case with every example twice, in two equal halves."""
    return replace(
        case,
        curvatures={name: np.concatenate([a, a]) for name, a in case.curvatures.items()},
        centers={name: np.concatenate([a, a]) for name, a in case.centers.items()},
    )


VECTORS: Final = [
    sharpen_vector(
        "L1-sam-fraction",
        7,
        ["SubsetFromEnd", "SubsetIgnored", "DescentOnSubset"],
        "The ascent pass sees the first fifth of the batch, the descent pass all of it.",
        TEN_EXAMPLES,
        {"profile": "nfnets", "rho": 1.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-fraction-ceil",
        7,
        ["SubsetFloor", "SubsetFromEnd"],
        "ceil(0.25 * 10) = 3 examples.",
        TEN_EXAMPLES,
        {"rho": 1.0, "fraction": 0.25},
    ),
    sharpen_vector(
        "L1-sam-fraction-one-example",
        7,
        ["SubsetFloor", "SubsetIgnored"],
        "At least one example.",
        SIX_EXAMPLES,
        {"rho": 1.0, "fraction": 0.01},
    ),
    sharpen_vector(
        "L1-sam-fraction-all",
        7,
        ["SubsetFloor"],
        "ceil(0.95 * 6) is the whole batch.",
        SIX_EXAMPLES,
        {"rho": 1.0, "fraction": 0.95},
    ),
    sharpen_vector(
        "L1-sam-microbatches",
        8,
        ["MicrobatchSum", "MicrobatchShared"],
        "Two micro-batches, each with its own e; the mean of the gradients.",
        EIGHT_EXAMPLES,
        {"rho": 1.0, "microbatches": 2},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-microbatches-uneven",
        8,
        ["MicrobatchUnweighted", "MicrobatchSum", "MicrobatchShared"],
        "Three of 4, 3 and 3 examples, weighted by their numbers.",
        TEN_EXAMPLES,
        {"rho": 1.0, "microbatches": 3},
    ),
    sharpen_vector(
        "L1-sam-microbatches-identical",
        8,
        ["MicrobatchSum"],
        "Two identical micro-batches give what one gives.",
        _batch_twice(SIX_EXAMPLES),
        {"rho": 1.0, "microbatches": 2},
    ),
    sharpen_vector(
        "L1-sam-microbatches-single",
        8,
        ["MicrobatchShared"],
        "As many micro-batches as examples.",
        SIX_EXAMPLES,
        {"rho": 1.0, "microbatches": 6},
    ),
    sharpen_vector(
        "L1-sam-microbatches-fraction",
        8,
        ["MicrobatchShared", "SubsetIgnored", "SubsetFloor"],
        "The first ceil(0.3 * n) examples of each micro-batch.",
        TEN_EXAMPLES,
        {"rho": 1.0, "microbatches": 3, "fraction": 0.3},
    ),
    sharpen_vector(
        "L1-sam-microbatches-too-many",
        8,
        ["SamAcceptsBadInput"],
        "More micro-batches than examples.",
        SIX_EXAMPLES,
        {"microbatches": 7},
        error=("ConfigError", ["microbatches=7", "6 examples"]),
    ),
    sharpen_vector(
        "L1-sam-global-scope-alone",
        9,
        ["ScopeIgnored"],
        "On a single replica both scopes are the same.",
        SIX_EXAMPLES,
        {"rho": 1.0, "scope": "global"},
    ),
    sharpen_vector(
        "L1-sam-loss",
        12,
        ["WrongLoss"],
        "The loss that is reported is the clean one.",
        EIGHT_EXAMPLES,
        {"rho": 1.0},
    ),
    sharpen_vector(
        "L1-sam-loss-fraction",
        12,
        ["WrongLoss"],
        "The clean loss is that of the ascent examples.",
        TEN_EXAMPLES,
        {"rho": 1.0, "fraction": 0.2},
    ),
    sharpen_vector(
        "L1-sam-loss-microbatches",
        12,
        ["WrongLoss"],
        "Losses are averaged by the numbers of examples.",
        TEN_EXAMPLES,
        {"rho": 1.0, "microbatches": 3, "fraction": 0.3},
    ),
]
