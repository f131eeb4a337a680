"""The overview in the README: a matrix and a figure, made from a committed report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from agc.cli.pictures import paper
from agc.errors import FormatError
from agc.files import check_target, write_text
from agc_conformance.clauses import CLAUSES
from agc_conformance.records import ULP_BINS
from agc_conformance.report.figures import recipe_curves, svg

__all__ = ["errors_figure", "overview", "publish"]

_BEGIN: Final = "<!-- matrix: written by `nox -s publish` -->"
_END: Final = "<!-- end of matrix -->"
_SIGNS: Final = {"passed": "✓", "failed": "✗", "expected": "~", "unsupported": "n/a", "none": ""}
_NAMES: Final = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}

Run = Mapping[str, Any]


def overview(report: Mapping[str, Any]) -> str:
    """Return the matrix of a report as Markdown.

    Parameters
    ----------
    report : mapping
        Contents of a ``report.json``.

    Returns
    -------
    str
        A row for each clause, those of SAM and the models folded away; a column for each backend,
        then for each subject; errors and provenance below.
    """
    runs = [*_runs(report, "backend"), *_runs(report, "subject")]
    head = ["", *(_title(run) for run in runs)]

    def rows(method: str, columns: Sequence[Run]) -> list[list[str]]:
        return [
            [f"**{clause}** {what}", *(_cell(run, clause) for run in columns)]
            for clause, what in CLAUSES.items()
            if clause.startswith(method)
        ]

    backends = [*_runs(report, "backend")]  # subjects are not asked about models
    folded = [
        ("The same for SAM", head, rows("SAM", runs)),
        ("The same for NFNets", head[: 1 + len(backends)], rows("NFNET", backends)),
        ("The same for recipes", head[: 1 + len(backends)], rows("RECIPE", backends)),
    ]
    # A report may be older than a clause.
    folded = [part for part in folded if any(any(row[1:]) for row in part[2])]
    worst = ["largest error in float32, of 4 ULP allowed", *(_worst(run) for run in runs)]
    date = min(run["header"]["date"] for run in runs)
    killed = [mutant["status"] for mutant in report["mutants"]].count("killed")
    return "\n".join(
        [
            *_table(head, [*rows("AGC", runs), worst]),
            "",
            *(
                line
                for title, titles, table in folded
                for line in (
                    f"<details><summary>{title}</summary>",
                    "",
                    *_table(titles, table),
                    "",
                    "</details>",
                    "",
                )
            ),
            "✓ all checks of a clause passed, but for those of what is not offered (n/a); ✗ how many did. "
            f"{killed} of "
            f"{len(report['mutants'])} wrong implementations, let loose on the same checks, were caught. "
            f"On a CPU, {date.split()[0]}; "
            "[the numbers](conformance/results/cpu.json), [how they are found](conformance/README.md).",
        ]
    )


def errors_figure(report: Mapping[str, Any]) -> str:
    """Draw how the clipped float32 elements of the backends are distributed over errors, as SVG."""
    labels = ["0", *(f"≤ {edge:g}" for edge in ULP_BINS[1:]), f"> {ULP_BINS[-1]:g}"]
    red = "#d9534f"  # on a light page and on a dark one
    with paper(6.4, 2.4) as figure:
        axes = figure.subplots()
        runs = [run for run in _runs(report, "backend") if run["header"]["backend"] in _NAMES]
        for place, run in enumerate(runs):
            counts = run["errors"]["AGC"]["float32"]["histogram"]
            left = [index + 0.27 * (place - (len(runs) - 1) / 2) for index in range(len(counts))]
            shares = [100 * count / sum(counts) for count in counts]
            axes.bar(left, shares, 0.25, label=_NAMES[run["header"]["backend"]])
        axes.axvline(ULP_BINS.index(4) + 0.5, color=red, lw=1.5)
        axes.text(ULP_BINS.index(4) + 0.6, 0.6 * axes.get_ylim()[1], "not allowed", color=red)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("distance from the float64 reference in units in the last place")
        axes.set_ylabel("% of elements")
        axes.legend()
        return svg(figure, "Clipped float32 elements by error in ULP, of three frameworks")


def publish(report: Path, results: Path, readme: Path) -> None:
    """Keep a report, draw its figure, and put its matrix into a README.

    Parameters
    ----------
    report : path
        ``report.json``.
    results : path
        Folder that gets ``cpu.json``, ``errors.svg`` and, if the report has it, ``recipe.svg``.
    readme : path
        A file with the two marks that the matrix stands between.

    Raises
    ------
    FormatError
        If the file is not a report, the report has failures or lacks a framework, or the README has
        no marks.
    OSError
        If one of the files cannot be written.
    """
    text = _read(report)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{report}: not JSON ({error}); run: nox -s conformance") from error
    if not isinstance(data, dict) or data.get("format") != "agc-report":
        raise FormatError(f"{report}: not a report; give the report.json of: nox -s conformance")
    try:
        lacks = _lacks(data)
        contents = {} if lacks else {"matrix": overview(data), "figure": errors_figure(data)}
        curves = {
            _NAMES[run["header"]["backend"]]: run["recipe"]
            for run in _runs(data, "backend")
            if run["header"]["backend"] in _NAMES and run.get("recipe")
        }
        if contents and curves:
            contents["recipe"] = recipe_curves(curves)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise FormatError(
            f"{report}: a damaged report ({what}); run: nox -s conformance"
        ) from error
    if lacks:
        raise FormatError(f"{report}: {lacks}; only a complete and good report is published")
    page = _read(readme)
    if _BEGIN not in page or _END not in page:
        raise FormatError(f"{readme}: it needs the lines {_BEGIN!r} and {_END!r}")
    before, after = page[: page.index(_BEGIN)], page[page.index(_END) :]
    check_target(readme)
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / "cpu.json", text)
    write_text(results / "errors.svg", contents["figure"] + "\n")
    if "recipe" in contents:
        write_text(results / "recipe.svg", contents["recipe"] + "\n")
    write_text(readme, f"{before}{_BEGIN}\n\n{contents['matrix']}\n\n{after}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text: {error}") from None


def _lacks(report: Mapping[str, Any]) -> str:
    """Return why a report cannot be published; empty if it can."""
    backends = {run["header"]["backend"] for run in report["runs"]}
    missing = [f"no run of {name}" for name in sorted(_NAMES.keys() - backends)]
    missing += [] if report["mutants"] else ["no mutants"]
    if missing or (report["ok"] and not report["notices"]):
        return ", ".join(missing)
    return " ".join([report["headline"], *report["notices"]])


def _runs(report: Mapping[str, Any], role: str) -> Iterator[Run]:
    order = [*_NAMES]
    runs = [run for run in report["runs"] if run["header"]["role"] == role]
    known = [run for run in runs if run["header"]["backend"] in _NAMES]
    yield from sorted(known, key=lambda run: order.index(run["header"]["backend"]))
    yield from (run for run in runs if run not in known)


def _title(run: Run) -> str:
    header = run["header"]
    name = header["backend"].partition(":")[0]
    version = header["versions"].get(name, "")
    return f"{_NAMES.get(name, name)} {version}".strip()


def _cell(run: Run, clause: str) -> str:
    cell = run["clauses"].get(clause, {"verdict": "none"})
    sign = _SIGNS[cell["verdict"]]
    counts = cell.get("counts", {})
    if cell["verdict"] == "passed" and counts.get("unsupported"):
        return f"{sign} ({counts['unsupported']} n/a)"
    if cell["verdict"] != "failed":
        return sign
    return f"{sign} {counts.get('passed', 0)}/{sum(counts.values()) - counts.get('unsupported', 0)}"


def _worst(run: Run) -> str:
    errors = run["errors"]["AGC"].get("float32")
    return (
        "" if errors is None or run["header"]["role"] != "backend" else f"{errors['max_ulp']:.2f}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], f"|---|{':-:|' * (len(head) - 1)}", *lines[1:]]
