"""The benchmarks of a framework, tried out on small tensors: they run, and do the same work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.contract import Contract

ROOT = Path(__file__).parents[2]
PYTEST = ("-m", "pytest", "--rehearsal", "-p", "no:xdist", "-p", "no:cacheprovider", "-q")


class BenchmarksContract(Contract):
    def test_rehearsal(self):
        framework = self.driver.adapter.__name__.removeprefix("agc_")
        files = [f"benchmarks/test_{name}.py" for name in (framework, f"sam_{framework}")]
        # Its plugin does nothing in a process that shares the machine with others.
        alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
        command = [sys.executable, *PYTEST, *files]
        done = subprocess.run(
            command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " skipped" not in done.stdout
