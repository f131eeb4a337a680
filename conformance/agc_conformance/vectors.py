"""Vectors: reading, checking and describing the files under ``vectors/v1``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from agc.errors import FormatError

__all__ = [
    "FORMAT",
    "VECTORS",
    "VERSION",
    "Vector",
    "check_schema",
    "digest",
    "load_vectors",
    "vector_counts",
]

FORMAT: Final = "agc-vectors"
VERSION: Final = 1
VECTORS: Final = Path(__file__).resolve().parent / "vectors" / "v1"


@dataclass(frozen=True, eq=False)
class Vector:
    """One vector, as it stands in its file; compared by identity.

    Attributes
    ----------
    data : mapping
        The JSON object; ``conformance/README.md`` describes its fields.
    file : str
        Name of the file.
    """

    data: Mapping[str, Any]
    file: str

    @property
    def id(self) -> str:
        """Unique name; starts with the level."""
        return str(self.data["id"])

    @property
    def clause(self) -> str:
        """The clause of the specification that it tests."""
        return str(self.data["clause"])

    @property
    def level(self) -> str:
        """``L0`` to ``L3``."""
        return str(self.data["level"])

    @property
    def kind(self) -> str:
        """Kind of question: ``clip``, ``trajectory``, ``sharpen``, ...; the README lists them."""
        return str(self.data["kind"])

    @property
    def flags(self) -> list[str]:
        """Bug classes that it catches."""
        return list(self.data["flags"])

    def dtypes(self, *, full: bool = False) -> list[str]:
        """Return the dtypes to run in.

        Each is ``gradient`` or ``gradient/weight``; ``-`` if the vector has no numbers.
        """
        if "dtypes" not in self.data:
            return ["-"]
        return [*self.data["dtypes"], *(self.data["full_dtypes"] if full else ())]


@lru_cache(maxsize=4)
def load_vectors(folder: Path = VECTORS) -> tuple[Vector, ...]:
    """Read every vector file of a folder, and check it against the schema unless it is the suite's.

    Raises
    ------
    FormatError
        If there is no file, or one is not JSON, of another format or version, or breaks the schema;
        the message names the file and the place.
    """
    paths = sorted(folder.glob("L*.json"))
    if not paths:
        raise FormatError(f"{folder}: there are no vector files here")
    if folder != VECTORS:  # a test checks the suite's own, which takes seconds
        check_schema(folder)
    return tuple(Vector(vector, path.name) for path in paths for vector in _read(path)["vectors"])


def check_schema(folder: Path) -> None:
    """Check every vector file of a folder against the schema.

    Raises
    ------
    FormatError
        As :func:`load_vectors`.
    """
    import jsonschema  # here, because it is slow to import

    schema = json.loads((VECTORS / "schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted(folder.glob("L*.json")):
        data = _read(path)
        problem = next(iter(validator.iter_errors(data)), None)
        if problem is not None:
            place = list(problem.absolute_path)
            name = ""
            if len(place) > 1 and place[0] == "vectors":
                vector = data["vectors"][place[1]]
                name = f" ({vector.get('id')!r})" if isinstance(vector, dict) else ""
            where = "/".join(map(str, place)) or "the file"
            raise FormatError(f"{path}: {where}{name}: {problem.message[:300]}")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text: {error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: not JSON, or truncated: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path}: not a vector file: 'format' is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{path}: version {data.get('version')!r}; this suite reads version {VERSION}"
        )
    return data


def digest(folder: Path = VECTORS) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all vector files, for provenance."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("L*.json")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def vector_counts(vectors: Sequence[Vector]) -> dict[str, Counter[str]]:
    """Count vectors by level, clause and flag."""
    return {
        "level": Counter(vector.level for vector in vectors),
        "clause": Counter(vector.clause for vector in vectors),
        "flag": Counter(flag for vector in vectors for flag in vector.flags),
    }
