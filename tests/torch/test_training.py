"""The step of ``agc train`` in PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agc.cli import main
from agc.errors import ConfigError, FormatError, NonFiniteError
from agc.recipe import load_recipe
from agc.training import Checkpoints, Launch, State, read_log
from agc.training.initial import initial_state
from agc_torch.train import trainer
from tests.contract.training import TrainingContract
from tests.helpers import relative
from tests.torch import train_two_processes as two
from tests.torch.driver import TorchDriver


class TestTraining(TrainingContract):
    driver = TorchDriver()


def test_engines_of_several_processes():
    with pytest.raises(ConfigError, match="start them with torchrun"):
        trainer(load_recipe("conformance"), Launch(engine="fsdp2"))


def test_sharded_states_that_are_refused(tmp_path):
    recipe = load_recipe("conformance")
    ours, state = trainer(recipe, Launch()), initial_state(recipe)
    nan = {**state.momentum, "head.bias": np.full(10, np.nan, np.float32)}
    ours.load(replace(state, momentum=nan))
    with pytest.raises(NonFiniteError, match="not finite before step 0"):
        ours.save_sharded(tmp_path / "nan")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FormatError, match=r"none: cannot be read: .*No such file"):
        ours.load_sharded(tmp_path / "none", 1)
    (tmp_path / "file").touch()
    ours.load(state)
    with pytest.raises(OSError, match=r"file: cannot be written: .*exists"):
        ours.save_sharded(tmp_path / "file")


def left(case: str, folder: Path) -> tuple[State, list[dict[str, object]]]:
    """Return the last state of a training, and its steps and evaluations."""
    state = Checkpoints(folder, load_recipe("conformance", two.CASES[case])).load()
    records = [r for r in read_log(folder / "log.jsonl") if r["type"] in ("step", "evaluation")]
    for record in records:
        record.pop("images_per_second", None)
    return state, records


@pytest.mark.long
def test_two_processes(tmp_path: Path) -> None:
    """They leave what one process leaves; each engine stops and goes on, on other numbers too."""
    for case in two.CASES:
        assert main(two.command(case, tmp_path / case)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, two.__file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    shutil.copytree(tmp_path / "fsdp2", tmp_path / "exported")
    shutil.rmtree(tmp_path / "exported" / "step-000002")
    assert (tmp_path / "exported" / "step-000001" / "sharded").is_dir()
    assert main(["checkpoint", "export", str(tmp_path / "exported")]) == 0
    for case, name in (("group", "ddp"), ("batch", "exported")):
        assert main([*two.command(case, tmp_path / name), "--resume"]) == 0
    runs = {"ddp": "group", "ddp-batch": "batch", "fsdp2": "batch", "exported": "batch"}
    for name, case in runs.items():
        (state, records), (alone, expected) = (left(case, tmp_path / n) for n in (name, case))
        for (part, arrays), (_, others) in zip(state.parts(), alone.parts(), strict=True):
            flat = (np.concatenate([*map(np.ravel, of.values())]) for of in (arrays, others))
            assert relative(*flat) <= (2e-6 if part == "momentum" else 1e-6), (name, part)
        for record, other in zip(records, expected, strict=True):
            assert [record.pop(key, None) for key in ("type", "weights")] == [
                other.pop(key, None) for key in ("type", "weights")
            ]
            assert record == pytest.approx(other, rel=1e-5), name
    facts = [r for r in read_log(tmp_path / "fsdp2" / "log.jsonl") if r["type"] == "start"]
    assert [(fact["processes"], fact["engine"]) for fact in facts] == [(2, "fsdp2")] * 2
