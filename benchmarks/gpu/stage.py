"""Run one stage in this process: ``python -m benchmarks.gpu.stage NAME --out FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from benchmarks.gpu.race import DoesNotApply
from benchmarks.gpu.results import Job, Results

__all__ = ["ABSENT", "MODULES", "add_job", "job_of", "main"]

ABSENT: Final = 3
"""Exit status of a stage that has nothing to do here."""
MODULES: Final = {
    "agc": "clip_torch",
    "sam": "sharpness_torch",
    "nfnet": "train_nfnet",
    "jax": "clip_jax",
}
"""Stage that writes a file of cases to its module; conformance is another program."""
_OURS: Final = ("agc", "agc_conformance", "agc_jax", "agc_torch", "benchmarks")
"""Packages that are not there because of a mistake."""


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to measure on."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda; cpu with --tiny")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, hardly timed: a rehearsal"
    )
    parser.add_argument("--commit", metavar="ID", help="what is measured, if git cannot tell")
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="NAME", help="contestants to leave out"
    )


def job_of(options: argparse.Namespace) -> Job:
    """Return what the options say."""
    device = options.device or ("cpu" if options.tiny else "cuda")
    return Job(device, options.tiny, options.commit, tuple(options.without))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage; return 0, or :data:`ABSENT` if it does not apply, with the reason."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    add_job(parser)
    options = parser.parse_args(arguments)
    job = job_of(options)
    try:
        module = import_module(f"benchmarks.gpu.{MODULES[options.name]}")
        results = Results(options.out, options.name, job)
        module.measure(job, results)
        results.finish()
    except (DoesNotApply, ModuleNotFoundError) as reason:
        missing = getattr(reason, "name", None) or ""
        if missing.partition(".")[0] in _OURS:
            raise
        print(f"{type(reason).__name__}: {reason}")
        return ABSENT
    return 0


if __name__ == "__main__":
    sys.exit(main())
