"""Two processes: local and global scope equal the reference's replicas, and sharding changes
nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "sam_two_processes.py"), str(HERE)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = ("scopes", "by hand, static graph", "one bad replica", "fsdp2", "tensor parallel")
    for line in lines:
        assert done.stdout.count(line) == 2, done.stdout  # once from each process
