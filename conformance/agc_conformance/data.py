"""Numbers in vectors: how they are written, generated and laid out.

Data of a parameter is one of

``{"values": [1.0, "NaN", ...]}``
    every element, in C order of the canonical axes; NaN and infinities are strings;
``{"real": [...], "imag": [...]}``
    the same for complex numbers;
``{"splitmix64": {"seed": 7, "exponent": -4, "spread": [2, 1]}}``
    generated, see :func:`splitmix_values`;
``{"rows": [4, 0, 4], "values": [...]}``
    a row-sparse gradient: rows and, row after row, their values.

``"set": [[index, value], ...]`` beside them overwrites single elements (flat index), and
``"shape": [...]`` replaces the shape, in vectors that need a wrong one.

The canonical axes of a parameter are elementary (nothing fused) and in a fixed order, unit axes
first. A layout says how a framework stores them: ``"h w (g i) o"`` transposes and fuses; an axis of
size 1 may be left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from agc.errors import FormatError

__all__ = [
    "decode_numbers",
    "decode_rule",
    "decode_values",
    "dtype_of",
    "encode_numbers",
    "from_layout",
    "layout_shape",
    "splitmix64",
    "splitmix_values",
    "to_layout",
]

Array = npt.NDArray[Any]

_SPECIAL: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TOKEN: Final = re.compile(r"\(([^()]*)\)|(\w+)")


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def encode_numbers(values: Any) -> list[Any]:
    """Return a flat list of JSON numbers that read back as the same float64 values."""
    out: list[Any] = []
    for value in np.asarray(values, np.float64).ravel().tolist():
        if math.isnan(value):
            out.append("NaN")
        elif math.isinf(value):
            out.append("Infinity" if value > 0 else "-Infinity")
        elif value == int(value) and abs(value) < 2**53 and str(value) != "-0.0":
            out.append(int(value))  # -0.0 would lose its sign
        else:
            out.append(value)
    return out


def decode_numbers(values: Sequence[Any]) -> Array:
    """Return the float64 array of a flat list made by :func:`encode_numbers`."""
    try:
        return np.array(
            [_SPECIAL[value] if isinstance(value, str) else float(value) for value in values],
            np.float64,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a list of numbers: {error!r}") from None


def decode_rule(data: Any) -> Any:
    """Return a rule's data with NaN and infinities as numbers."""
    if isinstance(data, Mapping):
        return {key: decode_rule(value) for key, value in data.items()}
    return _SPECIAL[data] if isinstance(data, str) and data in _SPECIAL else data


def splitmix64(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the first ``count`` outputs of SplitMix64 (Steele, Lea, Flood 2014).

    Output ``k`` (from 0) is ``mix(seed + (k + 1) * 0x9E3779B97F4A7C15)`` modulo 2**64, where
    ``mix(z)`` is ``z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9``, then
    ``z = (z ^ (z >> 27)) * 0x94D049BB133111EB``, then ``z ^ (z >> 31)``.

    Examples
    --------
    >>> [hex(value) for value in splitmix64(0, 2).tolist()]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def splitmix_values(
    shape: Sequence[int], *, seed: int, exponent: int, spread: Sequence[int]
) -> Array:
    """Generate values that differ in scale along every axis and are exact in every dtype.

    Parameters
    ----------
    shape : sequence of int
        Canonical shape.
    seed, exponent : int
        Seed and binary exponent.
    spread : sequence of int
        For every axis, the exponent of the largest power of two that scales its indices.

    Returns
    -------
    array of float64
        Element ``k`` (C order) with index ``(j_0, j_1, ...)`` is
        ``sign * m * 2**(exponent + sum_a e_a(j_a))``. With ``r = splitmix64(seed)[k]``,
        ``m = 1 + r % 16`` and ``sign`` is -1 if bit 4 of ``r`` is set. With
        ``q = splitmix64(seed + 1 + a)[j_a]``, ``e_a = (q >> 32) % (spread[a] + 1)``.

    Examples
    --------
    >>> splitmix_values((2, 2), seed=1, exponent=0, spread=(3, 1))
    array([[  8.,  32.],
           [-15.,  12.]])
    """
    r = splitmix64(seed, math.prod(shape)).reshape(tuple(shape))
    power = np.full(tuple(shape), exponent, np.int64)
    for axis, (size, most) in enumerate(zip(shape, spread, strict=True)):
        q = splitmix64(seed + 1 + axis, size)
        step = ((q >> np.uint64(32)) % np.uint64(most + 1)).astype(np.int64)
        power += step.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    sign = np.where(r & np.uint64(16), -1.0, 1.0)
    return np.asarray(np.ldexp(sign * (1 + (r % np.uint64(16)).astype(np.float64)), power))


def decode_values(data: Mapping[str, Any], shape: Sequence[int]) -> Array:
    """Return a parameter's data as float64 or complex128, in canonical shape."""
    shape = tuple(data.get("shape", shape))
    if "splitmix64" in data:
        array = splitmix_values(shape, **data["splitmix64"])
    elif "real" in data:
        array = decode_numbers(data["real"]) + 1j * decode_numbers(data["imag"])
    else:
        array = decode_numbers(data["values"])
    if array.size != math.prod(shape):
        raise FormatError(f"{array.size} values do not fill the shape {shape}")
    array = array.reshape(-1)
    for index, value in data.get("set", ()):
        array[index] = decode_numbers([value])[0]
    return array.reshape(shape)


def _groups(stored: str, axes: Mapping[str, int]) -> list[list[str]]:
    groups = [(fused or single).split() for fused, single in _TOKEN.findall(stored)]
    named = [name for group in groups for name in group]
    left_out = [name for name in axes if name not in named]
    if sorted(set(named)) != sorted(named) or not set(named) <= set(axes):
        raise FormatError(f"layout {stored!r} does not name the axes {list(axes)} once each")
    if any(axes[name] != 1 for name in left_out):
        raise FormatError(f"layout {stored!r} leaves out axes {left_out} of {dict(axes)}")
    return groups


def layout_shape(stored: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that a framework stores.

    Examples
    --------
    >>> layout_shape("h w (g i) o", {"g": 2, "o": 5, "i": 3, "h": 7, "w": 9})
    (7, 9, 6, 5)
    """
    return tuple(math.prod(axes[name] for name in group) for group in _groups(stored, axes))


def _order(stored: str, axes: Mapping[str, int]) -> list[int]:
    names = list(axes)
    named = [name for group in _groups(stored, axes) for name in group]
    return [names.index(name) for name in named + [n for n in names if n not in named]]


def to_layout(array: Array, stored: str, axes: Mapping[str, int]) -> Array:
    """Rearrange a canonical array into the layout that a framework stores."""
    moved = array.reshape(tuple(axes.values())).transpose(_order(stored, axes))
    return np.ascontiguousarray(moved).reshape(layout_shape(stored, axes))


def from_layout(array: Array, stored: str, axes: Mapping[str, int]) -> Array:
    """Rearrange a stored array back into the canonical one; the inverse of :func:`to_layout`."""
    order = _order(stored, axes)
    sizes = list(axes.values())
    back = [order.index(axis) for axis in range(len(order))]
    return np.ascontiguousarray(array.reshape([sizes[axis] for axis in order]).transpose(back))
