"""The part of the library that level 0 tests, and of level 5 what no framework computes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agc.config import AGC, SAM
from agc.data import Batch, Batches, open_source
from agc.plan import Parameter, Plan, make_plan
from agc.recipe import Numbers, Recipe, load_recipe, numbers
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

    def recipe(self, toml: str) -> Recipe:
        """Read a recipe file."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.toml"
            file.write_text(toml, encoding="utf-8")
            return load_recipe(file)

    def canonical(self, recipe: Recipe) -> str:
        """Return the text that a recipe's id is the SHA-256 of."""
        return recipe.canonical()

    def batch(self, recipe: Recipe, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """Return a host's part of a batch."""
        return Batches(recipe, open_source(recipe, "train"), host=host, hosts=hosts)[step]

    def numbers(self, recipe: Recipe) -> Numbers:
        """Return the numbers of every step."""
        return numbers(recipe)
