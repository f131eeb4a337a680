"""Parameters of vectors: their axes, layouts and numbers.

Short data are written out; larger data are a recipe that any reader can follow
(:mod:`agc_conformance.data`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from agc.config import AGC
from agc.units import Units
from agc_conformance.data import decode_values, encode_numbers
from agc_conformance.generate.unit_table import Array, unit_table

__all__ = [
    "CONV1D",
    "CONV2D",
    "DENSE",
    "FEW",
    "WHOLE",
    "Data",
    "Layouts",
    "VectorParameter",
    "bias",
    "by_framework",
    "conv",
    "conv_transpose",
    "dense",
    "generated",
    "inline",
    "mixed",
    "mixed_bias",
    "mixed_dense",
    "overwritten",
    "rows",
    "small_model",
]

Data = dict[str, Any]
Layouts = Mapping[str, tuple[str, str]]
"""Framework to its stored order of axes and its units pattern; ``any`` stands for all three."""

FEW: Final = 100
"""Largest number of elements that is written out."""
_NEAR: Final = 2.0**-8
"""Relative distance to the limit within which only the vectors about ties test units."""


# -- layouts -------------------------------------------------------------------------------------


def by_framework(torch: tuple[str, str], flax: tuple[str, str], keras: tuple[str, str]) -> Layouts:
    """Return the layouts of a parameter that the frameworks store differently."""
    return {"torch": torch, "flax": flax, "keras": keras}


def conv(spatial: str) -> Layouts:
    """Return the layouts of a convolution with these spatial axes."""
    last = (f"{spatial} i o", "... i o -> o")
    return by_framework((f"o i {spatial}", "o i ... -> o"), last, last)


def conv_transpose(spatial: str) -> Layouts:
    """Return the layouts of a transposed convolution with these spatial axes."""
    return by_framework(
        (f"i o {spatial}", "i o ... -> o"),
        (f"{spatial} i o", "... i o -> o"),
        (f"{spatial} o i", "... o i -> o"),
    )


DENSE: Final = by_framework(("o i", "o i -> o"), ("i o", "i o -> o"), ("i o", "i o -> o"))
CONV1D: Final = conv("w")
CONV2D: Final = conv("h w")
WHOLE: Final[Layouts] = {"any": ("o", "... ->")}
"""Layouts of a bias or another vector that is one unit."""


# -- a parameter ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class VectorParameter:
    """A parameter of a vector.

    Attributes
    ----------
    name : str
        Name that patterns match.
    axes : mapping of str to int
        Canonical axes and their sizes.
    units : int
        Number of the first axes that name a unit.
    weight, gradient : dict or None
        Numbers as they stand in the file; ``None`` is a parameter without a gradient.
    layouts : mapping
        How the frameworks store it; empty if all store the canonical axes.
    gradient_dtype : str, optional
        Dtype of the gradient, if it is not the vector's.
    """

    name: str
    axes: Mapping[str, int]
    units: int
    weight: Data
    gradient: Data | None
    layouts: Layouts = field(default_factory=dict)
    gradient_dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape."""
        return tuple(self.axes.values())

    @property
    def pattern(self) -> Units:
        """Units of the canonical array."""
        return Units(self._canonical()[1])

    @property
    def weight_array(self) -> Array:
        """Weight in canonical axes, float64 or complex128."""
        return decode_values(self.weight, self.shape)

    @property
    def gradient_array(self) -> Array:
        """Dense gradient in canonical axes, float64 or complex128."""
        assert self.gradient is not None
        return decode_values(self.gradient, self.shape)

    def to_json(self) -> Data:
        """Return the parameter as it stands in a file."""
        layouts = self.layouts or {"any": self._canonical()}
        data: Data = {
            "name": self.name,
            "axes": dict(self.axes),
            "units": self.units,
            "layouts": {framework: list(layout) for framework, layout in layouts.items()},
            "weight": self.weight,
            "gradient": self.gradient,
        }
        if self.gradient_dtype:
            data["gradient_dtype"] = self.gradient_dtype
        return data

    def _canonical(self) -> tuple[str, str]:
        names = list(self.axes)
        stored = " ".join(names)
        return stored, f"{stored} -> {' '.join(names[: self.units])}".strip()


# -- numbers -------------------------------------------------------------------------------------


def inline(values: Any) -> Data:
    """Write values out."""
    array = np.asarray(values)
    if np.iscomplexobj(array):
        return {"real": encode_numbers(array.real), "imag": encode_numbers(array.imag)}
    return {"values": encode_numbers(array)}


def rows(indices: Sequence[int], values: Any) -> Data:
    """Write a row-sparse gradient: ``values[k]`` belongs to row ``indices[k]``."""
    return {"rows": list(indices), "values": encode_numbers(values)}


def generated(shape: Sequence[int], seed: int, exponent: int, spread: Sequence[int]) -> Data:
    """Return the recipe of :func:`~agc_conformance.data.splitmix_values`, or its values if few."""
    data: Data = {
        "splitmix64": {"seed": seed, "exponent": exponent, "spread": list(spread)},
    }
    return inline(decode_values(data, shape)) if math.prod(shape) <= FEW else data


def overwritten(data: Data, elements: Mapping[int, float]) -> Data:
    """Return values that are written out, with these flat elements replaced."""
    values = list(data["values"])
    for index, value in elements.items():
        [values[index]] = encode_numbers([value])
    return {"values": values}


# -- parameters ----------------------------------------------------------------------------------


def dense(weight: Any, gradient: Any, name: str = "weight") -> VectorParameter:
    """Return a dense weight of these numbers, ``(o, i)``; one row a unit."""
    o, i = np.asarray(weight).shape
    return VectorParameter(name, {"o": o, "i": i}, 1, inline(weight), inline(gradient), DENSE)


def bias(weight: Any, gradient: Any, name: str = "bias") -> VectorParameter:
    """Return a bias of these numbers; one unit."""
    axes = {"o": np.asarray(weight).size}
    return VectorParameter(name, axes, 0, inline(weight), inline(gradient), WHOLE)


def mixed(
    name: str, axes: Mapping[str, int], units: int, layouts: Layouts, seed: int
) -> VectorParameter:
    """Return a parameter with units above and units below the limit of the default rule.

    Scales differ along every axis, and no unit is near its limit.

    Raises
    ------
    AssertionError
        If no seed from ``seed`` on gives such numbers.
    """
    shape, rule = tuple(axes.values()), AGC()
    spread = [3 if axis < units else 2 if axis < units + 2 else 1 for axis in range(len(shape))]
    for attempt in range(200):
        weight = generated(shape, seed + 1000 * attempt, -6, spread)
        for exponent in range(-9, -17, -1):
            gradient = generated(shape, seed + 1000 * attempt + 500, exponent, spread)
            p = VectorParameter(name, axes, units, weight, gradient, layouts)
            count = math.prod(shape[:units])
            table = unit_table(p.gradient_array, p.weight_array, count, 0.01, rule)
            ratios = np.array(table["gradient_norm"]) / np.array(table["limit"])
            if _is_mixed(ratios) and np.abs(ratios - 1).min() > _NEAR:
                return p
    raise AssertionError(f"no mixed numbers for {name!r} {dict(axes)}")


def _is_mixed(ratios: Array) -> bool:
    """Tell whether 30 % to 80 % of the units are clipped, or the only unit, at most 50 times."""
    if len(ratios) == 1:
        return bool(1 < ratios[0] < 50)
    return bool(0.3 <= np.count_nonzero(ratios > 1) / len(ratios) <= 0.8)


def mixed_dense(seed: int, name: str = "weight", o: int = 4, i: int = 5) -> VectorParameter:
    """Return a dense weight of :func:`mixed` numbers."""
    return mixed(name, {"o": o, "i": i}, 1, DENSE, seed)


def mixed_bias(seed: int, name: str = "bias", o: int = 4) -> VectorParameter:
    """Return a bias of :func:`mixed` numbers."""
    return mixed(name, {"o": o}, 0, WHOLE, seed)


def small_model(seed: int) -> list[VectorParameter]:
    """Return a convolution and a head, each with its bias, of :func:`mixed` numbers."""
    return [
        mixed("conv.weight", {"o": 4, "i": 2, "h": 2, "w": 2}, 1, CONV2D, seed),
        mixed_bias(seed + 1, "conv.bias", 4),
        mixed_dense(seed + 2, "head.weight", 3, 4),
        mixed_bias(seed + 3, "head.bias", 3),
    ]
