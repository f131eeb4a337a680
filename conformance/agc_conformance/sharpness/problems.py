"""Questions about SAM: weights and examples, once or in steps, and the expected results.

The loss is that of :class:`agc_conformance.backend.Examples`. It is quadratic, so that its gradient
at any point is known exactly. It differs in every element and example, so that no two batches,
micro-batches or parameters can be taken for one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agc.config import AGC, SAM
from agc.reference import GradientFunction
from agc_conformance.backend import Examples, Optimizer, SharpnessProblem
from agc_conformance.data import decode_numbers, decode_rule, decode_values
from agc_conformance.layout import Layout, layout_of
from agc_conformance.trajectories import Trajectory, expected_weights
from agc_conformance.vectors import Vector
from agc_conformance.verdict import accumulation_dtype

__all__ = [
    "ExpectedGradient",
    "ExpectedNumber",
    "SharpenQuestion",
    "SharpnessTrajectory",
    "as_batch",
    "gradient_function",
    "parse_sharpen",
    "parse_trajectory",
    "sam_rule",
]

Array = npt.NDArray[Any]
SharpnessTrajectory = Trajectory[SharpnessProblem, Examples]


@dataclass(frozen=True)
class ExpectedGradient:
    """An expected gradient, in canonical axes.

    Attributes
    ----------
    values, magnitudes : array of float64
        The gradient, and the sum of the magnitudes of all its terms.
    """

    values: Array
    magnitudes: Array


@dataclass(frozen=True)
class ExpectedNumber:
    """An expected loss or norm, and the sum of the magnitudes of all its terms."""

    value: float
    magnitude: float


@dataclass(frozen=True)
class SharpenQuestion:
    """A request for one sharpness-aware gradient, in one layout and dtype.

    Attributes
    ----------
    problem : SharpnessProblem
        For the backend.
    layout : Layout
        How the backend stores parameters.
    dtype : str
        Dtype of the weights and gradients.
    skipped : bool
        Whether the step is skipped.
    gradients : mapping of name to expectation
        ``"absent"``: the loss does not depend on the parameter.
    numbers : mapping of str to ExpectedNumber
        ``loss``, ``perturbed_loss`` and ``norm``.
    numbers_required : bool
        Whether a backend that reports none of them does not support the question.
    scenario : str, optional
        A setting of real training.
    settings : mapping
        The numbers and names of the scenario.
    """

    problem: SharpnessProblem
    layout: Layout
    dtype: str
    skipped: bool
    gradients: Mapping[str, Literal["absent"] | ExpectedGradient]
    numbers: Mapping[str, ExpectedNumber]
    numbers_required: bool
    scenario: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def sam_rule(data: Mapping[str, Any]) -> SAM:
    """Read a configuration of SAM; ``{"profile": name}`` starts from that profile."""
    values = decode_rule(data)
    if "profile" in values:
        values = {**SAM.profile(values["profile"]).to_dict(), **values}
        del values["profile"]
    return SAM.from_dict(values)


@lru_cache(maxsize=512)
def parse_sharpen(vector: Vector, layout: str, dtype: str) -> SharpenQuestion:
    """Read a vector of kind ``sharpen`` or ``sharpness-scenario``.

    Parameters
    ----------
    vector : Vector
        The vector.
    layout : {"torch", "flax", "keras"}
        The backend's layout.
    dtype : str
        Dtype of the weights; examples are in at least float32.
    """
    data, laid_out = vector.data, layout_of(vector, layout)
    expect = data["expect"]
    numbers = {}
    for kind in ("loss", "perturbed_loss", "norm"):
        if expect.get(kind) is not None:
            number = decode_numbers([expect[kind]["value"], expect[kind]["magnitude"]])
            numbers[kind] = ExpectedNumber(*number.tolist())
    return SharpenQuestion(
        _problem(vector, laid_out, dtype),
        laid_out,
        dtype,
        expect.get("skipped", False),
        {
            name: _expected(values, laid_out.parameters[name].shape)
            for name, values in expect.get("gradients", {}).items()
        },
        numbers,
        vector.clause == "SAM-12",
        data.get("scenario"),
        data.get("settings", {}),
    )


@lru_cache(maxsize=128)
def parse_trajectory(vector: Vector, layout: str, dtype: str) -> SharpnessTrajectory:
    """Read a vector of kind ``sharpness-trajectory``."""
    data, laid_out = vector.data, layout_of(vector, layout)
    return Trajectory(
        _problem(vector, laid_out, dtype),
        laid_out,
        dtype,
        Optimizer(**data["optimizer"]),
        [_examples(batch, laid_out, dtype) for batch in data["batches"]],
        expected_weights(vector),
        data["restart"],
    )


def _problem(vector: Vector, layout: Layout, dtype: str) -> SharpnessProblem:
    data = vector.data
    weights = {p["name"]: layout.stored(p["name"], p["weight"], dtype) for p in data["parameters"]}
    clipping = data.get("clipping")
    if clipping is not None:
        clipping = replace(AGC.from_dict(clipping), units=layout.units())
    first = data["batches"][0] if "batches" in data else data["examples"]
    return SharpnessProblem(
        sam_rule(data["rule"]),
        weights,  # type: ignore[arg-type]
        _examples(first, layout, dtype),
        data.get("step", 0),
        clipping,
    )


def _examples(batch: Mapping[str, Any], layout: Layout, dtype: str) -> Examples:
    wide = accumulation_dtype(dtype)
    return Examples(
        *(
            {
                name: layout.examples(name, values, batch["count"], wide)
                for name, values in batch[kind].items()
            }
            for kind in ("curvatures", "centers")
        )
    )


def _expected(data: Any, shape: tuple[int, ...]) -> Literal["absent"] | ExpectedGradient:
    if isinstance(data, str):
        return data  # type: ignore[return-value]
    return ExpectedGradient(
        *(decode_values({"values": data[key]}, shape) for key in ("values", "magnitudes"))
    )


def as_batch(examples: Examples) -> list[Array]:
    """Return a batch as the reference takes it: arrays that share their first axis."""
    arrays = [*examples.curvatures.values(), *examples.centers.values()]
    return [array.astype(np.float64) for array in arrays]


def gradient_function(names: Sequence[str], used: Sequence[str]) -> GradientFunction:
    """Return a function that computes the loss and its gradients, summed exactly.

    The loss is that of :class:`~agc_conformance.backend.Examples`.

    Parameters
    ----------
    names : sequence of str
        All parameters.
    used : sequence of str
        Parameters that the loss depends on, in the order of the batch's arrays.
    """

    def compute(
        weights: Mapping[str, Array], batch: Sequence[Array]
    ) -> tuple[float, dict[str, Array | None]]:
        count = len(batch[0])
        gradients: dict[str, Array | None] = dict.fromkeys(names)
        losses = []
        with np.errstate(invalid="ignore", over="ignore"):
            for name, a, c in zip(used, batch, batch[len(used) :], strict=False):
                away = weights[name] - c
                losses.append(0.5 * a * away**2)
                gradients[name] = exact_sum(a * away) / count
        return math.fsum(float(exact_sum(loss.ravel())) for loss in losses) / count, gradients

    return compute


def exact_sum(values: Array) -> Array:
    """Sum along the first axis, correctly rounded, so that every machine has the same result."""
    columns = values.reshape(len(values), -1).T
    sums = [math.fsum(c) if np.isfinite(c).all() else np.sum(c) for c in columns.tolist()]
    return np.array(sums, np.float64).reshape(values.shape[1:])
