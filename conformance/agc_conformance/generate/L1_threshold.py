"""Threshold, ties and epsilon."""

from __future__ import annotations

from typing import Final

import numpy as np

from agc_conformance.generate.build import FLOAT32_AND_FLOAT64, IN_EVERY_DTYPE, clip_vector
from agc_conformance.generate.parameters import CONV1D, VectorParameter, bias, dense, inline

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Threshold, ties, epsilon"

_GRADIENT: Final = np.array([[1.0, 2, 2], [0.5, 0.25, 0.75], [4, -1, 3]])
# limit = 0.5 * norm(W) = 5 = norm(G): exact in every dtype.
_TIE_RULE: Final = {"clipping": 0.5}
_TIE_WEIGHT: Final = np.array([[6.0, 8, 0], [8, 0, 6], [-6, 8, 0]])
_TIE_GRADIENT: Final = np.array([[3.0, 4, 0], [4, -0.0, 3], [-0.0, -3, 4]])

VECTORS: Final = [
    clip_vector(
        "L1-eps-zero-weights",
        1,
        ["MissingEps", "EpsInsideRoot", "WrongNorm"],
        "Units of zero weights have the limit clipping * eps, so that they can start to learn.",
        [
            dense(
                np.zeros((3, 4)), [[3.0, 4, 0, 0], [0, 0.5, -0.25, 2], [2.0**-18, 0, 0, 2.0**-19]]
            ),
            bias([0.0, 0, 0], [3.0, -4, 12]),
        ],
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-eps-floor",
        1,
        ["AdditiveEps", "MissingEps", "EpsInsideRoot", "WrongNorm", "WeightsChanged"],
        "Norms just below, just above and far above eps: eps is a floor, never added.",
        [dense([[2.0**-12, 2.0**-13, 0], [2.0**-10, 2.0**-10, 2.0**-11], [1.0, -2, 2]], _GRADIENT)],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-eps-large",
        1,
        ["AdditiveEps", "EpsInsideRoot", "MissingEps"],
        "eps of the size of the norms shows where it stands.",
        [dense([[3.0, 4, 0], [1, 2, 2], [0.5, 0.25, 0.5]], _GRADIENT * 4)],
        rule={"clipping": 0.25, "eps": 2.0},
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-eps-zero",
        1,
        ["AdditiveEps"],
        "eps = 0 is allowed: the limit of zero weights is then 0 and their gradient becomes 0.",
        [dense([[0.0, 0], [3, 4]], [[1.0, -2], [6, 8]])],
        rule={"eps": 0.0, "clipping": 0.5},
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-tie",
        2,
        ["TieClipped", "UnclippedChanged"],
        "A norm equal to the limit is not clipped; negative zeros keep their sign.",
        [dense(_TIE_WEIGHT, _TIE_GRADIENT)],
        rule=_TIE_RULE,
        stats=True,
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-tie-at-zero",
        2,
        ["TieClipped"],
        "Zero gradient, zero weights, eps = 0: limit and norm are both 0 and nothing is divided.",
        [dense([[0.0, 0], [3, 4]], [[0.0, -0.0], [0, 0]]), bias([0.0, 0], [0.0, -0.0])],
        rule={"eps": 0.0},
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-zero-gradient",
        2,
        ["TieClipped", "UnclippedChanged"],
        "Zero gradients stay zero, with their signs.",
        [dense([[0.0, 0], [3, 4]], [[0.0, -0.0], [-0.0, 0]])],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-around-limit",
        2,
        ["UnclippedChanged", "AdditiveEps"],
        "1/64 below the limit keeps its bits, 1/64 above is scaled back to it.",
        [dense(_TIE_WEIGHT, np.array([[1 - 2.0**-6], [1 + 2.0**-6], [0.5]]) * _TIE_GRADIENT)],
        rule=_TIE_RULE,
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-around-limit-close",
        2,
        ["UnclippedChanged"],
        "16 units in the last place of float32 below and above the limit.",
        [dense(_TIE_WEIGHT, np.array([[1 - 2.0**-19], [1 + 2.0**-19], [1]]) * _TIE_GRADIENT)],
        rule=_TIE_RULE,
        dtypes=["float32", "float64"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-unclipped-bits",
        2,
        ["UnclippedChanged", "DtypePromoted"],
        "Far below the limit every bit stays, also of negative zeros and odd mantissas.",
        [
            dense(
                [[64.0, 32, -128, 16], [-8, 96, 4, 2]],
                [[-0.0, 2.0**-12, -3 * 2.0**-13, 0.0], [127 * 2.0**-14, -0.0, 5 * 2.0**-12, 0]],
            )
        ],
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-no-second-eps",
        2,
        ["SecondEps"],
        "clipping * eps = 1e-8 is far below 1e-6: a floor of 1e-6 on the gradient norm over-clips.",
        [
            dense(
                [[0.0, 0, 0], [2.0**-20, 0, 2.0**-21]],
                [[2.0**-24, 2.0**-25, 0], [2.0**-22, -(2.0**-23), 2.0**-24]],
            )
        ],
        rule={"clipping": 0.01, "eps": 1e-6},
        dtypes=["float32", "bfloat16", "float64"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-large-clipping",
        2,
        ["WrongNorm"],
        "A threshold above 1 is as good as any other.",
        [dense([[3.0, 4, 0], [1, 2, 2]], [[30.0, 40, 5], [1, 2, 2]])],
        rule={"clipping": 2.5},
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-pocket-dense",
        2,
        ["WrongAxisDense", "PerTensor", "WrongNorm"],
        "By hand: rows .05774 and .001. One norm for all gives .04083 everywhere, columns .07071.",
        [dense(np.array([[10.0, 0, 0], [0.1, 0.1, 0.1]], np.float32), np.ones((2, 3)))],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-pocket-dense-from-1",
        2,
        ["Squeeze", "WrongAxisDense"],
        "By hand: .1, .01, .001. Squeezed to one vector it would be .05803 everywhere.",
        [dense(np.array([[10.0], [1], [0.1]], np.float32), np.ones((3, 1)))],
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L1-pocket-conv1d",
        2,
        ["WrongAxisConv", "PerTensor"],
        "By hand: .02739 in the first filter. Five published codes give four other answers.",
        [
            VectorParameter(
                "weight",
                {"o": 2, "i": 2, "w": 2},
                1,
                inline(np.array([[[1.0, 2], [3, 4]], [[0.1, 0.2], [0.3, 0.4]]], np.float32)),
                inline(np.ones(8)),
                CONV1D,
            )
        ],
        **FLOAT32_AND_FLOAT64,
    ),
]
