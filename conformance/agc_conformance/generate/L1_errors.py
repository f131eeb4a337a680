"""Gradients and units that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from agc_conformance.generate.build import error_vector
from agc_conformance.generate.parameters import bias, dense, mixed_bias, mixed_dense

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "What is refused"

_WEIGHT: Final = mixed_dense(170)
_BIAS: Final = mixed_bias(171)

VECTORS: Final = [
    error_vector(
        "L1-error-shape",
        2,
        ["AcceptsBadInput"],
        "A gradient of another shape than its parameter is refused, never broadcast.",
        [replace(_WEIGHT, gradient={"values": list(range(1, 17)), "shape": [4, 4]}), _BIAS],
        "ShapeError",
        ["weight"],
    ),
    error_vector(
        "L1-error-rank",
        2,
        ["AcceptsBadInput"],
        "A gradient of another rank than its parameter is refused.",
        [replace(_WEIGHT, gradient={"values": list(range(1, 21)), "shape": [5, 4, 1]})],
        "ShapeError",
        ["weight"],
    ),
    error_vector(
        "L1-error-integer-gradient",
        3,
        ["AcceptsBadInput"],
        "Integer gradients are refused, never turned into floating point.",
        [replace(dense([[1, 2], [3, 4]], [[1, 2], [3, 4]]), gradient_dtype="int32"), _BIAS],
        "DTypeError",
        ["weight"],
    ),
    error_vector(
        "L1-error-boolean-gradient",
        3,
        ["AcceptsBadInput"],
        "Boolean gradients are refused.",
        [_WEIGHT, replace(bias([1, 2], [1, 0]), gradient_dtype="bool")],
        "DTypeError",
        ["bias"],
    ),
    error_vector(
        "L1-error-no-gradients",
        5,
        ["AcceptsBadInput"],
        "A model without a single gradient is an error, not a silent success.",
        [replace(_WEIGHT, gradient=None), replace(_BIAS, gradient=None)],
        "MissingGradientError",
        ["gradient"],
    ),
    error_vector(
        "L1-error-units-misfit",
        2,
        ["AcceptsBadInput"],
        "A units pattern for another rank is refused, naming the parameter.",
        [replace(_WEIGHT, layouts={"any": ("o i", "o i h w -> o")})],
        "UnitsError",
        ["weight"],
    ),
]
