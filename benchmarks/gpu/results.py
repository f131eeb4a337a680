"""What a stage is told, and the file that it writes."""

from __future__ import annotations

import faulthandler
import json
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from agc.files import write_text
from agc_conformance.records import make_header
from benchmarks.common import versions
from benchmarks.gpu.race import Clock, Effort, Entry, Outcome, race

__all__ = ["FORMAT", "Job", "Results", "provenance"]

FORMAT: Final = "agc-gpu-benchmark"
_PACKAGES: Final = (
    "agc-sam", "numpy", "torch", "triton", "timm", "pytorch_optimizer", "jax", "jaxlib",
    "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax",
)  # fmt: skip


_HANGS: Final = 60
"""Seconds after which a turn has hung: some compile twenty kernels before."""
_CRASHED: Final = {"error": "the process or its GPU did not survive this contestant"}


@dataclass(frozen=True)
class Job:
    """What to measure on.

    Attributes
    ----------
    device : {"cuda", "cpu"}
        Where; a CPU is for rehearsals.
    tiny : bool
        Whether shapes are tiny and calls are few.
    commit : str, optional
        What is measured, on a machine that has the files but not their history.
    without : tuple of str
        Contestants that have crashed before.
    """

    device: str
    tiny: bool = False
    commit: str | None = None
    without: tuple[str, ...] = ()

    def effort(self, turns: int, rounds: int) -> Effort:
        """Return how often contestants run: hardly ever in a rehearsal."""
        return Effort(2, 2) if self.tiny else Effort(turns, rounds)

    def arguments(self) -> list[str]:
        """Return the options of a command that say all this."""
        commit = [] if self.commit is None else ["--commit", self.commit]
        without = ["--without", *self.without] if self.without else []
        return ["--device", self.device, *(["--tiny"] if self.tiny else []), *commit, *without]


def provenance(job: Job, module: str, *arguments: str) -> dict[str, Any]:
    """Return where, when and with what a file was made."""
    header = make_header("run")
    return {
        **asdict(job),
        "commit": job.commit or header["commit"],
        "date": header["date"],
        "command": shlex.join(["python", "-m", module, *arguments]),
        "gpu": _gpu() if job.device == "cuda" else None,
        "platform": header["platform"],
        "python": header["python"],
        "packages": versions(_PACKAGES),
    }


def _gpu() -> dict[str, str] | None:
    """Return name, memory and driver of the first GPU, as the driver says."""
    fields = {"name": "name", "memory": "memory.total", "driver": "driver_version"}
    query = f"--query-gpu={','.join(fields.values())}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        return dict(zip(fields, values, strict=True))
    except (OSError, subprocess.SubprocessError, LookupError, ValueError):
        return None  # nothing depends on it


class Results:
    """Cases of one stage, written after each, so that a crash loses none that was measured.

    Parameters
    ----------
    path : path
        The file.
    stage : str
        Name of the stage.
    job : Job
        What it was told.
    """

    def __init__(self, path: Path, stage: str, job: Job) -> None:
        self._path, self._job = path, job
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "version": 1,
            "stage": stage,
            "complete": False,
            "provenance": provenance(job, "benchmarks.gpu.stage", stage, *job.arguments()),
            "cases": [],
        }
        self._write()

    def race(
        self, entries: Mapping[str, Entry], clock: Clock, effort: Effort
    ) -> dict[str, Outcome]:
        """Let contestants take turns, but for those that have crashed before.

        The file says whose turn it is, in case that the process does not survive it; a turn that
        hangs is one of these.
        """

        def watch(name: str) -> None:
            faulthandler.dump_traceback_later(_HANGS, exit=True)
            self._content["turn"] = name
            self._write()

        here = {name: entry for name, entry in entries.items() if name not in self._job.without}
        try:
            outcomes = race(here, clock, effort, watch)
        finally:
            faulthandler.cancel_dump_traceback_later()
        del self._content["turn"]
        return {name: outcomes.get(name, dict(_CRASHED)) for name in entries}

    def add(self, **case: Any) -> None:
        """Write one more case."""
        self._content["cases"].append(case)
        self._write()

    def finish(self) -> None:
        """Say that this is all there is."""
        self._content["complete"] = True
        self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._content, indent=1) + "\n")
