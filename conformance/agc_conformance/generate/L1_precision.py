"""Dtypes, overflow, underflow and fan-in."""

from __future__ import annotations

from typing import Final

import numpy as np

from agc_conformance.generate.build import IN_EVERY_DTYPE, clip_vector
from agc_conformance.generate.parameters import (
    CONV2D,
    DENSE,
    VectorParameter,
    bias,
    dense,
    generated,
    mixed_bias,
    mixed_dense,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Dtypes, overflow, underflow, fan-in"

_COMPLEX_WEIGHT: Final = np.array([[3 + 4j, 1 - 2j, 0.5j], [0, 2 + 0j, -1 + 1j], [8j, 6, 1]])
_COMPLEX_GRADIENT: Final = np.array(
    [[1 + 1j, -2j, 3], [0.25 - 0.5j, 1j, 0.125], [2.0**-6, 2.0**-7 * 1j, 0]]
)


def _wide(
    o: int,
    i: int,
    seed: int,
    *,
    weight_exponent: int,
    gradient_exponent: int,
    spread: tuple[int, int] = (1, 1),
) -> VectorParameter:
    """Return a dense layer that is too large to write out its values."""
    weight = generated((o, i), seed, weight_exponent, spread)
    gradient = generated((o, i), seed + 500, gradient_exponent, spread)
    return VectorParameter("weight", {"o": o, "i": i}, 1, weight, gradient, DENSE)


VECTORS: Final = [
    clip_vector(
        "L1-fan-in-4608",
        3,
        ["NormInInputDtype", "NaiveAccumulation"],
        "3x3 over 512 channels: within 4 ULP in float32.",
        [
            VectorParameter(
                "weight",
                {"o": 3, "i": 512, "h": 3, "w": 3},
                1,
                generated((3, 512, 3, 3), 101, -12, (3, 5, 3, 3)),
                generated((3, 512, 3, 3), 601, -16, (3, 5, 3, 3)),
                CONV2D,
            )
        ],
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-float16-weights-underflow",
        3,
        ["NormInInputDtype", "LowPrecisionScale"],
        "4096 weights around 1e-4: their squares are 0 in float16.",
        [_wide(2, 4096, 103, weight_exponent=-16, gradient_exponent=-12)],
        dtypes=["float16", "bfloat16", "float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-float16-gradients-underflow",
        3,
        ["NormInInputDtype"],
        "16384 gradients around 1e-4: with squares in float16 the norm is 0 and nothing is clipped.",
        [_wide(1, 16384, 104, weight_exponent=-12, gradient_exponent=-16)],
        dtypes=["float16", "float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-float16-square-overflow",
        3,
        ["NormInInputDtype", "OverflowToZero"],
        "Gradients above 256: their squares overflow float16, their norm does not.",
        [dense([[1.0, 2, -3], [4, 0.5, 1]], [[300.0, -512, 264], [1024, 2, 3]])],
        dtypes=["float16", "bfloat16", "float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-float16-norm-overflow",
        3,
        ["NormInInputDtype", "OverflowToZero", "LowPrecisionScale"],
        "A gradient norm above 65504 cannot be held in float16; the clipped gradient can.",
        [_wide(2, 4096, 105, weight_exponent=-4, gradient_exponent=8)],
        dtypes=["float16", "float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-low-precision-scale",
        3,
        ["LowPrecisionScale", "NormInInputDtype"],
        "Norms, limits and scales stay in the accumulation dtype: one rounding at the end.",
        [_wide(16, 48, 106, weight_exponent=-6, gradient_exponent=-4, spread=(2, 2))],
        dtypes=["bfloat16", "float16"],
        full_dtypes=["float32"],
    ),
    clip_vector(
        "L1-long-bfloat16",
        3,
        ["NormInInputDtype", "LowPrecisionScale"],
        "4608 equal-sized terms: a sum in bfloat16 stops growing after 256 of them.",
        [_wide(2, 4608, 107, weight_exponent=-8, gradient_exponent=-8)],
        dtypes=["bfloat16"],
        full_dtypes=["float16"],
    ),
    clip_vector(
        "L1-mixed-dtypes",
        3,
        ["DtypePromoted", "LowPrecisionScale"],
        "Gradients in another precision than the weights keep their own.",
        [mixed_dense(108), mixed_bias(109)],
        dtypes=["bfloat16/float32", "float16/float32", "float32/bfloat16", "float32/float16"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-complex",
        3,
        ["ComplexSquare"],
        "|z|^2, not z^2, and a real scale.",
        [
            dense(_COMPLEX_WEIGHT, _COMPLEX_GRADIENT),
            bias(_COMPLEX_WEIGHT[0], _COMPLEX_GRADIENT[1]),
        ],
        dtypes=["complex64", "complex128"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-complex-cancelling",
        3,
        ["ComplexSquare"],
        "1 + i: its square is 2i, and the squares of 1 and i cancel.",
        [dense([[1 + 1j, 2], [1, 1j]], [[3, 3j], [1 + 1j, 1 - 1j]])],
        dtypes=["complex64", "complex128"],
        full_dtypes=[],
    ),
    clip_vector(
        "L1-float64",
        3,
        ["NormInInputDtype"],
        "float64 is accumulated in float64.",
        [mixed_dense(111, o=6, i=7), mixed_bias(112)],
        dtypes=["float64"],
        full_dtypes=[],
    ),
]
