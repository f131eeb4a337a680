"""A whole run: from a backend's name to a complete file of records, with a progress bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agc.backend import Backend, Unavailable
from agc.files import written
from agc_conformance.flags import FLAGS, NO_MUTANT
from agc_conformance.models.mutants import MODEL_MUTANTS, run_model_mutant
from agc_conformance.models.study import STUDIES, count_results, run_study
from agc_conformance.mutants import all_mutants, run_mutant
from agc_conformance.records import (
    MutantRecord,
    Record,
    ResultRecord,
    Role,
    UnavailableRecord,
    Writer,
    bad_statuses,
    make_header,
)
from agc_conformance.reference_backend import ReferenceBackend
from agc_conformance.runner import cases, load_backend, role_of, run_case
from agc_conformance.vectors import digest, load_vectors
from agc_conformance.xfail import apply, default_file, read_xfail, unused

__all__ = ["run", "teeth"]


def run(
    spec: str,
    out: Path,
    *,
    device: str = "cpu",
    select: str | None = None,
    full: bool = False,
    xfail: Path | None = None,
    role: Role | None = None,
    train: bool = True,
    models: bool = True,
    allow_unavailable: bool = False,
    console: Console | None = None,
) -> int:
    """Run the suite on one backend and write a file of records.

    Parameters
    ----------
    spec : str
        Backend, as :func:`agc_conformance.runner.load_backend` takes it.
    out : path
        The file.
    device : str
        Device.
    select : str, optional
        Glob on ids, clauses or flags.
    full : bool
        Also the dtypes that say little new, and F0.
    xfail : path, optional
        Expected failures; by default ``conformance/xfail/<backend>.txt``.
    role : {"backend", "subject"}, optional
        Overrides what the backend says.
    train : bool
        Also train on real images.
    models : bool
        Also compare NFNets; those of a subject are not.
    allow_unavailable : bool
        Whether an absent backend or device is a success.
    console : Console, optional
        For progress and summary.

    Returns
    -------
    int
        Exit status: 0, or 1 if something failed, nothing passed, or the backend was not there.
    """
    console = console or Console(stderr=True)
    common: dict[str, Any] = {
        "vectors": digest(),
        "full": full,
        "select": select,
        "train": train,
        "models": models,
        "device": device,
    }
    try:
        backend = load_backend(spec, device)
    except Unavailable as reason:
        absent: UnavailableRecord = {
            "type": "unavailable",
            "backend": spec,
            "device": device,
            "reason": str(reason),
        }
        with Writer(
            out, make_header("run", backend=spec, role=role or "backend", **common)
        ) as file:
            file.write(absent)
        console.print(f"[yellow]{spec} on {device}: unavailable[/]: {reason}", highlight=False)
        return 0 if allow_unavailable else 1
    role = role or role_of(backend)
    path = xfail or default_file(backend.name)
    expected = read_xfail(path) if path else []
    # The core of this library is nobody else's: what it does right is to nobody else's credit.
    core = isinstance(backend, ReferenceBackend) and role == "backend"
    chosen = cases(load_vectors(), select=select, full=full, core=core)
    header = make_header(
        "run",
        backend=backend.name,
        role=role,
        layout=backend.layout,
        device_name=backend.device_name(),
        versions=backend.versions(),
        **common,
    )
    counts: Counter[str] = Counter()
    good: dict[str, bool] = {}  # by level, whether anything is right or known to be wrong
    problems: list[ResultRecord] = []
    with Writer(out, header) as file, _progress(console) as bar:
        label = f"{backend.name} on {device}"
        task = bar.add_task(label, total=len(chosen))

        def keep(record: Record) -> None:
            if record["type"] == "result":
                result = apply(cast(ResultRecord, record), expected)
                status, level = result["status"], result["level"]
                counts[status] += 1
                good[level] = good.get(level, False) or status in ("passed", "xfail")
                if result["status"] in bad_statuses:
                    problems.append(result)
                record = result
            file.write(record)

        for vector, dtype in chosen:
            keep(run_case(backend, vector, dtype))
            bar.advance(task)
        if train:
            for record in _training(backend, select, bar):
                keep(record)
        if models and role == "backend":
            for record in _models(backend, select, full, bar):
                keep(record)
    for bad in problems[:20]:
        console.print(
            f"[red]{bad['status']}[/] {bad['id']}:{bad['dtype']} {escape(bad['detail'])}",
            highlight=False,
        )
    stale = unused(expected) if select is None else []
    for line in stale:
        console.print(f"[red]stale[/] {line}", highlight=False)
    shown = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    console.print(
        f"{backend.name} on {device}: {shown or 'nothing was run'} -> {written(out)}",
        highlight=False,
    )
    if role == "subject":
        return int(bool(stale) or not counts)
    # Plans are only a beginning, unless nothing else was asked for.
    idle = not any(good[level] for level in good if level != "L0" or len(good) == 1)
    if counts and idle:
        console.print("[red]nothing passed[/] beyond the plans of level 0", highlight=False)
    return int(idle or bool(problems) or bool(stale))


def _training(backend: Backend, select: str | None, bar: Progress) -> Iterator[Mapping[str, Any]]:
    """Train on real images and yield the records."""
    from agc_conformance.real_images import TASKS, result_ids, run_task  # scikit-learn is heavy

    for name in TASKS:
        if select is not None and not any(fnmatchcase(one, select) for one in result_ids(name)):
            continue
        task = bar.add_task(f"{backend.name} trains on {name}", total=None)

        def show(done: int, total: int, task: Any = task) -> None:
            bar.update(task, completed=done, total=total)

        yield from run_task(backend, name, progress=show)


def _models(
    backend: Backend, select: str | None, full: bool, bar: Progress
) -> Iterator[Mapping[str, Any]]:
    """Compare NFNets and yield the records."""
    for name, study in STUDIES.items():
        total = count_results(name, select)
        if total == 0 or (study.full and not full):
            continue
        task = bar.add_task(f"{backend.name} as NFNet {name}", total=total)

        def advance(count: int, task: Any = task) -> None:
            bar.advance(task, count)

        yield from run_study(backend, name, select=select, progress=advance)


def teeth(out: Path | None = None, *, console: Console | None = None) -> int:
    """Run every mutant against the vectors, or against a model, and, if ``out`` is given, write a file of records.

    Returns
    -------
    int
        Exit status: 1 if a mutant survives, or a flag has no mutant that its vectors kill.
    """
    console = console or Console(stderr=True)
    vectors, mutants, model_mutants = load_vectors(), all_mutants(), MODEL_MUTANTS
    count = len(mutants) + len(model_mutants)
    survivors: list[str] = []
    killed_flags: set[str] = set()
    flags = {vector.id: set(vector.flags) for vector in vectors}
    header = make_header("teeth", vectors=digest())
    with ExitStack() as stack:
        file = stack.enter_context(Writer(out, header)) if out else None
        bar = stack.enter_context(_progress(console))
        task = bar.add_task("mutants", total=count)

        def keep(name: str, flag: str, comment: str, killed_by: list[str]) -> None:
            record: MutantRecord = {
                "type": "mutant",
                "name": name,
                "flag": flag,
                "comment": comment,
                "status": "killed" if killed_by else "survived",
                "killed_by": killed_by,
            }
            if file is not None:
                file.write(record)
            if not killed_by:
                survivors.append(name)
            bar.advance(task)

        for mutant in mutants:
            killed_by = run_mutant(mutant, vectors)
            keep(mutant.name, mutant.flag, mutant.comment, killed_by)
            if any(mutant.flag in flags[key.rpartition(":")[0]] for key in killed_by):
                killed_flags.add(mutant.flag)
        for wrong in model_mutants:
            keep(wrong.name, wrong.clause, wrong.comment, run_model_mutant(wrong))
    for name in survivors:
        console.print(f"[red]survived[/] {name}", highlight=False)
    toothless = sorted(set(FLAGS) - killed_flags - set(NO_MUTANT))
    for flag in toothless:
        console.print(
            f"[red]toothless[/] no vector with the flag {flag} kills a mutant of that flag",
            highlight=False,
        )
    console.print(
        f"{count - len(survivors)} of {count} mutants killed, "
        f"{len(killed_flags)} of {len(FLAGS)} flags proven"
        + (f" -> {written(out)}" if out else ""),
        highlight=False,
    )
    return int(bool(survivors or toothless))


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar
