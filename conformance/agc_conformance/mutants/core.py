"""Mutants of the core: wrong configurations, units, plans and selections."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agc.config import AGC, SAM
from agc.errors import AGCError, AmbiguousUnitsError, SelectorError, UnitsError, UnitsWarning
from agc.plan import WHOLE, Parameter, Plan
from agc.schedule import Schedule
from agc.units import Units
from agc_conformance.core.functions import Core
from agc_conformance.mutants.mutant import registered

__all__: list[str] = []

_agc_mutant = registered("core")
_sam_mutant = registered("core", "SAM: ")

# -- AGC -----------------------------------------------------------------------------------------


@_agc_mutant("AcceptsBadConfig", "a bad value is replaced by the default")
class _LenientConfig(Core):
    """Accepts configurations that must be refused."""

    def config(self, data: Mapping[str, Any]) -> AGC:
        try:
            return super().config(data)
        except AGCError:
            return AGC()


@_agc_mutant("RoundTrip", "a schedule becomes its first value")
class _ForgetfulConfig(Core):
    def config(self, data: Mapping[str, Any]) -> AGC:
        rule = super().config(data)
        if isinstance(rule.clipping, Schedule):
            return replace(rule, clipping=rule.clipping(0))
        return rule


@_agc_mutant("WrongDefault", "eps = 1e-6")
class _OtherDefaults(Core):
    def config(self, data: Mapping[str, Any]) -> AGC:
        return super().config({"eps": 1e-6, **data})


@_agc_mutant("PatternParser", "what cannot be parsed is the whole tensor")
class _LenientParser(Core):
    def units(self, pattern: str, sizes: Mapping[str, int]) -> Units:
        try:
            return super().units(pattern, sizes)
        except UnitsError:
            return WHOLE


@_agc_mutant("UnverifiedPattern", "plans drop patterns that match nothing")
class _UnverifiedPlan(Core):
    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        try:
            return super().plan(parameters, rule, head)
        except SelectorError:
            return super().plan(parameters, AGC(), head)


@_agc_mutant("UnitsGuessed", "what nothing settles is one unit, without a word")
class _WholeWhereUnknown(Core):
    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        known = [p if p.units or p.layout else replace(p, layout="out-first") for p in parameters]
        try:
            return super().plan(known, rule, head)
        except AmbiguousUnitsError:
            return super().plan([replace(p, units=p.units or WHOLE) for p in known], rule, head)


@_agc_mutant("UnitsGuessed", "units that follow the layout follow it without a word")
class _SilentLayout(Core):
    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnitsWarning)
            return super().plan(parameters, rule, head)


@_agc_mutant("UnitsGuessed", "an error names one undecided parameter at a time")
class _OneAtATime(Core):
    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        for parameter in parameters:
            super().plan([parameter], AGC(), head)
        return super().plan(parameters, rule, head)


@_agc_mutant("VectorRefused", "vectors of rank above 2 are undecided")
class _VectorsUndecided(Core):
    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        for parameter in parameters:
            if (
                len(parameter.shape) > 2
                and parameter.units is None
                and parameter.name not in rule.units
            ):
                raise AmbiguousUnitsError(f"parameter {parameter.name!r} of rank above 2")
        return super().plan(parameters, rule, head)


# -- SAM -----------------------------------------------------------------------------------------


@_sam_mutant("SamAcceptsBadConfig", "a bad value is replaced by the default")
class _LenientRule(Core):
    def sam(self, data: Mapping[str, Any]) -> SAM:
        try:
            return super().sam(data)
        except AGCError:
            return SAM()


@_sam_mutant("SamRoundTrip", "a schedule becomes its first value")
class _ForgetfulRule(Core):
    def sam(self, data: Mapping[str, Any]) -> SAM:
        rule = super().sam(data)
        return replace(rule, rho=rule.radius(0)) if isinstance(rule.rho, Schedule) else rule


@_sam_mutant("SamDefault", "eps = 1e-12")
class _OtherRuleDefaults(Core):
    def sam(self, data: Mapping[str, Any]) -> SAM:
        return super().sam({"eps": 1e-12, **data})


@_sam_mutant("SamUnverifiedPattern", "where nothing matches, everything is selected")
class _PermissiveSelection(Core):
    def perturbed(self, names: Sequence[str], rule: SAM) -> Sequence[str]:
        try:
            return super().perturbed(names, rule)
        except SelectorError:
            return list(names)


@_sam_mutant("SamSelection", "exclude is not obeyed beside only")
class _OnlyWins(Core):
    def perturbed(self, names: Sequence[str], rule: SAM) -> Sequence[str]:
        return super().perturbed(names, replace(rule, exclude=()) if rule.only else rule)
