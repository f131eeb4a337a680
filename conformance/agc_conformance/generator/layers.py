"""Layer types: what each framework stores and which axes name a unit (DESIGN's table of units)."""

from __future__ import annotations

from typing import Any, Final

from agc_conformance.generator.build import clip_vector, mixed, vector

__all__ = ["layer_plans", "layer_vectors"]

Layouts = dict[str, tuple[str, str]]


def _three(torch: tuple[str, str], flax: tuple[str, str], keras: tuple[str, str]) -> Layouts:
    return {"torch": torch, "flax": flax, "keras": keras}


_DENSE: Final = _three(("o i", "o i -> o"), ("i o", "i o -> o"), ("i o", "i o -> o"))
_DEPTHWISE: Final = _three(
    ("(c m) i h w", "o i ... -> o"),
    ("h w i (c m)", "... i o -> o"),
    ("h w c m", "... c m -> c m"),
)
_EMBEDDING: Final = {"any": ("v d", "v d -> v")}


def _conv(spatial: str) -> Layouts:
    last = (f"{spatial} i o", "... i o -> o")
    return _three((f"o i {spatial}", "o i ... -> o"), last, last)


def _conv_transpose(spatial: str) -> Layouts:
    return _three(
        (f"i o {spatial}", "i o ... -> o"),
        (f"{spatial} i o", "... i o -> o"),
        (f"{spatial} o i", "... o i -> o"),
    )


_LAST_GROUPED: Final = ("h w (g i) o", "... (g=2 i) o -> g o")

# id, what, canonical axes (unit axes first), number of unit axes, layouts, flags
_ROWS: Final[list[tuple[str, str, dict[str, int], int, Layouts, list[str]]]] = [
    ("dense", "Dense 6 to 5", {"o": 5, "i": 6}, 1, _DENSE, ["WrongAxisDense", "PerTensor"]),
    ("dense-1-to-5", "Dense 1 to 5 has five units", {"o": 5, "i": 1}, 1, _DENSE, ["Squeeze"]),
    ("dense-6-to-1", "Dense 6 to 1 has one unit", {"o": 1, "i": 6}, 1, _DENSE, ["WrongAxisDense"]),
    (
        "conv1d",
        "a rank-3 kernel is not a stack of matrices",
        {"o": 5, "i": 4, "w": 3},
        1,
        _conv("w"),
        ["WrongAxisConv"],
    ),
    (
        "conv2d",
        "the one shape on which all unit-wise code agrees",
        {"o": 5, "i": 4, "h": 3, "w": 3},
        1,
        _conv("h w"),
        ["WrongAxisConv", "PerTensor"],
    ),
    (
        "conv2d-1x1-from-1",
        "a 1x1 convolution of one channel has five units",
        {"o": 5, "i": 1, "h": 1, "w": 1},
        1,
        _conv("h w"),
        ["Squeeze"],
    ),
    (
        "conv2d-1x1-to-1",
        "a 1x1 convolution to one channel has one unit",
        {"o": 1, "i": 6, "h": 1, "w": 1},
        1,
        _conv("h w"),
        ["Squeeze", "WrongAxisConv"],
    ),
    (
        "conv2d-not-square",
        "heights and widths differ",
        {"o": 3, "i": 2, "h": 2, "w": 5},
        1,
        _conv("h w"),
        ["WrongAxisConv"],
    ),
    (
        "conv3d",
        "rank 5",
        {"o": 4, "i": 3, "t": 2, "h": 3, "w": 2},
        1,
        _conv("t h w"),
        ["RankLimit", "WrongAxisConv"],
    ),
    (
        "rank6",
        "rank 6: four spatial axes",
        {"o": 3, "i": 2, "a": 2, "b": 2, "c": 2, "d": 3},
        1,
        _conv("a b c d"),
        ["RankLimit"],
    ),
    (
        "grouped-conv2d",
        "two groups: fan-in counts the inputs of one group",
        {"o": 6, "i": 2, "h": 3, "w": 3},
        1,
        _conv("h w"),
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
        _conv_transpose("w"),
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d",
        "PyTorch and Keras store the transposed kernel the other way round",
        {"o": 5, "i": 4, "h": 3, "w": 3},
        1,
        _conv_transpose("h w"),
        ["WrongAxisConvTranspose"],
    ),
    (
        "conv-transpose2d-square",
        "as many inputs as outputs: shapes cannot tell the two apart",
        {"o": 4, "i": 4, "h": 3, "w": 3},
        1,
        _conv_transpose("h w"),
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
        _three(("(g i) o h w", "(g=2 i) o ... -> g o"), _LAST_GROUPED, _LAST_GROUPED),
        ["GroupedSplit", "WrongAxisConvTranspose"],
    ),
    (
        "embedding",
        "a unit is a token's vector",
        {"v": 7, "d": 4},
        1,
        _EMBEDDING,
        ["WrongAxisEmbedding"],
    ),
    (
        "attention-query",
        "every feature of every head is a unit",
        {"h": 3, "d": 4, "i": 12},
        2,
        _three(("(h d) i", "o i -> o"), ("i h d", "i h d -> h d"), ("i h d", "i h d -> h d")),
        ["WrongAxisAttention"],
    ),
    (
        "attention-fused",
        "query, key and value in one matrix",
        {"o": 24, "i": 8},
        1,
        _DENSE,
        ["WrongAxisDense"],
    ),
    (
        "attention-output",
        "heads and their features are all inputs",
        {"o": 12, "h": 3, "d": 4},
        1,
        _three(("o (h d)", "o i -> o"), ("h d o", "h d o -> o"), ("h d o", "h d o -> o")),
        ["WrongAxisAttention"],
    ),
    (
        "attention-bias",
        "a bias is one unit, of whatever rank it is",
        {"h": 3, "d": 4},
        0,
        _three(("(h d)", "... ->"), ("h d", "... ->"), ("h d", "... ->")),
        ["VectorPerElement"],
    ),
    (
        "einsum",
        "btij,ijhk->bthk: two axes in, two axes out",
        {"h": 3, "k": 2, "i": 4, "j": 2},
        2,
        _three(
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
        _DENSE,
        ["WrongAxisDense"],
    ),
    (
        "recurrent-state",
        "an LSTM's recurrent weights",
        {"o": 12, "i": 3},
        1,
        _DENSE,
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
        _three(("c h w", "... ->"), ("h w c", "... ->"), ("h w c", "... ->")),
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
        _three(("l o i", "l o i -> l o"), ("l i o", "l i o -> l o"), ("l i o", "l i o -> l o")),
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
        _three(
            ("e o i h w", "e o ... -> e o"),
            ("e h w i o", "e ... o -> e o"),
            ("e h w i o", "e ... o -> e o"),
        ),
        ["WrongAxisStacked", "RankLimit"],
    ),
]


def layer_vectors() -> list[dict[str, Any]]:
    """Return one L1 vector for every row of the table."""
    out = []
    for number, (name, what, axes, units, layouts, flags) in enumerate(_ROWS):
        clause = 5 if units == 0 else 2
        p = mixed("weight", axes, units, layouts, 11 + number)
        out.append(clip_vector(f"L1-layer-{name}", clause, flags, f"{what}.", [p]))
    return out


# Layer kind, sizes, totals [elements, units] that are right for the weights; more than one where a
# framework may or may not count a stacked bias.
_PLANS: Final[list[tuple[str, dict[str, int], list[list[int]]]]] = [
    ("dense", {"i": 4, "o": 6}, [[24, 6]]),
    ("dense", {"i": 1, "o": 6}, [[6, 6]]),
    ("conv1d", {"i": 4, "o": 6, "w": 3}, [[72, 6]]),
    ("conv2d", {"i": 4, "o": 6, "h": 3, "w": 5}, [[360, 6]]),
    ("conv3d", {"i": 4, "o": 6, "t": 2, "h": 3, "w": 5}, [[720, 6]]),
    ("grouped_conv2d", {"i": 4, "o": 6, "g": 2, "h": 3, "w": 3}, [[108, 6]]),
    ("depthwise_conv2d", {"c": 5, "m": 2, "h": 3, "w": 3}, [[90, 10]]),
    ("conv_transpose1d", {"i": 4, "o": 6, "w": 3}, [[72, 6]]),
    ("conv_transpose2d", {"i": 4, "o": 6, "h": 3, "w": 5}, [[360, 6]]),
    ("grouped_conv_transpose2d", {"i": 4, "o": 6, "g": 2, "h": 3, "w": 3}, [[108, 6]]),
    ("embedding", {"v": 7, "d": 4}, [[28, 7]]),
    ("attention", {"i": 12, "h": 3, "d": 4, "o": 12}, [[576, 48]]),
    ("einsum", {"i": 5, "h": 2, "d": 3}, [[30, 6]]),
    ("lstm", {"i": 3, "o": 4}, [[112, 32]]),
    ("gru", {"i": 3, "o": 4}, [[84, 24]]),
    ("rnn", {"i": 3, "o": 4}, [[28, 8]]),
    ("bilinear", {"i": 3, "j": 5, "o": 4}, [[60, 4]]),
    ("hf_conv1d", {"i": 5, "o": 6}, [[30, 6]]),
    ("layer_norm", {"o": 6}, [[0, 0]]),
    ("class_token", {"d": 6}, [[0, 0]]),
    ("temperature", {"h": 6}, [[0, 0]]),
    ("stacked_dense", {"l": 3, "i": 4, "o": 5}, [[60, 15], [75, 18]]),
]


def layer_plans() -> list[dict[str, Any]]:
    """Return one L0 vector for every kind of layer: its plan in the framework's own layer."""
    vectors = {
        "layer_norm": ["LayerPlan"],
        "class_token": ["VectorRefused", "VectorPerElement"],
        "temperature": ["VectorRefused", "VectorPerElement"],
    }
    unknown = vector(
        "L0-plan-unknown",
        5,
        "layer",
        ["UnitsGuessed"],
        "A parameter of a layer that nobody knows, of rank 3: an error that names it, never a guess.",
        layer={"kind": "unknown", "sizes": {"a": 2, "b": 3, "c": 4}},
        rule={},
        expect={"error": "AmbiguousUnitsError", "message": ["table", "(2, 3, 4)"]},
    )
    return [
        *(
            vector(
                f"L0-plan-{kind.replace('_', '-')}{'-of-one-input' if sizes.get('i') == 1 else ''}",
                5 if kind in vectors else 2,
                "layer",
                vectors.get(
                    kind, ["LayerPlan", "Squeeze"] if sizes.get("i") == 1 else ["LayerPlan"]
                ),
                f"The framework's own {kind} layer: elements and units of its weights; all else is whole.",
                layer={"kind": kind, "sizes": sizes},
                rule={},
                expect={"totals": totals},
            )
            for kind, sizes, totals in _PLANS
        ),
        unknown,
    ]
