"""One of two workers that train, run by test_processes.py:
``python -m tests.tensorflow.two_workers INDEX FOLDER ADDRESS ADDRESS``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    _, INDEX, FOLDER, *ADDRESSES = sys.argv
    task = {"type": "worker", "index": int(INDEX)}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": ADDRESSES}, "task": task})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from agc.data import open_source
from agc.recipe import Recipe, load_recipe
from agc.training import Launch, Training
from agc_tensorflow.train import trainer
from tests.contract.training import SMALL


def recipe_of(*changes: str) -> Recipe:
    """Return a recipe of which two devices have unequal parts of SAM's ascent: 3 and 2 examples.

    The model draws its masks.
    """
    spread = ['sam.group="batch"', "sam.fraction=0.3", "train.masks=[]"]
    often = ["sam.every=1", "data.test.images=9", "evaluate.every_steps=2"]
    limited = ["optimizer.max_norm=0.05"]  # in every step
    return load_recipe("conformance", [*SMALL, *spread, *often, *limited, *changes])


def training(recipe: Recipe, folder: Path, **options: Any) -> Training:
    """Return a training that goes on in a folder."""
    launch = Launch(log_every=1, **options)
    sources = [open_source(recipe, part) for part in ("train", "test")]
    made = trainer(recipe, launch)
    return Training(recipe, made, *sources, folder, launch=launch, resume=True)


if __name__ == "__main__":
    run = training(recipe_of(), Path(FOLDER), sharded=True)
    assert not run.run(lambda: run.made == 2 and INDEX == "1")  # the other has to stop as well
    print(run.made)
