"""Every kind of layer: how each framework stores its weight, and which axes name a unit."""

from __future__ import annotations

from typing import Final

from agc_conformance.generate.build import clip_vector
from agc_conformance.generate.parameters import (
    CONV1D,
    CONV2D,
    DENSE,
    Layouts,
    by_framework,
    conv,
    conv_transpose,
    mixed,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Every row of the table of units"

_DEPTHWISE: Final = by_framework(
    ("(c m) i h w", "o i ... -> o"),
    ("h w i (c m)", "... i o -> o"),
    ("h w c m", "... c m -> c m"),
)
_GROUPED_OUT_LAST: Final = ("h w (g i) o", "... (g=2 i) o -> g o")

# Name, comment, canonical axes (unit axes first), number of unit axes, layouts, flags.
_LAYERS: Final[list[tuple[str, str, dict[str, int], int, Layouts, list[str]]]] = [
    ("dense", "Dense 6 to 5", {"o": 5, "i": 6}, 1, DENSE, ["WrongAxisDense", "PerTensor"]),
    ("dense-1-to-5", "Dense 1 to 5 has five units", {"o": 5, "i": 1}, 1, DENSE, ["Squeeze"]),
    ("dense-6-to-1", "Dense 6 to 1 has one unit", {"o": 1, "i": 6}, 1, DENSE, ["WrongAxisDense"]),
    (
        "conv1d",
        "a rank-3 kernel is not a stack of matrices",
        {"o": 5, "i": 4, "w": 3},
        1,
        CONV1D,
        ["WrongAxisConv"],
    ),
    (
        "conv2d",
        "the one shape on which all unit-wise code agrees",
        {"o": 5, "i": 4, "h": 3, "w": 3},
        1,
        CONV2D,
        ["WrongAxisConv", "PerTensor"],
    ),
    (
        "conv2d-1x1-from-1",
        "a 1x1 convolution of one channel has five units",
        {"o": 5, "i": 1, "h": 1, "w": 1},
        1,
        CONV2D,
        ["Squeeze"],
    ),
    (
        "conv2d-1x1-to-1",
        "a 1x1 convolution to one channel has one unit",
        {"o": 1, "i": 6, "h": 1, "w": 1},
        1,
        CONV2D,
        ["Squeeze", "WrongAxisConv"],
    ),
    (
        "conv2d-not-square",
        "heights and widths differ",
        {"o": 3, "i": 2, "h": 2, "w": 5},
        1,
        CONV2D,
        ["WrongAxisConv"],
    ),
    (
        "conv3d",
        "rank 5",
        {"o": 4, "i": 3, "t": 2, "h": 3, "w": 2},
        1,
        conv("t h w"),
        ["RankLimit", "WrongAxisConv"],
    ),
    (
        "rank6",
        "rank 6: four spatial axes",
        {"o": 3, "i": 2, "a": 2, "b": 2, "c": 2, "d": 3},
        1,
        conv("a b c d"),
        ["RankLimit"],
    ),
    (
        "grouped-conv2d",
        "two groups: fan-in counts the inputs of one group",
        {"o": 6, "i": 2, "h": 3, "w": 3},
        1,
        CONV2D,
        ["WrongAxisConv"],
    ),
    (
        "depthwise-conv2d",
        "one unit per channel, wherever the channel axis is",
        {"c": 5, "m": 1, "i": 1, "h": 3, "w": 3},
        2,
        _DEPTHWISE,
        ["WrongAxisDepthwise"],
    ),
    (
        "depthwise-conv2d-multiplier",
        "two outputs per channel, each a unit",
        {"c": 3, "m": 2, "i": 1, "h": 3, "w": 3},
        2,
        _DEPTHWISE,
        ["WrongAxisDepthwise"],
    ),
    (
        "conv-transpose1d",
        "PyTorch and Keras store the transposed kernel the other way round",
        {"o": 5, "i": 4, "w": 3},
        1,
        conv_transpose("w"),
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d",
        "PyTorch and Keras store the transposed kernel the other way round",
        {"o": 5, "i": 4, "h": 3, "w": 3},
        1,
        conv_transpose("h w"),
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d-square",
        "as many inputs as outputs: shapes cannot tell the two apart",
        {"o": 4, "i": 4, "h": 3, "w": 3},
        1,
        conv_transpose("h w"),
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d-flax-transpose-kernel",
        "Flax with transpose_kernel=True stores (h, w, o, i)",
        {"o": 5, "i": 4, "h": 3, "w": 3},
        1,
        {"any": ("h w o i", "... o i -> o")},
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d-grouped",
        "the groups of the fused input axis are unit axes",
        {"g": 2, "o": 5, "i": 3, "h": 3, "w": 2},
        2,
        by_framework(("(g i) o h w", "(g=2 i) o ... -> g o"), _GROUPED_OUT_LAST, _GROUPED_OUT_LAST),
        ["GroupedSplit", "WrongAxisConvTranspose"],
    ),
    (
        "embedding",
        "a unit is a token's vector",
        {"v": 7, "d": 4},
        1,
        {"any": ("v d", "v d -> v")},
        ["WrongAxisEmbedding"],
    ),
    (
        "attention-query",
        "every feature of every head is a unit",
        {"h": 3, "d": 4, "i": 12},
        2,
        by_framework(("(h d) i", "o i -> o"), ("i h d", "i h d -> h d"), ("i h d", "i h d -> h d")),
        ["WrongAxisAttention"],
    ),
    (
        "attention-fused",
        "query, key and value in one matrix",
        {"o": 24, "i": 8},
        1,
        DENSE,
        ["WrongAxisDense"],
    ),
    (
        "attention-output",
        "heads and their features are all inputs",
        {"o": 12, "h": 3, "d": 4},
        1,
        by_framework(("o (h d)", "o i -> o"), ("h d o", "h d o -> o"), ("h d o", "h d o -> o")),
        ["WrongAxisAttention"],
    ),
    (
        "attention-bias",
        "a bias is one unit, of whatever rank it is",
        {"h": 3, "d": 4},
        0,
        by_framework(("(h d)", "... ->"), ("h d", "... ->"), ("h d", "... ->")),
        ["VectorPerElement"],
    ),
    (
        "einsum",
        "btij,ijhk->bthk: two axes in, two axes out",
        {"h": 3, "k": 2, "i": 4, "j": 2},
        2,
        by_framework(
            ("(h k) (i j)", "o i -> o"),
            ("i j h k", "i j h k -> h k"),
            ("i j h k", "i j h k -> h k"),
        ),
        ["WrongAxisAttention"],
    ),
    (
        "recurrent-input",
        "an LSTM's input weights",
        {"o": 12, "i": 4},
        1,
        DENSE,
        ["WrongAxisDense"],
    ),
    (
        "recurrent-state",
        "an LSTM's recurrent weights",
        {"o": 12, "i": 3},
        1,
        DENSE,
        ["WrongAxisDense"],
    ),
    (
        "bilinear",
        "both input axes are reduced",
        {"o": 4, "i": 3, "j": 5},
        1,
        {"any": ("o i j", "o i j -> o")},
        ["WrongAxisConv"],
    ),
    (
        "hf-conv1d",
        "a dense layer stored input-first, also in PyTorch",
        {"o": 6, "i": 5},
        1,
        {"any": ("i o", "i o -> o")},
        ["WrongAxisDense"],
    ),
    ("bias", "a bias is one unit", {"o": 6}, 0, {"any": ("o", "... ->")}, ["VectorPerElement"]),
    ("scalar", "a 0-D gain is one unit", {}, 0, {"any": ("", "... ->")}, ["EmptyOrScalar"]),
    (
        "class-token",
        "(1, 1, D) is one unit",
        {"n": 1, "m": 1, "d": 6},
        0,
        {"any": ("n m d", "... ->")},
        ["VectorPerElement"],
    ),
    (
        "gain-keras",
        "(1, 1, 1, C) is one unit",
        {"a": 1, "b": 1, "c": 1, "d": 5},
        0,
        {"any": ("a b c d", "... ->")},
        ["VectorPerElement"],
    ),
    (
        "layer-scale",
        "(C, 1, 1) is one unit",
        {"c": 5, "h": 1, "w": 1},
        0,
        by_framework(("c h w", "... ->"), ("h w c", "... ->"), ("h w c", "... ->")),
        ["VectorPerElement"],
    ),
    (
        "position-embedding",
        "(1, N, D) declared as one unit a position",
        {"n": 4, "b": 1, "d": 5},
        1,
        {"any": ("b n d", "b n d -> n")},
        ["VectorPerElement", "WrongAxisConv"],
    ),
    (
        "stacked-dense",
        "three layers stacked by scan, vmap or experts: never a norm across them",
        {"l": 3, "o": 5, "i": 4},
        2,
        by_framework(
            ("l o i", "l o i -> l o"), ("l i o", "l i o -> l o"), ("l i o", "l i o -> l o")
        ),
        ["WrongAxisStacked"],
    ),
    (
        "stacked-bias",
        "the biases of three stacked layers: one unit a layer",
        {"l": 3, "o": 5},
        1,
        {"any": ("l o", "l o -> l")},
        ["WrongAxisStacked"],
    ),
    (
        "stacked-conv2d",
        "experts of convolutions",
        {"e": 2, "o": 3, "i": 2, "h": 2, "w": 3},
        2,
        by_framework(
            ("e o i h w", "e o ... -> e o"),
            ("e h w i o", "e ... o -> e o"),
            ("e h w i o", "e ... o -> e o"),
        ),
        ["WrongAxisStacked", "RankLimit"],
    ),
]

VECTORS: Final = [
    clip_vector(
        f"L1-layer-{name}",
        5 if units == 0 else 2,
        flags,
        f"{comment}.",
        [mixed("weight", axes, units, layouts, seed)],
    )
    for seed, (name, comment, axes, units, layouts, flags) in enumerate(_LAYERS, start=11)
]
