"""Text presentations: terminal, Markdown, JUnit XML, JSON."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any, Final
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agc_conformance.clauses import CLAUSES
from agc_conformance.records import bad_statuses
from agc_conformance.report.summary import (
    ULP_LIMITS,
    Cell,
    Column,
    Summary,
    not_offered,
    program_cells,
)

__all__ = ["as_json", "junit", "markdown", "terminal"]

_STYLE = {
    "passed": "green",
    "failed": "bold red",
    "expected": "yellow",
    "unsupported": "dim",
    "none": "dim",
}
_SHOWN: Final = 30
"""How many failures are printed."""
# Characters that XML 1.0 cannot hold.
_CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


def _cell(cell: Cell, *, subject: bool) -> str:
    verdict = cell.verdict
    if verdict == "none":
        return "-"
    if verdict == "unsupported":
        return "unsupported"
    good = cell.counts["passed"]
    word = (
        {"passed": "meets", "failed": "misses", "expected": "meets"}[verdict] + " "
        if subject
        else ""
    )
    if not subject and verdict == "failed":
        word = "FAILED "
    return f"{word}{good}/{cell.asked}"


def _worst(cell: Cell) -> str:
    return "" if cell.max_ulp is None else f" {cell.max_ulp:.2g} ULP"


def terminal(summary: Summary, console: Console) -> None:
    """Print the matrix."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    for title, columns in (("Backends", summary.backends), ("Subjects", summary.subjects)):
        if not columns:
            continue
        table = Table(title=title, title_justify="left")
        room = max(8, console.width - 4 - 21 * len(columns))  # the first column shrinks first
        table.add_column("clause", no_wrap=True, overflow="ellipsis", max_width=room)
        for column in columns:
            name = f"{column.name}\n{column.device}"
            table.add_column(name, justify="right", no_wrap=True)
        folded = not_offered(columns)
        for clause, what in CLAUSES.items():
            if clause in folded:
                continue
            cells = [column.cells[clause] for column in columns]
            shown = [
                f"[{_STYLE[c.verdict]}]{_cell(c, subject=col.role == 'subject')}[/]"
                for c, col in zip(cells, columns, strict=True)
            ]
            table.add_row(f"{clause} [dim]{what}[/]", *shown)
        totals = [
            f"[{_STYLE[c.total.verdict]}]{_cell(c.total, subject=c.role == 'subject')}[/]"
            for c in columns
        ]
        table.add_section()
        table.add_row("all", *totals)
        console.print(table)
        if folded:
            say(f"[dim]not offered or not asked: {', '.join(folded)}[/]")
    for column, result in summary.failures[:_SHOWN]:
        say(
            f"[red]{result['status']}[/] {escape(column.title)} {result['id']}:{result['dtype']} "
            f"{escape(result['detail'])}"
        )
    if len(summary.failures) > _SHOWN:
        say(f"and {len(summary.failures) - _SHOWN} more; --out DIR writes all")
    for record in summary.unavailable:
        say(
            f"[yellow]unavailable[/] {escape(record['backend'])} on {record['device']}: "
            f"{escape(record['reason'])}"
        )
    for name in summary.survivors:
        say(f"[red]survived[/] {name}")
    for program in summary.programs:
        if program["status"] != "compiled":
            say(f"[yellow]{program['status']}[/] {program['id']}: {escape(program['detail'])}")
    if summary.programs:
        compiled = sum(program["status"] == "compiled" for program in summary.programs)
        say(f"{compiled} of {len(summary.programs)} programs compiled ahead of time (not run)")
    for sentence in summary.diagnoses:
        say(f"[yellow]{escape(sentence)}[/]")
    for notice in summary.notices:
        say(f"[yellow]{escape(notice)}[/]")
    style = {"ok": "green", "partly": "yellow", "no": "bold red"}[summary.mood]
    say(f"[{style}]{summary.headline}[/]")


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    clean = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]
    ]
    lines = [f"| {' | '.join(row)} |" for row in clean]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:], ""]


def _mark(column: Column, cell: Cell) -> str:
    sign = {"passed": "✓", "failed": "✗", "expected": "~", "unsupported": "·", "none": ""}
    shown = _cell(cell, subject=False).replace("FAILED ", "").replace("unsupported", "n/a")
    return f"{sign[cell.verdict]} {shown}{_worst(cell) if column.role == 'backend' else ''}".strip()


def markdown(summary: Summary) -> str:
    """Return the report as Markdown."""
    lines = ["# Conformance", "", f"**{summary.headline}.**", ""]
    said = [*summary.notices, *summary.diagnoses]
    lines += [line for text in said for line in (f"> {text}", "")]
    for title, columns in (("Backends", summary.backends), ("Subjects", summary.subjects)):
        if columns:
            lines += [f"## {title}", ""]
            folded = not_offered(columns)
            rows = [
                [f"{clause}: {what}", *(_mark(c, c.cells[clause]) for c in columns)]
                for clause, what in CLAUSES.items()
                if clause not in folded
            ]
            rows.append(["all", *(_mark(c, c.total) for c in columns)])
            lines += _table(["clause", *(c.title for c in columns)], rows)
            lines += [f"Not offered or not asked: {', '.join(folded)}.", ""] if folded else []
    if summary.paths:
        lines += ["## Largest error in float32 by path, in ULP of which 4 are allowed", ""]
        rows = [
            [c.title, *(f"{c.paths[p]:.2f}" if p in c.paths else "" for p in summary.paths)]
            for c in summary.backends
        ]
        lines += _table(["run", *summary.paths], rows)
    if summary.failures:
        lines += ["## Failures", ""]
        rows = [
            [column.title, f"`{r['id']}:{r['dtype']}`", r["status"], r["detail"]]
            for column, r in summary.failures
        ]
        lines += _table(["run", "result", "status", "what"], rows)
    if summary.unavailable:
        lines += ["## Unavailable", ""]
        lines += _table(
            ["backend", "device", "why"],
            [[r["backend"], r["device"], r["reason"]] for r in summary.unavailable],
        )
    if summary.mutants:
        lines += ["## Mutants", ""]
        rows = [
            [
                m["name"],
                m["flag"],
                m["comment"],
                f"{m['status']} by {len(m['killed_by'])}" if m["killed_by"] else "**survived**",
                ", ".join(f"`{key}`" for key in m["killed_by"][:3]),
            ]
            for m in summary.mutants
        ]
        lines += _table(["mutant", "flag", "what it does", "", "for example"], rows)
    if summary.programs:
        lines += ["## Compiled ahead of time (not run)", ""]
        cells = [program_cells(p) for p in summary.programs]
        rows = [
            [p["id"], p["target"], p["status"], *row.values()]
            for p, row in zip(summary.programs, cells, strict=True)
        ]
        lines += _table(["program", "target", "status", *(t.lower() for t in cells[0])], rows)
    lines += ["## Provenance", ""]
    rows = []
    for file in summary.files:
        h = file.header
        versions = ", ".join(f"{name} {version}" for name, version in h["versions"].items())
        who = f"{h['kind']} {h.get('backend', '')}".strip()
        machine = f"{h.get('device_name', '')} {h['platform']}, Python {h['python']}".strip()
        rows.append([who, machine, versions, h.get("vectors", ""), h["commit"] or "", h["date"]])
    lines += _table(["file", "machine", "versions", "vectors", "commit", "date"], rows)
    return "\n".join(lines)


def junit(summary: Summary) -> str:
    """Return JUnit XML; failures of subjects are ``skipped``, since they need not conform."""
    root = ET.Element("testsuites", name="agc conformance")
    for column in summary.columns:
        total = column.total
        subject = column.role == "subject"
        errors = 0 if subject else total.counts["error"]
        failures = 0 if subject else total.bad - errors
        skipped = len(total.results) - total.counts["passed"] - errors - failures
        died = column.died if not subject else None
        suite = ET.SubElement(
            root,
            "testsuite",
            name=column.title,
            tests=str(len(total.results) + bool(died)),
            failures=str(failures),
            errors=str(errors + bool(died)),
            skipped=str(skipped),
        )
        for result in total.results:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=f"{column.name}.{column.device}.{result['clause']}",
                name=f"{result['id']}:{result['dtype']}",
                time=str(result.get("seconds", 0)),
            )
            status, detail = result["status"], _CONTROL.sub("?", result["detail"])
            if status == "passed":
                continue
            if status in bad_statuses and not subject:
                tag = "error" if status == "error" else "failure"
                ET.SubElement(case, tag, message=detail, type=status)
            else:
                ET.SubElement(case, "skipped", message=f"{status}: {detail}")
        if died:
            case = ET.SubElement(suite, "testcase", classname="died", name=died["check"])
            message = _CONTROL.sub("?", died["reason"])
            ET.SubElement(case, "error", message=message, type="died")
    if summary.mutants:
        suite = ET.SubElement(
            root,
            "testsuite",
            name="mutants",
            tests=str(len(summary.mutants)),
            failures=str(len(summary.survivors)),
            errors="0",
            skipped="0",
        )
        for mutant in summary.mutants:
            case = ET.SubElement(
                suite, "testcase", classname=f"mutants.{mutant['flag']}", name=mutant["name"]
            )
            if mutant["status"] != "killed":
                ET.SubElement(case, "failure", message="survived", type="survived")
    for record in summary.unavailable:
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{record['backend']} on {record['device']}",
            tests="1",
            failures="0",
            errors="0",
            skipped="1",
        )
        case = ET.SubElement(suite, "testcase", classname="unavailable", name="available")
        message = f"unavailable: {_CONTROL.sub('?', record['reason'])}"
        ET.SubElement(case, "skipped", message=message)
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_json(summary: Summary) -> str:
    """Return the summary as JSON."""

    def matrix(column: Column) -> dict[str, Any]:
        return {
            clause: {
                "verdict": cell.verdict,
                "counts": dict(cell.counts),
                "max_ulp": cell.max_ulp,
                "dtypes": {
                    name: {
                        "verdict": part.verdict,
                        "counts": dict(part.counts),
                        "max_ulp": part.max_ulp,
                    }
                    for name, part in cell.dtypes.items()
                },
            }
            for clause, cell in column.cells.items()
        }

    def errors(column: Column, method: str) -> dict[str, Any]:
        counts = column.histograms(method)
        return {
            name: {"max_ulp": worst, "limit": limit, "histogram": counts[name]}
            for name, (worst, limit) in column.errors(method).items()
        }

    data = {
        "format": "agc-report",
        "version": 1,
        "ok": summary.ok,
        "headline": summary.headline,
        "notices": summary.notices,
        "runs": [
            {
                "header": column.file.header,
                "died": column.died,
                "diagnosis": column.diagnosis,
                "clauses": matrix(column),
                "paths": column.paths,
                "recipe": column.recipe,
                "errors": {method: errors(column, method) for method in ULP_LIMITS},
            }
            for column in summary.columns
        ],
        "failures": [{"run": column.title, **result} for column, result in summary.failures],
        "unavailable": summary.unavailable,
        "mutants": summary.mutants,
        "programs": summary.programs,
    }
    return json.dumps(data, indent=1) + "\n"
