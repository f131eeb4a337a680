"""AGC and SAM under ``jax.distributed``: two processes with two devices each, on loopback (AGC-4,
AGC-8, SAM-9).
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
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()  # jax.distributed takes SIGTERM for a notice
    for process, (out, err) in zip(processes, done, strict=True):
        assert process.returncode == 0, out + err
        assert out.splitlines()[-1] == "raise_on_all", out  # the last
