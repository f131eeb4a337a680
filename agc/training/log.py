"""The log of a training: JSON lines, each step once, however often the training was stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agc.errors import FormatError
from agc.files import write_text

__all__ = ["Log", "read_log"]

Record = Mapping[str, Any]


class Log:
    """A file of JSON lines that a training adds to.

    A number that is not finite is null, as JSON has no other. A process that is killed may leave
    half a line, and lines of steps that no checkpoint has: both are dropped when the training goes
    on.

    Parameters
    ----------
    path : Path
        Need not exist.
    step : int
        Where the training goes on: what was logged of this step and later ones is dropped; what was
        found between the steps, such as evaluations, is kept up to here.
    write : bool
        Whether this process is the one that writes; the others read what is kept.

    Attributes
    ----------
    records : list of dict
        What is kept of an earlier run.

    Raises
    ------
    FormatError
        If the file is no log.
    OSError
        If it cannot be written to.
    """

    def __init__(self, path: Path, step: int, *, write: bool = True) -> None:
        self._path, self._write = path, write
        records = read_log(path) if path.exists() else []
        self.records = [
            record for record in records if record["step"] < step + (record["type"] != "step")
        ]
        if write:
            write_text(path, "".join(map(_line, self.records)))

    def write(self, records: Iterable[Record]) -> None:
        """Append records; they are in the file when this returns."""
        if self._write:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, records)))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log; half a line at its end is left out.

    Raises
    ------
    FormatError
        If it is no log; the message has the line.
    """
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["type"], record["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path}: line {number} is not of a log of this project: {error}"
            ) from None
        records.append(record)
    return records


def _line(record: Record) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
