"""Prove and measure on a GPU: ``python -m benchmarks.gpu --out FOLDER``.

Every stage is a process of its own, under a limit of its own, so that a hang or a crash of one
loses nothing of the others. ``--tiny`` rehearses everything on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agc.files import write_text
from benchmarks.gpu import report
from benchmarks.gpu.results import FORMAT, Job, provenance
from benchmarks.gpu.stage import ABSENT, MODULES, add_job, job_of

__all__ = ["STAGES", "Stage", "main"]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes
    ----------
    name : str
    limit : int
        Seconds after which it is killed.
    file : str
        What it writes, with ``{device}``.
    """

    name: str
    limit: int
    file: str

    def command(self, out: Path, job: Job) -> list[str]:
        """Return its command line."""
        module = "stage" if self.name in MODULES else "conformance"
        name = self.name.removeprefix("conformance-")
        command = [sys.executable, "-m", f"benchmarks.gpu.{module}", name, "--out", str(out)]
        if module == "conformance":  # what is complete by then can still be merged
            command += ["--seconds", str(self.limit - _MERGING)]
        return [*command, *job.arguments()]


_MERGING: Final = 15
"""Seconds that a stage has left to collect what its parts found."""
STAGES: Final = (
    (
        Stage("conformance-torch", 135, "torch-{device}.jsonl"),
        Stage("conformance-jax", 135, "jax-{device}.jsonl"),
    ),
    (Stage("agc", 100, "agc.json"),),
    (Stage("sam", 45, "sam.json"),),
    (Stage("nfnet", 115, "nfnet.json"),),
    (Stage("jax", 70, "jax.json"),),
)
"""Groups of stages, one after the other; those of a group, which time nothing, side by side."""
_LINES: Final = 40
"""Lines of the output of a stage that are kept."""
_ENVIRONMENT: Final = {
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and report; return 1 if one failed or a target is missed."""
    names = [stage.name for group in STAGES for stage in group]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE")
    add_job(parser)
    options = parser.parse_args(arguments)
    job = job_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    only = ["--only", *options.only] if options.only != names else []
    summary: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "stage": "summary",
        "provenance": provenance(job, "benchmarks.gpu", *job.arguments(), *only),
        "stages": [],
    }
    for group in STAGES:
        chosen = [stage for stage in group if stage.name in options.only]
        summary["stages"] += _run(chosen, options.out, job)
        write_text(options.out / report.SUMMARY, json.dumps(summary, indent=1) + "\n")
    return report.main([str(options.out)])


def _run(stages: Sequence[Stage], folder: Path, job: Job) -> list[dict[str, Any]]:
    """Run some stages side by side, and return what became of each."""
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for stage in stages:
            out = folder / stage.file.format(device=job.device)
            out.unlink(missing_ok=True)  # a failed run must not leave an older result in its place
            running.append(
                (stage, out, *_start(stage.command(out, job), Path(scratch) / stage.name))
            )
        start = time.monotonic()
        try:
            records = []
            for stage, out, process, log in running:
                status = _wait(process, start + stage.limit)
                lines = log.read_text(errors="replace").splitlines()
                seconds = round(time.monotonic() - start, 1)
                record = {"name": stage.name, "status": status, "limit": stage.limit}
                record |= {"seconds": seconds, "file": out.name, "log": lines[-_LINES:]}
                print(f"{stage.name}: {status}, {seconds:.0f} s", flush=True)
                records.append(record)
            return records
        finally:
            for _, _, process, _ in running:
                _kill(process)


def _start(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # so that it can be killed together with its own processes
        )
    return process, log


def _wait(process: subprocess.Popen[bytes], deadline: float) -> report.Status:
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "out of time"
    known: dict[int, report.Status] = {0: "complete", ABSENT: "does not apply"}
    return known.get(status, "failed")


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
