"""Perturbation and restoring of weights by SAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.data import splitmix_values
from agc_conformance.generate.parameters import DENSE, VectorParameter, inline
from agc_conformance.generate.sam_build import DOWN_TO_FLOAT16, sharpen_vector
from agc_conformance.generate.sam_case import (
    EIGHT_EXAMPLES,
    HARD_TO_RESTORE,
    SIX_EXAMPLES,
    TEN_EXAMPLES,
    SamCase,
    sam_case,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: perturbation and restoring"


def _at_the_centers(case: SamCase, names: Sequence[str], examples: slice = slice(None)) -> SamCase:
    """Return the case with these weights at the centers of some examples, where gradients are 0."""
    centers = dict(case.centers)
    for name in names:
        centers[name] = centers[name].copy()
        centers[name][examples] = case.weights[name]
    return replace(case, centers=centers)


def _norm_above_float16() -> SamCase:
    """Return a case whose gradients fit float16 and whose norm does not."""
    case = sam_case(5, 2)
    parameters, curvatures, centers = [], {}, {}
    for p in case.parameters:
        shape = (len(case.examples), *p.shape)
        weight = np.copysign(0.25 + np.abs(p.weight_array) / 32, p.weight_array)
        away = np.where(np.arange(weight.size) % 3, 0.5, -0.625).reshape(p.shape)
        parameters.append(replace(p, weight=inline(weight)))
        curvatures[p.name] = np.full(shape, 2.0**16)
        centers[p.name] = np.broadcast_to(weight - away, shape)
    return SamCase(parameters, curvatures, centers)


def _with_unused_parameter(case: SamCase) -> SamCase:
    """Return the case with one more parameter, which the loss does not depend on."""
    weight = inline(splitmix_values((2, 2), seed=77, exponent=-3, spread=[1, 1]))
    spare = VectorParameter("spare.weight", {"o": 2, "i": 2}, 1, weight, None, DENSE)
    return replace(case, parameters=[*case.parameters, spare])


_EVERYTHING: Final = list(SIX_EXAMPLES.weights)

VECTORS: Final = [
    sharpen_vector(
        "L1-sam-global-norm",
        1,
        ["PerLayerNorm", "AscentSign", "RhoMisused", "StaleGradient", "NotNormalised"],
        "One norm over all parameters; the gradient is taken at w + e.",
        SIX_EXAMPLES,
        {"rho": 0.5},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-default-rho",
        1,
        ["RhoMisused", "StaleGradient"],
        "The default radius.",
        EIGHT_EXAMPLES,
        {},
    ),
    sharpen_vector(
        "L1-sam-large-rho",
        1,
        ["RhoMisused", "PerLayerNorm", "AscentSign"],
        "A radius above 1, larger than the weights.",
        TEN_EXAMPLES,
        {"rho": 2.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-squares-overflow",
        1,
        ["PerturbationOverflow"],
        "Gradients near 2**70: their squares overflow float32, their norm does not.",
        SIX_EXAMPLES.scaled(68),
        {"rho": 1.0},
        dtypes=["float32", "bfloat16"],
    ),
    sharpen_vector(
        "L1-sam-squares-underflow",
        1,
        ["PerturbationOverflow", "PerturbationEps"],
        "Gradients near 2**-80: their squares underflow float32, their direction is right.",
        SIX_EXAMPLES.scaled(-82),
        {"rho": 1.0},
        dtypes=["float32", "bfloat16"],
    ),
    sharpen_vector(
        "L1-sam-half-overflow",
        1,
        ["PerturbationNormDtype"],
        "Every gradient fits float16, their norm does not: SAM must not switch itself off.",
        _norm_above_float16(),
        {"rho": 0.5},
        dtypes=["float16"],
        full_dtypes=["bfloat16", "float32"],
    ),
    sharpen_vector(
        "L1-sam-half-underflow",
        1,
        ["PerturbationNormDtype"],
        "Squares below the smallest number of float16.",
        SIX_EXAMPLES.scaled(-16),
        {"rho": 1.0},
        dtypes=["float16", "bfloat16"],
        full_dtypes=["float32"],
    ),
    sharpen_vector(
        "L1-sam-zero-gradient",
        2,
        ["ZeroGradientNaN"],
        "No gradient anywhere: e = 0, and no NaN.",
        _at_the_centers(SIX_EXAMPLES, _EVERYTHING),
        {"rho": 1.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-zero-ascent",
        2,
        ["ZeroGradientNaN"],
        "The ascent examples are at rest, the others are not: the plain gradient.",
        _at_the_centers(TEN_EXAMPLES, _EVERYTHING, slice(0, 2)),
        {"rho": 1.0, "fraction": 0.2},
    ),
    sharpen_vector(
        "L1-sam-zero-layer",
        2,
        ["ZeroGradientNaN", "PerLayerNorm"],
        "One layer at rest does not move; the others do.",
        _at_the_centers(SIX_EXAMPLES, ["conv.weight", "conv.bias"]),
        {"rho": 1.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-tiny-gradient",
        2,
        ["PerturbationEps"],
        "A norm near 1e-12: an epsilon of 1e-12 halves the radius.",
        SIX_EXAMPLES.scaled(-43),
        {"rho": 1.0},
    ),
    sharpen_vector(
        "L1-sam-tiny-gradient-eps",
        2,
        ["ProfileEps"],
        "The profile davda54 adds 1e-12 to the norm.",
        SIX_EXAMPLES.scaled(-43),
        {"profile": "davda54", "rho": 1.0},
    ),
    sharpen_vector(
        "L1-sam-restore",
        3,
        ["RestoreBySubtraction", "NotRestored"],
        "Weights that subtraction does not give back, a negative zero among them.",
        HARD_TO_RESTORE,
        {"rho": 2.0},
        dtypes=DOWN_TO_FLOAT16,
    ),
    sharpen_vector(
        "L1-sam-restore-adaptive",
        3,
        ["RestoreBySubtraction", "NotRestored"],
        "The same with ASAM.",
        HARD_TO_RESTORE,
        {"rho": 2.0, "adaptive": True},
    ),
    sharpen_vector(
        "L1-sam-unused",
        4,
        ["UnusedParameter"],
        "A parameter in no loss has no gradient and does not move.",
        _with_unused_parameter(SIX_EXAMPLES),
        {"rho": 1.0},
    ),
    sharpen_vector(
        "L1-sam-unused-adaptive",
        4,
        ["UnusedParameter"],
        "Nor in ASAM.",
        _with_unused_parameter(SIX_EXAMPLES),
        {"rho": 1.0, "adaptive": True},
    ),
    sharpen_vector(
        "L1-sam-no-gradient",
        4,
        ["SamAcceptsBadInput"],
        "Nothing that is to be perturbed takes part in the loss: an error, not silent SGD.",
        _with_unused_parameter(SIX_EXAMPLES),
        {"only": ["spare.*"]},
        error=("MissingGradientError", ["only"]),
    ),
]
