"""Binding: the same numbers, handed to each backend in its own layout and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.backend import Problem
from agc.config import AGC
from agc.reference import RowSparse
from agc.units import Units
from agc_conformance.data import (
    decode_numbers,
    decode_values,
    dtype_of,
    from_layout,
    layout_shape,
    to_layout,
)
from agc_conformance.vectors import Vector

__all__ = ["Bound", "Laid", "bind", "decode_rule"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Laid:
    """A vector in one layout."""

    vector: Vector
    layout: str

    def parameter(self, name: str) -> Mapping[str, Any]:
        """Return the vector's own description of a parameter."""
        found: Mapping[str, Any] = next(
            p for p in self.vector.data["parameters"] if p["name"] == name
        )
        return found

    def stored(self, name: str, data: Mapping[str, Any], dtype: str) -> Array | RowSparse:
        """Return data of a parameter as this layout stores them."""
        p = self.parameter(name)
        axes, (stored, _) = p["axes"], _layout(p, self.layout)
        if "rows" in data:
            shape = layout_shape(stored, axes)
            indices = np.array(data["rows"], np.int64)
            values = decode_values(data, (len(indices), *shape[1:]))
            return RowSparse(indices, values.astype(dtype_of(dtype)), shape)
        array = decode_values(data, tuple(axes.values())).astype(dtype_of(dtype))
        return array if "shape" in data else to_layout(array, stored, axes)

    def canonical(self, name: str, array: Array) -> Array:
        """Return a stored array in canonical axes; as it is if its shape is wrong."""
        p = self.parameter(name)
        stored, _ = _layout(p, self.layout)
        if tuple(array.shape) != layout_shape(stored, p["axes"]):
            return array
        return from_layout(array, stored, p["axes"])

    def units(self, name: str) -> Units:
        """Return the units of a parameter in this layout."""
        return Units(_layout(self.parameter(name), self.layout)[1])

    def examples(self, name: str, data: Mapping[str, Any], count: int, dtype: str) -> Array:
        """Return one array a parameter for each of so many examples, along a new first axis."""
        p = self.parameter(name)
        axes = {"example": count, **p["axes"]}
        array = decode_values(data, tuple(axes.values())).astype(dtype_of(dtype))
        return to_layout(array, f"example {_layout(p, self.layout)[0]}".strip(), axes)


@dataclass(frozen=True)
class Bound(Laid):
    """A vector of AGC in one layout and dtype.

    Attributes
    ----------
    problem : Problem
        For the backend.
    dtype : str
        Dtype of the gradients.
    """

    problem: Problem
    dtype: str


def _layout(p: Mapping[str, Any], layout: str) -> tuple[str, str]:
    stored, pattern = p["layouts"].get(layout) or p["layouts"]["any"]
    return stored, pattern


def decode_rule(data: Any) -> Any:
    """Return a rule's data with NaN and infinities as numbers."""
    if isinstance(data, Mapping):
        return {key: decode_rule(value) for key, value in data.items()}
    if isinstance(data, str) and data in ("NaN", "Infinity", "-Infinity"):
        return float(decode_numbers([data])[0])
    return data


def bind(vector: Vector, layout: str, dtype: str) -> Bound:
    """Lay a vector's parameters and gradients out.

    Parameters
    ----------
    vector : Vector
        Of kind ``clip``, ``trajectory`` or ``scenario``.
    layout : {"torch", "flax", "keras"}
        The backend's.
    dtype : str
        ``gradient``, or ``gradient/weight`` if the two differ.
    """
    gradient_dtype, _, weight_dtype = dtype.partition("/")
    weight_dtype = weight_dtype or gradient_dtype
    laid = Laid(vector, layout)
    weights: dict[str, Array] = {}
    gradients: dict[str, Any] = {}
    units: dict[str, Units] = {}
    for p in vector.data["parameters"]:
        name = p["name"]
        weight = laid.stored(name, p["weight"], weight_dtype)
        assert not isinstance(weight, RowSparse)
        weights[name] = weight
        kind = p.get("gradient_dtype", gradient_dtype)
        gradients[name] = None if p["gradient"] is None else laid.stored(name, p["gradient"], kind)
        units[name] = laid.units(name)
    step = vector.data.get("step", 0)
    rule = AGC.from_dict(decode_rule(vector.data["rule"]))
    problem = Problem(rule, weights, gradients, units, step)
    return Bound(vector, layout, problem, gradient_dtype)
