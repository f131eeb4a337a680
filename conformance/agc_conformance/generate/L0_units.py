"""Units patterns: their meaning for a shape, and those that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agc.units import Units
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Units patterns"


def _accepted(
    name: str, pattern: str, shape: list[int], *, sizes: Mapping[str, int] | None = None
) -> Data:
    units = Units(pattern, **(sizes or {}))
    axes = units.bind(tuple(shape))
    return vector(
        f"L0-units-{name}",
        5 if units.whole else 2,
        "units",
        ["PatternParser"],
        f"{pattern!r} on {tuple(shape)}.",
        pattern=pattern,
        sizes=dict(sizes or {}),
        shape=shape,
        expect={
            "view": list(axes.view),
            "reduce": list(axes.reduce),
            "keep": list(axes.keep),
            "count": axes.count,
        },
    )


def _refused(
    name: str,
    pattern: str,
    shape: list[int],
    message: list[str],
    *,
    sizes: Mapping[str, int] | None = None,
) -> Data:
    return vector(
        f"L0-units-error-{name}",
        2,
        "units",
        ["PatternParser"],
        f"{pattern!r} on {tuple(shape)} is refused.",
        pattern=pattern,
        sizes=dict(sizes or {}),
        shape=shape,
        expect={"error": "UnitsError", "message": message},
    )


VECTORS: Final = [
    _accepted("dense", "o i -> o", [5, 6]),
    _accepted("dense-out-last", "i o -> o", [6, 5]),
    _accepted("conv", "o i ... -> o", [5, 4, 3, 2]),
    _accepted("conv-no-spatial-axis", "o i ... -> o", [5, 4]),
    _accepted("conv-out-last", "... i o -> o", [3, 2, 4, 5]),
    _accepted("depthwise", "... c m -> c m", [3, 3, 5, 2]),
    _accepted("whole", "... ->", [1, 2, 3]),
    _accepted("whole-scalar", "... ->", []),
    _accepted("ellipsis-kept", "... i -> ...", [2, 3, 4]),
    _accepted("split", "(g=2 i) o ... -> g o", [6, 5, 3, 3]),
    _accepted("split-by-size", "(g i) o ... -> g o", [6, 5, 3], sizes={"g": 3}),
    _accepted("split-three", "(a=2 b c=3) d -> a c", [12, 5]),
    _accepted("split-inferred-one", "(g=6 i) -> g", [6]),
    _accepted("fixed-size", "a=3 b -> b", [3, 4]),
    _accepted("every-axis", "a b -> b a", [2, 3]),
    _accepted("empty-array", "o i -> o", [0, 3]),
    _accepted("empty-fan-in", "o i -> o", [3, 0]),
    _accepted("size-one", "o i -> o", [5, 1]),
    _accepted("no-spaces", "o i...->o", [5, 4, 3]),
    _refused("no-arrow", "o i", [2, 3], ["->", "^"]),
    _refused("two-arrows", "o i -> o -> i", [2, 2], ["second", "^"]),
    _refused("twice-left", "o o -> o", [2, 2], ["twice", "^"]),
    _refused("twice-right", "o i -> o o", [2, 2], ["twice", "^"]),
    _refused("unknown-right", "o i -> k", [2, 2], ["'k'", "^"]),
    _refused("open-parenthesis", "(g i -> g", [4], ["closed", "^"]),
    _refused("close-parenthesis", "g i) -> g", [4, 2], ["opened", "^"]),
    _refused("nested", "((g i) o) -> g", [4], ["inside", "^"]),
    _refused("empty-parentheses", "() o -> o", [1, 4], ["empty", "^"]),
    _refused("parentheses-right", "g i -> (g i)", [4, 2], ["right", "^"]),
    _refused("ellipsis-in-parentheses", "(... i) -> i", [4], ["...", "^"]),
    _refused("two-ellipses", "... i ... -> i", [4], ["twice", "^"]),
    _refused("size-zero", "o=0 i -> o", [4, 2], ["positive", "^"]),
    _refused("size-right", "o i -> o=2", [2, 2], ["left", "^"]),
    _refused("character", "o, i -> o", [2, 2], ["','", "^"]),
    _refused("rank", "o i -> o", [2, 3, 4], ["(2, 3, 4)"]),
    _refused("rank-ellipsis", "o i k ... -> o", [2, 3], ["at least 3"]),
    _refused("not-divisible", "(g=4 i) o -> g o", [6, 5], ["divisible"]),
    _refused("open-split", "(g i) o -> g o", [6, 5], ["g=2"]),
    _refused("fixed-size-differs", "a=3 b -> b", [4, 4], ["3"]),
    _refused("size-unknown-axis", "o i -> o", [4, 4], ["g=2"], sizes={"g": 2}),
    _refused("size-contradicts", "(g=2 i) -> g", [6], ["contradicts"], sizes={"g": 3}),
]
