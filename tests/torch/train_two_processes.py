"""Run by test_training.py in two processes: ``agc train`` with each engine."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from agc.cli import main
from agc.cli.train import STOPPED
from agc_conformance.backends.torch.processes import leave
from agc_torch.train import Trainer
from tests.contract.training import SMALL

SHORT = [
    *SMALL,
    "train.batch=8",
    "train.steps=2",
    "data.test.images=9",
    "optimizer.max_norm=0.05",  # limits every step
]
CASES = {
    "group": [*SHORT, "sam.group=2", "sam.fraction=0.5"],
    # Three ascent examples: two in the first half of the batch, one in the second.
    "batch": [*SHORT, 'sam.group="batch"', "sam.fraction=0.3"],
}


def command(case: str, folder: Path, *options: str) -> list[str]:
    changes = [f"--set={change}" for change in CASES[case]]
    start = ["train", "conformance", "--framework=torch", f"--out={folder}", "--microbatch=2"]
    return [*start, *changes, "--log-every=1", *options]


def stopped(arguments: list[str]) -> None:
    """Train until the second process is sent SIGTERM, in the first step."""
    take = Trainer.step

    def step_and_signal(self: Trainer, *of: Any) -> Any:
        if not self.hosts.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *of)

    with patch.object(Trainer, "step", step_and_signal):
        assert main(arguments) == STOPPED


def run(folder: Path) -> None:
    stopped(command("group", folder / "ddp"))
    assert main(command("batch", folder / "ddp-batch", "--engine=ddp")) == 0
    sharded = command("batch", folder / "fsdp2", "--engine=fsdp2", "--sharded")
    stopped(sharded)
    assert main([*sharded, "--resume"]) == 0
    assert main(command("group", folder / "refused", "--engine=fsdp2")) == 2
    seeds = [0, 0]
    dist.all_gather_object(seeds, torch.initial_seed())
    assert seeds[0] != seeds[1]  # of what a model draws itself


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    leave()
