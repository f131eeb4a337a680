"""Selection of parameters, thresholds by parameter and step, telemetry."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.generate.build import IN_EVERY_DTYPE, clip_vector, error_vector
from agc_conformance.generate.parameters import (
    CONV2D,
    Layouts,
    VectorParameter,
    bias,
    dense,
    inline,
    mixed,
    mixed_bias,
    mixed_dense,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "What takes part; schedules; telemetry"

_SCALAR: Final[Layouts] = {"any": ("", "... ->")}
_GAIN: Final = VectorParameter("gain", {}, 0, inline(2.0), inline(-3.0), _SCALAR)
_HEAD_FIRST: Final = [
    mixed_dense(140, "head.weight", 3, 4),
    mixed_bias(141, "head.bias", 3),
    mixed_dense(142, "body.weight"),
    mixed_bias(143, "body.bias"),
    mixed_dense(144, "neck.weight", 5, 3),
]
_HEAD_WITHOUT_BIAS: Final = [
    mixed_dense(145, "body.weight"),
    mixed_bias(146, "body.bias"),
    mixed_dense(147, "head.weight", 3, 4),
]
_THREE_LAYERS: Final = [
    mixed_dense(148, "stem.weight"),
    mixed_bias(149, "stem.bias"),
    mixed_dense(150, "block.weight", 3, 6),
    mixed_bias(151, "block.bias", 3),
    mixed_dense(152, "head.weight", 2, 7),
]
_SCHEDULE: Final = {"@schedule": [[0, 0.04], [4, 0.01], [8, 0.002]]}

VECTORS: Final = [
    clip_vector(
        "L1-scalars",
        5,
        ["EmptyOrScalar", "VectorPerElement", "MissingEps"],
        "0-D and one-element parameters are one unit each; a zero gain can start to learn.",
        [
            _GAIN,
            VectorParameter("skip_gain", {}, 0, inline(0.0), inline(5.0), _SCALAR),
            bias([4.0], [0.5], "one"),
        ],
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-vector",
        5,
        ["VectorPerElement"],
        "A bias is one unit: one scale for all of it.",
        [mixed_bias(130, o=9)],
        **IN_EVERY_DTYPE,
    ),
    clip_vector(
        "L1-none-gradient",
        5,
        ["NoneGradient"],
        "A parameter without a gradient is left alone.",
        [mixed_dense(131), replace(mixed_bias(133, "frozen"), gradient=None), mixed_bias(132)],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-empty",
        5,
        ["EmptyOrScalar"],
        "Empty parameters break nothing.",
        [
            dense(np.ones((0, 3)), [], "empty"),
            mixed_dense(134),
            dense(np.ones((3, 0)), [], "hollow"),
            bias([], [], "empty_bias"),
        ],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-many",
        5,
        ["GlobalNorm", "PoisonSpreads"],
        "Parameters do not influence each other.",
        [
            *_THREE_LAYERS,
            mixed("conv.weight", {"o": 4, "i": 3, "h": 2, "w": 2}, 1, CONV2D, 153),
            _GAIN,
        ],
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-exclude-pattern",
        6,
        ["ExcludeIgnored", "ExcludeByOrder"],
        "The head comes first: only its name tells.",
        _HEAD_FIRST,
        rule={"exclude": ["head.*"]},
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-exclude-one",
        6,
        ["ExcludeIgnored", "ExcludeByOrder"],
        "A name without wildcards excludes that one parameter.",
        _HEAD_FIRST,
        rule={"exclude": ["body.bias"]},
        full_dtypes=[],
    ),
    clip_vector(
        "L1-exclude-head",
        6,
        ["ExcludeByOrder", "ExcludeHeadBias", "ExcludeIgnored"],
        "'@head' is the head's weight and bias, and nothing else.",
        _HEAD_FIRST,
        rule={"exclude": ["@head"], "head": "head"},
        full_dtypes=[],
    ),
    clip_vector(
        "L1-exclude-head-weight",
        6,
        ["ExcludeHeadBias", "ExcludeByOrder"],
        "'@head.weight' is the head's matrix; its bias is still clipped.",
        _HEAD_FIRST,
        rule={"exclude": ["@head.weight"], "head": "head"},
        full_dtypes=[],
    ),
    clip_vector(
        "L1-exclude-head-without-bias",
        6,
        ["ExcludeByOrder"],
        "A head without bias at the end: leaving out the last two also leaves out a body bias.",
        _HEAD_WITHOUT_BIAS,
        rule={"exclude": ["@head"], "head": "head"},
        full_dtypes=[],
    ),
    error_vector(
        "L1-exclude-nothing",
        6,
        ["UnverifiedPattern"],
        "A pattern that matches nothing is an error that names it.",
        _HEAD_WITHOUT_BIAS,
        "SelectorError",
        ["haed.*"],
        rule={"exclude": ["haed.*"]},
    ),
    clip_vector(
        "L1-clipping-per-parameter",
        10,
        ["IgnoresClipping"],
        "The first pattern that matches decides; None switches AGC off.",
        _THREE_LAYERS,
        rule={"clipping": {"stem.*": 0.04, "*.bias": None, "block.*": 0.002, "*": 0.01}},
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-clipping-none",
        10,
        ["IgnoresClipping", "UnclippedChanged"],
        "clipping=None leaves every gradient as it is.",
        _THREE_LAYERS,
        rule={"clipping": None},
        full_dtypes=["float64"],
    ),
    error_vector(
        "L1-clipping-unmatched",
        10,
        ["UnverifiedPattern"],
        "A parameter that no pattern of clipping matches is an error that names it.",
        _THREE_LAYERS,
        "SelectorError",
        ["stem.weight"],
        rule={"clipping": {"*.bias": 0.1, "block.*": 0.01, "head.*": 0.01}},
    ),
    *(
        clip_vector(
            f"L1-schedule-step-{step}",
            10,
            ["IgnoresSchedule"],
            f"Straight lines between the points, at step {step}.",
            [mixed_dense(154, o=8), mixed_bias(155)],
            rule={"clipping": _SCHEDULE},
            step=step,
            full_dtypes=["float64"] if step == 1 else [],
        )
        for step in (0, 1, 4, 7, 100)
    ),
    clip_vector(
        "L1-schedule-per-parameter",
        10,
        ["IgnoresSchedule", "IgnoresClipping"],
        "A schedule for some parameters, a number for the others.",
        _THREE_LAYERS,
        rule={"clipping": {"stem.*": _SCHEDULE, "*": 0.01}},
        step=3,
        full_dtypes=[],
    ),
    clip_vector(
        "L1-granularity-tensor",
        12,
        ["TensorGranularity"],
        "granularity='tensor': one unit a parameter, whatever its layer (DreamerV3's 0.3).",
        [mixed_dense(156), mixed("conv.weight", {"o": 3, "i": 2, "h": 2, "w": 3}, 1, CONV2D, 157)],
        rule={"granularity": "tensor", "clipping": 0.004},
        stats=True,
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-granularity-tensor-nan",
        12,
        ["TensorGranularity", "NaNPasses"],
        "granularity='tensor': one NaN poisons the parameter.",
        [dense([[1.0, 2], [3, 4]], [[1.0, np.nan], [3, 4]]), mixed_bias(158)],
        rule={"granularity": "tensor", "clipping": 0.3},
        full_dtypes=[],
    ),
    clip_vector(
        "L1-stats",
        11,
        ["WrongStats"],
        "Units, clipped units, largest ratio, smallest scale, per parameter.",
        [*_THREE_LAYERS, _GAIN],
        rule={"exclude": ["head.*"]},
        stats=True,
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-stats-nothing-clipped",
        11,
        ["WrongStats"],
        "Nothing is clipped: the smallest scale is 1, the largest ratio is below the threshold.",
        [dense([[64.0, 32], [-8, 96]], [[0.0625, 0.125], [0.03125, 0]])],
        stats=True,
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-stats-small-weights",
        11,
        ["WrongStats"],
        "The ratio is to eps where the weights are smaller.",
        [dense([[0.0, 0], [2.0**-14, 0]], [[0.5, 0.25], [1, 2]])],
        stats=True,
        full_dtypes=["float64"],
    ),
    clip_vector(
        "L1-stats-nonfinite",
        11,
        ["WrongStats"],
        "Units under the policy are counted apart and not part of ratio and scale.",
        [dense([[3.0, 4], [1, 1], [6, 8]], [[np.nan, 1.0], [1, 2], [np.inf, 2]])],
        rule={"nonfinite": "zero"},
        stats=True,
        full_dtypes=["float64"],
    ),
]
