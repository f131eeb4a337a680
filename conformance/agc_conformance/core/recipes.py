"""Questions of level 5 that no framework answers: recipes, batches and the numbers of each step.

They are asked wherever recipes are trained, since NumPy computes them there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from agc.data import digest
from agc.recipe import Numbers, Recipe, to_toml
from agc_conformance.backend import Backend, Unsupported
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.core.functions import Core
from agc_conformance.data import encode_numbers
from agc_conformance.question import Kind
from agc_conformance.vectors import Vector
from agc_conformance.verdict import Verdict

__all__ = ["KINDS", "batch_digests", "number_tables"]

Data = Mapping[str, Any]


def _parse(vector: Vector, layout: str, dtype: str) -> Data:  # noqa: ARG001
    return vector.data


def _core(backend: Backend) -> Core:
    """Return the core behind a backend that trains recipes; a mutant replaces it."""
    if isinstance(backend, ReferenceBackend):
        return backend.core
    if type(backend).trainer is Backend.trainer:
        raise Unsupported(f"{backend.name} does not train recipes")
    return Core()


def _recipe(backend: Backend, data: Data) -> tuple[str, str, str]:
    """Return the canonical form, the id, and the id after a round trip through a file."""
    core = _core(backend)
    recipe = core.recipe(data["toml"])
    text = core.canonical(recipe)
    again = core.canonical(core.recipe(to_toml(recipe)))
    first, second = (hashlib.sha256(each.encode()).hexdigest() for each in (text, again))
    return text, first, second


def _compare_recipe(data: Data, answer: tuple[str, str, str]) -> Verdict:
    (text, found, again), want = answer, data["expect"]
    if found != want["id"]:
        return Verdict(f"the id is {found}, not {want['id']}: {text}")
    return Verdict("" if again == found else f"the id is {again} after a round trip")


def batch_digests(core: Core, data: Data) -> dict[str, list[str]]:
    """Return the SHA-256 of a vector's batches: by step, those of every host."""
    recipe, hosts = core.recipe(data["toml"]), data["hosts"]
    return {
        str(step): [digest(core.batch(recipe, step, host, hosts)) for host in range(hosts)]
        for step in data["steps"]
    }


def _batches(backend: Backend, data: Data) -> dict[str, list[str]]:
    return batch_digests(_core(backend), data)


def _compare_batches(data: Data, found: dict[str, list[str]]) -> Verdict:
    for step, hashes in data["expect"]["sha256"].items():
        for host, (have, want) in enumerate(zip(found[step], hashes, strict=True)):
            if have != want:
                return Verdict(f"step {step}, host {host}: SHA-256 {have}, not {want}")
    return Verdict()


def number_tables(core: Core, recipe: Recipe) -> dict[str, Any]:
    """Return the float32 tables of a recipe by name."""
    now: Numbers = core.numbers(recipe)
    tables: dict[str, Any] = {"rate": now.rate, "rho": now.rho, "ema_decay": now.ema_decay}
    tables |= {f"clipping {pattern}": table for pattern, table in now.clipping.items()}
    return {name: table for name, table in tables.items() if table is not None}


def _numbers(backend: Backend, data: Data) -> dict[str, Any]:
    core = _core(backend)
    return number_tables(core, core.recipe(data["toml"]))


def _compare_numbers(data: Data, tables: dict[str, Any]) -> Verdict:
    steps, want = data["steps"], data["expect"]
    for name, values in want["values"].items():
        have = encode_numbers(tables[name][steps])
        for step, mine, right in zip(steps, have, values, strict=True):
            if mine != right:
                return Verdict(f"{name} at step {step} is {mine!r}, not {right!r}")
        bits = hashlib.sha256(np.asarray(tables[name], "<f4").tobytes()).hexdigest()
        if bits != want["sha256"][name]:
            return Verdict(f"{name} has the SHA-256 {bits}, not {want['sha256'][name]}")
    extra = tables.keys() - want["values"].keys()
    return Verdict(f"there are numbers for {sorted(extra)}" if extra else "")


KINDS: Final[dict[str, Kind[Any, Any]]] = {
    "recipe": Kind(_parse, _recipe, _compare_recipe),
    "batch": Kind(_parse, _batches, _compare_batches),
    "schedule": Kind(_parse, _numbers, _compare_numbers),
}
"""Kinds of vectors by name."""
