"""Building a vector: its head, its body, and its expectation.

Every expectation must agree with :mod:`agc.reference`, or nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from agc.config import AGC
from agc.plan import Parameter, Plan, make_plan
from agc.reference import RowSparse, adaptive_clip
from agc_conformance.data import decode_values, encode_numbers
from agc_conformance.generate.parameters import FEW, Data, VectorParameter, inline
from agc_conformance.generate.unit_table import Array, clipped_gradient, unit_table

__all__ = [
    "FLOAT32_AND_FLOAT64",
    "IN_EVERY_DTYPE",
    "clip_vector",
    "error_vector",
    "expectation",
    "plan_of",
    "vector",
]

IN_EVERY_DTYPE: Final[dict[str, Any]] = {
    "dtypes": ["float32", "bfloat16", "float16", "float64"],
    "full_dtypes": [],
}
"""Arguments of a vector that runs in every dtype each time."""
FLOAT32_AND_FLOAT64: Final[dict[str, Any]] = {"dtypes": ["float32"], "full_dtypes": ["float64"]}
"""Arguments of a vector that runs in float32 and, with ``--full``, in float64."""


def vector(
    name: str,
    clause: int | str,
    kind: str,
    flags: Sequence[str],
    comment: str,
    **body: Any,
) -> Data:
    """Put the head of a vector before its body.

    Parameters
    ----------
    name : str
        Its id, which starts with the level.
    clause : int or str
        Clause of the specification; a number is AGC's.
    kind : str
        Kind of question.
    flags : sequence of str
        Bug classes that it catches.
    comment : str
        Purpose of the vector, in one sentence.
    **body
        Further fields, in the order of the file.
    """
    return {
        "id": name,
        "clause": clause if isinstance(clause, str) else f"AGC-{clause}",
        "level": name[:2],
        "kind": kind,
        "flags": sorted(set(flags)),
        "comment": comment,
        **body,
    }


def clip_vector(
    name: str,
    clause: int,
    flags: Sequence[str],
    comment: str,
    parameters: Sequence[VectorParameter],
    *,
    rule: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    full_dtypes: Sequence[str] = ("float64", "float16"),
    step: int = 0,
    stats: bool = False,
    scenario: str | None = None,
    settings: Mapping[str, Any] | None = None,
    expect_from: Sequence[VectorParameter] | None = None,
) -> Data:
    """Return a vector that clips once.

    Parameters
    ----------
    name, clause, flags, comment
        See :func:`vector`.
    parameters : sequence of VectorParameter
        Weights and gradients.
    rule : mapping, optional
        Differences from the default rule.
    dtypes, full_dtypes : sequence of str
        Dtypes to run in each time, and those added by ``--full``.
    step : int
        Optimizer step, for schedules.
    stats : bool
        Whether telemetry is expected as well.
    scenario, settings : str and mapping, optional
        The setting of real training to clip in.
    expect_from : sequence of VectorParameter, optional
        Parameters to compute the answer from, if the scenario changes the gradients first.
    """
    setting = {} if scenario is None else {"scenario": scenario, "settings": dict(settings or {})}
    return vector(
        name,
        clause,
        "scenario" if setting else "clip",
        flags,
        comment,
        dtypes=list(dtypes),
        full_dtypes=list(full_dtypes),
        **setting,
        rule=dict(rule or {}),
        step=step,
        parameters=[p.to_json() for p in parameters],
        expect=expectation(
            expect_from or parameters, AGC.from_dict(rule or {}), step=step, stats=stats
        ),
    )


def error_vector(
    name: str,
    clause: int,
    flags: Sequence[str],
    comment: str,
    parameters: Sequence[VectorParameter],
    error: str,
    message: Sequence[str],
    *,
    rule: Mapping[str, Any] | None = None,
) -> Data:
    """Return a vector that must be refused.

    Parameters
    ----------
    name, clause, flags, comment, parameters, rule
        See :func:`clip_vector`.
    error : str
        Class of the error.
    message : sequence of str
        Words that its message must contain.
    """
    return vector(
        name,
        clause,
        "clip",
        flags,
        comment,
        dtypes=["float32"],
        full_dtypes=[],
        rule=dict(rule or {}),
        step=0,
        parameters=[p.to_json() for p in parameters],
        expect={"error": error, "message": list(message)},
    )


# -- expectations --------------------------------------------------------------------------------


def plan_of(parameters: Iterable[VectorParameter], rule: AGC) -> Plan:
    """Make the plan on canonical arrays."""
    return make_plan([Parameter(p.name, p.shape, p.pattern) for p in parameters], rule)


def expectation(
    parameters: Sequence[VectorParameter], rule: AGC, *, step: int = 0, stats: bool = False
) -> Data:
    """Return the expected results of a problem.

    Raises
    ------
    AssertionError
        If the float64 reference disagrees.
    """
    plan = plan_of(parameters, rule)
    weights = {p.name: p.weight_array for p in parameters}
    gradients = {p.name: _gradient(p) for p in parameters}
    reference = adaptive_clip(weights, gradients, plan, rule, step=step)
    expected: Data = {}
    for p in parameters:
        gradient, threshold = gradients[p.name], plan[p.name].threshold(step)
        if gradient is None:
            expected[p.name] = "absent"
        elif threshold is None:
            expected[p.name] = "untouched"
        else:
            expected[p.name] = _expected_units(p, gradient, weights[p.name], plan, threshold, rule)
            _check_against_reference(p.name, expected[p.name], reference.clipped[p.name])
    if not stats:
        return {"gradients": expected}
    return {
        "gradients": expected,
        "stats": {
            name: {
                "units": counts.units,
                "clipped": counts.clipped,
                "nonfinite": counts.nonfinite,
                "max_ratio": encode_numbers([counts.max_ratio])[0],
                "min_scale": encode_numbers([counts.min_scale])[0],
            }
            for name, counts in reference.stats.items()
        },
    }


def _gradient(p: VectorParameter) -> Array | RowSparse | None:
    if p.gradient is None:
        return None
    if "rows" not in p.gradient:
        return p.gradient_array
    indices = np.array(p.gradient["rows"], np.int64)
    return RowSparse(indices, decode_values(p.gradient, (len(indices), *p.shape[1:])), p.shape)


def _expected_units(
    p: VectorParameter,
    gradient: Array | RowSparse,
    weight: Array,
    plan: Plan,
    threshold: float,
    rule: AGC,
) -> Data:
    """Return rows of a sparse gradient, the table of units and, if short, the clipped gradient."""
    expected: Data = {}
    entry = plan[p.name]
    count = entry.count
    if isinstance(gradient, RowSparse):
        coalesced = gradient.coalesce()
        expected["rows"] = coalesced.indices.tolist()
        gradient = coalesced.values
        if not entry.units.whole:
            weight, count = weight[coalesced.indices], len(coalesced.indices)
    units = unit_table(gradient, weight, count, threshold, rule)
    expected |= units
    if gradient.size <= FEW and "splitmix64" not in (p.gradient or {}):
        expected["gradient"] = inline(clipped_gradient(units, gradient, count, rule))
    return expected


def _check_against_reference(name: str, expected: Data, reference: Any) -> None:
    """Raise AssertionError unless the reference agrees."""
    action = np.array(expected["action"])
    same = np.array_equal(action == "clip", reference.clipped.ravel())
    same &= np.array_equal(action == "nonfinite", reference.nonfinite.ravel())
    finite = action != "nonfinite"
    for key in ("weight_norm", "gradient_norm", "limit", "scale"):
        want = np.array([value if isinstance(value, int | float) else 0 for value in expected[key]])
        have = getattr(reference, key).ravel()
        same &= bool(np.allclose(have[finite], want[finite], rtol=1e-13, atol=0))
    if not same:
        raise AssertionError(f"{name!r}: this expectation and agc.reference disagree: {expected}")
