"""Expected results of every unit: norms, limit, scale and action.

Norms are summed exactly (``math.fsum``), so that the files come out the same on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.config import AGC
from agc_conformance.data import encode_numbers

__all__ = ["Array", "clipped_gradient", "exact_norm", "unit_table"]

Array = npt.NDArray[Any]


def unit_table(
    gradient: Array, weight: Array, count: int, clipping: float, rule: AGC
) -> dict[str, list[Any]]:
    """Return the columns of the table of units (AGC-1, AGC-2, AGC-4).

    Parameters
    ----------
    gradient, weight : array of float64 or complex128
        The first axes name a unit.
    count : int
        Number of units.
    clipping : float
        Threshold at this step.
    rule : AGC
        Gives ``eps``.

    Returns
    -------
    dict of str to list
        ``weight_norm``, ``gradient_norm``, ``limit`` and ``scale`` as JSON numbers; ``action`` is
        ``"clip"``, ``"keep"`` or ``"nonfinite"``.
    """
    table: list[tuple[float, float, float, float, str]] = []
    for gradient_row, weight_row in zip(
        _by_unit(gradient, count), _by_unit(weight, count), strict=True
    ):
        gradient_norm, weight_norm = exact_norm(gradient_row), exact_norm(weight_row)
        limit = clipping * max(weight_norm, rule.eps) if not math.isnan(weight_norm) else math.nan
        scale = 1.0
        if not (math.isfinite(gradient_norm) and math.isfinite(weight_norm)):
            action = "nonfinite"
        elif gradient_norm > limit:
            action, scale = "clip", limit / gradient_norm
        else:
            action = "keep"
        table.append((weight_norm, gradient_norm, limit, scale, action))
    *numbers, actions = list(zip(*table, strict=True)) or [()] * 5
    names = ("weight_norm", "gradient_norm", "limit", "scale")
    columns = {name: encode_numbers(column) for name, column in zip(names, numbers, strict=True)}
    return {**columns, "action": list(actions)}


def clipped_gradient(units: dict[str, list[Any]], gradient: Array, count: int, rule: AGC) -> Array:
    """Return the clipped gradient, one row for each unit.

    With it, a reader of the file need not multiply by the scales.

    Parameters
    ----------
    units : dict
        The table of :func:`unit_table`.
    gradient : array
        Gradient of any shape; the first axes name a unit.
    count : int
        Number of units.
    rule : AGC
        Gives the policy for non-finite units (AGC-4).
    """
    clipped = _by_unit(gradient, count).copy()
    for unit, (scale, action) in enumerate(zip(units["scale"], units["action"], strict=True)):
        if action == "clip":
            clipped[unit] *= scale
        elif action == "nonfinite":
            clipped[unit] = 0.0 if rule.nonfinite == "zero" else math.nan
    return clipped


def exact_norm(values: Array) -> float:
    """Return the L2 norm: the square root of the correctly rounded sum of squares."""
    magnitudes = np.abs(
        np.concatenate([values.real.ravel(), values.imag.ravel()]).astype(np.float64)
    )
    if np.isnan(magnitudes).any():
        return math.nan
    largest = float(np.max(magnitudes, initial=0.0))
    if largest == 0 or math.isinf(largest):
        return largest
    power = math.frexp(largest)[1]
    scaled = np.ldexp(magnitudes, -power)
    return math.ldexp(math.sqrt(math.fsum((scaled * scaled).tolist())), power)


def _by_unit(values: Array, count: int) -> Array:
    return values.reshape(count, -1) if count else values.reshape(0, 1)
