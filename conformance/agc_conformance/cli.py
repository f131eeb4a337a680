"""``agc conformance``: run, report, publish, teeth, vectors, list."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the command ``conformance`` to ``agc`` (entry-point group ``agc.commands``)."""
    parser = subparsers.add_parser(
        "conformance", help="test an implementation against the published vectors"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the suite on one backend and write a result file")
    run.add_argument(
        "--backend",
        required=True,
        metavar="NAME",
        help="a registered name, package.module:object or path/to/file.py:object",
    )
    run.add_argument("--device", default="cpu", help="cpu, cuda or tpu (default: cpu)")
    run.add_argument("--out", type=Path, required=True, help="result file (JSON lines)")
    run.add_argument("--select", metavar="GLOB", help="only these ids, clauses or flags")
    run.add_argument(
        "--full", action="store_true", help="also the dtypes that say little new, and F0"
    )
    run.add_argument("--xfail", type=Path, metavar="FILE", help="expected failures with reasons")
    run.add_argument(
        "--role", choices=("backend", "subject"), help="'subject': only look, never fail"
    )
    run.add_argument("--no-train", action="store_true", help="leave out training on real images")
    run.add_argument("--no-models", action="store_true", help="leave out NFNets and recipes")
    run.add_argument(
        "--allow-unavailable", action="store_true", help="an absent backend is not a failure"
    )
    apart = run.add_mutually_exclusive_group()
    apart.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="end the run if one check takes longer (default: never)",
    )
    apart.add_argument(
        "--in-process",
        action="store_true",
        help="run in this process, as a debugger needs it; a crash then leaves no result file",
    )
    run.set_defaults(run=_run)

    report = commands.add_parser("report", help="present result files")
    report.add_argument(
        "files", type=Path, nargs="+", help="files of runs, teeth and compiled programs"
    )
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="also write HTML, Markdown, JUnit, JSON"
    )
    report.set_defaults(run=_report)

    publish = commands.add_parser("publish", help="keep a report and put its matrix into a README")
    publish.add_argument("report", type=Path, help="report.json of a complete run")
    publish.add_argument(
        "--results",
        type=Path,
        default=Path("conformance/results"),
        metavar="DIR",
        help="where the numbers are kept (conformance/results)",
    )
    publish.add_argument(
        "--readme",
        type=Path,
        default=Path("README.md"),
        metavar="FILE",
        help="where the matrix goes (README.md)",
    )
    publish.set_defaults(run=_publish)

    teeth = commands.add_parser("teeth", help="run wrong implementations; each must fail")
    teeth.add_argument("--out", type=Path, help="result file (JSON lines)")
    teeth.add_argument(
        "--write",
        action="store_true",
        help="write the table that failing backends are compared with",
    )
    teeth.set_defaults(run=_teeth)

    vectors = commands.add_parser("vectors", help="check the vector files, or write them")
    vectors.add_argument("--write", action="store_true", help="write what the generator makes")
    vectors.set_defaults(run=_vectors)

    listing = commands.add_parser("list", help="list vectors, backends and mutants")
    listing.add_argument("--select", metavar="GLOB", help="only these ids, clauses or flags")
    listing.set_defaults(run=_list)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"a number above 0 and below 1e6 is needed, not {text!r}")
    return seconds


def _run(options: argparse.Namespace) -> int:
    # An installed script does not see the folder that it is called in.
    if ":" in options.backend and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    given: dict[str, Any] = {
        "device": options.device,
        "select": options.select,
        "full": options.full,
        "xfail": options.xfail,
        "role": options.role,
        "train": not options.no_train,
        "models": not options.no_models,
        "allow_unavailable": options.allow_unavailable,
    }
    if options.in_process:
        from agc_conformance.suite import run

        return run(options.backend, options.out, **given)
    from agc_conformance.apart import run_apart

    return run_apart(options.backend, options.out, timeout=options.timeout, **given)


def _report(options: argparse.Namespace) -> int:
    from agc_conformance.report import report

    return report(options.files, options.out)


def _publish(options: argparse.Namespace) -> int:
    from agc_conformance.report.overview import publish

    publish(options.report, options.results, options.readme)
    return 0


def _teeth(options: argparse.Namespace) -> int:
    from agc_conformance.teeth import teeth

    return teeth(options.out, write=options.write)


def _vectors(options: argparse.Namespace) -> int:
    from rich.console import Console

    from agc_conformance.generate import check, write
    from agc_conformance.lint import lint
    from agc_conformance.vectors import load_vectors, vector_counts

    console = Console()
    if options.write:
        changed = write()
        load_vectors.cache_clear()
        console.print(f"written: {', '.join(changed) or 'nothing had changed'}", highlight=False)
    problems = lint() + [
        f"{name} is not what the generator makes; run: agc conformance vectors --write"
        for name in check()
    ]
    for problem in problems:
        console.print(f"[red]{problem}[/]", highlight=False)
    vectors = load_vectors()
    levels = vector_counts(vectors)["level"]
    shown = ", ".join(f"{levels[level]} {level}" for level in sorted(levels))
    console.print(f"{len(vectors)} vectors ({shown}), {len(problems)} problems", highlight=False)
    return int(bool(problems))


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from agc_conformance.clauses import CLAUSES
    from agc_conformance.load import backend_names
    from agc_conformance.mutants import MUTANTS
    from agc_conformance.nfnets.ask import KINDS, STUDIES, result_ids
    from agc_conformance.runner import cases
    from agc_conformance.suite import check_selection
    from agc_conformance.training import recipes
    from agc_conformance.training.ask import TASKS
    from agc_conformance.training.ask import result_ids as trained
    from agc_conformance.vectors import load_vectors

    check_selection(options.select)
    console = Console()
    table = Table("vector", "clause", "dtypes", "flags", "what", box=None)
    seen: set[str] = set()
    for vector, _ in cases(load_vectors(), select=options.select):
        if vector.id not in seen:
            seen.add(vector.id)
            dtypes = " ".join(vector.dtypes())
            flags = " ".join(vector.flags)
            table.add_row(vector.id, vector.clause, dtypes, flags, str(vector.data["comment"]))
    for name, study in STUDIES.items():
        for identifier in result_ids(name, options.select):
            clause = KINDS[identifier.removeprefix(f"model-{name}-")]
            when = "with --full" if study.full else ""
            table.add_row(identifier, clause, "", "", f"NFNet {name} {when}".strip())
    for task in TASKS:
        for identifier in trained(task):
            if options.select is None or fnmatchcase(identifier, options.select):
                table.add_row(identifier, "", "", "", f"training on {task}")
    for identifier in recipes.result_ids(options.select):
        clause = recipes.KINDS[identifier.removeprefix("L5-")]
        table.add_row(identifier, clause, "", "", "training of a recipe")
    console.print(table)
    if options.select is None:
        for name, what in CLAUSES.items():
            console.print(f"{name:7} {what}", highlight=False)
        console.print(f"backends: {', '.join(backend_names())}", highlight=False)
        mutants = ", ".join(mutant.name for mutant in MUTANTS)
        console.print(f"mutants: {mutants}", highlight=False)
    return 0
