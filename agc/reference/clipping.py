"""The executable definition of adaptive gradient clipping.

Source: Brock, De, Smith, Simonyan, arXiv:2102.06171, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.checks import NO_GRADIENT, check_inexact, check_shapes, check_step, rows_are_not_units
from agc.config import AGC
from agc.errors import (
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    ShapeError,
    UnitsError,
)
from agc.plan import Plan, PlanEntry
from agc.selectors import canonical_name
from agc.units import UnitAxes, Units

__all__ = [
    "Clipped",
    "Result",
    "RowSparse",
    "Stats",
    "adaptive_clip",
    "clip_units",
    "to_floats",
    "unit_norms",
    "widen",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RowSparse:
    """A gradient that is zero outside some rows: torch's sparse COO, TensorFlow's IndexedSlices.

    Attributes
    ----------
    indices : array of int, shape (n,)
        Rows; a row that appears more than once is the sum of its values.
    values : array, shape (n, ...)
        The rows' values.
    shape : tuple of int
        Shape of the dense gradient.

    Raises
    ------
    ShapeError
        If the values are not one row for each index, or a row is outside of the shape.
    DTypeError
        If the indices are not integers.
    """

    indices: Array
    values: Array
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices)
        wanted = (*indices.shape, *self.shape[1:])
        if not self.shape or indices.ndim != 1 or np.shape(self.values) != wanted:
            raise ShapeError(
                f"a row-sparse gradient of shape {self.shape} with indices of shape {indices.shape} "
                f"has values of shape {np.shape(self.values)}; it needs one row for each index"
            )
        if not np.issubdtype(indices.dtype, np.integer):
            raise DTypeError(f"the indices have dtype {indices.dtype}; rows are integers")
        outside = indices[(indices < 0) | (indices >= self.shape[0])]
        if outside.size:
            raise ShapeError(f"row {outside[0]} is outside of the gradient's shape {self.shape}")

    def coalesce(self) -> RowSparse:
        """Return the same gradient with ascending indices, each once."""
        rows, inverse = np.unique(np.asarray(self.indices), return_inverse=True)
        values = np.zeros((len(rows), *self.shape[1:]), np.asarray(self.values).dtype)
        np.add.at(values, inverse, self.values)
        return RowSparse(rows, values, self.shape)

    def to_dense(self) -> Array:
        """Return the dense gradient."""
        dense = np.zeros(self.shape, np.asarray(self.values).dtype)
        np.add.at(dense, self.indices, self.values)
        return dense


@dataclass(frozen=True)
class Stats:
    """What one clipping did (AGC-11).

    Attributes
    ----------
    units : int
        Units looked at.
    clipped : int
        Units whose gradient was scaled down.
    nonfinite : int
        Units that fell under the non-finite policy.
    max_ratio : float
        Largest ``norm(G_i) / max(norm(W_i), eps)`` of the finite units; 0 if there are none.
    min_scale : float
        Smallest factor applied to a finite unit; 1 if none was clipped.
    """

    units: int
    clipped: int
    nonfinite: int
    max_ratio: float
    min_scale: float

    def to_dict(self, prefix: str = "agc/") -> dict[str, float]:
        """Return the numbers as floats for a logger, with the fraction of units that was clipped.

        Examples
        --------
        >>> stats = Stats(units=8, clipped=2, nonfinite=0, max_ratio=0.04, min_scale=0.25)
        >>> stats.to_dict()["agc/clipped_fraction"]
        0.25
        """
        numbers = {"clipped_fraction": self.clipped / max(1, self.units), **vars(self)}
        return {f"{prefix}{key}": float(value) for key, value in numbers.items()}


def to_floats(
    total: Stats, parameters: Mapping[str, Stats], prefix: str = "agc/"
) -> dict[str, float]:
    """Return telemetry as flat floats for a logger, the same keys in every framework (AGC-11).

    Returns
    -------
    dict of str to float
        ``agc/clipped_fraction``, ``agc/units``, ``agc/clipped``, ``agc/nonfinite``,
        ``agc/max_ratio`` and ``agc/min_scale``; and of every parameter the same, as
        ``agc/stem.weight/clipped_fraction``.
    """
    floats = total.to_dict(prefix)
    for name, stats in parameters.items():
        floats |= stats.to_dict(f"{prefix}{name}/")
    return floats


@dataclass(frozen=True)
class Clipped:
    """One clipped gradient and the numbers behind it, per unit (reduced axes kept with size 1)."""

    gradient: Array
    weight_norm: Array
    gradient_norm: Array
    limit: Array
    scale: Array
    clipped: npt.NDArray[np.bool_]
    nonfinite: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """Clipped gradients (float64 or complex128) and statistics, per parameter and in total."""

    gradients: dict[str, Array | RowSparse | None]
    clipped: dict[str, Clipped]
    stats: dict[str, Stats]
    total: Stats


def unit_norms(array: Array, units: Units) -> Array:
    r"""L2 norm of every unit (AGC-3).

    Parameters
    ----------
    array : array, any shape, floating point or complex
        Weights or gradient.
    units : Units
        Which axes name a unit.

    Returns
    -------
    array of float64
        Norms, shaped like ``units.bind(array.shape).unit_shape``. NaN if the unit holds a NaN, else
        infinity if it holds an infinity.

    Raises
    ------
    DTypeError
        If the dtype is neither floating point nor complex.

    Notes
    -----
    Each unit is divided by its largest magnitude before squaring, so that a finite unit has a
    finite norm wherever float64 can hold it.

    Examples
    --------
    >>> unit_norms(np.array([[3.0, 4.0], [0.0, 2.0]]), Units("o i -> o")).ravel()
    array([5., 2.])
    """
    wide = widen("array", array)
    axes = units.bind(wide.shape)
    view = np.abs(wide.reshape(axes.view))
    if view.size == 0:
        return np.zeros(axes.unit_shape)
    largest = np.max(view, axis=axes.reduce, keepdims=True)
    divisor = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    # An overflow here is an honest infinity, which the policy of AGC-4 deals with.
    with np.errstate(over="ignore"):
        squares = np.sum((view / divisor) ** 2, axis=axes.reduce, keepdims=True)
        norms: Array = divisor * np.sqrt(squares)
    return norms


def clip_units(
    gradient: Array,
    weight: Array,
    units: Units,
    *,
    clipping: float = 0.01,
    eps: float = 1e-3,
    nonfinite: str = "propagate",
    div_eps: float = 0.0,
) -> Clipped:
    r"""Clip one dense gradient (AGC-1 to AGC-4).

    Parameters
    ----------
    gradient, weight : array, same shape, floating point or complex
        The gradient G and the parameter W.
    units : Units
        Which axes name a unit.
    clipping, eps, nonfinite, div_eps
        As in :class:`agc.AGC`.

    Returns
    -------
    Clipped
        The gradient in float64 or complex128, and norms, limits and scales per unit.

    Raises
    ------
    ConfigError
        If a hyper-parameter is outside what the specification defines.
    ShapeError
        If gradient and weight differ in shape.
    DTypeError
        If either is neither floating point nor complex, or is wider than float64.
    NonFiniteError
        If ``nonfinite="raise"`` and the norm of any unit is not finite.

    Examples
    --------
    >>> weight = np.array([[10.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    >>> clip_units(np.ones((2, 3)), weight, Units("o i -> o")).gradient.round(5)
    array([[0.05774, 0.05774, 0.05774],
           [0.001  , 0.001  , 0.001  ]])
    """
    rule = AGC(clipping=clipping, eps=eps, nonfinite=nonfinite, div_eps=div_eps)  # type: ignore[arg-type]
    if not isinstance(rule.clipping, float):
        raise ConfigError(f"clipping must be a finite number > 0, got {clipping!r}")
    g, w = widen("gradient", gradient), widen("weight", weight)
    if g.shape != w.shape:
        raise ShapeError(f"the gradient has shape {g.shape}, the weight {w.shape}")
    axes = units.bind(w.shape)
    return _clip(g, axes, unit_norms(g, units), unit_norms(w, units), rule.clipping, rule)


def _clip(
    g: Array, axes: UnitAxes, g_norm: Array, w_norm: Array, clipping: float, rule: AGC
) -> Clipped:
    bad = ~(np.isfinite(g_norm) & np.isfinite(w_norm))  # AGC-4
    if rule.nonfinite == "raise" and bad.any():
        raise NonFiniteError(f"{int(bad.sum())} of {bad.size} units have a norm that is not finite")
    limit = clipping * np.maximum(w_norm, rule.eps)  # AGC-1
    clipped = (g_norm > limit) & ~bad  # AGC-2: strictly
    scale = np.ones_like(limit)
    np.divide(limit, np.maximum(g_norm, rule.div_eps), out=scale, where=clipped)
    view = g.reshape(axes.view)
    out = np.where(clipped, view * scale, view)
    if bad.any():
        out = np.where(bad, 0.0 if rule.nonfinite == "zero" else np.nan * np.ones_like(view), out)
    return Clipped(out.reshape(g.shape), w_norm, g_norm, limit, scale, clipped, bad)


def adaptive_clip(
    parameters: Mapping[str, Array],
    gradients: Mapping[str, Array | RowSparse | None],
    plan: Plan,
    rule: AGC,
    *,
    step: int = 0,
) -> Result:
    """Clip the gradients of a whole model (AGC-1 to AGC-12).

    Parameters
    ----------
    parameters : mapping of name to array
        Every parameter of the plan.
    gradients : mapping of name to array, RowSparse or None
        Gradients; None or a missing name means that the parameter has none (AGC-5).
    plan : Plan
        What happens to every parameter.
    rule : AGC
        For ``eps``, ``nonfinite`` and ``div_eps``.
    step : int, default 0
        The optimizer step, for schedules (AGC-10).

    Returns
    -------
    Result
        Clipped gradients under the names given, and telemetry (AGC-11).

    Raises
    ------
    ConfigError
        If the step is not an integer from 0 on, or a schedule's value is not finite and above 0.
    ParameterError
        If the names differ from the plan's.
    MissingGradientError
        If no parameter has a gradient.
    ShapeError, DTypeError, UnitsError, NonFiniteError
        As :func:`clip_units`, with the parameter's name.
    """
    step = check_step(step)
    planned = {entry.name for entry in plan}
    for kind, names in (("parameter", parameters), ("gradient", gradients)):
        strange = [name for name in names if canonical_name(name) not in planned]
        if strange:
            raise ParameterError(f"{kind} {strange[0]!r} is not in the plan")
    weights = {canonical_name(name): value for name, value in parameters.items()}
    missing = sorted(planned - set(weights))
    if missing:
        raise ParameterError(f"parameter {missing[0]!r} of the plan is missing")
    if all(gradient is None for gradient in gradients.values()):
        raise MissingGradientError(NO_GRADIENT)
    out: dict[str, Array | RowSparse | None] = {}
    details: dict[str, Clipped] = {}
    for name, gradient in gradients.items():
        entry = plan[name]
        weight = weights[entry.name]
        if gradient is None:
            out[name] = None
            continue
        check_shapes(entry.name, weight=weight.shape, gradient=gradient.shape, plan=entry.shape)
        try:
            sparse = isinstance(gradient, RowSparse)
            done = _clip_sparse if isinstance(gradient, RowSparse) else _clip_dense
            outcome = done(gradient, weight, entry, rule, step)  # type: ignore[arg-type]
        except (DTypeError, NonFiniteError, UnitsError) as error:
            raise type(error)(f"parameter {entry.name!r}: {error}") from None
        if outcome is None:
            out[name] = gradient
        elif sparse:
            assert isinstance(gradient, RowSparse)
            out[name] = RowSparse(gradient.coalesce().indices, outcome.gradient, entry.shape)
        else:
            out[name] = outcome.gradient
        if outcome is not None:
            details[name] = outcome
    stats = {name: _stats(outcome, rule.eps) for name, outcome in details.items()}
    return Result(out, details, stats, _total(list(stats.values())))


def _clip_dense(
    gradient: Array, weight: Array, entry: PlanEntry, rule: AGC, step: int
) -> Clipped | None:
    widen("gradient", gradient), widen("weight", weight)
    threshold = entry.threshold(step)
    if threshold is None:
        return None
    return clip_units(
        gradient,
        weight,
        entry.units,
        clipping=threshold,
        eps=rule.eps,
        nonfinite=rule.nonfinite,
        div_eps=rule.div_eps,
    )


def _clip_sparse(
    gradient: RowSparse, weight: Array, entry: PlanEntry, rule: AGC, step: int
) -> Clipped | None:
    """Clip the rows that a sparse gradient has; no other row is read (AGC-9)."""
    rows = gradient.coalesce()
    widen("gradient", rows.values), widen("weight", weight)
    threshold = entry.threshold(step)
    if threshold is None:
        return None
    if entry.units.whole:
        axes = entry.units.bind(rows.values.shape)
        g, w_norm = widen("gradient", rows.values), unit_norms(weight, entry.units)
        g_norm = unit_norms(g, entry.units)
    elif 0 in entry.axes.keep and entry.axes.view == entry.axes.shape:
        axes = entry.units.bind(rows.values.shape)
        g, w_norm = widen("gradient", rows.values), unit_norms(weight[rows.indices], entry.units)
        g_norm = unit_norms(g, entry.units)
    else:
        raise rows_are_not_units("the gradient", gradient.shape, entry.units)
    return _clip(g, axes, g_norm, w_norm, threshold, rule)


def _stats(outcome: Clipped, eps: float) -> Stats:
    good = ~outcome.nonfinite
    floor = np.maximum(outcome.weight_norm[good], eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(outcome.gradient_norm[good] == 0, 0.0, outcome.gradient_norm[good] / floor)
    return Stats(
        units=int(outcome.scale.size),
        clipped=int(outcome.clipped.sum()),
        nonfinite=int(outcome.nonfinite.sum()),
        max_ratio=float(np.max(ratio, initial=0.0)),
        min_scale=float(np.min(outcome.scale[good], initial=1.0)),
    )


def _total(stats: list[Stats]) -> Stats:
    return Stats(
        units=sum(each.units for each in stats),
        clipped=sum(each.clipped for each in stats),
        nonfinite=sum(each.nonfinite for each in stats),
        max_ratio=max((each.max_ratio for each in stats), default=0.0),
        min_scale=min((each.min_scale for each in stats), default=1.0),
    )


def widen(what: str, array: Array) -> Array:
    """Return the array in float64 or complex128; float16 and bfloat16 widen without rounding."""
    array = np.asarray(array)
    # bfloat16 comes from ml_dtypes, whose kind is "V" to NumPy.
    inexact = np.issubdtype(array.dtype, np.inexact) or array.dtype.name == "bfloat16"
    check_inexact(f"the {what}", array.dtype, inexact=inexact)
    wide = np.complex128 if np.issubdtype(array.dtype, np.complexfloating) else np.float64
    if not np.can_cast(array.dtype, wide):
        raise DTypeError(
            f"the {what} has dtype {array.dtype}, which float64 cannot hold; cast it first"
        )
    return array.astype(wide)
