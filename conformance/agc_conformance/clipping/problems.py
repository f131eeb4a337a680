"""Questions about AGC: gradients to clip, once or in steps, and the expected results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agc.config import AGC
from agc.reference import RowSparse, Stats
from agc_conformance.backend import Gradient, Optimizer, Problem
from agc_conformance.data import decode_numbers, decode_rule
from agc_conformance.layout import Layout, layout_of
from agc_conformance.trajectories import Trajectory, expected_weights
from agc_conformance.vectors import Vector

__all__ = [
    "ClipQuestion",
    "ClipTrajectory",
    "Expected",
    "ExpectedUnits",
    "parse_clip",
    "parse_trajectory",
]

Array = npt.NDArray[Any]
ClipTrajectory = Trajectory[Problem, Mapping[str, Gradient]]


@dataclass(frozen=True)
class ExpectedUnits:
    """Expected results for the units of a gradient, in the order of the canonical axes.

    Attributes
    ----------
    actions : sequence of str
        ``"clip"``, ``"keep"`` or ``"nonfinite"``.
    weight_norm, gradient_norm, limit, scale : array of float64, shape (units,)
        The numbers of AGC-1 and AGC-2.
    """

    actions: Sequence[str]
    weight_norm: Array
    gradient_norm: Array
    limit: Array
    scale: Array

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> ExpectedUnits:
        """Read from a vector."""
        columns = ("weight_norm", "gradient_norm", "limit", "scale")
        return cls(data["action"], *(decode_numbers(data[column]) for column in columns))


Expected = Literal["absent", "untouched"] | ExpectedUnits


@dataclass(frozen=True)
class ClipQuestion:
    """Gradients to clip, in one layout and dtype.

    Attributes
    ----------
    problem : Problem
        For the backend.
    layout : Layout
        How the backend stores parameters.
    dtype : str
        Dtype of the gradients.
    seen : mapping of name to array, RowSparse or None
        The gradients that AGC sees: unscaled, if the scenario scales them.
    gradients : mapping of name to expectation
        ``"absent"``: the parameter has no gradient. ``"untouched"``: the bits of the gradient stay.
    stats : mapping of name to Stats
        Telemetry (AGC-11).
    stats_required : bool
        Whether a backend without telemetry does not support the question.
    scenario : str, optional
        A setting of real training.
    settings : mapping
        The numbers of the scenario.
    """

    problem: Problem
    layout: Layout
    dtype: str
    seen: Mapping[str, Gradient]
    gradients: Mapping[str, Expected]
    stats: Mapping[str, Stats]
    stats_required: bool
    scenario: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1024)
def parse_clip(vector: Vector, layout: str, dtype: str) -> ClipQuestion:
    """Read a vector of kind ``clip`` or ``scenario``.

    Parameters
    ----------
    vector : Vector
        The vector.
    layout : {"torch", "flax", "keras"}
        The backend's layout.
    dtype : str
        ``gradient``, or ``gradient/weight`` if the two differ.
    """
    data, laid_out = vector.data, layout_of(vector, layout)
    gradient_dtype = dtype.partition("/")[0]
    problem = _problem(vector, laid_out, dtype)
    settings = dict(data.get("settings", {}))
    seen = dict(problem.gradients)
    if "micro" in settings:
        settings["micro"] = [
            {name: laid_out.stored(name, values, gradient_dtype) for name, values in micro.items()}
            for micro in settings["micro"]
        ]
    if "scale" in settings:
        seen = {
            name: None if value is None else value / np.asarray(settings["scale"], value.dtype)
            for name, value in problem.gradients.items()
            if not isinstance(value, RowSparse)
        }
    expect = data["expect"]
    return ClipQuestion(
        problem,
        laid_out,
        gradient_dtype,
        seen,
        {name: _expected(values) for name, values in expect.get("gradients", {}).items()},
        {name: _stats(values) for name, values in expect.get("stats", {}).items()},
        vector.clause == "AGC-11",
        data.get("scenario"),
        settings,
    )


@lru_cache(maxsize=128)
def parse_trajectory(vector: Vector, layout: str, dtype: str) -> ClipTrajectory:
    """Read a vector of kind ``trajectory``."""
    data, laid_out = vector.data, layout_of(vector, layout)
    gradients = [
        {name: laid_out.stored(name, values, dtype) for name, values in step.items()}
        for step in data["gradients"]
    ]
    return Trajectory(
        _problem(vector, laid_out, dtype),
        laid_out,
        dtype,
        Optimizer(**data["optimizer"]),
        gradients,
        expected_weights(vector),
    )


def _problem(vector: Vector, layout: Layout, dtype: str) -> Problem:
    gradient_dtype, _, weight_dtype = dtype.partition("/")
    weights: dict[str, Array] = {}
    gradients: dict[str, Gradient] = {}
    for p in vector.data["parameters"]:
        name = p["name"]
        weight = layout.stored(name, p["weight"], weight_dtype or gradient_dtype)
        assert not isinstance(weight, RowSparse)
        weights[name] = weight
        own_dtype = p.get("gradient_dtype", gradient_dtype)
        gradient = p["gradient"]
        gradients[name] = None if gradient is None else layout.stored(name, gradient, own_dtype)
    rule = AGC.from_dict(decode_rule(vector.data["rule"]))
    return Problem(rule, weights, gradients, layout.units(), vector.data.get("step", 0))


def _expected(data: Any) -> Expected:
    return data if isinstance(data, str) else ExpectedUnits.from_data(data)  # type: ignore[return-value]


def _stats(data: Mapping[str, Any]) -> Stats:
    ratio, scale = decode_numbers([data["max_ratio"], data["min_scale"]]).tolist()
    return Stats(data["units"], data["clipped"], data["nonfinite"], ratio, scale)
