"""Running: one vector after another, on one backend and device."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import agc.errors
from agc.errors import AGCError
from agc_conformance.backend import Backend, Unsupported
from agc_conformance.clipping.ask import KINDS as CLIPPING
from agc_conformance.core.ask import CORE_KINDS
from agc_conformance.core.ask import KINDS as PLANS
from agc_conformance.core.recipes import KINDS as RECIPES
from agc_conformance.question import Kind
from agc_conformance.records import ResultRecord, Status, describe, make_result
from agc_conformance.sharpness.ask import KINDS as SHARPNESS
from agc_conformance.vectors import Vector
from agc_conformance.verdict import Verdict

__all__ = ["KINDS", "OF_THIS_LIBRARY", "cases", "run_case"]

KINDS: Final[dict[str, Kind[Any, Any]]] = PLANS | CLIPPING | SHARPNESS | RECIPES
"""Kinds of vectors by name; each wing of the suite adds its own."""
OF_THIS_LIBRARY: Final = frozenset(CORE_KINDS) | RECIPES.keys()
"""Kinds that the core of this library answers, recipes in each backend's environment."""


def cases(
    vectors: Sequence[Vector],
    *,
    select: str | None = None,
    full: bool = False,
    without: Collection[str] = (),
) -> list[tuple[Vector, str]]:
    """Return the vectors and dtypes to run.

    Parameters
    ----------
    vectors : sequence of Vector
        All vectors.
    select : str, optional
        Glob on ids, clauses or flags.
    full : bool, default False
        Also the dtypes that add little coverage.
    without : collection of str
        Kinds of vectors that are left out.
    """

    def selected(vector: Vector) -> bool:
        names = (vector.id, vector.clause, *vector.flags)
        return select is None or any(fnmatchcase(name, select) for name in names)

    return [
        (vector, dtype)
        for vector in vectors
        if selected(vector) and vector.kind not in without
        for dtype in vector.dtypes(full=full)
    ]


def run_case(backend: Backend, vector: Vector, dtype: str) -> ResultRecord:
    """Run one vector in one dtype; an exception of the backend becomes a record."""
    start = time.perf_counter()
    verdict = Verdict()
    status: Status = "passed"
    try:
        verdict = _run(backend, vector, dtype)
        if verdict.problem:
            status = "failed"
    except Unsupported as reason:
        status, verdict.problem = "unsupported", str(reason)
    except (Exception, SystemExit) as error:
        status, verdict.problem = "error", describe(error)
    return make_result(
        vector.id,
        clause=vector.clause,
        level=vector.level,
        flags=vector.flags,
        dtype=dtype,
        status=status,
        max_ulp=verdict.max_ulp,
        histogram=verdict.histogram,
        detail=verdict.problem[:600],
        ulp_by_path=verdict.ulp_by_path,
        seconds=time.perf_counter() - start,
    )


def _run(backend: Backend, vector: Vector, dtype: str) -> Verdict:
    """Ask a backend; if the vector expects an error, raising it passes."""
    missing = sorted(set(dtype.split("/")) - {"-", *backend.dtypes})
    if missing:
        raise Unsupported(f"the backend does not take {', '.join(missing)}")
    kind, expect = KINDS[vector.kind], vector.data["expect"]
    expected = expect.get("error")
    if expected is None:
        return kind.run(backend, vector, dtype)
    question = kind.parse(vector, backend.layout, dtype)
    try:
        kind.answer(backend, question)
    except getattr(agc.errors, expected) as error:
        lost = [words for words in expect["message"] if words not in str(error)]
        return Verdict(f"the message {str(error)!r} does not name {lost}" if lost else "")
    except AGCError as error:
        return Verdict(f"{expected} was expected, not {type(error).__name__}: {error}")
    return Verdict(f"{expected} was expected; nothing was raised")
