"""The HTML page: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from agc_conformance.clauses import CLAUSES
from agc_conformance.flags import FLAGS
from agc_conformance.records import ResultRecord, bad_statuses
from agc_conformance.report.figures import (
    histograms,
    model_errors,
    recipe_curves,
    training_figures,
)
from agc_conformance.report.summary import (
    ULP_LIMITS,
    Cell,
    Column,
    Summary,
    not_offered,
    program_cells,
)
from agc_conformance.vectors import load_vectors

__all__ = ["html"]


def html(summary: Summary) -> str:
    """Return the report as one self-contained page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["ulp"] = lambda value: "" if value is None else f"{value:.3g}"
    template = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        summary=summary,
        clauses=CLAUSES,
        comments={vector.id: vector.data["comment"] for vector in load_vectors()},
        flags=FLAGS,
        bad=bad_statuses,
        # Figures are SVG made here, so nothing needs escaping.
        drawn=[
            Markup(histograms(f"{method}, {column.title}", counts, limits))
            for method, limits in ULP_LIMITS.items()
            for column in summary.backends
            if (counts := column.histograms(method))
        ],
        methods=list(ULP_LIMITS),
        training=_training(summary),
        trained=_trained(summary),
        recipes=_recipes(summary),
        models=_models(summary),
        dtype=lambda name: "no numbers" if name == "-" else name,
        short=_short,
        all_dtypes=_dtypes(summary),
        empty=Cell(),
        not_offered=not_offered,
        offered=lambda folded: {c: what for c, what in CLAUSES.items() if c not in folded},
        named=lambda folded: {clause: CLAUSES[clause] for clause in folded},
        unsupported=lambda column: [
            clause for clause, part in column.cells.items() if part.verdict == "unsupported"
        ],
        count_of=lambda classes: sum(len(failures) for failures in classes.values()),
        groups=_groups(summary),
        filters=_filters(summary),
        program_cells=program_cells,
    )


def _short(dtype: str) -> str:
    """Abbreviate a dtype: ``bf16/f32`` has gradients in bfloat16 and weights in float32."""
    if dtype == "-":
        return "no numbers"
    return dtype.replace("bfloat", "bf").replace("float", "f").replace("complex", "c")


_Failure = tuple[Column, ResultRecord]


def _groups(summary: Summary) -> dict[str, dict[str, list[_Failure]]]:
    """Return the failures by clause and the first bug class that the vector catches."""
    groups: dict[str, dict[str, list[_Failure]]] = {clause: {} for clause in CLAUSES}
    for column, result in summary.failures:
        flag = next(iter(result["flags"]), "")
        classes = groups.setdefault(result["clause"], {})
        classes.setdefault(flag, []).append((column, result))
    return {clause: classes for clause, classes in groups.items() if classes}


def _filters(summary: Summary) -> dict[str, list[tuple[str, str, int]]]:
    """Return what failures can be filtered by: values, their titles and numbers of failures."""
    failures, titles = summary.failures, {column.key: column.title for column in summary.columns}
    counts = {
        "Clause": (CLAUSES, Counter(result["clause"] for _, result in failures)),
        "Bug class": (FLAGS, Counter(flag for _, result in failures for flag in result["flags"])),
        "Run": (titles, Counter(column.key for column, _ in failures)),
    }
    return {
        group: [(value, titles.get(value, value), count[value]) for value in names if count[value]]
        for group, (names, count) in counts.items()
    }


def _dtypes(summary: Summary) -> list[str]:
    dtypes: dict[str, None] = {}
    for column in summary.columns:
        dtypes.update(dict.fromkeys(column.total.dtypes))
    return list(dtypes)


def _training(summary: Summary) -> list[tuple[str, str, Markup]]:
    """Return backend, task and figure of every training on real images."""
    return [
        (column.title, task, Markup(drawn))
        for column in summary.backends
        if column.file.train
        for task, drawn in training_figures(column.file.train).items()
    ]


def _asked(result: ResultRecord) -> bool:
    return result["status"] != "unsupported"


def _trained(summary: Summary) -> list[str]:
    """Return the ids of the results of training on real images."""
    ids: dict[str, None] = {}
    for column in summary.backends:
        ids |= {
            r["id"]: None for r in column.file.results if _asked(r) and "RealImages" in r["flags"]
        }
    return list(ids)


def _recipes(summary: Summary) -> tuple[list[tuple[str, str]], Markup] | None:
    """Return the results of level 5 (id and dtype), and the figure; None if nobody was asked."""
    every = [r for column in summary.backends for r in column.file.results if r["level"] == "L5"]
    results = dict.fromkeys((r["id"], r["dtype"]) for r in every if _asked(r))
    if not results:
        return None
    runs = {column.title: column.recipe for column in summary.backends if column.recipe}
    return list(results), Markup(recipe_curves(runs) if runs else "")


def _models(summary: Summary) -> list[tuple[str, list[tuple[str, str]], Markup]]:
    """Return name, results (id and dtype) and figure of every NFNet."""
    ids: dict[str, dict[tuple[str, str], None]] = {}
    for column in summary.backends:
        for result in column.file.results:
            if _asked(result) and result["level"] == "L4":
                name = result["id"].split("-")[1]
                ids.setdefault(name, {})[result["id"], result["dtype"]] = None
    models = []
    for name, results in ids.items():
        records = {
            column.title: [record for record in column.file.models if record["model"] == name]
            for column in summary.backends
        }
        records = {title: those for title, those in records.items() if those}
        models.append((name, list(results), Markup(model_errors(records) if records else "")))
    return models
