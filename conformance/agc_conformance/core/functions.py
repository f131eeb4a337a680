"""The part of the library that level 0 tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agc.config import AGC, SAM
from agc.plan import Parameter, Plan, make_plan
from agc.selectors import perturbed_names
from agc.units import Units
from agc_conformance.sharpness.problems import sam_rule

__all__ = ["Core"]


class Core:
    """Configurations, units and plans; a class, so that a mutant can be wrong in one of them."""

    def config(self, data: Mapping[str, Any]) -> AGC:
        """Build a configuration from data."""
        return AGC.from_dict(data)

    def units(self, pattern: str, sizes: Mapping[str, int]) -> Units:
        """Parse a units pattern."""
        return Units(pattern, **sizes)

    def plan(self, parameters: Sequence[Parameter], rule: AGC, head: str | None) -> Plan:
        """Make a plan."""
        return make_plan(parameters, rule, head=head)

    def sam(self, data: Mapping[str, Any]) -> SAM:
        """Build a configuration of SAM from data."""
        return sam_rule(data)

    def perturbed(self, names: Sequence[str], rule: SAM) -> Sequence[str]:
        """Select the parameters that SAM perturbs."""
        return perturbed_names(names, rule)
