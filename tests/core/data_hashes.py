"""Write what the batches of the conformance recipe must be: ``python -m tests.core.data_hashes``.

The file is a promise: whoever has begun a training goes on with the same bits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from agc.data import Batches, Evaluation, digest, initial_values, open_source
from agc.recipe import Recipe, load_recipe

FILE: Final = Path(__file__).with_suffix(".json")

_CLEAN: Final = load_recipe(
    "conformance",
    [
        "augment.randaugment.flavour=clean",
        "augment.randaugment.magnitude=12",
        "augment.order=augment-first",
        "input.crop.rule=torchvision",
    ],
)
_PLAIN: Final = load_recipe("conformance")

RECIPES: Final = {
    "conformance": _PLAIN,
    "clean, augmented first, torchvision's crop": _CLEAN,
    "magnitude 15": load_recipe("conformance", ["augment.randaugment.magnitude=15"]),
    "mixed only": replace(_PLAIN, augment=replace(_PLAIN.augment, randaugment=None)),
}

STEPS: Final = (0, 1, 6, 49)
"""The first two, the one with the border of the first epoch, and the last."""


def measure(recipe: Recipe) -> dict[str, str]:
    """Return step to digest of the batch, those of the evaluation, and of the initial values."""
    batches = Batches(recipe, open_source(recipe, "train"))
    evaluation = Evaluation(recipe, open_source(recipe, "test"), batch=32)
    initial = hashlib.sha256()
    for name, value in initial_values(recipe).items():
        initial.update(f"{name} {value.shape}\n".encode() + value.astype("<f4").tobytes())
    return {
        **{f"step {step}": digest(batches[step]) for step in STEPS},
        **{f"evaluation {n}": digest(batch) for n, batch in enumerate(evaluation)},
        "initial values": initial.hexdigest(),
    }


if __name__ == "__main__":
    hashes = {name: measure(recipe) for name, recipe in RECIPES.items()}
    FILE.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
