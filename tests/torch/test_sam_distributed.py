"""Two processes: local and global scope are those of one, and sharding changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("sam_two_processes.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tensor_parallel") == 2, done.stdout  # the last, from each process
