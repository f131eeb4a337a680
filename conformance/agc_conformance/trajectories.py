"""Trajectories: weights step after step, compared in the same way for AGC and SAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from agc_conformance.backend import Optimizer
from agc_conformance.data import decode_values, dtype_of
from agc_conformance.layout import Layout
from agc_conformance.vectors import Vector
from agc_conformance.verdict import LIMITS, Verdict, ulp

__all__ = ["Trajectory", "compare_trajectory", "compare_weights", "expected_weights"]

Array = npt.NDArray[Any]
Problem = TypeVar("Problem")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Trajectory(Generic[Problem, Batch]):
    """A question about steps of training.

    Attributes
    ----------
    problem
        Initial weights and rules, for the backend.
    layout : Layout
        How the backend stores parameters.
    dtype : str
        Dtype of the weights.
    optimizer : Optimizer
        The optimizer that takes the steps.
    batches : sequence
        Gradients, or examples, of each step.
    expected : mapping of name to list of array
        Weights in canonical axes: the initial ones, then those after each step.
    restart : int, optional
        Step before which training is saved and loaded.
    """

    problem: Problem
    layout: Layout
    dtype: str
    optimizer: Optimizer
    batches: Sequence[Batch]
    expected: Mapping[str, Sequence[Array]]
    restart: int | None = None


def expected_weights(vector: Vector) -> dict[str, list[Array]]:
    """Read the initial weights of every parameter of a vector, and those after each step."""
    steps = vector.data["expect"]["weights"]
    return {
        p["name"]: [
            decode_values(values, tuple(p["axes"].values()))
            for values in (p["weight"], *(weights[p["name"]] for weights in steps))
        ]
        for p in vector.data["parameters"]
    }


def compare_trajectory(
    question: Trajectory[Any, Any], got: Sequence[Mapping[str, Array]]
) -> Verdict:
    """Compare every parameter at every step."""
    if not isinstance(got, Sequence):
        return Verdict(f"a {type(got).__name__} came back, not a list of weights")
    if len(got) != len(question.batches):
        return Verdict(f"{len(got)} steps came back, not {len(question.batches)}")
    verdict = Verdict()
    for name, (start, *expected) in question.expected.items():
        missing = [step for step, weights in enumerate(got) if name not in weights]
        if missing:
            return Verdict(f"{name}: no weights came back at step {missing[0]}")
        stored = [question.layout.canonical(name, np.asarray(weights[name])) for weights in got]
        verdict.add(compare_weights(name, stored, expected, start, dtype=question.dtype))
    return verdict


def compare_weights(
    name: str, got: Sequence[Array], want: Sequence[Array], start: Array, *, dtype: str
) -> Verdict:
    """Compare one parameter at every step of a trajectory.

    Each step may add as many ULP as a clipped gradient may be off (4 in float32). The ULP is that
    of the largest magnitude that the element or its change has had so far: a weight that passes
    through zero is not held to the spacing at zero.
    """
    verdict = Verdict()
    reach, before = np.abs(start), start
    for step, (have, should) in enumerate(zip(got, want, strict=True), start=1):
        if have.dtype != dtype_of(dtype) or have.shape != should.shape:
            return Verdict(
                f"{name}, step {step}: weights came back as {have.dtype}{list(have.shape)}, "
                f"not {dtype}{list(should.shape)}"
            )
        reach = np.maximum(reach, np.maximum(np.abs(should), np.abs(should - before)))
        with np.errstate(invalid="ignore"):
            errors = np.abs(have.astype(np.float64) - should) / ulp(reach, dtype) / step
        errors = np.where(np.isnan(errors), np.inf, errors)
        verdict.measure(errors)
        if errors.size and errors.max() > LIMITS[dtype]:
            worst = int(errors.argmax())
            verdict.add(
                Verdict(
                    f"{name}, step {step}, element {worst}: got {have.ravel()[worst]!s}, not "
                    f"{should.ravel()[worst]!s}: {errors.max():.3g} ULP a step, {LIMITS[dtype]:g} allowed"
                )
            )
        before = should
    return verdict
