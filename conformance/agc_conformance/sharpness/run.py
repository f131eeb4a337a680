"""Asking a backend about SAM, one vector after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from agc.backend import Backend, Examples, Optimizer, SharpnessProblem
from agc_conformance.compare import Verdict, compare_weights
from agc_conformance.data import decode_values
from agc_conformance.sharpness.compare import compare_sharpness
from agc_conformance.sharpness.problems import BoundSharpness, bind_sharpness
from agc_conformance.vectors import Vector

__all__ = ["ask_sharpness"]


def ask_sharpness(backend: Backend, vector: Vector, dtype: str) -> Verdict:
    """Run one vector of kind ``sharpen``, ``sharpness-trajectory`` or ``sharpness-scenario``."""
    bound = bind_sharpness(vector, backend.layout, dtype)
    data, problem = vector.data, _copy(bound.problem)
    if vector.kind == "sharpness-trajectory":
        return _trajectory(backend, bound)
    if vector.kind == "sharpness-scenario":
        outcome = backend.sharpness_scenario(data["scenario"], problem, dict(data["settings"]))
    else:
        outcome = backend.sharpen(problem)
    return Verdict() if "error" in data["expect"] else compare_sharpness(bound, outcome)


def _trajectory(backend: Backend, bound: BoundSharpness) -> Verdict:
    data = bound.vector.data
    got = backend.sharpness_trajectory(
        _copy(bound.problem),
        Optimizer(**data["optimizer"]),
        [_copy_examples(one) for one in bound.batches],
        restart=data["restart"],
    )
    want = data["expect"]["weights"]
    if len(got) != len(want):
        return Verdict(f"{len(got)} steps came back, not {len(want)}")
    verdict = Verdict()
    for p in data["parameters"]:
        name, shape = p["name"], tuple(p["axes"].values())
        missing = [step for step, weights in enumerate(got) if name not in weights]
        if missing:
            return Verdict(f"{name}: no weights came back at step {missing[0]}")
        verdict.add(
            compare_weights(
                name,
                [bound.canonical(name, np.asarray(weights[name])) for weights in got],
                [decode_values(weights[name], shape) for weights in want],
                decode_values(p["weight"], shape),
                dtype=bound.dtype,
            )
        )
    return verdict


def _copy_examples(examples: Examples) -> Examples:
    return Examples(
        {name: array.copy() for name, array in examples.curvatures.items()},
        {name: array.copy() for name, array in examples.centers.items()},
    )


def _copy(problem: SharpnessProblem) -> SharpnessProblem:
    """Copy the arrays, so that a backend cannot change what it is compared with."""
    return replace(
        problem,
        parameters={name: array.copy() for name, array in problem.parameters.items()},
        examples=_copy_examples(problem.examples),
    )
