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
from dataclasses import dataclass, replace
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
        Seconds that it has at least, after which it is killed; what the stages before it have left
        of theirs is added.
    file : str
        What it writes, with ``{device}``.
    """

    name: str
    limit: int
    file: str

    def command(self, out: Path, job: Job, seconds: float) -> list[str]:
        """Return the command line of a process that has so many seconds."""
        module = "stage" if self.name in MODULES else "conformance"
        name = self.name.removeprefix("conformance-")
        command = [sys.executable, "-m", f"benchmarks.gpu.{module}", name, "--out", str(out)]
        if module == "conformance":  # what is complete by then can still be merged
            command += ["--seconds", f"{seconds - _MERGING:.0f}"]
        return [*command, *job.arguments()]


_MERGING: Final = 15
"""Seconds that a stage has left to collect what its parts found."""
_WORTHWHILE: Final = 15
"""Seconds that a stage needs at least to begin again."""
STAGES: Final = (
    Stage("conformance-torch", 115, "torch-{device}.jsonl"),
    Stage("agc", 95, "agc.json"),
    Stage("sam", 45, "sam.json"),
    Stage("nfnet", 110, "nfnet.json"),
    Stage("jax", 75, "jax.json"),
    Stage("conformance-jax", 95, "jax-{device}.jsonl"),
)
"""In this order, of what is worth most when time runs out."""
_LINES: Final = 40
"""Lines of the output of a stage that are kept."""
_KILLED: Final = 10
"""Seconds until a process that was killed is given up: a driver may hold it for ever."""
_ENVIRONMENT: Final = {
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and report; return 1 if one failed or a target is missed."""
    begin = time.monotonic()
    # What is under way is killed, and what there is reported, as after an interrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE")
    add_job(parser)
    options = parser.parse_args(arguments)
    job = job_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    only = ["--only", *options.only] if options.only != names else []
    stages = [stage for stage in STAGES if stage.name in options.only]
    records: dict[str, dict[str, Any]] = {
        stage.name: {
            "name": stage.name,
            "status": "not started",
            "limit": stage.limit,
            "seconds": 0.0,
            "file": stage.file.format(device=job.device),
            "log": [],
        }
        for stage in stages
    }
    summary: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "stage": "summary",
        "provenance": provenance(job, "benchmarks.gpu", *job.arguments(), *only),
        "stages": list(records.values()),
    }
    for record in records.values():
        # A run that is cut short must not leave an older result in its place.
        (options.out / record["file"]).unlink(missing_ok=True)
    try:
        for stage in stages:
            record = records[stage.name]
            record["status"] = "not finished"
            _show(options.out, summary)
            begin += stage.limit
            record |= _run(stage, options.out / record["file"], job, begin)
            print(f"{stage.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
    finally:
        _show(options.out, summary)
    return report.main([str(options.out)])


def _show(folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary, and the report of what there is as yet."""
    write_text(folder / report.SUMMARY, json.dumps(summary, indent=1) + "\n")
    try:
        report.write(folder)
    except Exception as error:  # of a report, which can be made again, no stage is to suffer
        print(f"no report: {type(error).__name__}: {error}", flush=True)


def _run(stage: Stage, out: Path, job: Job, deadline: float) -> dict[str, Any]:
    """Run a stage, again without a contestant that it crashed on; return what became of it."""
    start, lines = time.monotonic(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        while True:
            left = deadline - time.monotonic()
            process, log = _start(stage.command(out, job, left), Path(scratch) / stage.name)
            try:
                status = _wait(process, deadline)
            finally:
                _kill(process)
            lines += log.read_text(errors="replace").splitlines()[-_LINES:]
            culprit = _culprit(out) if status == "failed" else None
            if culprit is None or deadline - time.monotonic() < _WORTHWHILE:
                seconds = round(time.monotonic() - start, 1)
                return {"status": status, "seconds": seconds, "log": lines[-2 * _LINES :]}
            lines.append(f"-- again, without {culprit!r}")
            job = replace(job, without=(*job.without, culprit))


def _culprit(out: Path) -> str | None:
    """Return the contestant whose turn it was when a stage died, if it was one's."""
    if out.suffix != ".json" or not out.exists():
        return None
    turn: str | None = json.loads(out.read_text(encoding="utf-8")).get("turn")
    return turn


def _start(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0,  # so that it can be killed together with its own processes
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
        process.wait(_KILLED)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


if __name__ == "__main__":
    sys.exit(main())
