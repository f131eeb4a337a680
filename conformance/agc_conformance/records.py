"""Records: the results of a run, one JSON object a line, and the only way to write and read them.

A file starts with a header, ends with a footer that counts what lies between, and appears under its
name only when it is complete. Collecting results and presenting them share nothing but this format.

========== ==========================================================================
``type``   holds
========== ==========================================================================
header     program, machine and versions; ``kind`` is ``run``, ``teeth`` or ``compiled``
result     one vector in one dtype on one backend
train      one step of training on real images: numbers per layer, for the figures
model      errors per layer of one comparison of an NFNet, for the figures
unavailable a backend or device that is not on this machine, and why
died       the process ended before the run did: in which check, and how
mutant     one wrong implementation and the vectors that catch it
program    one program compiled ahead of time: ``compiled``, never ``passed``
footer     counts by status
========== ==========================================================================
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NotRequired,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import agc
from agc.errors import FormatError
from agc.files import check_target, part_of, put

__all__ = [
    "FORMAT",
    "ULP_BINS",
    "VERSION",
    "Costs",
    "DiedRecord",
    "Footer",
    "Header",
    "Kind",
    "ModelRecord",
    "MutantRecord",
    "ProgramRecord",
    "Record",
    "ResultFile",
    "ResultRecord",
    "Role",
    "Status",
    "TrainRecord",
    "UnavailableRecord",
    "Writer",
    "bad_statuses",
    "complete",
    "describe",
    "make_header",
    "make_result",
    "read_results",
]

FORMAT: Final = "agc-results"
VERSION: Final = 1

Kind = Literal["run", "teeth", "compiled"]
Role = Literal["backend", "subject"]
"""A *backend* must conform. A *subject* is third-party code, which is reported but need not
conform; its class says ``role = "subject"``."""
Status = Literal["passed", "failed", "error", "unsupported", "xfail", "xpass", "compiled"]

bad_statuses: Final[frozenset[str]] = frozenset({"failed", "error", "xpass"})
"""Statuses that make a backend's run a failure."""

ULP_BINS: Final[tuple[float, ...]] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0)
"""Upper edges of a result's error histogram; one more bin holds everything above the last."""


class Header(TypedDict):
    """First line: program, machine and versions."""

    type: Literal["header"]
    format: str
    version: int
    kind: Kind
    suite: str
    vectors: NotRequired[str]
    backend: NotRequired[str]
    role: NotRequired[Role]
    layout: NotRequired[str]
    device: NotRequired[str]
    device_name: NotRequired[str]
    versions: dict[str, str]
    python: str
    platform: str
    commit: str | None
    date: str
    full: NotRequired[bool]
    select: NotRequired[str | None]
    train: NotRequired[bool]
    models: NotRequired[bool]


class ResultRecord(TypedDict):
    """One vector in one dtype on one backend.

    ``max_ulp`` is the largest error of a clipped element in units in the last place, or None where
    nothing was measured; ``histogram`` counts elements by error, bins as :data:`ULP_BINS`.
    ``ulp_by_path`` is the largest error by path: ``eager``, and ``paths`` of the backend.
    """

    type: Literal["result"]
    id: str
    clause: str
    level: str
    flags: list[str]
    dtype: str
    status: Status
    max_ulp: float | None
    histogram: Annotated[list[int], {"maxItems": len(ULP_BINS) + 1}]
    detail: str
    ulp_by_path: NotRequired[dict[str, float]]
    seconds: NotRequired[float]


class TrainLayer(TypedDict):
    """One layer in one step; a layer that is not clipped has no units."""

    units: NotRequired[Annotated[int, {"minimum": 1}]]
    clipped: NotRequired[int]


class TrainRecord(TypedDict):
    """One step of training on real images, numbers per layer."""

    type: Literal["train"]
    task: str
    step: int
    loss: float | None
    reference_loss: float | None
    layers: dict[str, TrainLayer]


class ModelRecord(TypedDict):
    """Errors of one comparison of an NFNet, by layer, tensor or step; None if not finite."""

    type: Literal["model"]
    model: str
    kind: str
    dtype: str
    errors: dict[str, float | None]
    limits: dict[str, float | None]


class UnavailableRecord(TypedDict):
    """A backend or device that is not on this machine."""

    type: Literal["unavailable"]
    backend: str
    device: str
    reason: str


class DiedRecord(TypedDict):
    """The process of a run ended before the run did; what would have followed was not asked.

    ``check`` is the ``id:dtype`` that the backend was asked, or what was done instead.
    """

    type: Literal["died"]
    check: str
    reason: str


class MutantRecord(TypedDict):
    """One wrong implementation and the results that catch it (``id:dtype``)."""

    type: Literal["mutant"]
    name: str
    flag: str
    comment: str
    status: Literal["killed", "survived"]
    killed_by: list[str]


class Costs(TypedDict):
    """What a compiled program costs one device."""

    device_bytes: int
    temporary_bytes: int
    aliased_bytes: NotRequired[int]
    kernels: int
    collectives: int
    collective_bytes: int


class ProgramRecord(TypedDict):
    """One program compiled ahead of time, beside the least it must move and a peer."""

    type: Literal["program"]
    id: str
    status: Literal["compiled", "failed"]
    target: str
    detail: str
    minimum_bytes: NotRequired[int]
    costs: NotRequired[Costs]
    peer: NotRequired[str]
    peer_costs: NotRequired[Costs]


class Footer(TypedDict):
    """Last line: counts by status (or by record type where there is none)."""

    type: Literal["footer"]
    counts: dict[str, int]
    seconds: float


Record = Mapping[str, Any]


def make_result(
    id: str,  # noqa: A002
    *,
    clause: str,
    level: str,
    status: Status,
    dtype: str = "-",
    flags: Iterable[str] = (),
    max_ulp: float | None = None,
    histogram: Sequence[int] = (),
    detail: str = "",
    ulp_by_path: Mapping[str, float] | None = None,
    seconds: float | None = None,
) -> ResultRecord:
    """Return a result record; an error that is not finite becomes the largest float."""
    max_ulp = None if max_ulp is None else _finite(max_ulp)
    record: ResultRecord = {
        "type": "result",
        "id": id,
        "clause": clause,
        "level": level,
        "flags": list(flags),
        "dtype": dtype,
        "status": status,
        "max_ulp": max_ulp,
        "histogram": [int(count) for count in histogram],
        "detail": detail.encode(errors="replace").decode(),
    }
    if ulp_by_path:
        record["ulp_by_path"] = {path: _finite(error) for path, error in ulp_by_path.items()}
    if seconds is not None:
        record["seconds"] = round(seconds, 4)
    return record


def _finite(error: float) -> float:
    return error if math.isfinite(error) else sys.float_info.max


def make_header(kind: Kind, **more: Any) -> Header:
    """Return a header for this machine and moment.

    Parameters
    ----------
    kind : {"run", "teeth", "compiled"}
        Kind of file.
    **more
        Further fields of :class:`Header`, for example ``backend="torch"``.
    """
    header: dict[str, Any] = {
        "type": "header",
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "suite": agc.__version__,
        "versions": {},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True) + " " + platform.machine(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {**header, **more}  # type: ignore[typeddict-item]


def _commit() -> str | None:
    """Return the commit of this module's checkout, with ``+`` if changed; None if there is none."""
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here,
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or git is not installed
    return revision.stdout.strip() if tracked.returncode == 0 else None


class Writer:
    """Streams records to ``path + ".part"`` and renames it when the footer is written.

    Use it as a context manager; leaving it by an exception writes no footer and keeps the ``.part``
    file, which no reader accepts.

    Parameters
    ----------
    path : path
        Path of the complete file.
    header : Header
        First record; see :func:`make_header`.

    Raises
    ------
    OSError
        If ``path`` cannot be written, before anything is.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        self.path = Path(path)
        self.part = part_of(self.path)
        self.counts: Counter[str] = Counter()
        self._start = datetime.now(UTC)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_target(self.path)
        check_target(self.part)
        _check("header", header)
        self._file = self.part.open("w", encoding="utf-8")
        self._line(header)

    def _line(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def write(self, record: Record) -> None:
        """Write one record and flush it."""
        self._line(record)
        self.counts[_counted(record)] += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            seconds = round((datetime.now(UTC) - self._start).total_seconds(), 3)
            self._line({"type": "footer", "counts": dict(self.counts), "seconds": seconds})
        self._file.close()
        if kind is None:
            put(self.part, self.path)


def complete(path: Path, header: Header, died: DiedRecord) -> None:
    """Complete the file of a :class:`Writer` whose process died.

    Parameters
    ----------
    path : path
        The file. What was written of it is kept.
    header : Header
        Its header if the process died before it wrote one.
    died : DiedRecord
        The last record.
    """
    part = part_of(path)
    text = part.read_text(encoding="utf-8") if part.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be cut
    records = [_parse(f"{part}, line {number}", line) for number, line in enumerate(lines, 1)]
    with Writer(path, cast(Header, records[0]) if records else header) as file:
        for record in [*records[1:], died]:
            file.write(record)


def _counted(record: Record) -> str:
    kind = str(record["type"])
    return str(record["status"]) if "status" in record else kind


@dataclass(frozen=True)
class ResultFile:
    """A complete file of records, sorted by type."""

    path: str
    header: Header
    results: list[ResultRecord] = field(default_factory=list)
    train: list[TrainRecord] = field(default_factory=list)
    models: list[ModelRecord] = field(default_factory=list)
    unavailable: list[UnavailableRecord] = field(default_factory=list)
    died: list[DiedRecord] = field(default_factory=list)
    mutants: list[MutantRecord] = field(default_factory=list)
    programs: list[ProgramRecord] = field(default_factory=list)
    footer: Footer | None = None

    @property
    def role(self) -> Role:
        """``backend`` if the code must conform, ``subject`` if it need not."""
        return self.header.get("role", "backend")

    @property
    def has_results(self) -> bool:
        """Whether the file holds anything to present."""
        return any((self.results, self.unavailable, self.died, self.mutants, self.programs))


_FIELDS: Final[dict[str, str]] = {
    "result": "results",
    "train": "train",
    "model": "models",
    "unavailable": "unavailable",
    "died": "died",
    "mutant": "mutants",
    "program": "programs",
}


def _schema(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of the type of a record or field."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        fields = get_type_hints(hint, include_extras=True)
        return {
            "type": "object",
            "required": [n for n, of in fields.items() if get_origin(of) is not NotRequired],
            "properties": {name: _schema(of) for name, of in fields.items()},
        }
    if origin is Annotated:
        return {**_schema(inner[0]), **inner[1]}
    if origin is NotRequired:
        return _schema(inner[0])
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is UnionType:
        return {"anyOf": [_schema(of) for of in inner]}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(inner[1])}
    return _PLAIN[hint]


_LARGEST: Final = sys.float_info.max
_PLAIN: Final[dict[Any, dict[str, Any]]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0, "maximum": 2**63},
    float: {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST},
    type(None): {"type": "null"},
}
_HINTS: Final[dict[str, Any]] = {
    "header": Header,
    "result": ResultRecord,
    "train": TrainRecord,
    "model": ModelRecord,
    "unavailable": UnavailableRecord,
    "died": DiedRecord,
    "mutant": MutantRecord,
    "program": ProgramRecord,
    "footer": Footer,
}


@cache
def _checker(kind: str) -> Any:
    from jsonschema import Draft202012Validator  # here, for machines that measure without it

    return Draft202012Validator(_schema(_HINTS[kind]))


def _check(place: str, record: Mapping[str, Any]) -> None:
    """Raise FormatError unless a record has every field of its type, each of the right type."""
    from jsonschema.exceptions import best_match

    kind = record.get("type")
    if not isinstance(kind, str) or kind not in _HINTS:
        raise FormatError(f"{place}: unknown record type {kind!r}")
    problem = best_match(_checker(kind).iter_errors(record))
    if problem is not None:
        field = "/".join(map(str, problem.absolute_path)) or "the record"
        text = problem.message  # the value, which may be long, then the problem
        shown = text if len(text) <= 200 else f"{text[:60]} ... {text[-130:]}"
        raise FormatError(f"{place}: {kind}: {field}: {shown}")


def read_results(path: str | os.PathLike[str]) -> ResultFile:
    """Read a complete file of records.

    Raises
    ------
    FormatError
        If the file does not exist, is not JSON lines of this format and version, or ends without
        the footer that counts its records; the message names the line.
    """
    place = Path(path)
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{place}: cannot be read as text: {error}") from None
    lines = text.splitlines()
    if not lines:
        raise FormatError(f"{place}: the file is empty")
    header = _parse(f"{place}, line 1", lines[0])
    if header.get("type") != "header" or header.get("format") != FORMAT:
        raise FormatError(f"{place}, line 1: not a header of the format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise FormatError(
            f"{place}, line 1: version {header.get('version')!r}; this suite reads version {VERSION}"
        )
    if header.get("kind") not in get_args(Kind):
        raise FormatError(f"{place}, line 1: unknown kind {header.get('kind')!r}")
    _check(f"{place}, line 1", header)
    results = ResultFile(str(place), header)  # type: ignore[arg-type]
    counts: Counter[str] = Counter()
    footer: dict[str, Any] | None = None
    for number, line in enumerate(lines[1:], start=2):
        if footer is not None:
            raise FormatError(f"{place}, line {number}: something follows the footer")
        record = _parse(f"{place}, line {number}", line)
        _check(f"{place}, line {number}", record)
        kind = record["type"]
        if kind == "header":
            raise FormatError(f"{place}, line {number}: a second header")
        if kind == "footer":
            footer = record
            continue
        getattr(results, _FIELDS[kind]).append(record)
        counts[_counted(record)] += 1
    if footer is None:
        raise FormatError(
            f"{place}, line {len(lines)}: the file ends without a footer, so the run was not finished"
        )
    if footer.get("counts") != dict(counts):
        raise FormatError(
            f"{place}, line {len(lines)}: the footer counts {footer.get('counts')}, "
            f"the file holds {dict(counts)}: records are missing"
        )
    object.__setattr__(results, "footer", footer)
    return results


def _parse(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        # Reports write these strings as UTF-8, which cannot hold a lone surrogate.
        json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}: not JSON, or truncated: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{place}: not a JSON object")
    return record


def describe(error: BaseException) -> str:
    """Return one line about an exception: its type, its first line, and where it comes from."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = f": {str(error).splitlines()[0]}" if str(error) else ""
    return f"{type(error).__name__}{message}{place}"
