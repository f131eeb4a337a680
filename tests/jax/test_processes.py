"""AGC, SAM and ``agc train`` under ``jax.distributed``: two processes with two devices each, on
loopback (AGC-4, AGC-8, SAM-9).
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agc.data import open_source
from agc.recipe import load_recipe
from agc.training import Checkpoints, Launch, Training, read_log
from agc_jax.train import trainer

PROGRAM = Path(__file__).with_name("two_processes.py")
CHANGES = [
    "model.variant=micro",
    "train.batch=16",
    "train.steps=5",
    'train.only=["head.*", "final_conv.*"]',
    "schedule.warmup_steps=1",
    'sam.group="batch"',
    "sam.fraction=0.3",  # five examples, on four devices
    "sam.every=1",
    "optimizer.max_norm=0.05",  # limits every step
    "checkpoint.every_steps=1",
    "checkpoint.keep=4",
    "evaluate.every_steps=5",
    "data.test.images=9",
]


def train(recipe, folder):
    """Train on one device, to the end."""
    launch = Launch(device="cpu")
    sources = (open_source(recipe, part) for part in ("train", "test"))
    made = trainer(recipe, launch)
    assert Training(recipe, made, *sources, folder, launch=launch, resume=True).run()


def same(recipe, folder, other):
    """Compare the end of two trainings."""
    found, expected = (Checkpoints(path, recipe).load(5) for path in (folder, other))
    for (part, arrays), (_, wanted) in zip(found.parts(), expected.parts(), strict=True):
        for name, array in arrays.items():
            limit = 1e-5 if part == "momentum" else 1e-6
            size = np.linalg.norm(wanted[name])
            assert np.linalg.norm(array - wanted[name]) <= limit * size, (part, name)
    logs = (
        [record for record in read_log(path / "log.jsonl") if record["type"] == "evaluation"]
        for path in (folder, other)
    )
    for record, wanted in zip(*logs, strict=True):
        assert record.pop("loss") == pytest.approx(wanted.pop("loss"), rel=1e-6)
        assert record == wanted


@pytest.mark.long
def test_two_processes(tmp_path, quick):
    """They go on from the middle of what one device did, and arrive where it arrived.

    One device goes on from what they wrote by parts on their way, and arrives there as well.
    """
    recipe = load_recipe("conformance", CHANGES)
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe, one)
    shutil.copytree(one / "step-000002", two / "step-000002")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port, str(two), *CHANGES],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()  # jax.distributed takes SIGTERM for a notice
    for process, (out, err) in zip(processes, done, strict=True):
        assert process.returncode == 0, out + err
        assert out.splitlines()[-1] == "train", out  # the last
    same(recipe, two, one)
    shutil.rmtree(two / "step-000005")
    assert (two / "step-000004" / "sharded").is_dir()
    train(recipe, two)
    same(recipe, two, one)
