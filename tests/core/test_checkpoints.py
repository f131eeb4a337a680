"""Checkpoints: complete or not there, and what each mistake is called."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from agc.data import initial_values
from agc.errors import ConfigError, FormatError, NonFiniteError, ParameterError
from agc.recipe import load_recipe
from agc.training import Checkpoints, State, checkpoints
from agc.weights import load

RECIPE = load_recipe("conformance")
PARAMETERS = initial_values(RECIPE)


def state_at(step):
    scale = np.float32(1 + step)
    return State(
        step=step,
        parameters=PARAMETERS,
        momentum={name: scale * value for name, value in PARAMETERS.items()},
        ema={name: -scale * value for name, value in PARAMETERS.items()},
        facts={"framework": "none", "top1": 0.5},
    )


def equal(first, second):
    assert first.step == second.step
    assert first.facts == second.facts
    for (name, ours), (_, theirs) in zip(first.parts(), second.parts(), strict=True):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], strict=True)


def test_round_trip(tmp_path):
    kept = Checkpoints(tmp_path / "run", RECIPE)
    assert kept.steps() == []
    path = kept.save(state_at(20))
    assert path == tmp_path / "run" / "step-000020"
    equal(kept.load(), state_at(20))
    options, arrays = load(path / "parameters.safetensors")
    assert options == RECIPE.model.options()
    np.testing.assert_array_equal(arrays["head.weight"], PARAMETERS["head.weight"])


def test_no_dtype_is_changed(tmp_path):
    """Neither where a training is saved nor where it goes on, changes allowed or not."""
    wide = load_recipe("conformance", ["precision.compute=float64"])
    low = load_recipe("conformance", ["precision.compute=bfloat16"])
    with pytest.raises(
        ParameterError,
        match=r'parameters: stem\.conv0\.weight is float32, and with precision\.compute="float64" '
        "it has to be float64",
    ):
        Checkpoints(tmp_path, wide).save(state_at(1))
    assert not list(tmp_path.iterdir())
    state = state_at(1)
    parts = {
        part: {name: array.astype(np.float64) / 3 for name, array in arrays.items()}
        for part, arrays in state.parts()
    }
    state = replace(state, **parts)
    for recipe, given, other in ((wide, state, RECIPE), (RECIPE, state_at(1), wide)):
        folder = tmp_path / recipe.precision.compute
        Checkpoints(folder, recipe).save(given)
        equal(Checkpoints(folder, recipe).load(), given)
        for allow in (False, True):
            with pytest.raises(
                FormatError,
                match=f'of precision.compute="{recipe.precision.compute}", and the recipe of '
                f'"{other.precision.compute}", but no array changes its dtype .* --init',
            ):
                Checkpoints(folder, other, allow_changed=allow).load()
    # Parameters of a recipe in bfloat16 are float32 too.
    equal(Checkpoints(tmp_path / "float32", low, allow_changed=True).load(), state_at(1))


def test_the_last_ones_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, RECIPE)
    for step in (10, 20, 30, 1_000_000):
        kept.save(state_at(step))
        (tmp_path / "notes.txt").touch()
    assert kept.steps() == [30, 1_000_000]
    equal(kept.load(30), state_at(30))
    equal(kept.load(), state_at(1_000_000))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step-000030",
        "step-1000000",
    ]


def test_the_same_step_again(tmp_path):
    kept = Checkpoints(tmp_path, RECIPE)
    kept.save(state_at(20))
    kept.save(replace(state_at(20), facts={"again": True}))
    assert kept.load().facts == {"again": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000020"]


def test_without_an_average(tmp_path):
    recipe = replace(RECIPE, ema=None, evaluate=replace(RECIPE.evaluate, weights=("raw",)))
    kept = Checkpoints(tmp_path, recipe)
    kept.save(replace(state_at(3), ema=None))
    assert kept.load().ema is None
    with pytest.raises(ParameterError, match="there is an average, and the recipe has none"):
        kept.save(state_at(4))
    with pytest.raises(ParameterError, match="there is no average, and the recipe has one"):
        Checkpoints(tmp_path, RECIPE).save(replace(state_at(4), ema=None))


KILLED = """
import os, sys
from pathlib import Path
from tests.core.test_checkpoints import RECIPE, state_at
from agc.training import Checkpoints, checkpoints

kept, written = Checkpoints(Path(sys.argv[1]), RECIPE), []
kept.save(state_at(10))
real = checkpoints.save

def save(*arguments):
    real(*arguments)
    written.append(arguments)
    if len(written) == 2:
        os.kill(os.getpid(), 9)

checkpoints.save = save
kept.save(state_at(20))
"""


def test_a_process_that_is_killed_loses_one_checkpoint_at_most(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    kept = Checkpoints(tmp_path, RECIPE)
    assert kept.steps() == [10]
    equal(kept.load(), state_at(10))
    kept.save(state_at(30))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000010", "step-000030"]


def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, RECIPE)
    kept.save(state_at(10))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        kept.save(state_at(20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    equal(kept.load(), state_at(10))


@pytest.mark.parametrize("part", ["parameters", "momentum", "ema"])
def test_what_is_not_finite_is_not_saved(tmp_path, part):
    kept = Checkpoints(tmp_path, RECIPE)
    state = state_at(20)
    broken = {**getattr(state, part), "head.bias": np.full(10, np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match=f"{part} 'head.bias' is not finite before step 20"):
        kept.save(replace(state, **{part: broken}))
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_another_model(tmp_path):
    kept = Checkpoints(tmp_path, RECIPE)
    fewer = {name: value for name, value in PARAMETERS.items() if name != "head.bias"}
    with pytest.raises(ParameterError, match=r"to be saved: momentum: .*missing.*head\.bias"):
        kept.save(replace(state_at(2), momentum=fewer))
    kept.save(state_at(2))
    other = load_recipe("conformance", ["model.variant=tiny"])
    with pytest.raises(ParameterError, match="step-000002: parameters: "):
        Checkpoints(tmp_path, other, allow_changed=True).load()


def test_another_recipe(tmp_path):
    Checkpoints(tmp_path, RECIPE).save(state_at(2))
    changed = load_recipe("conformance", ["train.smoothing=0.2"])
    message = f"is of the recipe {RECIPE.id[:12]}, not of {changed.id[:12]}; choose another folder"
    with pytest.raises(FormatError, match=message):
        Checkpoints(tmp_path, changed).load()
    equal(Checkpoints(tmp_path, changed, allow_changed=True).load(), state_at(2))


@pytest.mark.parametrize(
    "name",
    ["parameters.safetensors", "momentum.safetensors", "ema.safetensors", "state.json"],
)
def test_damaged_files(tmp_path, name):
    kept = Checkpoints(tmp_path, RECIPE)
    kept.save(state_at(10))
    file = kept.save(state_at(20)) / name
    data = file.read_bytes()
    for damage in (data[: len(data) // 2], b"", None):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(FormatError, match=rf"{name}.*step-000020 to go on from step 10"):
            kept.load()
        file.touch()
    equal(kept.load(10), state_at(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "version 2, and this release reads 1"),
        ({"step": 3}, "it says step 3; remove .* to begin anew"),
        ({"facts": None}, "cannot be read as a checkpoint's state"),
    ],
)
def test_states_of_another_form(tmp_path, change, message):
    kept = Checkpoints(tmp_path, RECIPE)
    file = kept.save(state_at(10)) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        kept.load()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "none" / "run"):
        with pytest.raises(ConfigError, match="checkpoints cannot be written to"):
            Checkpoints(folder, RECIPE)
    with pytest.raises(ConfigError, match=r"make the folder .*none first; there is none$"):
        Checkpoints(tmp_path / "none" / "run", RECIPE)
    with pytest.raises(FormatError, match="there is no checkpoint"):
        Checkpoints(tmp_path, RECIPE).load()
    with pytest.raises(FormatError, match=r"state\.json: cannot be read .* to begin anew"):
        Checkpoints(tmp_path, RECIPE).load(7)
