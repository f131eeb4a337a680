"""``agc train`` on two workers, and on two devices of one: as on one device."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from agc.errors import ConfigError, FormatError, NonFiniteError, ParameterError
from agc.recipe import Recipe
from agc.training import Checkpoints, Launch, read_log
from agc_conformance.training.recipes import seeded_state
from agc_tensorflow.train import trainer
from tests.helpers import relative
from tests.tensorflow.two_workers import recipe_of, training

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch, mirrored):
    monkeypatch.setattr("agc_tensorflow.train._mirrored", lambda devices: mirrored)
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def begin(recipe: Recipe, folder: Path) -> Path:
    """Make a folder with a checkpoint in which every branch counts, before a step that moves."""
    Checkpoints(folder, recipe).save(replace(seeded_state(recipe), step=1))
    return folder


def compare(recipe: Recipe, *folders: Path) -> None:
    """Expect the same of two trainings."""
    states = [Checkpoints(folder, recipe).load() for folder in folders]
    assert states[0].step == states[1].step > 1
    for (name, ours), (_, wanted) in zip(*(state.parts() for state in states), strict=True):
        flat = [np.concatenate([*map(np.ravel, arrays.values())]) for arrays in (ours, wanted)]
        assert relative(*flat) <= 1e-6, name
    for ours, wanted in zip(*map(numbers_of, folders), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5)


def numbers_of(folder: Path) -> list[dict[str, float]]:
    """Return what a log has of steps and evaluations, without times."""
    records = [r for r in read_log(folder / "log.jsonl") if r["type"] in ("step", "evaluation")]
    records.sort(key=lambda r: (r["type"], r["step"]))
    return [
        {k: v for k, v in r.items() if isinstance(v, int | float) and k != "images_per_second"}
        for r in records
    ]


def run_two_workers(folder: Path) -> None:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in free]
    command = [sys.executable, "-m", "tests.tensorflow.two_workers"]
    workers = [
        subprocess.Popen(
            [*command, str(index), str(folder), *addresses],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    try:
        done = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, done, strict=True):
        assert worker.returncode == 0, out + err
        assert out.splitlines()[-1] == "2"


@pytest.mark.long
def test_two_workers(tmp_path):
    """They stop together, and one worker with two devices goes on from their own form."""
    recipe = recipe_of()
    whole, moved = (begin(recipe, tmp_path / name) for name in ("whole", "moved"))
    run_two_workers(moved)
    assert training(recipe, moved, engine="mirrored").run()
    assert training(recipe, whole, engine="one-device").run()
    compare(recipe, moved, whole)


def test_groups_on_two_devices(tmp_path):
    """Each device has whole groups, and a part of the model is trained."""
    recipe = recipe_of("sam.group=8", 'train.only=["@head", "stem.*"]')
    folders = [begin(recipe, tmp_path / name) for name in ("mirrored", "one-device")]
    for folder in folders:
        run = training(recipe, folder, engine=folder.name)
        assert not run.run(lambda: True)
    compare(recipe, *folders)


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"engine": "multi-worker"}, None, "needs the environment variable TF_CONFIG"),
        ({}, ["127.0.0.1:1"], "must be configured at program startup"),  # TensorFlow was used
        ({}, "none", "TF_CONFIG=.*none"),
        ({"device": "CPU:1"}, ["127.0.0.1:1"], "that TF_CONFIG asks for uses all devices; leave"),
        ({"engine": "mirrored", "device": "CPU:1"}, None, 'or choose engine="one-device"'),
        ({"engine": "mirrored"}, None, "a multiple of 32 on 2 devices, as sam.group=16"),
    ],
)
def test_engines_that_cannot_train(monkeypatch, options, workers, message):
    if workers:
        cluster, task = {"worker": workers}, {"type": "worker", "index": 0}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    with pytest.raises(ConfigError, match=message):
        trainer(recipe_of("sam.group=16"), Launch(**options))


def test_sharded_checkpoints_that_are_refused(tmp_path):
    recipe = recipe_of()
    made = trainer(recipe, Launch(engine="one-device"))
    with pytest.raises(FormatError, match=r"sharded: .*state"):
        made.load_sharded(tmp_path / "sharded", 1)
    made.load(seeded_state(recipe))
    made.save_sharded(tmp_path / "sharded")
    other = trainer(recipe_of("model.num_classes=3"), Launch(engine="one-device"))
    with pytest.raises(ParameterError, match="of another model"):
        other.load_sharded(tmp_path / "sharded", 1)
    made._weights[0].assign(np.nan * made._weights[0])
    with pytest.raises(NonFiniteError, match="is not finite before step 0"):
        made.save_sharded(tmp_path / "again")
    assert not (tmp_path / "again").exists()
