"""Run the conformance suite on one backend, in parts side by side, and merge their results.

``python -m benchmarks.gpu.conformance torch --out FILE``. A part that hangs or crashes takes none
of the others with it: what there is becomes one file, after every part, whose header names them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agc.files import part_of
from agc_conformance.records import (
    DiedRecord,
    Record,
    ResultFile,
    Writer,
    complete,
    make_header,
    read_results,
)
from agc_conformance.suite import run
from benchmarks.gpu.results import Job
from benchmarks.gpu.stage import ABSENT, add_job, job_of

__all__ = ["NO_KERNELS", "PARTS", "main", "merge"]

_BACKENDS: Final = {
    "torch": "agc_conformance.backends.torch.backend:TorchBackend",
    "jax": "agc_conformance.backends.jax.backend:JaxBackend",
}
"""Backends by name, found without an installed package's entry points."""
PARTS: Final = {
    "torch": (
        "L[02]-*", "L1-[a-k]*", "L1-l*", "L1-[m-r]*", "L1-s*", "L1-[t-z]*", "L3-[!s]*", "L3-s*", "L5-*",
        "real-*", "model-tiny-[!t]*", "model-tiny-t*",
    ),
    "jax": (
        "L[02]-*", "L1-[a-k]*", "L1-l*", "L1-[m-r]*", "L1-sam-[a-m]*", "L1-sam-[n-z]*", "L1-s[!a]*",
        "L1-[t-z]*", "L3-*", "L5-*", "real-*", "model-tiny-optimizer", "model-tiny-trajectory",
        "model-tiny-o[!p]*", "model-tiny-[!ot]*",
    ),
}  # fmt: skip
"""Globs of ids that together are the whole suite; most of the time goes into compiling."""
NO_KERNELS: Final = "the Triton kernels of AGC"
"""How PyTorch's adapter begins to say that they do not compile."""
_REHEARSED: Final = ("L1-eps-*",)
_NO_AUTOTUNING: Final = "--xla_gpu_autotune_level=0"
"""Option of XLA that shortens its compilation, which is most of what the suite waits for."""
_LINES: Final = 15
"""Lines of the output of a part that failed."""


def merge(paths: Sequence[Path], out: Path, job: Job) -> ResultFile | None:
    """Write the results of complete files into one, and return it; None if there are none.

    The header selects nothing if that is the whole suite, on a real device.

    Parameters
    ----------
    paths : sequence of path
        Files of :func:`agc_conformance.suite.run` on one backend; those that are missing are left
        out.
    out : path
        The file.
    job : Job
        Names the commit, if the files do not.
    """
    files = [read_results(path) for path in paths if path.exists()]
    if not files:
        return None
    first = files[0].header
    died = any(file.died for file in files)
    whole = len(files) == len(paths) and not died and not job.tiny
    select = None if whole else " ".join(str(file.header.get("select")) for file in files)
    header = {**first, "select": select, "commit": first["commit"] or job.commit}
    header |= {key: any(file.header.get(key) for file in files) for key in ("train", "models")}
    with Writer(out, header) as writer:  # type: ignore[arg-type]
        for file in files:
            records: list[Record] = [*file.results, *file.train, *file.models, *file.unavailable]
            records += file.died
            for record in records:
                writer.write(record)
    return read_results(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or one; return 0, 1 if something failed, or ``ABSENT``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.conformance", description=__doc__
    )
    parser.add_argument("backend", choices=_BACKENDS)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of all parts")
    parser.add_argument("--part", metavar="GLOB", help="run this part alone, in this process")
    add_job(parser)
    options = parser.parse_args(arguments)
    job = job_of(options)
    if options.part is not None:
        return run(
            _BACKENDS[options.backend],
            options.out,
            device=job.device,
            select=options.part,
            train=options.part.startswith("real"),
            models=options.part.startswith("model"),
        )
    with tempfile.TemporaryDirectory() as folder:
        return _parts(options.backend, options.out, job, options.seconds, Path(folder))


def _parts(backend: str, out: Path, job: Job, seconds: float, folder: Path) -> int:
    parts = _REHEARSED if job.tiny else PARTS[backend]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # parts share the cores
    if job.device == "cuda":
        # Or PyTorch's own operations would pass in the kernels' place.
        environment["PYTHONWARNINGS"] = f"error:{NO_KERNELS}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_AUTOTUNING}".strip()
    deadline = time.monotonic() + seconds
    paths = [folder / f"{index}.jsonl" for index in range(len(parts))]
    processes = []
    for part, path in zip(parts, paths, strict=True):
        command = [sys.executable, "-m", "benchmarks.gpu.conformance", backend]
        command += ["--part", part, "--out", str(path), *job.arguments()]
        with path.with_suffix(".log").open("w") as log:
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
    failed, merged = False, None
    for part, path, process in zip(parts, paths, processes, strict=True):
        problem = _problem(process, deadline)
        print(f"{part}: {problem or 'passed'}")
        if problem is not None:
            failed = True
            print(*path.with_suffix(".log").read_text().splitlines()[-_LINES:], sep="\n")
            _keep(path, part, problem)
        merged = merge(paths, out, job)
    if merged is None or merged.footer is None:
        return 1
    print(", ".join(f"{count} {status}" for status, count in merged.footer["counts"].items()))
    if merged.unavailable and not merged.results:
        print(merged.unavailable[0]["reason"])
        return ABSENT
    return int(failed)


def _keep(path: Path, part: str, problem: str) -> None:
    """Complete the file of a part that ended before its time, if it has come to write any."""
    unfinished = part_of(path)
    if unfinished.is_file() and "\n" in unfinished.read_text(encoding="utf-8"):
        died: DiedRecord = {"type": "died", "check": part, "reason": problem}
        complete(path, make_header("run"), died)


def _problem(process: subprocess.Popen[bytes], deadline: float) -> str | None:
    """Wait for a part; return what is wrong with it, if anything is."""
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "out of time"
    return None if status == 0 else f"exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
