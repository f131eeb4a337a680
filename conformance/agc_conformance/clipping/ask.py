"""Questions about AGC, put to a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt

from agc.reference import RowSparse
from agc_conformance.backend import Backend, Gradient, Outcome, Problem, Unsupported
from agc_conformance.clipping.compare import compare_clip
from agc_conformance.clipping.problems import (
    ClipQuestion,
    ClipTrajectory,
    parse_clip,
    parse_trajectory,
)
from agc_conformance.question import Kind
from agc_conformance.trajectories import compare_trajectory
from agc_conformance.vectors import Vector
from agc_conformance.verdict import Verdict

__all__ = ["KINDS"]

Array = npt.NDArray[Any]


_BY_PATH: Final = frozenset({"NaiveAccumulation", "OverflowToZero"})
"""Flags of vectors that are asked of every path: of long sums, and of large numbers."""


def _clip(backend: Backend, question: ClipQuestion) -> Outcome:
    if question.scenario is None:
        return backend.clip(question.problem)
    scenario = getattr(backend, f"scenario_{question.scenario}")
    outcome: Outcome = scenario(question.problem, **question.settings)
    return outcome


class _Clip(Kind[ClipQuestion, Outcome]):
    """Clipping; where float32 may not do, every path of a backend is asked (AGC-3, AGC-4)."""

    def run(self, backend: Backend, vector: Vector, dtype: str) -> Verdict:
        """Run a vector; each path has to pass as well."""
        question = self.parse(vector, backend.layout, dtype)
        verdict = self._judge(backend, question)
        plain = question.scenario is None and dtype == "float32"
        if not plain or _BY_PATH.isdisjoint(vector.flags):
            return verdict
        verdicts = {"eager": verdict}
        for path in backend.paths:
            try:
                verdicts[path] = self._judge(backend, replace(question, scenario=path))
            except Unsupported:
                continue
            if problem := verdicts[path].problem:
                verdict.problem = verdict.problem or f"{path}: {problem}"
        verdict.ulp_by_path = {
            path: found.max_ulp for path, found in verdicts.items() if found.max_ulp is not None
        }
        return verdict

    def _judge(self, backend: Backend, question: ClipQuestion) -> Verdict:
        """Compare an answer; whoever only clips has to leave the weights alone."""
        given = _copy(question.problem)
        settings = dict(question.settings)
        if "micro" in settings:
            settings["micro"] = [_copies(gradients) for gradients in settings["micro"]]
        outcome = self.answer(backend, replace(question, problem=given, settings=settings))
        verdict = self.compare(question, outcome)
        if question.scenario is None or question.scenario in backend.paths:
            for name, weight in question.problem.parameters.items():
                if given.parameters[name].tobytes() != weight.tobytes():
                    verdict.problem = verdict.problem or f"{name}: the weights were changed"
        return verdict


def _train(backend: Backend, question: ClipTrajectory) -> list[Mapping[str, Array]]:
    gradients = [_copies(of_step) for of_step in question.batches]
    return backend.trajectory(_copy(question.problem), question.optimizer, gradients)


def _copy(problem: Problem) -> Problem:
    """Copy the arrays, since a backend may change them in place."""
    return replace(
        problem,
        parameters={name: value.copy() for name, value in problem.parameters.items()},
        gradients=_copies(problem.gradients),
    )


def _copies(gradients: Mapping[str, Gradient]) -> dict[str, Gradient]:
    return {name: _copied(gradient) for name, gradient in gradients.items()}


def _copied(gradient: Gradient) -> Gradient:
    if isinstance(gradient, RowSparse):
        return replace(gradient, indices=gradient.indices.copy(), values=gradient.values.copy())
    return None if gradient is None else gradient.copy()


KINDS: Final[dict[str, Kind[Any, Any]]] = {
    "clip": _Clip(parse_clip, _clip, compare_clip),
    "scenario": _Clip(parse_clip, _clip, compare_clip),
    "trajectory": Kind(parse_trajectory, _train, compare_trajectory),
}
"""Kinds of vectors by name."""
