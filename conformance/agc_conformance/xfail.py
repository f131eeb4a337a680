"""Expected failures: one text file for each backend, whose lines hold a pattern and a reason.

``L1-sparse-*:float32  no sparse gradients before version 3`` expects those results to fail. The
pattern is a shell-style glob on a result's ``id`` or ``id:dtype``. A result that passes although it
was expected to fail, and a line that makes no difference, are errors: the list never outlives its
reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from agc.errors import FormatError
from agc_conformance.records import ResultRecord

__all__ = ["Expected", "apply", "default_file", "read_xfail", "unused"]


@dataclass
class Expected:
    """One line of the file."""

    pattern: str
    reason: str
    place: str
    hits: int = 0

    def matches(self, id: str, dtype: str) -> bool:  # noqa: A002
        """Tell whether the line's pattern matches a result."""
        return fnmatchcase(id, self.pattern) or fnmatchcase(f"{id}:{dtype}", self.pattern)


def default_file(backend: str) -> Path | None:
    """Return ``conformance/xfail/<backend>.txt`` of the checkout, if there is one."""
    path = Path(__file__).resolve().parents[1] / "xfail" / f"{backend}.txt"
    return path if path.is_file() else None


def read_xfail(path: Path) -> list[Expected]:
    """Read a file of expected failures; ``#`` starts a comment line.

    Raises
    ------
    FormatError
        If the file cannot be read or a line has no reason.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors may write a mark
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text: {error}") from None
    expected = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pattern, *reason = line.split(maxsplit=1)
        if not reason:
            raise FormatError(f"{path}, line {number}: {pattern!r} gives no reason")
        expected.append(Expected(pattern, reason[0].strip(), f"{path}, line {number}"))
    return expected


def apply(record: ResultRecord, expected: Iterable[Expected]) -> ResultRecord:
    """Turn an expected failure into ``xfail`` and an unexpected success into ``xpass``."""
    for line in expected:
        if line.matches(record["id"], record["dtype"]):
            if record["status"] in ("failed", "error"):
                line.hits += 1
                detail = f"{line.reason} ({record['detail']})"
                return {**record, "status": "xfail", "detail": detail}
            if record["status"] == "passed":
                line.hits += 1
                return {**record, "status": "xpass", "detail": f"expected to fail: {line.reason}"}
    return record


def unused(expected: Iterable[Expected]) -> list[str]:
    """Return messages about the lines that made no difference."""
    return [
        f"{line.place}: {line.pattern!r} matches no result that fails"
        for line in expected
        if not line.hits
    ]
