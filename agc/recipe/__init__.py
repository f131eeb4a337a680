"""Recipes: what a training computes, in one file that every framework reads.

A recipe says what is computed, a launch says where: processes, devices, micro-batches, workers and
paths never appear in a recipe, and no result depends on them beyond rounding.

Read ``tables``, ``recipe``, ``keys``, ``files`` and ``numbers``, in this order; the recipes that
come with the package are in ``shipped``.
"""

from agc.recipe.files import load_recipe, shipped_recipes, to_toml
from agc.recipe.numbers import Numbers, numbers
from agc.recipe.recipe import Recipe

__all__ = ["Numbers", "Recipe", "load_recipe", "numbers", "shipped_recipes", "to_toml"]
