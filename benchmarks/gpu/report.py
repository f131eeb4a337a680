"""Turn the files of a run into verdicts and tables: ``python -m benchmarks.gpu.report FOLDER``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

from agc.files import write_text
from agc_conformance.records import bad_statuses
from benchmarks.common import grid
from benchmarks.gpu.conditions import CONDITIONS, DTYPES
from benchmarks.gpu.race import Outcome, relative
from benchmarks.report import NOISE, TITLES
from benchmarks.shapes import MODELS

__all__ = ["SUMMARY", "Run", "Status", "Verdict", "main", "verdicts", "write"]

SUMMARY: Final = "summary.json"
_BANDWIDTH: Final = 0.85
"""Least share of the bandwidth of a copy, in the same run."""
_FASTER: Final = 10.0
"""How many times our time timm takes at least, both eager."""
_SHARE: Final = 0.02
"""Largest share of a training step that AGC and the norm of SAM take together."""
_FRACTION: Final = 1.25
"""Longest step with SAM on a fifth of the batch, as a multiple of one without SAM."""
_EVEN: Final = (1 - NOISE, 1 + NOISE)
"""As fast, or as large: two identical programs differ by this much."""

Status = Literal[
    "complete", "failed", "out of time", "does not apply", "not started", "not finished"
]
Judgement = Literal["met", "missed", "not measured", "does not apply"]

_TITLES: Final[dict[Any, str]] = {
    **TITLES,
    "conformance-torch": "Conformance, PyTorch",
    "conformance-jax": "Conformance, JAX",
    "agc": "AGC in PyTorch",
    "sam": "SAM in PyTorch",
    "nfnet": "NFNet-F0 in PyTorch",
    "jax": "AGC in JAX",
    "tenth": "a tenth clipped",
    True: "ASAM",
    False: "SAM",
}
_COUNTED: Final = ("result", "unavailable", "died")
"""Records of a conformance run that are counted."""
_MARKS: Final = {
    "met": "met",
    "missed": "**missed**",
    "not measured": "**not measured**",
    "does not apply": "does not apply",
}
_LABELS: Final = ("model", "dtype", "condition", "adaptive", "precision", "layout")
_NOTES: Final = (
    "Times are medians of all calls; *relative* is a multiple of the base's time, turn by turn. The share of a "
    "copy's bandwidth counts the bytes that the work needs at least; a large copy in the same turns is 100 %."
)
_HEADS: Final = (
    "", "contestant", "device, ms", "10 % to 90 %", "host, ms", "relative", "of a copy's bandwidth",
    "memory, MB", "ULP",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A target, and whether it is met.

    Attributes
    ----------
    case, what : str
        What was measured.
    reached, target : str
        The number, and its limit.
    judgement : str
    """

    case: str
    what: str
    reached: str
    target: str
    judgement: Judgement


class Run:
    """All files of a folder.

    Parameters
    ----------
    folder : path
        What ``python -m benchmarks.gpu`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.provenance: dict[str, Any] = summary["provenance"]
        self.stages: dict[str, dict[str, Any]] = {s["name"]: s for s in summary["stages"]}
        self._cases: dict[str, list[dict[str, Any]]] = {}
        self._results: dict[str, Counter[str]] = {}
        for name, stage in self.stages.items():
            path = folder / stage["file"]
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if path.suffix == ".jsonl":
                records = map(json.loads, text.splitlines())
                counted = (r.get("status", r["type"]) for r in records if r["type"] in _COUNTED)
                self._results[name] = Counter(counted)
            else:
                self._cases[name] = json.loads(text)["cases"] if text else []

    @property
    def rehearsed(self) -> bool:
        """Whether this says nothing of a GPU."""
        return bool(self.provenance["tiny"] or self.provenance["device"] != "cuda")

    def cases(self, stage: str) -> list[dict[str, Any]]:
        """Return the cases of a stage, as many as it measured."""
        return self._cases.get(stage, [])

    def contestants(self, stage: str, **case: Any) -> Mapping[str, Outcome]:
        """Return the outcomes of one case; nothing if it was not measured."""
        for found in self.cases(stage):
            if all(found[key] == value for key, value in case.items()):
                outcomes: dict[str, Outcome] = found["contestants"]
                return outcomes
        return {}

    def conformance(self, stage: str) -> Counter[str]:
        """Return the number of results of a conformance run by status."""
        return self._results[stage]


def verdicts(run: Run) -> list[Verdict]:
    """Return every target that the stages of a run have; in a rehearsal none applies."""
    judges = {
        "conformance-torch": _conformance,
        "conformance-jax": _conformance,
        "agc": _clipping,
        "sam": _perturbing,
        "nfnet": _training,
        "jax": _clipping_in_jax,
    }
    found = [verdict for stage in run.stages for verdict in judges[stage](run, stage)]
    if run.rehearsed:
        return [replace(verdict, judgement="does not apply") for verdict in found]
    return found


def _conformance(run: Run, stage: str) -> Iterator[Verdict]:
    counts = run.conformance(stage)
    shown = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    judgement: Judgement = "met" if run.stages[stage]["status"] == "complete" else "not measured"
    if bad_statuses.intersection(counts):
        judgement = "missed"
    yield Verdict(_TITLES[stage], "results", shown or "none", "none failed", judgement)


def _clipping(run: Run, stage: str) -> Iterator[Verdict]:
    ours = ("agc", "agc attached", "agc in a CUDA graph", "agc without Triton")
    yield _right(run, stage, ours)
    for dtype, model, condition in product(DTYPES, MODELS, CONDITIONS):
        outcomes = run.contestants(stage, dtype=dtype, model=model, condition=condition)
        case = f"AGC, {_TITLES[model]}, {dtype}, {_TITLES[condition]}"
        for name in ours[:3]:
            share = outcomes.get(name, {}).get("of_copy_bandwidth")
            what = f"{name}: share of a copy's bandwidth"
            yield _judge(case, what, share, "{:.0%}", least=_BANDWIDTH)
        slower = outcomes.get("timm", {}).get("relative")
        yield _judge(case, "time of timm, relative to agc", slower, "{:.1f}x", least=_FASTER)


def _perturbing(run: Run, stage: str) -> Iterator[Verdict]:
    yield _right(run, stage, ("perturb", "perturb without Triton"))


def _training(run: Run, stage: str) -> Iterator[Verdict]:
    yield _right(run, stage, ("forward",))
    for case in run.cases(stage):
        outcomes = case["contestants"]
        label = f"NFNet-F0, {case['precision']}, {case['layout']}"
        parts = [outcomes[name].get("relative") for name in ("AGC alone", "norm of SAM alone")]
        share = None if None in parts else sum(parts)
        what = "share of AGC and of SAM's norm in a step"
        yield _judge(label, what, share, "{:.2%}", most=_SHARE)
        for what in ("forward", "step", "step with AGC"):
            slower = relative(outcomes[f"{what} of timm"], outcomes[what])
            what = f"{what}: time of timm, relative to agc"
            yield _judge(label, what, slower, "{:.2f}x", least=_EVEN[0])
        peaks = [outcomes[name].get("peak_bytes") for name in ("step", "step of timm")]
        memory = peaks[0] / peaks[1] if all(peaks) else None
        what = "step: memory, relative to timm"
        yield _judge(label, what, memory, "{:.2f}x", most=_EVEN[1])
        sharp = outcomes["step with AGC and SAM, fraction 0.2"]
        cost = relative(sharp, outcomes["step with AGC"])
        what = "SAM, fraction 0.2: time of a step, relative to one without"
        yield _judge(label, what, cost, "{:.2f}x", most=_FRACTION)


def _clipping_in_jax(run: Run, stage: str) -> Iterator[Verdict]:
    yield _right(run, stage, ("agc",))
    for dtype, model, condition in product(DTYPES, MODELS, CONDITIONS):
        outcomes = run.contestants(stage, dtype=dtype, model=model, condition=condition)
        case = f"AGC in JAX, {_TITLES[model]}, {dtype}, {_TITLES[condition]}"
        slower = outcomes.get("optax", {}).get("relative")
        yield _judge(case, "time of optax, relative to agc", slower, "{:.2f}x", least=_EVEN[0])


def _right(run: Run, stage: str, names: Sequence[str]) -> Verdict:
    """Judge whether the results of ours are right, in all cases of a stage."""
    found = [case["contestants"][name].get("right") for case in run.cases(stage) for name in names]
    judgement: Judgement = "met"
    if not found or None in found:
        judgement = "not measured"
    if False in found:
        judgement = "missed"
    reached = f"{found.count(True)} of {len(found)}"
    return Verdict(_TITLES[stage], "results that are right", reached, "all", judgement)


def _judge(
    case: str,
    what: str,
    value: float | None,
    form: str,
    *,
    least: float | None = None,
    most: float | None = None,
) -> Verdict:
    bounds = {"at least": least, "at most": most}
    target = ", ".join(f"{word} {form.format(b)}" for word, b in bounds.items() if b is not None)
    if value is None:
        return Verdict(case, what, "", target, "not measured")
    met = (least is None or value >= least) and (most is None or value <= most)
    return Verdict(case, what, form.format(value), target, "met" if met else "missed")


def _targets(judged: Sequence[Verdict]) -> str:
    rows: list[Sequence[str]] = [
        ("case", "what", "reached", "target", "verdict"),
        ("---", "---", "---:", "---", "---"),
    ]
    case = ""
    for verdict in judged:
        label = "" if verdict.case == case else verdict.case
        case = verdict.case
        rows.append(
            (label, verdict.what, verdict.reached, verdict.target, _MARKS[verdict.judgement])
        )
    return grid(rows)


def _table(run: Run, stage: str) -> str:
    """Return a Markdown table with a row for each contestant of each case."""
    rows: list[Sequence[str]] = [_HEADS, ("---", "---", *("---:" for _ in _HEADS[2:]))]
    for case in run.cases(stage):
        label = ", ".join(str(_TITLES.get(case[k], case[k])) for k in _LABELS if k in case)
        for name, outcome in case["contestants"].items():
            rows.append((label, name, *_cells(outcome)))
            label = ""
    return grid(rows)


def _cells(outcome: Outcome) -> list[str]:
    if "device_ms" not in outcome:
        shown = outcome.get("absent", "")
        return [f"does not apply: {shown}" if shown else f"failed: {outcome['error']}", *[""] * 6]
    device, host = outcome["device_ms"], outcome["host_ms"]
    return [
        f"{device['median']:.4g}",
        f"{device['low']:.4g} to {device['high']:.4g}",
        f"{host['median']:.3g}",
        _shown(outcome.get("relative"), "{:.3g}x"),
        _shown(outcome.get("of_copy_bandwidth"), "{:.0%}")
        or _shown(outcome.get("gigabytes_per_second"), "{:.0f} GB/s"),
        _shown(outcome.get("peak_bytes"), "{:.1f}", 1e-6),
        _shown(outcome.get("max_ulp"), "{:.2g}")
        + (" **wrong**" if outcome.get("right") is False else ""),
    ]


def _shown(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value * unit)


def _stages(run: Run) -> str:
    rows: list[Sequence[str]] = [
        ("stage", "status", "seconds", "limit"),
        ("---", "---", "---:", "---:"),
    ]
    for stage in run.stages.values():
        numbers = f"{stage['seconds']:.0f}", str(stage["limit"])
        rows.append((_TITLES[stage["name"]], stage["status"], *numbers))
    return grid(rows)


def _where(run: Run) -> str:
    made = run.provenance
    gpu = made["gpu"]
    device = "GPU of unknown name" if made["device"] == "cuda" else "CPU"
    if gpu is not None:
        device = f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}"
    packages = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    return (
        f"{device}; {made['platform']}; Python {made['python']}, {packages}; commit {made['commit']}; "
        f"{made['date']}; `{made['command']}`"
    )


def document(run: Run) -> str:
    """Return the whole page in Markdown, the overview last, where a terminal shows it."""
    judged = verdicts(run)
    counts = Counter(verdict.judgement for verdict in judged)
    parts = ["# AGC and SAM on a GPU", _where(run), _NOTES]
    for name, stage in run.stages.items():
        if run.cases(name):
            parts += [f"## {_TITLES[name]}", _table(run, name)]
        if stage["status"] != "complete":
            log = "\n".join(stage["log"])
            parts += [f"## {_TITLES[name]}: {stage['status']}", f"```text\n{log}\n```"]
    parts += ["## Targets", _targets(judged), "## Stages", _stages(run)]
    if run.rehearsed:
        parts.append("**A rehearsal: no number here says anything about a GPU.**")
    parts.append(", ".join(f"{count} {judgement}" for judgement, count in counts.items()))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``README.md`` beside the files and print it; return 1 unless all is well.

    On a GPU every stage must be complete and every target met; in a rehearsal no stage and no
    contestant may fail, and no result of ours be wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    print(write(options.folder))
    return int(not _is_well(Run(options.folder)))


def write(folder: Path) -> str:
    """Write ``README.md`` beside the files of a run, and return it."""
    text = document(Run(folder))
    write_text(folder / "README.md", text)
    return text


def _is_well(run: Run) -> bool:
    statuses = {stage["status"] for stage in run.stages.values()}
    if not run.rehearsed:
        met = all(verdict.judgement == "met" for verdict in verdicts(run))
        return statuses == {"complete"} and met
    cases = [case for stage in run.stages for case in run.cases(stage)]
    outcomes = [outcome for case in cases for outcome in case["contestants"].values()]
    failed = any("error" in outcome or outcome.get("right") is False for outcome in outcomes)
    return statuses <= {"complete", "does not apply"} and not failed


if __name__ == "__main__":
    sys.exit(main())
