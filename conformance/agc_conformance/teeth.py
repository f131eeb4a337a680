"""The suite's own test: every mutant must be caught."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from agc.files import write_text, written
from agc_conformance.diagnosis import KILLERS, killers, table
from agc_conformance.flags import FLAGS
from agc_conformance.mutants import MUTANTS, run_mutant
from agc_conformance.records import MutantRecord, Writer, make_header
from agc_conformance.suite import progress_bar
from agc_conformance.vectors import digest, load_vectors

__all__ = ["teeth"]


def teeth(out: Path | None = None, *, write: bool = False, console: Console | None = None) -> int:
    """Run every mutant, and, if ``out`` is given, write a file of records.

    Parameters
    ----------
    out : path, optional
        The file.
    write : bool, default False
        Also write :data:`agc_conformance.diagnosis.KILLERS`, which backends are compared with.
    console : Console, optional
        For progress and summary.

    Returns
    -------
    int
        Exit status: 1 if a mutant survives, no vector with a flag kills a mutant of that flag, or
        the table is another one.
    """
    console = console or Console(stderr=True)
    vectors = load_vectors()
    flags = {vector.id: set(vector.flags) for vector in vectors}
    survivors: list[str] = []
    killed: dict[str, list[str]] = {}
    killed_flags: set[str] = set()
    with ExitStack() as stack:
        header = make_header("teeth", vectors=digest())
        file = stack.enter_context(Writer(out, header)) if out else None
        bar = stack.enter_context(progress_bar(console))
        task = bar.add_task("mutants", total=len(MUTANTS))
        for mutant in MUTANTS:
            killed_by = run_mutant(mutant, vectors)
            record: MutantRecord = {
                "type": "mutant",
                "name": mutant.name,
                "flag": mutant.flag,
                "comment": mutant.comment,
                "status": "killed" if killed_by else "survived",
                "killed_by": killed_by,
            }
            if file is not None:
                file.write(record)
            if mutant.wing in ("clipping", "sharpness"):
                killed[mutant.name] = killed_by
            if not killed_by:
                survivors.append(mutant.name)
            if any(mutant.flag in flags.get(key.rpartition(":")[0], ()) for key in killed_by):
                killed_flags.add(mutant.flag)
            bar.advance(task)
    say = partial(console.print, highlight=False, soft_wrap=True)
    for name in survivors:
        say(f"[red]survived[/] {name}")
    toothless = sorted(set(FLAGS) - killed_flags)
    for flag in toothless:
        say(f"[red]toothless[/] no vector with the flag {flag} kills a mutant of that flag")
    if write:
        write_text(KILLERS, table(killed))
        killers.cache_clear()
    stale = any(killers().get(name) != frozenset(keys) for name, keys in killed.items())
    if stale:
        say(f"[red]stale[/] {KILLERS.name} says otherwise; run: agc conformance teeth --write")
    say(
        f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants killed, "
        f"{len(killed_flags)} of {len(FLAGS)} flags proven"
        + (f" -> {escape(written(out))}" if out else "")
    )
    return int(bool(survivors or toothless or stale))
