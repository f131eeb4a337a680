"""Questions of level 0.

The core of this library is asked for configurations, units, plans and selections, and a backend for
the plans of its layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from agc.config import AGC, SAM
from agc.errors import UnitsWarning
from agc.plan import Parameter, Plan
from agc.units import UnitAxes, Units
from agc_conformance.backend import Backend, Layer
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.core.functions import Core
from agc_conformance.data import decode_rule
from agc_conformance.question import Kind
from agc_conformance.sharpness.problems import sam_rule
from agc_conformance.vectors import Vector
from agc_conformance.verdict import Verdict

__all__ = ["CORE_KINDS", "KINDS"]

Data = Mapping[str, Any]


def _parse(vector: Vector, layout: str, dtype: str) -> Data:  # noqa: ARG001
    """Return the vector's own data: plans depend on neither layout nor dtype."""
    return vector.data


def _core(backend: Backend) -> Core:
    """Return the backend's core, which a mutant replaces; this library's for other backends."""
    return backend.core if isinstance(backend, ReferenceBackend) else Core()


# --- configurations -------------------------------------------------------------------------------

Rule = AGC | SAM


def _config(read: Callable[[Core, Data], Rule]) -> Kind[Data, tuple[Rule, Rule]]:
    """Return a kind that reads a rule, and reads it again from its own data."""

    def answer(backend: Backend, data: Data) -> tuple[Rule, Rule]:
        core = _core(backend)
        rule = read(core, decode_rule(data["rule"]))
        return rule, read(core, rule.to_dict())

    return Kind(_parse, answer, _compare_config)


def _compare_config(data: Data, rules: tuple[Rule, Rule]) -> Verdict:
    (rule, again), want = rules, data["expect"]["rule"]
    have = rule.to_dict()
    if have != want:
        return Verdict(f"read as {have}, not {want}")
    if again != rule or hash(again) != hash(rule):
        return Verdict(f"{rule} became {again} on a round trip through a dict")
    return Verdict()


# --- units, plans and selections ------------------------------------------------------------------


def _units(backend: Backend, data: Data) -> UnitAxes:
    return _core(backend).units(data["pattern"], data["sizes"]).bind(tuple(data["shape"]))


def _compare_units(data: Data, axes: UnitAxes) -> Verdict:
    have = {
        "view": list(axes.view),
        "reduce": list(axes.reduce),
        "keep": list(axes.keep),
        "count": axes.count,
    }
    want = data["expect"]
    return Verdict("" if have == want else f"bound as {have}, not {want}")


def _plan(backend: Backend, data: Data) -> tuple[Plan, str]:
    """Return a plan and its warnings."""
    parameters = [
        Parameter(
            p["name"],
            tuple(p["shape"]),
            Units(p["units"]) if "units" in p else None,
            p.get("layout"),
        )
        for p in data["parameters"]
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnitsWarning)
        plan = _core(backend).plan(parameters, AGC.from_dict(data["rule"]), data["head"])
    return plan, " ".join(str(warning.message) for warning in caught)


def _compare_plan(data: Data, answer: tuple[Plan, str]) -> Verdict:
    (plan, warned), want = answer, data["expect"]
    have = {e.name: [e.count, e.clipping, e.excluded, e.source] for e in plan}
    if have != want["entries"]:
        return Verdict(f"planned {have}, not {want}")
    missing = [name for name in want.get("warned", ()) if repr(name) not in warned]
    if missing or (warned and not want.get("warned")):
        return Verdict(
            f"the warning about units should name {missing or 'nothing'}, it says: {warned!r}"
        )
    return Verdict()


def _select(backend: Backend, data: Data) -> list[str]:
    return list(_core(backend).perturbed(data["names"], sam_rule(data["rule"])))


def _compare_selection(data: Data, names: list[str]) -> Verdict:
    want = data["expect"]["names"]
    return Verdict("" if names == want else f"perturbs {names}, not {want}")


# --- layers ---------------------------------------------------------------------------------------


def _layer(backend: Backend, data: Data) -> Plan:
    layer = Layer(data["layer"]["kind"], data["layer"]["sizes"])
    return backend.layer_plan(layer, AGC.from_dict(data["rule"]))


def _compare_layer(data: Data, plan: Plan) -> Verdict:
    weights = [entry for entry in plan if not entry.units.whole]
    elements = sum(int(np.prod(entry.shape)) for entry in weights)
    have, want = [elements, sum(e.count for e in weights)], data["expect"]["totals"]
    if have in want:
        return Verdict()
    table = "; ".join(f"{e.name} {list(e.shape)} {e.units} ({e.count})" for e in plan)
    return Verdict(f"{have[0]} elements in {have[1]} units, not {want}: {table}")


CORE_KINDS: Final[dict[str, Kind[Any, Any]]] = {
    "config": _config(lambda core, data: core.config(data)),
    "sam-config": _config(lambda core, data: core.sam(data)),
    "sam-select": Kind(_parse, _select, _compare_selection),
    "units": Kind(_parse, _units, _compare_units),
    "plan": Kind(_parse, _plan, _compare_plan),
}
"""Kinds that test the core of this library and no backend."""

KINDS: Final[dict[str, Kind[Any, Any]]] = {
    **CORE_KINDS,
    "layer": Kind(_parse, _layer, _compare_layer),
}
"""Kinds of vectors by name."""
