"""AGC under ``jax.distributed``: two processes with two devices each, on loopback (AGC-4,
AGC-8).
"""

import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("two_processes.py")


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=300) for process in processes]
    for rank, (process, (out, err)) in enumerate(zip(processes, done, strict=True)):
        assert process.returncode == 0, err
        said = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert said == [
            f"{rank} sharded over processes: the same bits",
            f"{rank} jit ConfigError",
            f"{rank} eager NonFiniteError",
        ]
