"""Problems of SAM: the loss that every framework writes in two lines, and vectors handed to a backend.

The loss is :class:`agc.backend.Examples`': quadratic, so that its gradient at any point is known exactly,
and different in every element and example, so that no two batches, micro-batches or parameters can be
taken for one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.backend import Examples, SharpnessProblem
from agc.config import AGC, SAM
from agc.reference import GradientFunction
from agc_conformance.bind import Laid, decode_rule
from agc_conformance.compare import accumulation_dtype
from agc_conformance.vectors import Vector

__all__ = ["BoundSharpness", "as_batch", "bind_sharpness", "gradient_function", "sam_rule"]

Array = npt.NDArray[Any]


def sam_rule(data: Mapping[str, Any]) -> SAM:
    """Read a configuration of SAM; ``{"profile": name}`` starts from that profile."""
    values = decode_rule(data)
    if "profile" in values:
        values = {**SAM.profile(values["profile"]).to_dict(), **values}
        del values["profile"]
    return SAM.from_dict(values)


@dataclass(frozen=True)
class BoundSharpness(Laid):
    """A vector of SAM in one layout and dtype.

    Attributes
    ----------
    problem : SharpnessProblem
        For the backend.
    batches : list of Examples
        One a step, of a trajectory.
    dtype : str
        Dtype of the weights and gradients.
    """

    problem: SharpnessProblem
    batches: list[Examples]
    dtype: str


def bind_sharpness(vector: Vector, layout: str, dtype: str) -> BoundSharpness:
    """Lay a vector's weights and examples out.

    Parameters
    ----------
    vector : Vector
        Of kind ``sharpen``, ``sharpness-trajectory`` or ``sharpness-scenario``.
    layout : {"torch", "flax", "keras"}
        The backend's.
    dtype : str
        Of the weights; examples are in at least float32.
    """
    laid, data = Laid(vector, layout), vector.data
    weights = {p["name"]: laid.stored(p["name"], p["weight"], dtype) for p in data["parameters"]}
    wide = accumulation_dtype(dtype)

    def examples(one: Mapping[str, Any]) -> Examples:
        kinds = [
            {name: laid.examples(name, array, one["count"], wide) for name, array in kind.items()}
            for kind in (one["curvatures"], one["centers"])
        ]
        return Examples(*kinds)

    batches = [examples(one) for one in data.get("batches", [data.get("examples")])]
    clipping = None
    if data.get("clipping") is not None:
        clipping = AGC.from_dict(data["clipping"])
        clipping = replace(clipping, units={name: laid.units(name) for name in weights})
    problem = SharpnessProblem(
        sam_rule(data["rule"]),
        weights,  # type: ignore[arg-type]
        batches[0],
        data.get("step", 0),
        clipping,
    )
    return BoundSharpness(vector, layout, problem, batches, dtype)


def as_batch(examples: Examples) -> list[Array]:
    """Return a batch as the reference takes it: arrays that share their first axis."""
    arrays = [*examples.curvatures.values(), *examples.centers.values()]
    return [array.astype(np.float64) for array in arrays]


def gradient_function(names: Sequence[str], used: Sequence[str]) -> GradientFunction:
    """Return the loss of :class:`~agc.backend.Examples` with its gradients, summed exactly.

    Parameters
    ----------
    names : sequence of str
        All parameters.
    used : sequence of str
        Those in the loss, in the order of the batch's arrays.
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
        return math.fsum(float(exact_sum(one.ravel())) for one in losses) / count, gradients

    return compute


def exact_sum(values: Array) -> Array:
    """Sum along the first axis, correctly rounded: the same on every machine."""
    columns = values.reshape(len(values), -1).T
    sums = [math.fsum(c) if np.isfinite(c).all() else np.sum(c) for c in columns.tolist()]
    return np.array(sums, np.float64).reshape(values.shape[1:])
