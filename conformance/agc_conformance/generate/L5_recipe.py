"""Recipes: canonical forms, ids, and files that are refused."""

from __future__ import annotations

import hashlib
from typing import Final

from agc_conformance.core.functions import Core
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Recipes: canonical forms, ids, refusals"

_SMALL: Final = """schema = 1
model = { variant = "micro", stochastic_depth = 0.1 }
data.train = { kind = "synthetic", split = "train", images = 401 }
data.test = { kind = "synthetic", split = "test", images = 75 }
train = { batch = 32, epochs = 2 }
optimizer.rate.peak = 0.1
"""


def _accepted(name: str, comment: str, toml: str) -> Data:
    recipe = Core().recipe(toml)
    expect = {"id": hashlib.sha256(recipe.canonical().encode()).hexdigest()}
    assert expect["id"] == recipe.id
    return vector(
        f"L5-recipe-{name}",
        "RECIPE-1",
        "recipe",
        ["RecipeId"],
        comment,
        toml=toml,
        expect=expect,
    )


def _refused(name: str, comment: str, toml: str, *message: str, error: str = "ConfigError") -> Data:
    return vector(
        f"L5-recipe-{name}",
        "RECIPE-1",
        "recipe",
        ["RecipeLenient"],
        comment,
        toml=toml,
        expect={"error": error, "message": list(message)},
    )


VECTORS: Final = [
    *(
        _accepted(name, "As it is shipped.", f'base = "{name}"\n')
        for name in ("conformance", "nfnet-f0", "jft-finetune")
    ),
    _accepted("small", "Every default is filled in.", _SMALL),
    _accepted(
        "notes",
        "Notes and the order of keys compute nothing: the id is that of L5-recipe-small.",
        'notes."optimizer.rate.peak" = "the paper\'s"\nseed = 0\n' + _SMALL,
    ),
    _accepted("seed", "The seed computes something.", "seed = 1\n" + _SMALL),
    _accepted(
        "order",
        "The order of patterns decides which one wins, so the canonical form keeps it.",
        _SMALL + 'agc.clipping = { "stem.*" = 0.02, "*" = 0.01 }\n',
    ),
    _refused("syntax", "No TOML.", "schema = \n", "recipe.toml", error="FormatError"),
    _refused("unknown-table", "A misspelt table.", _SMALL + "[ema2]\n", "ema2"),
    _refused("unknown-key", "A misspelt key.", _SMALL + "[agc]\nclip = 0.01\n", "clip", "clipping"),
    _refused("schema", "A later version.", "schema = 2\n" + _SMALL[11:], "schema"),
    _refused("decay", "A decay above 1.", _SMALL + "[ema]\ndecay = 2.0\n", "ema", "decay"),
    _refused("group", "Groups of SAM must divide the batch.", _SMALL + "sam.group = 5\n", "group"),
    _refused("base-unknown", "There is no such recipe.", 'base = "nfnet-f9"\n', "nfnet-f9"),
]
