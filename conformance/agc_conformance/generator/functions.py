"""Level 1 beyond the table of layers: threshold, precision, non-finite values, selection, errors."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from agc_conformance.generator.build import (
    FULL,
    P,
    clip_vector,
    error_vector,
    generated,
    inline,
    mixed,
    rows,
)

__all__ = ["function_vectors"]

_OI: Final = {
    "torch": ("o i", "o i -> o"),
    "flax": ("i o", "i o -> o"),
    "keras": ("i o", "i o -> o"),
}
_OIW: Final = {
    "torch": ("o i w", "o i ... -> o"),
    "flax": ("w i o", "... i o -> o"),
    "keras": ("w i o", "... i o -> o"),
}
_OIHW: Final = {
    "torch": ("o i h w", "o i ... -> o"),
    "flax": ("h w i o", "... i o -> o"),
    "keras": ("h w i o", "... i o -> o"),
}
_B: Final = {"any": ("o", "... ->")}
_ALL: Final = ["float32", "bfloat16", "float16", "float64"]
_WIDE: Final = ["float32", "float64"]
_EVERY: Final[dict[str, Any]] = {"dtypes": _ALL, "full": []}
_HALF: Final = {"clipping": 0.5}


def _matrix(weight: Any, gradient: Any, name: str = "weight") -> P:
    """Return a dense weight, one row a unit."""
    w = np.asarray(weight)
    return P(name, {"o": w.shape[0], "i": w.shape[1]}, 1, inline(w), inline(gradient), _OI)


def _vector(weight: Any, gradient: Any, name: str = "bias") -> P:
    """Return a bias: one unit."""
    return P(name, {"o": np.asarray(weight).size}, 0, inline(weight), inline(gradient), _B)


def _dense(seed: int, name: str = "weight", o: int = 4, i: int = 5) -> P:
    return mixed(name, {"o": o, "i": i}, 1, _OI, seed)


def _bias(seed: int, name: str = "bias", o: int = 4) -> P:
    return mixed(name, {"o": o}, 0, _B, seed)


def _threshold() -> list[dict[str, Any]]:
    zero = np.zeros((3, 4))
    g = np.array([[3.0, 4.0, 0, 0], [0, 0.5, -0.25, 2], [2.0**-18, 0, 0, 2.0**-19]])
    tiny = np.array([[2.0**-12, 2.0**-13, 0], [2.0**-10, 2.0**-10, 2.0**-11], [1.0, -2.0, 2.0]])
    ones = np.array([[1.0, 2, 2], [0.5, 0.25, 0.75], [4, -1, 3]])
    # limit = 0.5 * 10 = 5 = norm of (3, 4): exact in every dtype
    w_tie = np.array([[6.0, 8, 0], [8, 0, 6], [-6, 8, 0]])
    g_tie = np.array([[3.0, 4, 0], [4, -0.0, 3], [-0.0, -3, 4]])
    above = 1 + 2.0**-6
    near = 1 + 2.0**-19
    return [
        clip_vector(
            "L1-eps-zero-weights",
            1,
            ["MissingEps", "EpsInsideRoot", "WrongNorm"],
            "Units of zero weights have the limit clipping * eps, so that they can start to learn.",
            [_matrix(zero, g), _vector([0.0, 0, 0], [3.0, -4, 12])],
            **_EVERY,
        ),
        clip_vector(
            "L1-eps-floor",
            1,
            ["AdditiveEps", "MissingEps", "EpsInsideRoot", "WrongNorm"],
            "Norms just below, just above and far above eps: eps is a floor, never added.",
            [_matrix(tiny, ones)],
            full=["float64"],
        ),
        clip_vector(
            "L1-eps-large",
            1,
            ["AdditiveEps", "EpsInsideRoot", "MissingEps"],
            "eps of the size of the norms shows where it stands.",
            [_matrix([[3.0, 4, 0], [1, 2, 2], [0.5, 0.25, 0.5]], ones * 4)],
            rule={"clipping": 0.25, "eps": 2.0},
            **_EVERY,
        ),
        clip_vector(
            "L1-eps-zero",
            1,
            ["AdditiveEps"],
            "eps = 0 is allowed: the limit of zero weights is then 0 and their gradient becomes 0.",
            [_matrix([[0.0, 0], [3, 4]], [[1.0, -2], [6, 8]])],
            rule={"eps": 0.0, "clipping": 0.5},
            full=["float64"],
        ),
        clip_vector(
            "L1-tie",
            2,
            ["TieClipped", "UnclippedChanged"],
            "A norm equal to the limit is not clipped; negative zeros keep their sign.",
            [_matrix(w_tie, g_tie)],
            rule=_HALF,
            stats=True,
            **_EVERY,
        ),
        clip_vector(
            "L1-tie-at-zero",
            2,
            ["TieClipped"],
            "Zero gradient, zero weights, eps = 0: limit and norm are both 0 and nothing is divided.",
            [_matrix([[0.0, 0], [3, 4]], [[0.0, -0.0], [0, 0]]), _vector([0.0, 0], [0.0, -0.0])],
            rule={"eps": 0.0},
            **_EVERY,
        ),
        clip_vector(
            "L1-zero-gradient",
            2,
            ["TieClipped", "UnclippedChanged"],
            "Zero gradients stay zero, with their signs.",
            [_matrix([[0.0, 0], [3, 4]], [[0.0, -0.0], [-0.0, 0]])],
            full=["float64"],
        ),
        clip_vector(
            "L1-around-limit",
            2,
            ["UnclippedChanged", "AdditiveEps"],
            "1/64 below the limit keeps its bits, 1/64 above is scaled back to it.",
            [_matrix(w_tie, np.array([[2.0 - above], [above], [0.5]]) * g_tie)],
            rule=_HALF,
            **_EVERY,
        ),
        clip_vector(
            "L1-around-limit-close",
            2,
            ["UnclippedChanged"],
            "16 units in the last place of float32 below and above the limit.",
            [_matrix(w_tie, np.array([[2.0 - near], [near], [1.0]]) * g_tie)],
            rule=_HALF,
            dtypes=_WIDE,
            full=[],
        ),
        clip_vector(
            "L1-unclipped-bits",
            2,
            ["UnclippedChanged", "DtypePromoted"],
            "Far below the limit every bit stays, also of negative zeros and odd mantissas.",
            [
                _matrix(
                    [[64.0, 32, -128, 16], [-8, 96, 4, 2]],
                    [[-0.0, 2.0**-12, -3 * 2.0**-13, 0.0], [127 * 2.0**-14, -0.0, 5 * 2.0**-12, 0]],
                )
            ],
            **_EVERY,
        ),
        clip_vector(
            "L1-no-second-eps",
            2,
            ["SecondEps"],
            "clipping * eps = 1e-8 is far below 1e-6: a floor of 1e-6 on the gradient norm over-clips.",
            [
                _matrix(
                    [[0.0, 0, 0], [2.0**-20, 0, 2.0**-21]],
                    [[2.0**-24, 2.0**-25, 0], [2.0**-22, -(2.0**-23), 2.0**-24]],
                )
            ],
            rule={"clipping": 0.01, "eps": 1e-6},
            dtypes=["float32", "bfloat16", "float64"],
            full=[],
        ),
        clip_vector(
            "L1-large-clipping",
            2,
            ["WrongNorm"],
            "A threshold above 1 is as good as any other.",
            [_matrix([[3.0, 4, 0], [1, 2, 2]], [[30.0, 40, 5], [1, 2, 2]])],
            rule={"clipping": 2.5},
            full=["float64"],
        ),
        clip_vector(
            "L1-pocket-dense",
            2,
            ["WrongAxisDense", "PerTensor", "WrongNorm"],
            "By hand: rows .05774 and .001. One norm for all gives .04083 everywhere, columns .07071.",
            [_matrix(np.array([[10.0, 0, 0], [0.1, 0.1, 0.1]], np.float32), np.ones((2, 3)))],
            dtypes=["float32"],
            full=["float64"],
        ),
        clip_vector(
            "L1-pocket-dense-from-1",
            2,
            ["Squeeze", "WrongAxisDense"],
            "By hand: .1, .01, .001. Squeezed to one vector it would be .05803 everywhere.",
            [_matrix(np.array([[10.0], [1], [0.1]], np.float32), np.ones((3, 1)))],
            dtypes=["float32"],
            full=["float64"],
        ),
        clip_vector(
            "L1-pocket-conv1d",
            2,
            ["WrongAxisConv", "PerTensor"],
            "By hand: .02739 in the first filter. Five published codes give four other answers.",
            [
                P(
                    "weight",
                    {"o": 2, "i": 2, "w": 2},
                    1,
                    inline(np.array([[[1.0, 2], [3, 4]], [[0.1, 0.2], [0.3, 0.4]]], np.float32)),
                    inline(np.ones(8)),
                    _OIW,
                )
            ],
            dtypes=["float32"],
            full=["float64"],
        ),
    ]


def _big(
    name: str, o: int, i: int, seed: int, w_exp: int, g_exp: int, spread: tuple[int, int] = (1, 1)
) -> P:
    """Return a wide dense layer, too large to be written out."""
    weight = generated((o, i), seed, w_exp, spread)
    return P(name, {"o": o, "i": i}, 1, weight, generated((o, i), seed + 500, g_exp, spread), _OI)


def _precision() -> list[dict[str, Any]]:
    complex_w = np.array([[3 + 4j, 1 - 2j, 0.5j], [0, 2 + 0j, -1 + 1j], [8j, 6, 1]])
    complex_g = np.array([[1 + 1j, -2j, 3], [0.25 - 0.5j, 1j, 0.125], [2.0**-6, 2.0**-7 * 1j, 0]])
    return [
        clip_vector(
            "L1-fan-in-4608",
            3,
            ["NormInInputDtype", "NaiveAccumulation"],
            "3x3 over 512 channels: within 4 ULP in float32.",
            [
                P(
                    "weight",
                    {"o": 3, "i": 512, "h": 3, "w": 3},
                    1,
                    generated((3, 512, 3, 3), 101, -12, (3, 5, 3, 3)),
                    generated((3, 512, 3, 3), 601, -16, (3, 5, 3, 3)),
                    _OIHW,
                )
            ],
            **_EVERY,
        ),
        clip_vector(
            "L1-float16-weights-underflow",
            3,
            ["NormInInputDtype", "LowPrecisionScale"],
            "4096 weights around 1e-4: their squares are 0 in float16.",
            [_big("weight", 2, 4096, 103, -16, -12)],
            dtypes=["float16", "bfloat16", "float32"],
            full=[],
        ),
        clip_vector(
            "L1-float16-gradients-underflow",
            3,
            ["NormInInputDtype"],
            "16384 gradients around 1e-4: with squares in float16 the norm is 0 and nothing is clipped.",
            [_big("weight", 1, 16384, 104, -12, -16)],
            dtypes=["float16", "float32"],
            full=[],
        ),
        clip_vector(
            "L1-float16-square-overflow",
            3,
            ["NormInInputDtype", "OverflowToZero"],
            "Gradients above 256: their squares overflow float16, their norm does not.",
            [_matrix([[1.0, 2, -3], [4, 0.5, 1]], [[300.0, -512, 264], [1024, 2, 3]])],
            dtypes=["float16", "bfloat16", "float32"],
            full=[],
        ),
        clip_vector(
            "L1-float16-norm-overflow",
            3,
            ["NormInInputDtype", "OverflowToZero", "LowPrecisionScale"],
            "A gradient norm above 65504 cannot be held in float16; the clipped gradient can.",
            [_big("weight", 2, 4096, 105, -4, 8)],
            dtypes=["float16", "float32"],
            full=[],
        ),
        clip_vector(
            "L1-low-precision-scale",
            3,
            ["LowPrecisionScale", "NormInInputDtype"],
            "Norms, limits and scales stay in the accumulation dtype: one rounding at the end.",
            [_big("weight", 16, 48, 106, -6, -4, (2, 2))],
            dtypes=["bfloat16", "float16"],
            full=["float32"],
        ),
        clip_vector(
            "L1-long-bfloat16",
            3,
            ["NormInInputDtype", "LowPrecisionScale"],
            "4608 equal-sized terms: a sum in bfloat16 stops growing after 256 of them.",
            [_big("weight", 2, 4608, 107, -8, -8)],
            dtypes=["bfloat16"],
            full=["float16"],
        ),
        clip_vector(
            "L1-mixed-dtypes",
            3,
            ["DtypePromoted", "LowPrecisionScale"],
            "Gradients in another precision than the weights keep their own.",
            [_dense(108), _bias(109)],
            dtypes=["bfloat16/float32", "float16/float32", "float32/bfloat16", "float32/float16"],
            full=[],
        ),
        clip_vector(
            "L1-complex",
            3,
            ["ComplexSquare"],
            "|z|^2, not z^2, and a real scale.",
            [
                P("weight", {"o": 3, "i": 3}, 1, inline(complex_w), inline(complex_g), _OI),
                P("bias", {"o": 3}, 0, inline(complex_w[0]), inline(complex_g[1]), _B),
            ],
            dtypes=["complex64", "complex128"],
            full=[],
        ),
        clip_vector(
            "L1-complex-cancelling",
            3,
            ["ComplexSquare"],
            "1 + i: its square is 2i, and the squares of 1 and i cancel.",
            [
                P(
                    "weight",
                    {"o": 2, "i": 2},
                    1,
                    inline(np.array([[1 + 1j, 2], [1, 1j]])),
                    inline(np.array([[3, 3j], [1 + 1j, 1 - 1j]])),
                    _OI,
                )
            ],
            dtypes=["complex64", "complex128"],
            full=[],
        ),
        clip_vector(
            "L1-float64",
            3,
            ["NormInInputDtype"],
            "float64 is accumulated in float64.",
            [_dense(111, o=6, i=7), _bias(112)],
            dtypes=["float64"],
            full=[],
        ),
    ]


def _nonfinite() -> list[dict[str, Any]]:
    w = np.array([[1.0, 2, 2], [4, -4, 2], [0.5, 0.25, 1], [3, 0, 4]])
    g = np.array([[0.5, 0.25, -1], [0.001953125, 0, -0.0], [2, -3, 4], [1, 1, 0.5]])
    policies = (("propagate", ["NaNPasses"]), ("zero", ["PolicyIgnored"]))
    places: list[tuple[str, str, str, float, list[str]]] = [
        ("nan-gradient", "g", "A NaN in one gradient", np.nan, ["NaNPasses"]),
        ("inf-gradient", "g", "An infinity in one gradient", np.inf, ["InfToZero"]),
        ("minus-inf-gradient", "g", "A negative infinity in one gradient", -np.inf, ["InfToZero"]),
        ("nan-weight", "w", "A NaN in one weight", np.nan, ["NaNPasses"]),
        ("inf-weight", "w", "An infinity in one weight", np.inf, ["NaNPasses"]),
    ]
    out = []
    for name, where, what, value, flags in places:
        weight, gradient = w.copy(), g.copy()
        (gradient if where == "g" else weight)[2, 1] = value
        for policy, more in policies:
            out.append(
                clip_vector(
                    f"L1-{name}-{policy}",
                    4,
                    [*flags, *more, "PoisonSpreads"],
                    f"{what}: the whole unit falls under the policy {policy!r}, no other unit does.",
                    [_matrix(weight, gradient), _bias(120)],
                    rule={"nonfinite": policy},
                    full=FULL,
                    stats=True,
                )
            )
    small, vector_g = g.copy(), np.array([1.0, np.nan, 2])
    small[1] = [0.0009765625, np.nan, 0]
    conv_w = generated((3, 2, 2, 2), 121, -4, (2, 1, 1, 1))
    conv_g = generated((3, 2, 2, 2), 122, -6, (2, 1, 1, 1))
    conv_g["values"][11] = "NaN"
    conv_g["values"][16] = "-Infinity"
    out += [
        clip_vector(
            "L1-nan-in-small-unit",
            4,
            ["NaNPasses"],
            "A NaN in a unit that would not be clipped poisons it all the same.",
            [_matrix(w, small)],
            full=["float64"],
        ),
        clip_vector(
            "L1-nan-bias",
            4,
            ["NaNPasses", "PoisonSpreads"],
            "A bias is one unit: one NaN makes all of it NaN, and nothing of the weight beside it.",
            [_dense(123), _vector([1.0, 2, 3], vector_g)],
            full=["float64"],
        ),
        clip_vector(
            "L1-nonfinite-conv2d",
            4,
            ["NaNPasses", "InfToZero", "PoisonSpreads"],
            "Two poisoned filters of a convolution, one sound one.",
            [P("weight", {"o": 3, "i": 2, "h": 2, "w": 2}, 1, conv_w, conv_g, _OIHW)],
            full=["float64"],
        ),
        clip_vector(
            "L1-nan-excluded",
            4,
            ["ExcludeIgnored", "PoisonSpreads"],
            "An excluded parameter is not looked at: its NaN stays alone.",
            [_matrix(w, small), _matrix(w, small, "head.weight")],
            rule={"exclude": ["head.*"]},
            full=["float64"],
        ),
        clip_vector(
            "L1-nan-and-inf",
            4,
            ["NaNPasses", "InfToZero"],
            "NaN, infinity and both in the gradient, in the weights, and in both.",
            [
                _matrix(
                    [[1.0, np.nan], [2, 3], [np.inf, 1], [np.nan, np.inf], [3, 4]],
                    [[np.inf, 1.0], [np.inf, np.nan], [0, 1], [np.nan, -np.inf], [3, 4]],
                )
            ],
            full=["float64", "float16"],
        ),
        clip_vector(
            "L1-inf-weight-zero-gradient",
            4,
            ["NaNPasses"],
            "Infinite weights with a zero gradient are non-finite still.",
            [_matrix([[np.inf, 1.0], [3, 4]], [[0.0, 0], [1, 1]])],
            full=["float64"],
        ),
        clip_vector(
            "L1-overflow-gradient",
            4,
            ["OverflowToZero"],
            "Finite values whose squares overflow float32: clipped correctly or under the policy, never 0.",
            [
                _matrix(
                    [[1.0, 2, 2], [3, 4, 0]],
                    [[2.0**66, 2.0**67, -(2.0**65)], [0.5, 0.25, 1]],
                )
            ],
            dtypes=["float32", "bfloat16"],
            full=["float64"],
        ),
        clip_vector(
            "L1-overflow-sum",
            4,
            ["OverflowToZero"],
            "Every square is finite in float32, their sum is not.",
            [_matrix(np.ones((1, 8)) * 3, np.arange(1, 9).reshape(1, 8) * 2.0**61)],
            dtypes=["float32", "bfloat16"],
            full=["float64"],
        ),
        clip_vector(
            "L1-overflow-weight",
            4,
            ["OverflowToZero"],
            "Finite weights whose squares overflow float32.",
            [_matrix([[2.0**65, -(2.0**66), 1], [3, 4, 0]], [[1.0, 2, 3], [1, 1, 1]])],
            dtypes=["float32", "bfloat16"],
            full=["float64"],
        ),
        clip_vector(
            "L1-overflow-float64",
            4,
            ["OverflowToZero"],
            "Finite values whose squares overflow float64.",
            [_matrix([[1.0, 2, 2], [3, 4, 0]], [[2.0**600, 2.0**601, 1], [0.5, 0.25, 1]])],
            dtypes=["float64"],
            full=[],
        ),
        error_vector(
            "L1-raise-nan-gradient",
            4,
            ["PolicyIgnored", "NaNPasses"],
            "nonfinite='raise' names the parameter.",
            [_matrix(w, small), _bias(124)],
            "NonFiniteError",
            ["weight"],
            rule={"nonfinite": "raise"},
        ),
        error_vector(
            "L1-raise-inf-weight",
            4,
            ["PolicyIgnored"],
            "nonfinite='raise' looks at weights as well.",
            [_matrix(w, g), _vector([1.0, np.inf], [1.0, 1], "scale")],
            "NonFiniteError",
            ["scale"],
            rule={"nonfinite": "raise"},
        ),
        clip_vector(
            "L1-raise-finite",
            4,
            ["PolicyIgnored"],
            "nonfinite='raise' clips as usual where everything is finite.",
            [_dense(125), _bias(126)],
            rule={"nonfinite": "raise"},
            full=["float64"],
        ),
    ]
    return out


def _taking_part() -> list[dict[str, Any]]:
    none = _bias(133, "frozen")
    without = P(none.name, none.axes, none.units, none.weight, None, none.layouts)
    empty_row = P("empty", {"o": 0, "i": 3}, 1, inline([]), inline([]), _OI)
    empty_column = P("hollow", {"o": 3, "i": 0}, 1, inline([]), inline([]), _OI)
    empty_bias = P("empty_bias", {"o": 0}, 0, inline([]), inline([]), _B)
    scalar = P("gain", {}, 0, inline(2.0), inline(-3.0), {"any": ("", "... ->")})
    zero_scalar = P("skip_gain", {}, 0, inline(0.0), inline(5.0), {"any": ("", "... ->")})
    one = P("one", {"o": 1}, 0, inline([4.0]), inline([0.5]), _B)
    head = [
        _dense(140, "head.weight", 3, 4),
        _bias(141, "head.bias", 3),
        _dense(142, "body.weight"),
        _bias(143, "body.bias"),
        _dense(144, "neck.weight", 5, 3),
    ]
    bare = [_dense(145, "body.weight"), _bias(146, "body.bias"), _dense(147, "head.weight", 3, 4)]
    three = [
        _dense(148, "stem.weight"),
        _bias(149, "stem.bias"),
        _dense(150, "block.weight", 3, 6),
        _bias(151, "block.bias", 3),
        _dense(152, "head.weight", 2, 7),
    ]
    schedule = {"clipping": {"@schedule": [[0, 0.04], [4, 0.01], [8, 0.002]]}}
    return [
        clip_vector(
            "L1-scalars",
            5,
            ["EmptyOrScalar", "VectorPerElement", "MissingEps"],
            "0-D and one-element parameters are one unit each; a zero gain can start to learn.",
            [scalar, zero_scalar, one],
            **_EVERY,
        ),
        clip_vector(
            "L1-vector",
            5,
            ["VectorPerElement"],
            "A bias is one unit: one scale for all of it.",
            [_bias(130, o=9)],
            **_EVERY,
        ),
        clip_vector(
            "L1-none-gradient",
            5,
            ["NoneGradient"],
            "A parameter without a gradient is left alone.",
            [_dense(131), without, _bias(132)],
            full=["float64"],
        ),
        clip_vector(
            "L1-empty",
            5,
            ["EmptyOrScalar"],
            "Empty parameters break nothing.",
            [empty_row, _dense(134), empty_column, empty_bias],
            full=["float64"],
        ),
        clip_vector(
            "L1-many",
            5,
            ["GlobalNorm", "PoisonSpreads"],
            "Parameters do not influence each other.",
            [
                *three,
                mixed("conv.weight", {"o": 4, "i": 3, "h": 2, "w": 2}, 1, _OIHW, 153),
                scalar,
            ],
            full=["float64"],
        ),
        clip_vector(
            "L1-exclude-pattern",
            6,
            ["ExcludeIgnored", "ExcludeByOrder"],
            "The head comes first: only its name tells.",
            head,
            rule={"exclude": ["head.*"]},
            full=["float64"],
        ),
        clip_vector(
            "L1-exclude-one",
            6,
            ["ExcludeIgnored", "ExcludeByOrder"],
            "A name without wildcards excludes that one parameter.",
            head,
            rule={"exclude": ["body.bias"]},
            full=[],
        ),
        clip_vector(
            "L1-exclude-head",
            6,
            ["ExcludeByOrder", "ExcludeHeadBias", "ExcludeIgnored"],
            "'@head' is the head's weight and bias, and nothing else.",
            head,
            rule={"exclude": ["@head"], "head": "head"},
            full=[],
        ),
        clip_vector(
            "L1-exclude-head-weight",
            6,
            ["ExcludeHeadBias", "ExcludeByOrder"],
            "'@head.weight' is the head's matrix; its bias is still clipped.",
            head,
            rule={"exclude": ["@head.weight"], "head": "head"},
            full=[],
        ),
        clip_vector(
            "L1-exclude-head-without-bias",
            6,
            ["ExcludeByOrder"],
            "A head without bias at the end: leaving out the last two also leaves out a body bias.",
            bare,
            rule={"exclude": ["@head"], "head": "head"},
            full=[],
        ),
        error_vector(
            "L1-exclude-nothing",
            6,
            ["UnverifiedPattern"],
            "A pattern that matches nothing is an error that names it.",
            bare,
            "SelectorError",
            ["haed.*"],
            rule={"exclude": ["haed.*"]},
        ),
        clip_vector(
            "L1-clipping-per-parameter",
            10,
            ["IgnoresClipping"],
            "The first pattern that matches decides; None switches AGC off.",
            three,
            rule={"clipping": {"stem.*": 0.04, "*.bias": None, "block.*": 0.002, "*": 0.01}},
            full=["float64"],
        ),
        clip_vector(
            "L1-clipping-none",
            10,
            ["IgnoresClipping", "UnclippedChanged"],
            "clipping=None leaves every gradient as it is.",
            three,
            rule={"clipping": None},
            full=["float64"],
        ),
        error_vector(
            "L1-clipping-unmatched",
            10,
            ["UnverifiedPattern"],
            "A parameter that no pattern of clipping matches is an error that names it.",
            three,
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
                [_dense(154, o=8), _bias(155)],
                rule=schedule,
                step=step,
                full=["float64"] if step == 1 else [],
            )
            for step in (0, 1, 4, 7, 100)
        ),
        clip_vector(
            "L1-schedule-per-parameter",
            10,
            ["IgnoresSchedule", "IgnoresClipping"],
            "A schedule for some parameters, a number for the others.",
            three,
            rule={"clipping": {"stem.*": schedule["clipping"], "*": 0.01}},
            step=3,
            full=[],
        ),
        clip_vector(
            "L1-granularity-tensor",
            12,
            ["TensorGranularity"],
            "granularity='tensor': one unit a parameter, whatever its layer (DreamerV3's 0.3).",
            [_dense(156), mixed("conv.weight", {"o": 3, "i": 2, "h": 2, "w": 3}, 1, _OIHW, 157)],
            rule={"granularity": "tensor", "clipping": 0.004},
            stats=True,
            full=["float64"],
        ),
        clip_vector(
            "L1-granularity-tensor-nan",
            12,
            ["TensorGranularity", "NaNPasses"],
            "granularity='tensor': one NaN poisons the parameter.",
            [_matrix([[1.0, 2], [3, 4]], [[1.0, np.nan], [3, 4]]), _bias(158)],
            rule={"granularity": "tensor", "clipping": 0.3},
            full=[],
        ),
        clip_vector(
            "L1-stats",
            11,
            ["WrongStats"],
            "Units, clipped units, largest ratio, smallest scale, per parameter.",
            [*three, scalar],
            rule={"exclude": ["head.*"]},
            stats=True,
            full=["float64"],
        ),
        clip_vector(
            "L1-stats-nothing-clipped",
            11,
            ["WrongStats"],
            "Nothing is clipped: the smallest scale is 1, the largest ratio is below the threshold.",
            [_matrix([[64.0, 32], [-8, 96]], [[0.0625, 0.125], [0.03125, 0]])],
            stats=True,
            full=["float64"],
        ),
        clip_vector(
            "L1-stats-nonfinite",
            11,
            ["WrongStats"],
            "Units under the policy are counted apart and not part of ratio and scale.",
            [_matrix([[3.0, 4], [1, 1], [6, 8]], [[np.nan, 1.0], [1, 2], [np.inf, 2]])],
            rule={"nonfinite": "zero"},
            stats=True,
            full=["float64"],
        ),
    ]


def _sparse() -> list[dict[str, Any]]:
    axes = {"v": 6, "d": 3}
    layouts = {"any": ("v d", "v d -> v")}
    weight = generated((6, 3), 160, -3, (3, 2))
    values = [[0.5, -0.25, 1], [0.0078125, 0, -0.00390625], [2, 0.75, -3]]
    embedding = P("embedding", axes, 1, weight, rows([4, 0, 3], values), layouts)
    twice = P(
        "embedding",
        axes,
        1,
        weight,
        rows([4, 1, 4, 1, 4], [[0.5, -0.25, 1], [1, 0, 2], [2, 0.75, -3], [-1, 0, -2], [1, 1, 1]]),
        layouts,
    )
    small = P(
        "embedding",
        axes,
        1,
        inline(np.full((6, 3), 64.0) * np.arange(1, 7)[:, None]),
        rows([2, 5, 2], [[0.25, 0, -0.5], [0.125, 0.25, 0], [0.125, 0.25, 0]]),
        layouts,
    )
    whole = P("embedding", axes, 0, weight, rows([4, 0, 3], values), {"any": ("v d", "... ->")})
    columns = P(
        "embedding",
        {"d": 3, "v": 6},
        1,
        weight,
        rows([4, 0], values[:2]),
        {"any": ("v d", "v d -> d")},
    )
    poisoned = P(
        "embedding",
        axes,
        1,
        weight,
        rows([4, 0, 3], [[0.5, np.nan, 1], [0.0078125, 0, 0], [2, 0.75, -3]]),
        layouts,
    )
    mask: dict[str, Any] = {"dtypes": ["float32"], "full": ["float64"]}
    return [
        clip_vector(
            "L1-sparse-rows",
            9,
            ["SparseDensified"],
            "Three rows of six: those are clipped, no other row appears, the gradient stays sparse.",
            [embedding],
            **mask,
        ),
        clip_vector(
            "L1-sparse-duplicates",
            9,
            ["SparseDuplicates", "SparseDensified"],
            "A row that appears three times is summed first; one that cancels is zero.",
            [twice],
            **mask,
        ),
        clip_vector(
            "L1-sparse-unclipped",
            9,
            ["SparseDuplicates", "UnclippedChanged"],
            "Rows below the limit keep their sums.",
            [small],
            **mask,
        ),
        clip_vector(
            "L1-sparse-whole",
            9,
            ["SparseDensified"],
            "Declared as one unit, a sparse gradient is measured against the whole weight.",
            [whole],
            **mask,
        ),
        clip_vector(
            "L1-sparse-nan",
            9,
            ["NaNPasses", "PoisonSpreads"],
            "A poisoned row is the only one that falls under the policy.",
            [poisoned],
            **mask,
        ),
        clip_vector(
            "L1-sparse-beside-dense",
            9,
            ["SparseDensified", "GlobalNorm"],
            "Sparse and dense gradients in one model.",
            [embedding, _dense(161), _bias(162)],
            **mask,
        ),
        error_vector(
            "L1-sparse-columns",
            9,
            ["SparseDensified", "AcceptsBadInput"],
            "Column units of a row-sparse gradient are refused, naming the parameter.",
            [columns],
            "UnitsError",
            ["embedding"],
        ),
    ]


def _errors() -> list[dict[str, Any]]:
    good, bias = _dense(170), _bias(171)
    wrong_shape = P(
        "weight",
        {"o": 4, "i": 5},
        1,
        good.weight,
        {"values": list(range(1, 17)), "shape": [4, 4]},
        _OI,
    )
    transposed = P(
        "weight",
        {"o": 4, "i": 5},
        1,
        good.weight,
        {"values": list(range(1, 21)), "shape": [5, 4, 1]},
        _OI,
    )
    integer = P(
        "weight",
        {"o": 2, "i": 2},
        1,
        inline([[1, 2], [3, 4]]),
        inline([[1, 2], [3, 4]]),
        _OI,
        "int32",
    )
    boolean = P("bias", {"o": 2}, 0, inline([1, 2]), inline([1, 0]), _B, "bool")
    off = [
        P("weight", good.axes, good.units, good.weight, None, good.layouts),
        P("bias", bias.axes, bias.units, bias.weight, None, bias.layouts),
    ]
    misfit = P(
        "weight",
        {"o": 4, "i": 5},
        1,
        good.weight,
        good.gradient,
        {"any": ("o i", "o i h w -> o")},
    )
    return [
        error_vector(
            "L1-error-shape",
            2,
            ["AcceptsBadInput"],
            "A gradient of another shape than its parameter is refused, never broadcast.",
            [wrong_shape, bias],
            "ShapeError",
            ["weight"],
        ),
        error_vector(
            "L1-error-rank",
            2,
            ["AcceptsBadInput"],
            "A gradient of another rank than its parameter is refused.",
            [transposed],
            "ShapeError",
            ["weight"],
        ),
        error_vector(
            "L1-error-integer-gradient",
            3,
            ["AcceptsBadInput"],
            "Integer gradients are refused, never turned into floating point.",
            [integer, bias],
            "DTypeError",
            ["weight"],
        ),
        error_vector(
            "L1-error-boolean-gradient",
            3,
            ["AcceptsBadInput"],
            "Boolean gradients are refused.",
            [good, boolean],
            "DTypeError",
            ["bias"],
        ),
        error_vector(
            "L1-error-no-gradients",
            5,
            ["AcceptsBadInput"],
            "A model without a single gradient is an error, not a silent success.",
            off,
            "MissingGradientError",
            ["gradient"],
        ),
        error_vector(
            "L1-error-units-misfit",
            2,
            ["AcceptsBadInput"],
            "A units pattern for another rank is refused, naming the parameter.",
            [misfit],
            "UnitsError",
            ["weight"],
        ),
    ]


def function_vectors() -> dict[str, list[dict[str, Any]]]:
    """Return the vectors of level 1, by file."""
    return {
        "threshold": _threshold(),
        "precision": _precision(),
        "nonfinite": _nonfinite(),
        "selection": _taking_part(),
        "sparse": _sparse(),
        "errors": _errors(),
    }
