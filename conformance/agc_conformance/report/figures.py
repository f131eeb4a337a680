"""Figures: inline SVG, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from markupsafe import escape

from agc.cli.pictures import paper
from agc_conformance.records import ULP_BINS, ModelRecord
from agc_conformance.training.network import PARAMETERS
from agc_conformance.training.recipes import LIMITS as LIMITS_OF_STATE
from agc_conformance.training.recipes import TASK
from agc_conformance.verdict import LIMITS

__all__ = ["histograms", "model_errors", "recipe_curves", "svg", "training_figures"]


_FLOOR: Final = 1e-17
"""Position of an error of 0 on the logarithmic axis."""


def svg(figure: Any, title: str) -> str:
    """Return a matplotlib figure as an ``<svg>`` element with a title."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "agc", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, _, rest = text[text.index("<svg") :].partition(">")
    return f'{head} role="img">\n <title>{escape(title)}</title>{rest}'


def histograms(
    title: str, counts_by_dtype: Mapping[str, Sequence[int]], limits: Mapping[str, float] = LIMITS
) -> str:
    """Draw how the elements that one run computed are distributed over errors.

    Parameters
    ----------
    title : str
        The run.
    counts_by_dtype : mapping of dtype to counts
        Elements by error; bins as :data:`agc_conformance.records.ULP_BINS` and one above.
    limits : mapping of dtype to float
        Largest error allowed.

    Returns
    -------
    str
        A row for each dtype and a column for each bin; errors right of the line are not allowed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    labels = ["0", *(f"≤ {edge:g}" for edge in ULP_BINS[1:]), f"> {ULP_BINS[-1]:g}"]
    counts = np.array([list(row) for row in counts_by_dtype.values()], float)
    shares = counts / counts.sum(axis=1, keepdims=True)
    style = {"font.size": 8, "font.family": "sans-serif", "svg.fonttype": "none"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.2, 0.62 + 0.27 * len(counts_by_dtype)), layout="constrained")
        plot = figure.subplots()
        x, y = np.arange(len(labels) + 1) - 0.5, np.arange(len(counts_by_dtype) + 1) - 0.5
        plot.pcolormesh(x, y, np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.25)
        plot.invert_yaxis()
        for row, column in zip(*np.nonzero(counts), strict=True):
            share = shares[row, column]
            shown = f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
            colour = "white" if share > 0.5 else "#16202c"
            plot.text(column, row, shown, ha="center", va="center", fontsize=7, color=colour)
        for row, dtype in enumerate(counts_by_dtype):
            edge = ULP_BINS.index(limits[dtype]) + 0.5
            plot.plot([edge, edge], [row - 0.5, row + 0.5], color="#b3161b", lw=1.5)
        plot.set_xticks(range(len(labels)), labels)
        plot.set_yticks(range(len(counts_by_dtype)), list(counts_by_dtype))
        plot.set_xlabel(f"error in ULP, {int(counts.sum()):,} elements")
        plot.set_title(title, fontsize=9, loc="left", fontweight="bold")
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        return svg(figure, f"{title}: elements by error in ULP")


_PANELS: Final = {
    "outputs": "output of the stem and of every block",
    "gradients": "gradient of every tensor, in the order of the forward pass",
    "optimizer": "all parameters after each step of DeepMind's optimizer",
    "trajectory": "all parameters after each step of AGC and the framework's SGD",
}
_SHADES: Final = {"float64": 1.0, "float32": 0.45}


def model_errors(records_by_run: Mapping[str, Sequence[ModelRecord]]) -> str:
    """Draw the errors of one model, layer by layer and step by step.

    Parameters
    ----------
    records_by_run : mapping of run to records
        ``model`` records of one model.

    Returns
    -------
    str
        A logarithmic panel for each kind of result and a colour for each run, strong in float64 and
        pale in float32. Red lines are the limits. An error of 0 lies at the bottom; a cross at the
        top is NaN or infinity.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = [
        kind
        for kind in _PANELS
        if any(r["kind"] == kind for rs in records_by_run.values() for r in rs)
    ]
    style = {"font.size": 8, "font.family": "sans-serif", "svg.fonttype": "none"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.6, 0.3 + 2.0 * len(kinds)), layout="constrained")
        for plot, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
            names: list[str] = []
            labelled: set[str] = set()
            for number, (title, records) in enumerate(records_by_run.items()):
                for record in records:
                    if record["kind"] != kind:
                        continue
                    names = list(record["errors"])
                    errors: list[float | None] = [
                        _FLOOR if e == 0 else e for e in record["errors"].values()
                    ]
                    shade = _SHADES.get(record["dtype"], 0.2)
                    label = None if title in labelled else title
                    labelled.add(title)
                    plot.plot(errors, f"C{number}.-", ms=3, lw=0.7, alpha=shade, label=label)
                    lost = [place for place, error in enumerate(errors) if error is None]
                    top = plot.get_xaxis_transform()
                    plot.plot(lost, [0.97] * len(lost), f"C{number}x", ms=6, transform=top)
                    limits = [np.nan if x is None else x for x in record["limits"].values()]
                    plot.plot(limits, "#b3161b", lw=0.8, drawstyle="steps-mid")
            plot.set_yscale("log")
            plot.set_title(_PANELS[kind], fontsize=9, loc="left", fontweight="bold")
            plot.set_ylabel("relative error")
            if len(names) <= 16:
                plot.set_xticks(range(len(names)), names, rotation=30, ha="right")
            else:
                places = range(0, len(names), max(1, len(names) // 12))
                plot.set_xticks(places, [names[i] for i in places], rotation=30, ha="right")
            plot.spines[["top", "right"]].set_visible(False)
            if kind == kinds[0]:
                plot.legend(frameon=False, ncols=len(records_by_run), loc="lower right")
        return svg(figure, "Relative errors by layer, tensor and step")


def recipe_curves(runs: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """Draw the trainings of one recipe over each other.

    Parameters
    ----------
    runs : mapping of run to mapping
        :attr:`agc_conformance.report.summary.Column.recipe` of each.

    Returns
    -------
    str
        Above the losses, on that of the reference; below the errors, on a logarithmic axis. The red
        line is the limit.
    """

    def finite(values: Iterable[float | None]) -> list[float]:
        return [np.nan if value is None else value for value in values]

    with paper(7.6, 4.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        longest = max((run["reference_loss"] for run in runs.values()), key=len)
        above.plot(finite(longest), "0.6", lw=6, alpha=0.5, label="float64 reference")
        dashes: list[Any] = ["-", (0, (4, 2)), (0, (1, 2))]
        for number, (title, run) in enumerate(runs.items()):
            line = {"color": f"C{number}", "ls": dashes[number % len(dashes)], "label": title}
            above.plot(finite(run["loss"]), lw=1.5, **line)
            known = [_FLOOR if error == 0 else error for error in finite(run["error"])]
            below.plot(known, f"C{number}.-", ms=3, lw=0.7)
        below.axhline(limit := LIMITS_OF_STATE["float32"]["parameters"], color="#d9534f", lw=1)
        below.set_yscale("log")
        below.set_ylim(1e-9, 10 * limit)
        above.set_ylabel("loss")
        below.set_ylabel("relative error of the parameters")
        below.set_xlabel("step")
        above.legend(frameon=False, ncols=len(runs) + 1, fontsize=7)
        return svg(figure, "One recipe in several frameworks: loss and error by step")


def training_figures(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Draw, for every task, the loss and the clipped fraction of every layer over the steps.

    Parameters
    ----------
    records : iterable of mapping
        ``train`` records of one backend, as a run writes them; others are passed over.

    Returns
    -------
    dict of task name to str
        Inline SVG, the same bytes for the same records.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("type") == "train" and record["task"] != TASK:
            tasks.setdefault(record["task"], []).append(record)
    drawn = {}
    for task, steps in tasks.items():
        names = [
            name for name in PARAMETERS if any("units" in s["layers"].get(name, {}) for s in steps)
        ]
        fractions = [
            [
                layer.get("clipped", 0) / layer["units"] if "units" in layer else np.nan
                for layer in (step["layers"].get(name, {}) for step in steps)
            ]
            for name in names
        ]
        with mpl.rc_context({"font.size": 8, "svg.fonttype": "none"}):
            figure = Figure(figsize=(6.4, 1.2 + 0.22 * len(names)), layout="constrained")
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, len(names) or 1])
            above.plot([step["reference_loss"] for step in steps], "0.7", lw=4, label="reference")
            above.plot([step["loss"] for step in steps], "C0", lw=1, label="backend")
            above.set_ylabel("loss")
            above.legend(frameon=False)
            if names:
                image = below.imshow(fractions, vmin=0, vmax=1, aspect="auto", cmap="viridis")
                below.set_yticks(range(len(names)), names)
                figure.colorbar(image, ax=below, label="clipped", ticks=[0, 0.5, 1])
            below.set_xlabel("step")
            drawn[task] = svg(figure, f"{task}: loss and share of clipped units by step")
    return drawn
