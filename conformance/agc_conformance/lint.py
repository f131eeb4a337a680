"""Checks of the vector files beyond their schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from agc import errors
from agc.errors import FormatError, UnitsError
from agc.units import Units
from agc_conformance.backend import Backend
from agc_conformance.clauses import CLAUSES, COMPUTED
from agc_conformance.clipping.ask import KINDS as CLIPPING
from agc_conformance.data import decode_values, dtype_of, layout_shape, to_layout
from agc_conformance.flags import FLAGS
from agc_conformance.sharpness.ask import KINDS as SHARPNESS
from agc_conformance.vectors import VECTORS, Vector, load_vectors, vector_counts

__all__ = ["lint"]

_MAX_BYTES: Final = 1_000_000


def lint(folder: Path = VECTORS) -> list[str]:
    """Return the problems of the vectors that their schema does not find."""
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
        if vector.kind in CLIPPING | SHARPNESS:
            problems += [f"{vector.id}: {problem}" for problem in _lint_numbers(vector)]
        if vector.kind in SHARPNESS:
            problems += [f"{vector.id}: {problem}" for problem in _lint_examples(vector)]
        if "scenario" in vector.data:
            method = (
                f"{'sharpen' if vector.kind in SHARPNESS else 'scenario'}_{vector.data['scenario']}"
            )
            if not hasattr(Backend, method):
                problems.append(f"{vector.id}: no backend can be asked for {method}")
    counts = vector_counts(vectors)
    # What NFNets and trainings compute has no vectors.
    problems += [
        f"clause {name} has no vector"
        for name in CLAUSES
        if not name.startswith(COMPUTED) and not counts["clause"][name]
    ]
    problems += [f"flag {name} has no vector" for name in FLAGS if not counts["flag"][name]]
    size = sum(path.stat().st_size for path in folder.glob("*.json"))
    if size > _MAX_BYTES:
        problems.append(f"the files hold {size} bytes, more than {_MAX_BYTES}")
    return problems


def _lint_numbers(vector: Vector) -> list[str]:
    """Check that layouts keep the canonical units and data are exact in every dtype of a vector."""
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
    """Check that examples are exact in float32, in which backends receive them."""
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
