"""How a vector is put together: exact norms, expectations, and the cross-check with the reference.

Norms are summed exactly (``math.fsum``), so that the files come out the same on every machine; every
expectation must agree with :mod:`agc.reference`, or the generator stops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.config import AGC
from agc.plan import Parameter, Plan, make_plan
from agc.reference import RowSparse, adaptive_clip
from agc.units import Units
from agc_conformance.data import decode_values, encode_numbers

__all__ = [
    "FULL",
    "INLINE",
    "QUICK",
    "Array",
    "P",
    "clip_vector",
    "error_vector",
    "exact_norm",
    "expectation",
    "generated",
    "inline",
    "mixed",
    "plan_of",
    "rows",
    "vector",
]

Array = npt.NDArray[Any]
Data = dict[str, Any]

QUICK: Final = ["float32", "bfloat16"]
FULL: Final = ["float64", "float16"]
INLINE: Final = 100
"""Largest number of elements that is written out; larger data are generated."""
_NEAR: Final = 2.0**-8
"""Ratios this close to the limit are left to the vectors about ties."""


@dataclass(frozen=True)
class P:
    """A parameter of a vector: canonical axes (the first ``units`` name a unit), layouts, data."""

    name: str
    axes: Mapping[str, int]
    units: int
    weight: Data
    gradient: Data | None
    layouts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gradient_dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape."""
        return tuple(self.axes.values())

    @property
    def pattern(self) -> Units:
        """Units of the canonical array."""
        names = list(self.axes)
        return Units(f"{' '.join(names)} -> {' '.join(names[: self.units])}")

    def json(self) -> dict[str, Any]:
        """Return the parameter as it stands in a file."""
        names = list(self.axes)
        layouts = self.layouts or {
            "any": [
                " ".join(names),
                f"{' '.join(names)} -> {' '.join(names[: self.units])}".strip(),
            ]
        }
        out: dict[str, Any] = {
            "name": self.name,
            "axes": dict(self.axes),
            "units": self.units,
            "layouts": {key: list(value) for key, value in layouts.items()},
            "weight": self.weight,
            "gradient": self.gradient,
        }
        if self.gradient_dtype:
            out["gradient_dtype"] = self.gradient_dtype
        return out


def inline(values: Any) -> Data:
    """Write values out."""
    array = np.asarray(values)
    if np.iscomplexobj(array):
        return {"real": encode_numbers(array.real), "imag": encode_numbers(array.imag)}
    return {"values": encode_numbers(array)}


def rows(indices: Sequence[int], values: Any) -> Data:
    """Write a row-sparse gradient."""
    return {"rows": list(indices), "values": encode_numbers(values)}


def generated(
    shape: Sequence[int], seed: int, exponent: int, spread: Sequence[int], **more: Any
) -> Data:
    """Generate values; small ones are written out."""
    recipe = {"seed": seed, "exponent": exponent, "spread": list(spread)}
    data: Data = {"splitmix64": recipe, **more}
    return inline(decode_values(data, shape)) if math.prod(shape) <= INLINE else data


def exact_norm(values: Array) -> float:
    """L2 norm, correctly rounded up to the last square root, the same on every machine."""
    flat = np.abs(np.concatenate([values.real.ravel(), values.imag.ravel()]).astype(np.float64))
    if np.isnan(flat).any():
        return math.nan
    largest = float(np.max(flat, initial=0.0))
    if largest == 0 or math.isinf(largest):
        return largest
    power = math.frexp(largest)[1]
    scaled = np.ldexp(flat, -power)
    return math.ldexp(math.sqrt(math.fsum((scaled * scaled).tolist())), power)


def plan_of(parameters: Iterable[P], rule: AGC) -> Plan:
    """Make the plan on canonical arrays."""
    return make_plan([Parameter(p.name, p.shape, p.pattern) for p in parameters], rule)


def _sparse(data: Data, shape: tuple[int, ...]) -> RowSparse:
    found = np.array(data["rows"], np.int64)
    return RowSparse(found, decode_values(data, (len(found), *shape[1:])), shape)


def expectation(
    parameters: Sequence[P], rule: AGC, *, step: int = 0, stats: bool = False
) -> dict[str, Any]:
    """Return what is expected of a problem, checked against the float64 reference."""
    plan = plan_of(parameters, rule)
    weights = {p.name: decode_values(p.weight, p.shape) for p in parameters}
    gradients: dict[str, Array | RowSparse | None] = {}
    for p in parameters:
        if p.gradient is None:
            gradients[p.name] = None
        elif "rows" in p.gradient:
            gradients[p.name] = _sparse(p.gradient, p.shape)
        else:
            gradients[p.name] = decode_values(p.gradient, p.shape)
    result = adaptive_clip(weights, gradients, plan, rule, step=step)
    out: dict[str, Any] = {}
    for p in parameters:
        gradient, entry = gradients[p.name], plan[p.name]
        threshold = entry.threshold(step)
        if gradient is None:
            out[p.name] = "absent"
        elif threshold is None:
            out[p.name] = "untouched"
        else:
            weight = weights[p.name]
            found: dict[str, Any] = {}
            if isinstance(gradient, RowSparse):
                gradient = gradient.coalesce()
                found["rows"] = gradient.indices.tolist()
                dense = gradient.values
                weight = weight if entry.units.whole else weight[gradient.indices]
                count = 1 if entry.units.whole else len(gradient.indices)
            else:
                dense, count = gradient, entry.count
            found |= _units(dense, weight, count, threshold, rule)
            _agrees(p.name, found, result.clipped[p.name])
            if dense.size <= INLINE and "splitmix64" not in (p.gradient or {}):
                found |= _clipped(found, dense, count, rule)
            out[p.name] = found
    expect: dict[str, Any] = {"gradients": out}
    if stats:
        expect["stats"] = {
            name: {
                "units": one.units,
                "clipped": one.clipped,
                "nonfinite": one.nonfinite,
                "max_ratio": encode_numbers([one.max_ratio])[0],
                "min_scale": encode_numbers([one.min_scale])[0],
            }
            for name, one in result.stats.items()
        }
    return expect


def _units(
    gradient: Array, weight: Array, count: int, clipping: float, rule: AGC
) -> dict[str, Any]:
    """Norms, limits and actions of every unit (AGC-1, AGC-2, AGC-4)."""
    g = gradient.reshape(count, -1) if count else gradient.reshape(0, 1)
    w = weight.reshape(count, -1) if count else weight.reshape(0, 1)
    table: list[tuple[float, float, float, float, str]] = []
    for gradient_row, weight_row in zip(g, w, strict=True):
        gn, wn = exact_norm(gradient_row), exact_norm(weight_row)
        limit = clipping * max(wn, rule.eps) if not math.isnan(wn) else math.nan
        if not (math.isfinite(gn) and math.isfinite(wn)):
            table.append((wn, gn, limit, 1.0, "nonfinite"))
        elif gn > limit:
            table.append((wn, gn, limit, limit / gn, "clip"))
        else:
            table.append((wn, gn, limit, 1.0, "keep"))
    columns = list(zip(*table, strict=True)) or [()] * 5
    names = ("weight_norm", "gradient_norm", "limit", "scale")
    found: dict[str, Any] = {
        name: encode_numbers(column) for name, column in zip(names, columns[:4], strict=True)
    }
    found["action"] = list(columns[4])
    return found


def _clipped(found: dict[str, Any], gradient: Array, count: int, rule: AGC) -> dict[str, Any]:
    """Return the clipped gradient, for readers that do not want to multiply."""
    view = gradient.reshape(count, -1).copy() if count else gradient.reshape(0, 1)
    for unit, (scale, action) in enumerate(zip(found["scale"], found["action"], strict=True)):
        if action == "clip":
            view[unit] *= scale
        elif action == "nonfinite":
            view[unit] = 0.0 if rule.nonfinite == "zero" else math.nan
    return {"gradient": inline(view)}


def _agrees(name: str, found: dict[str, Any], reference: Any) -> None:
    """Stop unless the reference says the same."""
    action = np.array(found["action"])
    same = np.array_equal(action == "clip", reference.clipped.ravel())
    same &= np.array_equal(action == "nonfinite", reference.nonfinite.ravel())
    good = action != "nonfinite"
    for key in ("weight_norm", "gradient_norm", "limit", "scale"):
        want = np.array([value if isinstance(value, int | float) else 0 for value in found[key]])
        have = getattr(reference, key).ravel()
        same &= bool(np.allclose(have[good], want[good], rtol=1e-13, atol=0))
    if not same:
        raise AssertionError(f"the expectation of {name!r} and agc.reference disagree: {found}")


def mixed(
    name: str,
    axes: Mapping[str, int],
    units: int,
    layouts: Mapping[str, Sequence[str]],
    seed: int,
    *,
    clipping: float = 0.01,
) -> P:
    """Return a parameter whose scales differ on every axis, some units above the limit and some below."""
    shape = tuple(axes.values())
    spread = [3 if axis < units else 2 if axis < units + 2 else 1 for axis in range(len(shape))]
    for attempt in range(200):
        s = seed + 1000 * attempt
        weight = generated(shape, s, -6, spread)
        for exponent in range(-9, -17, -1):
            gradient = generated(shape, s + 500, exponent, spread)
            p = P(name, axes, units, weight, gradient, layouts)
            g, w = (decode_values(data, shape) for data in (gradient, weight))
            found = _units(g, w, math.prod(shape[:units]), clipping, AGC())
            ratios = np.array(found["gradient_norm"]) / np.array(found["limit"])
            clipped = found["action"].count("clip")
            some = clipped == 1 if len(ratios) == 1 else 0.3 <= clipped / len(ratios) <= 0.8
            if some and np.abs(ratios - 1).min() > _NEAR and (len(ratios) > 1 or ratios[0] < 50):
                return p
    raise AssertionError(f"no data found for {name!r} {dict(axes)}")


def vector(
    id: str,  # noqa: A002
    clause: int | str,
    kind: str,
    flags: Sequence[str],
    comment: str,
    **body: Any,
) -> dict[str, Any]:
    """Put the head of a vector before its body."""
    return {
        "id": id,
        "clause": clause if isinstance(clause, str) else f"AGC-{clause}",
        "level": id[:2],
        "kind": kind,
        "flags": sorted(set(flags)),
        "comment": comment,
        **body,
    }


def clip_vector(
    id: str,  # noqa: A002
    clause: int,
    flags: Sequence[str],
    comment: str,
    parameters: Sequence[P],
    *,
    rule: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = QUICK,
    full: Sequence[str] = FULL,
    step: int = 0,
    stats: bool = False,
    expect_from: Sequence[P] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a vector that clips once.

    ``more`` may say ``scenario`` and ``settings``; ``expect_from`` are the parameters that the answer is
    computed from, where the scenario changes the gradients first.
    """
    agc_rule = AGC.from_dict(rule or {})
    return vector(
        id,
        clause,
        "scenario" if "scenario" in more else "clip",
        flags,
        comment,
        dtypes=list(dtypes),
        full_dtypes=list(full),
        **more,
        rule=dict(rule or {}),
        step=step,
        parameters=[p.json() for p in parameters],
        expect=expectation(expect_from or parameters, agc_rule, step=step, stats=stats),
    )


def error_vector(
    id: str,  # noqa: A002
    clause: int,
    flags: Sequence[str],
    comment: str,
    parameters: Sequence[P],
    error: str,
    message: Sequence[str],
    *,
    rule: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = ("float32",),
) -> dict[str, Any]:
    """Return a vector that must be refused with an error of this class whose message names these."""
    return vector(
        id,
        clause,
        "clip",
        flags,
        comment,
        dtypes=list(dtypes),
        full_dtypes=[],
        rule=dict(rule or {}),
        step=0,
        parameters=[p.json() for p in parameters],
        expect={"error": error, "message": list(message)},
    )
