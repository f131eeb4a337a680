"""NaN and infinity, and finite values whose squares overflow."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.generate.build import clip_vector, error_vector
from agc_conformance.generate.parameters import (
    CONV2D,
    VectorParameter,
    bias,
    dense,
    generated,
    inline,
    mixed_bias,
    mixed_dense,
    overwritten,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "NaN and infinity"

_WEIGHT: Final = [[1.0, 2, 2], [4, -4, 2], [0.5, 0.25, 1], [3, 0, 4]]
_GRADIENT: Final = [[0.5, 0.25, -1], [0.001953125, 0, -0.0], [2, -3, 4], [1, 1, 0.5]]
_NAN_IN_SMALL_UNIT: Final = [[0.5, 0.25, -1], [0.0009765625, np.nan, 0], [2, -3, 4], [1, 1, 0.5]]
# The second element of the third unit.
_POISONED: Final = 7


def _weight_with(value: float) -> VectorParameter:
    weight = overwritten(inline(_WEIGHT), {_POISONED: value})
    return replace(dense(_WEIGHT, _GRADIENT), weight=weight)


def _gradient_with(value: float) -> VectorParameter:
    gradient = overwritten(inline(_GRADIENT), {_POISONED: value})
    return replace(dense(_WEIGHT, _GRADIENT), gradient=gradient)


# Name, parameter, comment, flags.
_PLACES: Final[list[tuple[str, VectorParameter, str, list[str]]]] = [
    ("nan-gradient", _gradient_with(np.nan), "A NaN in one gradient", ["NaNPasses"]),
    ("inf-gradient", _gradient_with(np.inf), "An infinity in one gradient", ["InfToZero"]),
    (
        "minus-inf-gradient",
        _gradient_with(-np.inf),
        "A negative infinity in one gradient",
        ["InfToZero"],
    ),
    ("nan-weight", _weight_with(np.nan), "A NaN in one weight", ["NaNPasses"]),
    ("inf-weight", _weight_with(np.inf), "An infinity in one weight", ["NaNPasses"]),
]
_POLICIES: Final = {"propagate": "NaNPasses", "zero": "PolicyIgnored"}

VECTORS: Final = [
    *(
        clip_vector(
            f"L1-{name}-{policy}",
            4,
            [*flags, flag, "PoisonSpreads"],
            f"{comment}: the whole unit falls under the policy {policy!r}, no other unit does.",
            [poisoned, mixed_bias(120)],
            rule={"nonfinite": policy},
            stats=True,
        )
        for name, poisoned, comment, flags in _PLACES
        for policy, flag in _POLICIES.items()
    ),
    clip_vector(
        "L1-nan-in-small-unit",
        4,
        ["NaNPasses"],
        "A NaN in a unit that would not be clipped poisons it all the same.",
        [dense(_WEIGHT, _NAN_IN_SMALL_UNIT)],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-nan-bias",
        4,
        ["NaNPasses", "PoisonSpreads"],
        "A bias is one unit: one NaN makes all of it NaN, and nothing of the weight beside it.",
        [mixed_dense(123), bias([1.0, 2, 3], [1.0, np.nan, 2])],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-nonfinite-conv2d",
        4,
        ["NaNPasses", "InfToZero", "PoisonSpreads"],
        "Two poisoned filters of a convolution, one sound one.",
        [
            VectorParameter(
                "weight",
                {"o": 3, "i": 2, "h": 2, "w": 2},
                1,
                generated((3, 2, 2, 2), 121, -4, (2, 1, 1, 1)),
                overwritten(
                    generated((3, 2, 2, 2), 122, -6, (2, 1, 1, 1)), {11: np.nan, 16: -np.inf}
                ),
                CONV2D,
            )
        ],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-nan-excluded",
        4,
        ["ExcludeIgnored", "PoisonSpreads"],
        "An excluded parameter is not looked at: its NaN stays alone.",
        [dense(_WEIGHT, _NAN_IN_SMALL_UNIT), dense(_WEIGHT, _NAN_IN_SMALL_UNIT, "head.weight")],
        rule={"exclude": ["head.*"]},
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-nan-and-inf",
        4,
        ["NaNPasses", "InfToZero"],
        "NaN, infinity and both in the gradient, in the weights, and in both.",
        [
            dense(
                [[1.0, np.nan], [2, 3], [np.inf, 1], [np.nan, np.inf], [3, 4]],
                [[np.inf, 1.0], [np.inf, np.nan], [0, 1], [np.nan, -np.inf], [3, 4]],
            )
        ],
        full_dtypes=["float64", "float16"],
    ),
    clip_vector(
        "L1-inf-weight-zero-gradient",
        4,
        ["NaNPasses"],
        "Infinite weights with a zero gradient are non-finite still.",
        [dense([[np.inf, 1.0], [3, 4]], [[0.0, 0], [1, 1]])],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-overflow-gradient",
        4,
        ["OverflowToZero"],
        "Finite values whose squares overflow float32: clipped correctly or under the policy, never 0.",
        [
            dense(
                [[1.0, 2, 2], [3, 4, 0]],
                [[2.0**66, 2.0**67, -(2.0**65)], [0.5, 0.25, 1]],
            )
        ],
        dtypes=["float32", "bfloat16"],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-overflow-sum",
        4,
        ["OverflowToZero"],
        "Every square is finite in float32, their sum is not.",
        [dense(np.ones((1, 8)) * 3, np.arange(1, 9).reshape(1, 8) * 2.0**61)],
        dtypes=["float32", "bfloat16"],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-overflow-weight",
        4,
        ["OverflowToZero"],
        "Finite weights whose squares overflow float32.",
        [dense([[2.0**65, -(2.0**66), 1], [3, 4, 0]], [[1.0, 2, 3], [1, 1, 1]])],
        dtypes=["float32", "bfloat16"],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-overflow-ratio",
        4,
        ["OverflowToZero"],
        "Squares fit float32, and the square of the ratio to a floor of eps does not.",
        [dense([[0.0, 0, 0], [3, 4, 0]], [[2.0**57, 2.0**58, 0], [0.5, 0.25, 1]])],
        dtypes=["float32", "bfloat16"],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-overflow-ratio-float64",
        4,
        ["OverflowToZero"],
        "Squares fit float64, and the square of the ratio to a floor of eps does not.",
        [dense([[0.0, 0, 0], [3, 4, 0]], [[2.0**507, 2.0**508, 0], [0.5, 0.25, 1]])],
        dtypes=["float64"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-overflow-float64",
        4,
        ["OverflowToZero"],
        "Finite values whose squares overflow float64.",
        [dense([[1.0, 2, 2], [3, 4, 0]], [[2.0**600, 2.0**601, 1], [0.5, 0.25, 1]])],
        dtypes=["float64"],
        full_dtypes=[],
    ),
    error_vector(
        "L1-raise-nan-gradient",
        4,
        ["PolicyIgnored", "NaNPasses"],
        "nonfinite='raise' names the parameter.",
        [dense(_WEIGHT, _NAN_IN_SMALL_UNIT), mixed_bias(124)],
        "NonFiniteError",
        ["weight"],
        rule={"nonfinite": "raise"},
    ),
    error_vector(
        "L1-raise-inf-weight",
        4,
        ["PolicyIgnored"],
        "nonfinite='raise' looks at weights as well.",
        [dense(_WEIGHT, _GRADIENT), bias([1.0, np.inf], [1.0, 1], "scale")],
        "NonFiniteError",
        ["scale"],
        rule={"nonfinite": "raise"},
    ),
    clip_vector(
        "L1-raise-finite",
        4,
        ["PolicyIgnored"],
        "nonfinite='raise' clips as usual where everything is finite.",
        [mixed_dense(125), mixed_bias(126)],
        rule={"nonfinite": "raise"},
        full_dtypes=["float64"],
    ),
]
