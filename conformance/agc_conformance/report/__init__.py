"""The report of all result files: in a terminal, and as Markdown, JUnit XML, JSON and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from agc.files import check_target, write_text
from agc_conformance.records import read_results
from agc_conformance.report.html import html
from agc_conformance.report.summary import Summary, summarize
from agc_conformance.report.text import as_json, junit, markdown, terminal

__all__ = ["Summary", "as_json", "html", "junit", "markdown", "report", "summarize", "terminal"]


def report(
    files: Sequence[Path], out: Path | None = None, *, console: Console | None = None
) -> int:
    """Present result files.

    Parameters
    ----------
    files : sequence of path
        Files of runs, teeth and compiled programs.
    out : path, optional
        Folder for ``index.html``, ``report.md``, ``report.json`` and ``junit.xml``.
    console : Console, optional
        Where the matrix is printed.

    Returns
    -------
    int
        Exit status: 1 if a backend failed anything, a mutant survived or a program did not compile.

    Raises
    ------
    FormatError
        If a file is damaged or of another version.
    OSError
        If ``out`` cannot be written.
    """
    summary = summarize([read_results(path) for path in files])
    console = console or Console()
    if out is None:
        terminal(summary, console)
    else:
        contents = {
            "index.html": html(summary),
            "report.md": markdown(summary),
            "report.json": as_json(summary),
            "junit.xml": junit(summary),
        }
        out.mkdir(parents=True, exist_ok=True)
        for name in contents:
            check_target(out / name)  # check all files before writing any
        for name, text in contents.items():
            write_text(out / name, text)
        terminal(summary, console)
        written = f"written: {escape(str(out))}/index.html and {len(contents) - 1} more"
        console.print(written, highlight=False, soft_wrap=True)
    return 0 if summary.ok else 1
