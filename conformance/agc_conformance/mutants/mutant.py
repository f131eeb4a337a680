"""A mutant, and the one registry of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clipping.ask import KINDS as CLIPPING
from agc_conformance.core.ask import CORE_KINDS
from agc_conformance.core.functions import Core
from agc_conformance.core.recipes import KINDS as RECIPES
from agc_conformance.nfnets.ask import run_study
from agc_conformance.question import Kind
from agc_conformance.runner import KINDS, cases, run_case
from agc_conformance.sharpness.ask import KINDS as SHARPNESS
from agc_conformance.training.recipes import SHORT, run_recipes
from agc_conformance.vectors import Vector, load_vectors

__all__ = ["MUTANTS", "Mutant", "checks", "registered", "run_mutant"]

Wing = Literal["core", "clipping", "sharpness", "nfnets", "recipes", "training"]


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation.

    Attributes
    ----------
    name : str
        Name in words.
    flag : str
        Bug class that it represents; for an NFNet or a training, the clause that it breaks.
    comment : str
        The mistake, and whose code makes it.
    wing : {"core", "clipping", "sharpness", "nfnets", "recipes", "training"}
        Wing whose questions it is asked.
    make : callable
        Builds the backend.
    select : str
        For an NFNet or a training: glob on the kinds of results (``KINDS`` of
        :mod:`agc_conformance.nfnets.ask` and :mod:`agc_conformance.training.recipes`).
    """

    name: str
    flag: str
    comment: str
    wing: Wing
    make: Callable[[], ReferenceBackend]
    select: str = "*"


MUTANTS: Final[list[Mutant]] = []
"""Every mutant; the modules of this package fill it."""

_KINDS: Final[Mapping[str, Mapping[str, Kind[Any, Any]]]] = {
    "core": CORE_KINDS,
    "clipping": {**CLIPPING, "layer": KINDS["layer"]},
    "sharpness": SHARPNESS,
    "recipes": RECIPES,
}
"""Wing to the kinds of vectors that its mutants run."""


_Part = type[ReferenceBackend] | type[Core]


def registered(wing: Wing, prefix: str = "") -> Callable[[str, str], Callable[[_Part], _Part]]:
    """Return a decorator that registers a backend, or a backend's core, named after its class."""

    def described(flag: str, comment: str) -> Callable[[_Part], _Part]:
        def register(part: _Part) -> _Part:
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part.__name__.strip("_")).lower()
            name = prefix + words.replace("nan ", "NaN ")
            MUTANTS.append(Mutant(name, flag, comment, wing, _backend(part)))
            return part

        return register

    return described


def _backend(part: _Part) -> type[ReferenceBackend]:
    if issubclass(part, ReferenceBackend):
        return part

    class Wrong(ReferenceBackend):
        pass

    Wrong.core = part()
    return Wrong


def checks(wing: str) -> list[str]:
    """Return the checks (``id:dtype``) that the mutants of a wing with vectors are asked."""
    return [f"{v.id}:{dtype}" for v, dtype in cases(load_vectors()) if v.kind in _KINDS[wing]]


def run_mutant(mutant: Mutant, vectors: Sequence[Vector]) -> list[str]:
    """Return the results (``id:dtype``) that catch a mutant.

    A mutant runs its wing's vectors; an NFNet the study ``tiny`` in float32, a training four steps.
    """
    backend = mutant.make()
    with np.errstate(all="ignore"):  # some mutants overflow or divide by zero
        if mutant.wing == "nfnets":
            select = f"model-tiny-{mutant.select}"
            study = run_study(backend, "tiny", select=select, dtypes=("float32",))
            records = [record for record in study if record["type"] == "result"]
        elif mutant.wing == "training":
            run = run_recipes(backend, SHORT, select=f"L5-{mutant.select}")
            records = [record for record in run if record["type"] == "result"]
        else:
            records = [
                run_case(backend, vector, dtype)
                for vector, dtype in cases(vectors)
                if vector.kind in _KINDS[mutant.wing]
            ]
    return [f"{r['id']}:{r['dtype']}" for r in records if r["status"] in ("failed", "error")]
