"""Questions about SAM, put to a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt

from agc_conformance.backend import (
    Backend,
    Examples,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
)
from agc_conformance.question import Kind
from agc_conformance.sharpness.compare import compare_sharpness
from agc_conformance.sharpness.problems import (
    SharpenQuestion,
    SharpnessTrajectory,
    parse_sharpen,
    parse_trajectory,
)
from agc_conformance.trajectories import compare_trajectory

__all__ = ["KINDS"]

Array = npt.NDArray[Any]


def _sharpen(backend: Backend, question: SharpenQuestion) -> SharpnessOutcome:
    problem = _copy(question.problem)
    if question.scenario is None:
        return backend.sharpen(problem)
    outcome: SharpnessOutcome = getattr(backend, f"sharpen_{question.scenario}")(
        problem, **question.settings
    )
    return outcome


def _train(backend: Backend, question: SharpnessTrajectory) -> list[Mapping[str, Array]]:
    batches = [_copy_examples(batch) for batch in question.batches]
    return backend.sharpness_trajectory(
        SharpnessTask(_copy(question.problem), question.optimizer, batches, question.restart)
    )


def _copy(problem: SharpnessProblem) -> SharpnessProblem:
    """Copy the arrays, since a backend may change them in place."""
    return replace(
        problem,
        parameters={name: array.copy() for name, array in problem.parameters.items()},
        examples=_copy_examples(problem.examples),
    )


def _copy_examples(examples: Examples) -> Examples:
    return Examples(
        {name: array.copy() for name, array in examples.curvatures.items()},
        {name: array.copy() for name, array in examples.centers.items()},
    )


KINDS: Final[dict[str, Kind[Any, Any]]] = {
    "sharpen": Kind(parse_sharpen, _sharpen, compare_sharpness),
    "sharpness-scenario": Kind(parse_sharpen, _sharpen, compare_sharpness),
    "sharpness-trajectory": Kind(parse_trajectory, _train, compare_trajectory),
}
"""Kinds of vectors by name."""
