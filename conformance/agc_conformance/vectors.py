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

import jsonschema
import numpy as np

from agc import errors
from agc.errors import FormatError, UnitsError
from agc.units import Units
from agc_conformance.data import decode_values, dtype_of, layout_shape, to_layout
from agc_conformance.flags import FLAGS, NO_MUTANT

__all__ = [
    "CLAUSES",
    "FORMAT",
    "VECTORS",
    "VERSION",
    "Vector",
    "digest",
    "lint",
    "load_vectors",
    "vector_counts",
]

FORMAT: Final = "agc-vectors"
VERSION: Final = 1
VECTORS: Final = Path(__file__).resolve().parent / "vectors" / "v1"
CLAUSES: Final[dict[str, str]] = {
    "AGC-1": "limit = clipping * max(norm(W), eps)",
    "AGC-2": "strictly above the limit, scaled to it; else the bits stay",
    "AGC-3": "norms and scales in at least float32; the gradient's dtype stays",
    "AGC-4": "non-finite values fall under a policy",
    "AGC-5": "vectors, scalars, empty and missing gradients",
    "AGC-6": "explicit, verified exclusion",
    "AGC-7": "order: unscale, average, clip, decay, optimize",
    "AGC-8": "independent of sharding",
    "AGC-9": "row-sparse gradients stay sparse",
    "AGC-10": "thresholds by parameter and step",
    "AGC-11": "telemetry",
    "AGC-12": "whole tensors as a mode of its own",
    "SAM-1": "e = rho * g / norm(g), one norm over everything that is perturbed",
    "SAM-2": "a zero gradient does not move; no epsilon",
    "SAM-3": "gradient at w + e; then the weights, bit for bit",
    "SAM-4": "parameters without a gradient",
    "SAM-5": "a norm that is not finite falls under a policy",
    "SAM-6": "weight decay and AGC only on the final gradient, at w",
    "SAM-7": "ascent on the first part of the same batch",
    "SAM-8": "micro-batches, each with its own e, averaged",
    "SAM-9": "ascent local to a replica or global",
    "SAM-10": "ASAM",
    "SAM-11": "every k-th step, schedules of rho, selection",
    "SAM-12": "the clean loss is reported",
    "SAM-13": "training goes on from a checkpoint as if never stopped",
    "NFNET-1": "forward: logits and the output of every block",
    "NFNET-2": "loss and gradient of every tensor",
    "NFNET-3": "how signals propagate",
    "NFNET-4": "plan, which units are clipped, clipped gradients",
    "NFNET-5": "DeepMind's optimizer and AGC before SGD, step by step",
}
_MAX_BYTES: Final = 1_000_000
_CORE_KINDS: Final = ("config", "units", "plan", "sam-config", "sam-select")


@dataclass(frozen=True)
class Vector:
    """One vector, as it stands in its file.

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
        """What is asked: ``clip``, ``trajectory``, ``sharpen``, ...; the README lists them."""
        return str(self.data["kind"])

    @property
    def flags(self) -> list[str]:
        """Bug classes that it catches."""
        return list(self.data["flags"])

    @property
    def asks_core(self) -> bool:
        """Whether it asks the core of this library, and no backend."""
        return self.kind in _CORE_KINDS

    def dtypes(self, *, full: bool = False) -> list[str]:
        """Dtypes to run in, as ``gradient`` or ``gradient/weight``; ``-`` where there are no numbers."""
        if "dtypes" not in self.data:
            return ["-"]
        return [*self.data["dtypes"], *(self.data["full_dtypes"] if full else ())]


@lru_cache(maxsize=4)
def load_vectors(folder: Path = VECTORS) -> tuple[Vector, ...]:
    """Read and validate every vector file of a folder.

    Raises
    ------
    FormatError
        If there is no file, or one is not JSON, of another format or version, or breaks the schema; the
        message names the file and the place.
    """
    paths = sorted(folder.glob("L*.json"))
    if not paths:
        raise FormatError(f"{folder}: there are no vector files here")
    schema = json.loads((VECTORS / "schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    found: list[Vector] = []
    for path in paths:
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
        found += [Vector(vector, path.name) for vector in data["vectors"]]
    return tuple(found)


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
    """First 16 hexadecimal digits of the SHA-256 of all vector files, for provenance."""
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


def lint(folder: Path = VECTORS) -> list[str]:
    """Return everything that is wrong with the vectors beyond their schema; empty if nothing is."""
    vectors = load_vectors(folder)
    problems: list[str] = []
    for name, count in Counter(vector.id for vector in vectors).items():
        if count > 1:
            problems.append(f"{name}: the id is used {count} times")
    for vector in vectors:
        if vector.clause not in CLAUSES:
            problems.append(f"{vector.id}: there is no clause {vector.clause!r}")
        if not vector.id.startswith(vector.level + "-"):
            problems.append(f"{vector.id}: the id does not start with its level {vector.level}")
        problems += [
            f"{vector.id}: flag {flag!r} is not described in flags.py"
            for flag in vector.flags
            if flag not in FLAGS
        ]
        error = vector.data["expect"].get("error")
        if error is not None and not hasattr(errors, error):
            problems.append(f"{vector.id}: there is no error class {error!r}")
        if vector.kind in ("clip", "trajectory", "scenario") or vector.kind.startswith("sharp"):
            problems += [f"{vector.id}: {problem}" for problem in _lint_numbers(vector)]
        if vector.kind.startswith("sharp"):
            problems += [f"{vector.id}: {problem}" for problem in _lint_examples(vector)]
    counts = vector_counts(vectors)
    # Models have no vectors: their parameters, images and expectations are computed (models/study.py).
    problems += [
        f"clause {name} has no vector"
        for name in CLAUSES
        if not name.startswith("NFNET") and not counts["clause"][name]
    ]
    problems += [f"flag {name} has no vector" for name in FLAGS if not counts["flag"][name]]
    problems += [
        f"NO_MUTANT names the unknown flag {name}" for name in NO_MUTANT if name not in FLAGS
    ]
    size = sum(path.stat().st_size for path in folder.glob("*.json"))
    if size > _MAX_BYTES:
        problems.append(f"the files hold {size} bytes, more than {_MAX_BYTES}")
    return problems


def _lint_numbers(vector: Vector) -> list[str]:
    """Check layouts against canonical units, and that data are exact in every dtype of the vector."""
    problems: list[str] = []
    misfit = vector.data["expect"].get("error") == "UnitsError"
    for p in vector.data["parameters"]:
        axes: dict[str, int] = p["axes"]
        shape = tuple(axes.values())
        for framework, (stored, pattern) in p["layouts"].items():
            try:
                right = misfit or _same_units(axes, p["units"], stored, pattern)
            except (FormatError, UnitsError) as error:
                problems.append(f"{p['name']}, {framework}: {error}")
                continue
            if not right:
                problems.append(f"{p['name']}, {framework}: {pattern!r} has other units")
        named = {"weight": p["weight"], "gradient": p["gradient"]}
        for what, data in named.items():
            if data is None or "rows" in data:
                continue
            array = decode_values(data, shape)
            for dtype in vector.dtypes(full=True):
                name = dtype.split("/")[0 if what == "gradient" else -1]
                back = array.astype(dtype_of(name)).astype(array.dtype)
                if not np.array_equal(back, array, equal_nan=True):
                    problems.append(f"the {what} of {p['name']} is not exact in {name}")
    return problems


def _lint_examples(vector: Vector) -> list[str]:
    """Check that examples are exact in float32, which they are handed over in."""
    problems: list[str] = []
    shapes = {p["name"]: tuple(p["axes"].values()) for p in vector.data["parameters"]}
    for batch in vector.data.get("batches", [vector.data.get("examples")]):
        for kind in ("curvatures", "centers"):
            for name, data in batch[kind].items():
                array = decode_values(data, (batch["count"], *shapes[name]))
                if not np.array_equal(array.astype(np.float32), array, equal_nan=True):
                    problems.append(f"the {kind} of {name} are not exact in float32")
    return problems


def _same_units(axes: Mapping[str, int], units: int, stored: str, pattern: str) -> bool:
    """Tell whether a layout's pattern groups the elements as the canonical axes do."""
    shape = tuple(axes.values())
    count = int(np.prod(shape[:units], dtype=np.int64))
    size = int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return Units(pattern).count(layout_shape(stored, axes)) == 0
    label = np.repeat(np.arange(count), size // count).reshape(shape)
    bound = Units(pattern).bind(layout_shape(stored, axes))
    view = to_layout(label, stored, axes).reshape(bound.view)
    low, high = view.min(axis=bound.reduce), view.max(axis=bound.reduce)
    return bound.count == count and bool(np.array_equal(low, high))
