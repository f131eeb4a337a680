"""A whole run: from a backend's name to a complete file of records, with a progress bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agc.errors import ConfigError
from agc.files import written
from agc_conformance.backend import Backend, Unavailable
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clauses import CLAUSES, OF_THE_CORE
from agc_conformance.core.ask import CORE_KINDS
from agc_conformance.diagnosis import diagnose
from agc_conformance.flags import FLAGS
from agc_conformance.load import load_backend, role_of
from agc_conformance.nfnets.ask import STUDIES, count_results, result_ids, run_study
from agc_conformance.records import (
    Record,
    ResultRecord,
    Role,
    UnavailableRecord,
    Writer,
    bad_statuses,
    make_header,
)
from agc_conformance.runner import OF_THIS_LIBRARY, cases, run_case
from agc_conformance.training import recipes
from agc_conformance.vectors import digest, load_vectors
from agc_conformance.xfail import apply, default_file, read_xfail, unused

__all__ = ["check_selection", "progress_bar", "run"]

Watch = Callable[[str], None]
_SHOWN: Final = 20
"""How many failures are printed; the file and the report have all."""


def check_selection(select: str | None) -> None:
    """Raise ConfigError, which names what is nearest, if a selection matches nothing."""
    if select is None:
        return
    from agc_conformance.training.ask import TASKS
    from agc_conformance.training.ask import result_ids as trained

    names = [vector.id for vector in load_vectors()]
    names += [*CLAUSES, *FLAGS]
    names += [identifier for study in STUDIES for identifier in result_ids(study)]
    names += [identifier for task in TASKS for identifier in trained(task)]
    names += recipes.result_ids()
    if any(fnmatchcase(name, select) for name in names):
        return
    plain = {name.lower(): name for name in names}
    close = get_close_matches(select.strip("*").lower(), plain, n=3, cutoff=0.5)
    nearest = ", ".join(plain[name] for name in close)
    raise ConfigError(
        f"--select {select}: no id, clause or bug class matches"
        f"{f'; nearest are {nearest}' if nearest else ''}; agc conformance list shows all"
    )


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
    watch: Watch | None = None,
    console: Console | None = None,
) -> int:
    """Run the suite on one backend and write a file of records.

    Parameters
    ----------
    spec : str
        Backend, as :func:`agc_conformance.load.load_backend` takes it.
    out : path
        The file.
    device : str
        Device.
    select : str, optional
        Glob on ids, clauses or flags.
    full : bool
        Also the dtypes that add little coverage, and F0.
    xfail : path, optional
        Expected failures; by default ``conformance/xfail/<backend>.txt``.
    role : {"backend", "subject"}, optional
        Overrides the backend's own role.
    train : bool
        Also train on real images.
    models : bool
        Also compare NFNets and train recipes; subjects are not asked for them.
    allow_unavailable : bool
        Whether the run succeeds if the backend or device is missing.
    watch : callable, optional
        Called with the name of every check (``id:dtype``) before the backend is asked.
    console : Console, optional
        For progress and summary.

    Returns
    -------
    int
        Exit status: 0, or 1 if something failed, nothing passed, or the backend was unavailable.

    Raises
    ------
    ConfigError
        If ``select`` matches nothing, or there is no such backend.
    """
    console = console or Console(stderr=True)
    say = partial(console.print, highlight=False, soft_wrap=True)
    watch = watch or (lambda _: None)
    check_selection(select)
    place = out.absolute()  # a backend may change the working directory
    expected = read_xfail(xfail) if xfail else []
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
            place, make_header("run", backend=spec, role=role or "backend", **common)
        ) as file:
            file.write(absent)
        say(f"[yellow]{escape(spec)} on {device}: unavailable[/]: {escape(str(reason))}")
        return 0 if allow_unavailable else 1
    role = role or role_of(backend)
    if xfail is None and (path := default_file(backend.name)):
        expected = read_xfail(path)
    # Level 0 tests this library's core, so only the reference backend is asked.
    without = frozenset(CORE_KINDS) if role == "backend" else OF_THIS_LIBRARY
    if isinstance(backend, ReferenceBackend) and role == "backend":
        without = frozenset()
    chosen = cases(load_vectors(), select=select, full=full, without=without)
    header = make_header(
        "run",
        backend=backend.name,
        role=role,
        layout=backend.layout,
        device_name=backend.device_name(),
        versions=backend.versions(),
        **common,
    )
    label = f"{escape(backend.name)} on {device}"
    counts: Counter[str] = Counter()
    passed_by_level: dict[str, bool] = {}  # known failures count as passed
    results: list[ResultRecord] = []
    with Writer(place, header) as file, progress_bar(console) as bar:
        task = bar.add_task(label, total=len(chosen))

        def keep(record: Record) -> None:
            if record["type"] == "result":
                result = apply(cast(ResultRecord, record), expected)
                status = result["status"]
                level = "L0" if result["clause"] in OF_THE_CORE else result["level"]
                counts[status] += 1
                passed_by_level[level] = passed_by_level.get(level, False) or status in (
                    "passed",
                    "xfail",
                )
                results.append(result)
                record = result
            file.write(record)

        for vector, dtype in chosen:
            watch(f"{vector.id}:{dtype}")
            keep(run_case(backend, vector, dtype))
            bar.advance(task)
        if train:
            for record in _training(backend, select, bar, watch):
                keep(record)
        if models and role == "backend":
            for record in _models(backend, select, full, bar, watch):
                keep(record)
            for record in _recipes(backend, select, bar, watch):
                keep(record)
    problems = [result for result in results if result["status"] in bad_statuses]
    for bad in problems[:_SHOWN]:
        say(f"[red]{bad['status']}[/] {bad['id']}:{bad['dtype']} {escape(bad['detail'])}")
    if len(problems) > _SHOWN:
        say(f"and {len(problems) - _SHOWN} more, which the report lists")
    stale = unused(expected) if select is None else []
    for line in stale:
        say(f"[red]stale[/] {escape(line)}")
    shown = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    if not counts:
        shown = (
            f"nothing was run: --select {escape(str(select))} matches only what this run leaves out"
        )
    for sentence in diagnose(results):
        say(f"[yellow]{escape(sentence)}[/]")
    say(f"{label}: {shown} -> {escape(written(out))}")
    if role == "subject":
        return int(bool(stale) or not counts)
    # Passing level 0 alone does not count, unless no other level was selected.
    levels = set(passed_by_level) - {"L0"} or {"L0"}
    nothing_passed = not any(passed_by_level.get(level) for level in levels)
    if counts and nothing_passed:
        say("[red]nothing passed[/] beyond the plans of level 0")
    return int(nothing_passed or bool(problems) or bool(stale))


def _training(
    backend: Backend, select: str | None, bar: Progress, watch: Watch
) -> Iterator[Mapping[str, Any]]:
    """Train on real images and yield the records."""
    from agc_conformance.training.ask import TASKS, result_ids, run_task  # scikit-learn is heavy

    for name in TASKS:
        if select is not None and not any(
            fnmatchcase(identifier, select) for identifier in result_ids(name)
        ):
            continue
        task = bar.add_task(f"{backend.name} trains on {name}", total=None)

        def show(done: int, total: int, task: Any = task, name: str = name) -> None:
            bar.update(task, completed=done, total=total)
            watch(f"real-{name}, step {min(done + 1, total)} of {total}")

        watch(f"real-{name}, step 1")
        yield from run_task(backend, name, progress=show)


def _models(
    backend: Backend, select: str | None, full: bool, bar: Progress, watch: Watch
) -> Iterator[Mapping[str, Any]]:
    """Compare NFNets and yield the records."""
    for name, study in STUDIES.items():
        total = count_results(name, select)
        if total == 0 or (study.full and not full):
            continue
        task = bar.add_task(f"{backend.name} as NFNet {name}", total=total)

        def advance(count: int, task: Any = task) -> None:
            bar.advance(task, count)

        yield from run_study(backend, name, select=select, progress=advance, watch=watch)


def _recipes(
    backend: Backend, select: str | None, bar: Progress, watch: Watch
) -> Iterator[Mapping[str, Any]]:
    """Train recipes and yield the records."""
    total = recipes.count_results(select)
    if total:
        task = bar.add_task(f"{backend.name} trains a recipe", total=total)
        yield from recipes.run_recipes(
            backend, select=select, progress=lambda done: bar.advance(task, done), watch=watch
        )


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a progress bar, and remove it at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar
