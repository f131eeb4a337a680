"""Plans of the frameworks' own layers: how many elements of weights, in how many units."""

from __future__ import annotations

from typing import Final

from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Plans of the frameworks' own layers"

# Kind of layer, sizes, right totals [elements, units] of its weights. There are two totals where a
# framework may or may not count a stacked bias.
_LAYERS: Final[list[tuple[str, dict[str, int], list[list[int]]]]] = [
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
# Flags of layers whose parameters are all vectors (AGC-5).
_VECTORS_ONLY: Final = {
    "layer_norm": ["LayerPlan"],
    "class_token": ["VectorRefused", "VectorPerElement"],
    "temperature": ["VectorRefused", "VectorPerElement"],
}


def _layer(kind: str, sizes: dict[str, int], totals: list[list[int]]) -> Data:
    name, flags = kind.replace("_", "-"), _VECTORS_ONLY.get(kind, ["LayerPlan"])
    if sizes.get("i") == 1:
        name, flags = f"{name}-of-one-input", [*flags, "Squeeze"]
    return vector(
        f"L0-plan-{name}",
        5 if kind in _VECTORS_ONLY else 2,
        "layer",
        flags,
        f"The framework's own {kind} layer: elements and units of its weights; all else is whole.",
        layer={"kind": kind, "sizes": sizes},
        rule={},
        expect={"totals": totals},
    )


VECTORS: Final = [
    *(_layer(kind, sizes, totals) for kind, sizes, totals in _LAYERS),
    vector(
        "L0-plan-unknown",
        5,
        "layer",
        ["UnitsGuessed"],
        "A parameter of a layer that nobody knows, of rank 3: an error that names it, never a guess.",
        layer={"kind": "unknown", "sizes": {"a": 2, "b": 3, "c": 4}},
        rule={},
        expect={"error": "AmbiguousUnitsError", "message": ["table", "(2, 3, 4)"]},
    ),
]
