"""Layouts: the same numbers, stored as each framework stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.reference import RowSparse
from agc.units import Units
from agc_conformance.data import (
    decode_values,
    dtype_of,
    from_layout,
    layout_shape,
    to_layout,
)
from agc_conformance.vectors import Vector

__all__ = ["Layout", "StoredParameter", "layout_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredParameter:
    """How one parameter of a vector is stored.

    Attributes
    ----------
    axes : mapping of str to int
        Canonical axes and their sizes, unit axes first.
    axes_stored : str
        The axes as they are stored, fused ones in parentheses.
    units : Units
        Units of the stored array.
    """

    axes: Mapping[str, int]
    axes_stored: str
    units: Units

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape."""
        return tuple(self.axes.values())


@dataclass(frozen=True)
class Layout:
    """How a backend stores the parameters of a vector.

    Attributes
    ----------
    parameters : mapping of name to StoredParameter
        In the order of the vector.
    """

    parameters: Mapping[str, StoredParameter]

    def stored(self, name: str, data: Mapping[str, Any], dtype: str) -> Array | RowSparse:
        """Return a parameter's data in the stored layout."""
        p = self.parameters[name]
        if "rows" in data:
            shape = layout_shape(p.axes_stored, p.axes)
            indices = np.array(data["rows"], np.int64)
            values = decode_values(data, (len(indices), *shape[1:]))
            return RowSparse(indices, values.astype(dtype_of(dtype)), shape)
        array = decode_values(data, p.shape).astype(dtype_of(dtype))
        return array if "shape" in data else to_layout(array, p.axes_stored, p.axes)

    def canonical(self, name: str, array: Array) -> Array:
        """Return a stored array in canonical axes; one of a wrong shape is not changed."""
        p = self.parameters[name]
        if tuple(array.shape) != layout_shape(p.axes_stored, p.axes):
            return array
        return from_layout(array, p.axes_stored, p.axes)

    def units(self) -> dict[str, Units]:
        """Return the units of every parameter."""
        return {name: p.units for name, p in self.parameters.items()}

    def examples(self, name: str, data: Mapping[str, Any], count: int, dtype: str) -> Array:
        """Return an array of a parameter's shape for each of ``count`` examples, along axis 0."""
        p = self.parameters[name]
        axes = {"example": count, **p.axes}
        array = decode_values(data, tuple(axes.values())).astype(dtype_of(dtype))
        return to_layout(array, f"example {p.axes_stored}".strip(), axes)


def layout_of(vector: Vector, layout: str) -> Layout:
    """Read how ``"torch"``, ``"flax"`` or ``"keras"`` stores the parameters of a vector."""
    parameters = {}
    for p in vector.data["parameters"]:
        stored, pattern = p["layouts"].get(layout) or p["layouts"]["any"]
        parameters[p["name"]] = StoredParameter(p["axes"], stored, Units(pattern))
    return Layout(parameters)
