"""Row-sparse gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.generate.build import FLOAT32_AND_FLOAT64, clip_vector, error_vector
from agc_conformance.generate.parameters import (
    Data,
    VectorParameter,
    generated,
    inline,
    mixed_bias,
    mixed_dense,
    rows,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Row-sparse gradients"

_WEIGHT: Final = generated((6, 3), 160, -3, (3, 2))
_VALUES: Final = [[0.5, -0.25, 1], [0.0078125, 0, -0.00390625], [2, 0.75, -3]]


def _embedding(gradient: Data, weight: Data = _WEIGHT) -> VectorParameter:
    """Return an embedding of six tokens; each token is a unit."""
    axes, layouts = {"v": 6, "d": 3}, {"any": ("v d", "v d -> v")}
    return VectorParameter("embedding", axes, 1, weight, gradient, layouts)


_THREE_ROWS: Final = _embedding(rows([4, 0, 3], _VALUES))

VECTORS: Final = [
    clip_vector(
        "L1-sparse-rows",
        9,
        ["SparseDensified"],
        "Three rows of six: those are clipped, no other row appears, the gradient stays sparse.",
        [_THREE_ROWS],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-sparse-duplicates",
        9,
        ["SparseDuplicates", "SparseDensified"],
        "A row that appears three times is summed first; one that cancels is zero.",
        [
            _embedding(
                rows(
                    [4, 1, 4, 1, 4],
                    [[0.5, -0.25, 1], [1, 0, 2], [2, 0.75, -3], [-1, 0, -2], [1, 1, 1]],
                )
            )
        ],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-sparse-unclipped",
        9,
        ["SparseDuplicates", "UnclippedChanged"],
        "Rows below the limit keep their sums.",
        [
            _embedding(
                rows([2, 5, 2], [[0.25, 0, -0.5], [0.125, 0.25, 0], [0.125, 0.25, 0]]),
                inline(np.full((6, 3), 64.0) * np.arange(1, 7)[:, None]),
            )
        ],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-sparse-whole",
        9,
        ["SparseDensified"],
        "Declared as one unit, a sparse gradient is measured against the whole weight.",
        [replace(_THREE_ROWS, units=0, layouts={"any": ("v d", "... ->")})],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-sparse-nan",
        9,
        ["NaNPasses", "PoisonSpreads"],
        "A poisoned row is the only one that falls under the policy.",
        [_embedding(rows([4, 0, 3], [[0.5, np.nan, 1], [0.0078125, 0, 0], [2, 0.75, -3]]))],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-sparse-beside-dense",
        9,
        ["SparseDensified", "GlobalNorm"],
        "Sparse and dense gradients in one model.",
        [_THREE_ROWS, mixed_dense(161), mixed_bias(162)],
        **FLOAT32_AND_FLOAT64,
    ),
    error_vector(
        "L1-sparse-columns",
        9,
        ["SparseDensified", "AcceptsBadInput"],
        "Column units of a row-sparse gradient are refused, naming the parameter.",
        [
            VectorParameter(
                "embedding",
                {"d": 3, "v": 6},
                1,
                _WEIGHT,
                rows([4, 0], _VALUES[:2]),
                {"any": ("v d", "v d -> d")},
            )
        ],
        "UnitsError",
        ["embedding"],
    ),
]
