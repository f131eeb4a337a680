"""Summary of all result files, from which every presentation is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

from agc_conformance.clauses import CLAUSES, OF_THE_CORE
from agc_conformance.diagnosis import diagnose
from agc_conformance.records import (
    ULP_BINS,
    DiedRecord,
    ResultFile,
    ResultRecord,
    Role,
    bad_statuses,
)
from agc_conformance.sharpness.compare import SHARPNESS_LIMITS
from agc_conformance.training.recipes import TASK
from agc_conformance.vectors import digest
from agc_conformance.verdict import LIMITS

__all__ = [
    "ULP_LIMITS",
    "Cell",
    "CellVerdict",
    "Column",
    "Summary",
    "not_offered",
    "program_cells",
    "summarize",
]

CellVerdict = Literal["passed", "failed", "expected", "unsupported", "none"]

ULP_LIMITS: Final = {"AGC": LIMITS, "SAM": SHARPNESS_LIMITS}
"""Largest errors allowed, by method and dtype; the clauses of a method start with its name."""
_PARTS: Final = {"train": "training on real images", "models": "NFNets and recipes"}
"""Optional parts of a run, by the key of its header."""
_ORDER = ["-", "float32", "float64", "bfloat16", "float16", "complex64", "complex128"]


@dataclass
class Cell:
    """Results of one clause, or of one clause in one dtype."""

    results: list[ResultRecord] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Results by status."""
        return Counter(result["status"] for result in self.results)

    @property
    def verdict(self) -> CellVerdict:
        """The status to show: failures first, then expected failures, passes, unsupported."""
        counts = self.counts
        if any(counts[status] for status in bad_statuses):
            return "failed"
        if counts["xfail"]:
            return "expected"
        if counts["passed"]:
            return "passed"
        return "unsupported" if counts else "none"

    @property
    def bad(self) -> int:
        """Number of failures."""
        return sum(self.counts[status] for status in bad_statuses)

    @property
    def asked(self) -> int:
        """Number of results that are not unsupported."""
        return len(self.results) - self.counts["unsupported"]

    @property
    def max_ulp(self) -> float | None:
        """Largest error measured in a result that passed."""
        return max(
            (
                r["max_ulp"]
                for r in self.results
                if r["max_ulp"] is not None and r["status"] == "passed"
            ),
            default=None,
        )

    @property
    def dtypes(self) -> dict[str, Cell]:
        """The results by dtype, plain dtypes first."""
        cells: dict[str, Cell] = {}
        for result in self.results:
            cells.setdefault(result["dtype"], Cell()).results.append(result)
        names = sorted(
            cells, key=lambda n: (n not in _ORDER, _ORDER.index(n) if n in _ORDER else 0, n)
        )
        return {name: cells[name] for name in names}


@dataclass
class Column:
    """One run: a backend on a device."""

    file: ResultFile
    key: str
    cells: dict[str, Cell]

    @property
    def name(self) -> str:
        """Backend."""
        return self.file.header.get("backend", "?")

    @property
    def device(self) -> str:
        """Device asked for."""
        return self.file.header.get("device", "cpu")

    @property
    def title(self) -> str:
        """Backend and device."""
        return f"{self.name} on {self.device}"

    @property
    def role(self) -> Role:
        """Backend or subject."""
        return self.file.role

    @property
    def total(self) -> Cell:
        """All results."""
        return Cell(self.file.results)

    @property
    def died(self) -> DiedRecord | None:
        """How the run ended, if its process died."""
        return next(iter(self.file.died), None)

    @cached_property
    def diagnosis(self) -> list[str]:
        """What the failures resemble, a sentence a method; nothing if the vectors have changed."""
        same = self.file.header.get("vectors") == digest()
        return diagnose(self.file.results) if same else []

    @property
    def conforms(self) -> bool:
        """Whether the run ended and a question beyond the core's was answered right."""
        return self.died is None and any(
            r["status"] == "passed" and r["level"] != "L0" and r["clause"] not in OF_THE_CORE
            for r in self.file.results
        )

    @property
    def recipe(self) -> dict[str, list[float | None]]:
        """Loss, the reference's, and the parameters' error of each step of a float32 training.

        Empty if there was none; a number is None if it is not finite.
        """
        steps = [step for step in self.file.train if step["task"] == TASK]
        errors = [
            record["errors"]
            for record in self.file.models
            if record["model"] == TASK and record["dtype"] == "float32"
        ]
        if not steps or not errors:
            return {}
        return {
            "loss": [step["loss"] for step in steps],
            "reference_loss": [step["reference_loss"] for step in steps],
            "error": [error for place, error in errors[0].items() if "," not in place],
        }

    def histograms(self, method: str) -> dict[str, list[int]]:
        """Return counts of elements by error in ULP, for each dtype of gradients.

        Only results of one method that passed are counted.
        """
        totals: dict[str, list[int]] = {}
        for result in self._measured(method):
            name = result["dtype"].partition("/")[0]
            mine = totals.setdefault(name, [0] * (len(ULP_BINS) + 1))
            for index, count in enumerate(result["histogram"]):
                mine[index] += count
        return {name: totals[name] for name in _ORDER if name in totals}

    def errors(self, method: str) -> dict[str, tuple[float, float]]:
        """Return the largest error and the limit by dtype, of one method's results that passed."""
        worst: dict[str, float] = {}
        for result in self._measured(method):
            name = result["dtype"].partition("/")[0]
            worst[name] = max(worst.get(name, 0.0), result["max_ulp"] or 0.0)
        return {name: (value, ULP_LIMITS[method][name]) for name, value in worst.items()}

    @property
    def paths(self) -> dict[str, float]:
        """Largest error in float32 by path, of the vectors that are asked of every path."""
        worst: dict[str, float] = {}
        for result in self.file.results:
            for path, error in result.get("ulp_by_path", {}).items():
                worst[path] = max(worst.get(path, 0.0), error)
        return worst

    def _measured(self, method: str) -> list[ResultRecord]:
        return [
            result
            for result in self.file.results
            if result["clause"].startswith(method)
            and any(result["histogram"])
            and result["dtype"].partition("/")[0] in ULP_LIMITS[method]
            and result["status"] == "passed"
            and result["level"] != "L2"
        ]


@dataclass
class Summary:
    """All data of the report."""

    backends: list[Column]
    subjects: list[Column]
    teeth: list[ResultFile]
    compiled: list[ResultFile]
    unavailable: list[dict[str, Any]]
    files: list[ResultFile]
    notices: list[str]

    @property
    def columns(self) -> list[Column]:
        """Backends, then subjects."""
        return [*self.backends, *self.subjects]

    @property
    def paths(self) -> list[str]:
        """Paths of all backends."""
        return [*dict.fromkeys(path for column in self.backends for path in column.paths)]

    @property
    def failures(self) -> list[tuple[Column, ResultRecord]]:
        """Results that make this report a failure."""
        return [
            (column, result)
            for column in self.backends
            for result in column.file.results
            if result["status"] in bad_statuses
        ]

    @property
    def died(self) -> list[Column]:
        """Backends whose process died."""
        return [column for column in self.backends if column.died]

    @property
    def diagnoses(self) -> list[str]:
        """What the failures of each run resemble."""
        return [f"{column.title}: {s}" for column in self.columns for s in column.diagnosis]

    @property
    def mutants(self) -> list[dict[str, Any]]:
        """Mutants of all files that ``teeth`` wrote."""
        return [dict(mutant) for file in self.teeth for mutant in file.mutants]

    @property
    def survivors(self) -> list[str]:
        """Mutants that no vector catches."""
        return [m["name"] for m in self.mutants if m["status"] != "killed"]

    @property
    def programs(self) -> list[dict[str, Any]]:
        """Programs compiled ahead of time."""
        return [dict(program) for file in self.compiled for program in file.programs]

    @property
    def ok(self) -> bool:
        """Whether there are results, and nothing failed."""
        broken = any(program["status"] == "failed" for program in self.programs)
        absent = bool(self.unavailable) and not self.columns
        empty = any(not file.has_results for file in self.files)
        return not (self.failures or self.died or self.survivors or broken or absent or empty)

    @property
    def mood(self) -> Literal["ok", "partly", "no"]:
        """Colour of the headline: green only if everything was available and passed."""
        if not self.ok:
            return "no"
        complete = self.backends and not self.unavailable and not self.notices
        return "ok" if complete else "partly"

    @property
    def headline(self) -> str:
        """One sentence about the whole."""
        counts = Cell([r for c in self.backends for r in c.file.results]).counts
        good = [c for c in self.backends if not c.total.bad and c.conforms]
        asked = len(self.backends) + len(self.unavailable)
        parts = [f"{len(good)} of {asked} backend{'s' * (asked != 1)} conform{'s' * (asked == 1)}"]
        parts += [
            f"{counts[s]} {s}" for s in ("passed", *sorted(bad_statuses), "xfail") if counts[s]
        ]
        if counts["unsupported"]:
            parts.append(f"{counts['unsupported']} unsupported")
        if self.died:
            parts.append(f"{len(self.died)} died")
        if self.unavailable:
            parts.append(f"{len(self.unavailable)} unavailable")
        if self.mutants:
            killed = len(self.mutants) - len(self.survivors)
            parts.append(f"{killed} of {len(self.mutants)} mutants killed")
        return ", ".join(parts)


def not_offered(columns: Sequence[Column]) -> list[str]:
    """Return the clauses that none of some runs answers."""
    return [
        clause
        for clause in CLAUSES
        if all(column.cells[clause].verdict in ("unsupported", "none") for column in columns)
    ]


def program_cells(program: Mapping[str, Any]) -> dict[str, str]:
    """Return what a table shows of a compiled program, by title; the peer's numbers in brackets."""
    costs, peer = program.get("costs"), program.get("peer_costs")
    minimum = program.get("minimum_bytes")

    def both(show: Callable[[Mapping[str, int]], str]) -> str:
        if costs is None:
            return ""
        return show(costs) + (f" ({show(peer)})" if peer is not None else "")

    def moved(costs: Mapping[str, int]) -> str:
        size: int = costs["device_bytes"]
        return _size(size) if minimum is None else f"{_size(size)}, {size / minimum:.3f} x least"

    return {
        "Device memory": both(moved),
        "Temporary": both(lambda costs: _size(costs["temporary_bytes"])),
        "Kernels": both(lambda costs: str(costs["kernels"])),
        "Exchanged": both(lambda c: f"{_size(c['collective_bytes'])} in {c['collectives']}"),
        "Peer": program.get("peer", ""),
        "Note": program["detail"],
    }


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def summarize(files: Iterable[ResultFile]) -> Summary:
    """Combine result files."""
    files = list(files)
    columns: list[Column] = []
    unavailable: list[dict[str, Any]] = []
    for file in files:
        if file.header["kind"] != "run":
            continue
        unavailable += [{**record, "path": file.path} for record in file.unavailable]
        if file.unavailable and not file.results:
            continue
        cells = {clause: Cell() for clause in CLAUSES}
        for result in file.results:
            cells.setdefault(result["clause"], Cell()).results.append(result)
        columns.append(Column(file, f"run{len(columns)}", cells))
    return Summary(
        backends=[column for column in columns if column.role == "backend"],
        subjects=[column for column in columns if column.role == "subject"],
        teeth=[file for file in files if file.header["kind"] == "teeth"],
        compiled=[file for file in files if file.header["kind"] == "compiled"],
        unavailable=unavailable,
        files=files,
        notices=_notices(files, columns),
    )


def _notices(files: Sequence[ResultFile], columns: Sequence[Column]) -> list[str]:
    """List caveats for readers of the matrix."""
    notices = []
    digests = {file.header.get("vectors") for file in files if file.header["kind"] != "compiled"}
    if len(digests) > 1:
        notices.append("These runs used different vectors; run them again with the same suite.")
    for column in columns:
        if column.died:
            notices.append(
                f"{column.title} died in {column.died['check']}: {column.died['reason']}; "
                "the checks after it were not run."
            )
        selected = column.file.header.get("select")
        if selected is not None:
            notices.append(f"{column.title} ran only {selected!r}.")
        for key, what in _PARTS.items():
            if not column.file.header.get(key, True):
                notices.append(f"{column.title} ran without {what}.")
        empty = [clause for clause, cell in column.cells.items() if not cell.results]
        # Only backends are asked about models; a partial run has its own notice above.
        whole = selected is None and column.file.header.get("models", True)
        whole = whole and not column.died
        if column.role == "backend" and column.file.results and whole and empty:
            notices.append(f"{column.title} was not asked about {', '.join(empty)}.")
    notices += [f"{file.path} has no results at all." for file in files if not file.has_results]
    names = Counter(column.title for column in columns)
    notices += [f"{name} appears {count} times." for name, count in names.items() if count > 1]
    return notices
