"""The numerics: one norm per unit, one comparison for all units, scaling of what is clipped.

The norms of all units stand in one flat float64 vector for the weights and one for the gradients, so limits,
decisions and scales are a handful of small operations whatever the number of parameters. Then

* on the CPU, in graphs and eagerly, gradients without a clipped unit are passed on as they are;
* under XLA and on accelerators every gradient is selected and scaled in one pass, without a branch.

Letters at the end of a name: U units, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from agc import AGC, Schedule
from agc import reference as agc_reference
from agc.errors import (
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    ShapeError,
    UnitsError,
)
from agc.plan import PlanEntry
from agc_tensorflow.norms import fold, in_xla, scale_units, sum_of_squares
from agc_tensorflow.units import Model, Variable, resolve, variable_key

__all__ = ["IDLE", "Gradient", "Stats", "adaptive_clip_gradients", "clip"]

Gradient: TypeAlias = Any
"""A tensor, ``tf.IndexedSlices`` or None."""
Step: TypeAlias = Any
"""A Python integer, or an integer tensor or variable."""
IDLE: Final = (0.0, 0.0, 0.0, 0.0, 1.0)
"""Telemetry of a parameter that AGC did not act on."""


def adaptive_clip_gradients(
    gradients: Sequence[Gradient],
    variables: Sequence[Variable],
    rule: AGC,
    *,
    model: Model | None = None,
    step: Step = 0,
    return_stats: bool = False,
) -> list[Gradient] | tuple[list[Gradient], Stats]:
    r"""Clip gradients in a loop of your own (AGC-1 to AGC-12).

    Parameters
    ----------
    gradients : sequence of tensor, tf.IndexedSlices or None
        What ``tape.gradient(loss, variables)`` returns: floating point or complex, in the variable's dtype
        or another. None, for a variable that the loss does not depend on, stays None.
    variables : sequence of keras.Variable or tf.Variable
        The variables, in the order of the gradients.
    rule : AGC
        The configuration.
    model : keras.Layer, tf.Module, or mapping of name to variable, optional
        What the variables belong to: its layer types settle the units. The variables may be a part of its
        parameters. Without it, vectors are one unit, matrices follow the layout convention with a warning,
        and the rest has to be declared in the rule.
    step : int or integer tensor, default 0
        The optimizer step, for schedules: ``optimizer.iterations``.
    return_stats : bool, default False
        Whether to return telemetry too.

    Returns
    -------
    list of tensor, tf.IndexedSlices or None
        The clipped gradients, each in its gradient's dtype; a row-sparse one with each row once.
    Stats
        If ``return_stats``.

    Raises
    ------
    MissingGradientError
        If no variable has a gradient.
    ShapeError, DTypeError, UnitsError, NonFiniteError
        If a gradient and its variable differ in shape, are not floating point or complex, if a row-sparse
        gradient does not fit its units, or if a norm is not finite and ``nonfinite="raise"``. The message
        names the parameter.
    SelectorError, AmbiguousUnitsError, ParameterError
        As :func:`agc_tensorflow.plan`; or a variable is not the model's.
    ConfigError
        If ``nonfinite="raise"`` under XLA, which cannot raise.
    tf.errors.InvalidArgumentError
        In place of NonFiniteError inside a ``tf.function``, which raises only when it runs.

    Notes
    -----
    Call it after unscaling, accumulation and reduction across replicas, before the optimizer's step (AGC-7);
    :class:`agc_tensorflow.AdaptiveGradClip` does that by itself.

    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \epsilon)}{\|G_i\|} G_i
        \quad\text{if}\quad \|G_i\| > \lambda \max(\|W_i\|, \epsilon)

    On the CPU TensorFlow flushes subnormal results to zero, also in what is scaled here; what is not clipped
    keeps its bits.

    References
    ----------
    Brock, De, Smith, Simonyan, arXiv:2102.06171, Eq. 3.

    Examples
    --------
    >>> weight = tf.Variable([[3.0], [4.0]], name="weight")
    >>> clipped, stats = adaptive_clip_gradients(
    ...     [tf.constant([[0.0], [1.0]])], [weight], AGC(clipping=0.01), return_stats=True
    ... )
    >>> clipped[0].numpy()
    array([[0.  ],
           [0.05]], dtype=float32)
    >>> stats.total()
    Stats(units=1, clipped=1, nonfinite=0, max_ratio=0.2, min_scale=0.05)
    """
    if any(hasattr(given, "shape") for given in (gradients, variables)):
        raise ParameterError("give sequences of gradients and variables, also if there is only one")
    gradients, variables = list(gradients), list(variables)
    if len(set(map(variable_key, variables))) < len(variables):
        raise ParameterError("a variable was given twice; give it once, with its whole gradient")
    if len(gradients) != len(variables):
        raise ParameterError(
            f"{len(gradients)} gradients were given for {len(variables)} variables; "
            "give one each, None where there is no gradient"
        )
    _, entries = resolve(variables, rule, model=model)
    clipped, stats = clip(gradients, variables, entries, rule, step=step)
    return (clipped, stats) if return_stats else clipped


class Stats(tf.experimental.ExtensionType):  # type: ignore[misc]
    """What one clipping did, on the device until somebody reads it (AGC-11).

    The properties are device scalars; :meth:`total` and :meth:`parameters` bring numbers to the host. It
    may be returned from a ``tf.function``.

    Attributes
    ----------
    names : tuple of str
        The parameters.
    table : tensor of float64, shape (parameters, 5)
        By parameter: units, clipped units, units that are not finite, largest ratio, smallest scale. A
        parameter that AGC did not act on has no units.
    """

    names: tuple[str, ...]
    table: tf.Tensor

    @property
    def units(self) -> tf.Tensor:
        """Number of units looked at."""
        return tf.reduce_sum(self.table[:, 0])

    @property
    def clipped(self) -> tf.Tensor:
        """Number of units that were scaled down."""
        return tf.reduce_sum(self.table[:, 1])

    @property
    def nonfinite(self) -> tf.Tensor:
        """Number of units that fell under the non-finite policy (AGC-4)."""
        return tf.reduce_sum(self.table[:, 2])

    @property
    def max_ratio(self) -> tf.Tensor:
        """Largest ``norm(G_i) / max(norm(W_i), eps)`` of the finite units; 0 if there are none."""
        return tf.reduce_max(self.table[:, 3])

    @property
    def min_scale(self) -> tf.Tensor:
        """Smallest factor applied to a finite unit; 1 if none was clipped."""
        return tf.reduce_min(self.table[:, 4])

    def total(self) -> agc_reference.Stats:
        """Return the numbers of all parameters together."""
        columns = (self.units, self.clipped, self.nonfinite, self.max_ratio, self.min_scale)
        return _host_stats([float(column) for column in columns])

    def parameters(self) -> dict[str, agc_reference.Stats]:
        """Return the numbers of every parameter that AGC acted on, by name."""
        rows = zip(self.names, self.table.numpy().tolist(), strict=True)
        return {name: _host_stats(row) for name, row in rows if row[0]}


def clip(
    gradients: Sequence[Gradient],
    variables: Sequence[Variable],
    entries: Sequence[PlanEntry],
    rule: AGC,
    *,
    step: Step = 0,
    densify: bool = False,
) -> tuple[list[Gradient], Stats]:
    """Clip gradients that are paired with their entries of a plan; see :func:`adaptive_clip_gradients`.

    With ``densify``, row-sparse gradients whose rows are not units are made dense instead of refused.
    """
    names = tuple(entry.name for entry in entries)
    if all(gradient is None for gradient in gradients):
        raise MissingGradientError(
            "no parameter has a gradient; compute gradients before clipping them"
        )
    out: list[Gradient] = list(gradients)
    jobs: list[_Job] = []
    for place, (gradient, variable, entry) in enumerate(
        zip(gradients, variables, entries, strict=True)
    ):
        if gradient is not None:
            weight = variable.value if isinstance(variable, keras.Variable) else variable
            gradient = _check(gradient, weight, entry)
            if entry.clipped:
                if densify and not _fits_rows(entry) and isinstance(gradient, tf.IndexedSlices):
                    gradient = _dense(gradient, entry)
                kind = _SparseJob if isinstance(gradient, tf.IndexedSlices) else _Job
                jobs.append(kind(place, entry, gradient, tf.convert_to_tensor(weight), rule))
    if not jobs:
        return out, Stats(names, tf.constant([IDLE] * len(names), tf.float64))

    ids_U = _ids(jobs)
    w_U = tf.sqrt(tf.concat([job.weight_squares for job in jobs], 0))
    g_U = tf.sqrt(tf.concat([job.gradient_squares for job in jobs], 0))
    finite_U = tf.math.is_finite(w_U) & tf.math.is_finite(g_U)
    floor_U = tf.maximum(w_U, _number(rule.eps))
    threshold_U = _thresholds(jobs, ids_U, step)
    limit_U = threshold_U * floor_U  # AGC-1
    # A schedule that returns nonsense inside a graph, which cannot raise, poisons its units.
    senseless_U = tf.math.is_nan(threshold_U)
    finite_U &= ~senseless_U
    clipped_U = finite_U & (g_U > limit_U)  # AGC-2: strictly
    scale_U = tf.where(clipped_U, limit_U / tf.maximum(g_U, _number(rule.div_eps)), _number(1))
    touched_U = clipped_U | ~finite_U

    places = tf.gather([job.place for job in jobs], ids_U)
    units_P: list[Any] = [0] * len(names)
    for job in jobs:
        units_P[job.place] = job.units
    table = _table(units_P, places, floor_U, g_U, scale_U, clipped_U, finite_U)
    poison_U = _number(math.nan)
    if rule.nonfinite == "zero":
        poison_U = tf.where(senseless_U, poison_U, _number(0))
    scale_U = tf.where(finite_U, scale_U, poison_U)  # AGC-4
    guard = _raise_nonfinite(table, names) if rule.nonfinite == "raise" else None

    touched_P = tf.unstack(
        tf.math.unsorted_segment_sum(tf.cast(touched_U, tf.int32), ids_U, len(jobs))
    )
    sizes = [job.count for job in jobs]
    scales = tf.split(scale_U, sizes) if len(jobs) > 1 else [scale_U]
    masks = tf.split(touched_U, sizes) if len(jobs) > 1 else [touched_U]
    for job, scale, mask, touched in zip(jobs, scales, masks, touched_P, strict=True):
        out[job.place] = job.apply(scale, mask, touched)
    if guard is not None:
        with tf.control_dependencies([guard]):
            out = [None if g is None else tf.identity(g) for g in out]
    return out, Stats(names, table)


class _Job:
    """One parameter with a dense gradient."""

    def __init__(
        self, place: int, entry: PlanEntry, gradient: tf.Tensor, weight: tf.Tensor, rule: AGC
    ) -> None:
        self.place = place
        self.entry = entry
        self.gradient = gradient
        self.fold = fold(entry.units, entry.shape)
        self.count: Any = entry.count  # of places in the flat vectors
        self.units: Any = entry.count  # of them, those that hold a unit
        self.zero = rule.nonfinite == "zero"
        self.wide = _is_wide(rule, entry)
        self.gradient_squares = self._sum(gradient)
        self.weight_squares = self._sum(weight)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        return sum_of_squares(x, self.fold, wide=self.wide)

    def apply(self, scale: tf.Tensor, mask: tf.Tensor, touched: tf.Tensor) -> Gradient:
        """Return the gradient scaled where the mask says so; ``touched`` counts its units."""
        return tf.reshape(self._scaled(scale, mask, touched), self.entry.shape)

    def _scaled(self, scale: tf.Tensor, mask: tf.Tensor, touched: tf.Tensor) -> tf.Tensor:
        return scale_units(
            self.gradient, self.fold, scale, mask, touched, wide=self.wide, zero=self.zero
        )


class _SparseJob(_Job):
    """One parameter with a row-sparse gradient (AGC-9)."""

    def __init__(
        self, place: int, entry: PlanEntry, gradient: tf.IndexedSlices, weight: tf.Tensor, rule: AGC
    ) -> None:
        if not _fits_rows(entry):
            raise UnitsError(
                f"parameter {entry.name!r}: the gradient of shape {entry.shape} is row-sparse, but the rows "
                f"are not units of {entry.units}; give the model, whose embedding layers have row units, declare "
                "units such as 'v d -> v', or make the gradient dense with tf.convert_to_tensor, as "
                "AdaptiveGradClip does by itself"
            )
        rows_are_units = bool(entry.axes.keep)
        self.place = place
        self.entry = entry
        self.dense_shape = gradient.dense_shape
        self.zero = rule.nonfinite == "zero"
        self.wide = _is_wide(rule, entry)
        self.indices, self.gradient, found = _coalesce(gradient)
        self.count = self.units = 1
        self.fold = fold(entry.units, entry.shape)
        if not rows_are_units:
            self.weight_squares = self._sum(weight)
        self.fold = fold(entry.units, entry.shape, rows=True)
        self.gradient_squares = self._sum(self.gradient)
        if rows_are_units:
            squares = self._sum(tf.gather(weight, self.indices))
            self.count = tf.size(squares)
            self.units = found * fold(entry.units, (1, *entry.shape[1:])).count
            self.weight_squares = tf.where(tf.range(self.count) < self.units, squares, _number(0))

    def apply(self, scale: tf.Tensor, mask: tf.Tensor, touched: tf.Tensor) -> Gradient:
        values = tf.reshape(self._scaled(scale, mask, touched), (-1, *self.entry.shape[1:]))
        return tf.IndexedSlices(values, self.indices, self.dense_shape)


def _fits_rows(entry: PlanEntry) -> bool:
    """Tell whether a row-sparse gradient can be clipped as it is: rows are units, or all is one unit."""
    axes = entry.axes
    return not axes.keep or (0 in axes.keep and axes.view == axes.shape)


def _dense(gradient: tf.IndexedSlices, entry: PlanEntry) -> tf.Tensor:
    indices = tf.reshape(gradient.indices, [-1])
    return tf.math.unsorted_segment_sum(gradient.values, indices, entry.shape[0])


def _coalesce(gradient: tf.IndexedSlices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Add up rows that appear more than once; return indices, values and the number of rows found.

    XLA knows no arrays whose size depends on their values, so there the rows found come first, and the rest
    are zeros for the first row.
    """
    indices, values = tf.reshape(gradient.indices, [-1]), gradient.values
    if not in_xla():
        rows, row_of = tf.unique(indices)
        found = tf.size(rows)
        return rows, tf.math.unsorted_segment_sum(values, row_of, found), found
    size = tf.size(indices)
    order = tf.argsort(indices)
    indices = tf.gather(indices, order)
    new = tf.concat(
        [tf.ones_like(indices[:1]), tf.cast(indices[1:] != indices[:-1], indices.dtype)], 0
    )
    row_of = tf.cumsum(new) - 1
    found = tf.cast(tf.reduce_sum(new), tf.int32)
    rows = tf.math.unsorted_segment_max(indices, row_of, size)
    rows = tf.where(tf.range(size) < found, rows, rows[:1])
    return rows, tf.math.unsorted_segment_sum(tf.gather(values, order), row_of, size), found


def _check(gradient: Gradient, weight: Any, entry: PlanEntry) -> Gradient:
    """Return the gradient as a tensor or IndexedSlices if it fits its variable."""
    sparse = isinstance(gradient, tf.IndexedSlices)
    if not sparse:
        gradient = tf.convert_to_tensor(gradient)
    values = gradient.values if sparse else gradient
    given = values.shape[1:] if sparse else values.shape
    wanted = entry.shape[1:] if sparse else entry.shape
    if tuple(weight.shape) != entry.shape or not given.is_compatible_with(wanted):
        shape = (entry.shape[0], *given) if sparse and entry.shape else tuple(given)
        raise ShapeError(
            f"parameter {entry.name!r} has shape {tuple(weight.shape)}, its gradient "
            f"{tuple(shape)}, and the plan says {entry.shape}"
        )
    for what, dtype in (("gradient", values.dtype), ("weight", tf.as_dtype(weight.dtype))):
        if not (dtype.is_floating or dtype.is_complex):
            raise DTypeError(
                f"parameter {entry.name!r}: the {what} has dtype {dtype.name}; "
                "AGC needs floating point or complex"
            )
    return gradient


def _is_wide(rule: AGC, entry: PlanEntry) -> bool:
    """Tell whether squares that float32 cannot hold could matter, since limits may be so small."""
    smallest = entry.clipping
    if isinstance(smallest, Schedule):
        smallest = min(value for _, value in smallest.points)
    elif not isinstance(smallest, float):
        smallest = 1e-6  # a callable may return anything; nobody clips below that
    return rule.eps < 2.0**-40 or smallest * rule.eps < 2.0**-50


def _number(value: float) -> tf.Tensor:
    return tf.constant(value, tf.float64)


def _ids(jobs: Sequence[_Job]) -> tf.Tensor:
    """Job that each unit belongs to."""
    counts = [job.count for job in jobs]
    if all(isinstance(count, int) for count in counts):
        return tf.constant(np.repeat(np.arange(len(jobs), dtype=np.int32), counts))
    return tf.concat([tf.fill([count], number) for number, count in enumerate(counts)], 0)


def _thresholds(jobs: Sequence[_Job], ids: tf.Tensor, step: Step) -> tf.Tensor:
    """Clipping threshold, one for all units or one each (AGC-10)."""
    if isinstance(step, keras.Variable):
        step = step.value
    if not isinstance(step, int):
        step = tf.convert_to_tensor(step)
    known: dict[Any, tf.Tensor] = {}
    values = []
    for job in jobs:
        clipping = job.entry.clipping
        key = id(clipping) if callable(clipping) else clipping
        if key not in known:
            known[key] = _threshold(job.entry, step)
        values.append(known[key])
    if len(known) == 1:
        return values[0]
    return tf.gather(tf.stack(values), ids)


def _threshold(entry: PlanEntry, step: Step) -> tf.Tensor:
    if not callable(entry.clipping) or not tf.is_symbolic_tensor(step):
        return _number(entry.threshold(int(step) if callable(entry.clipping) else 0) or 0.0)
    if isinstance(entry.clipping, Schedule):
        value = _interpolate(entry.clipping, step)
    else:
        value = entry.clipping(step)
        value = tf.cast(value, tf.float64) if tf.is_tensor(value) else _number(value)
    return tf.where((value > 0) & tf.math.is_finite(value), value, _number(math.nan))


def _interpolate(schedule: Schedule, step: tf.Tensor) -> tf.Tensor:
    """Return :meth:`agc.Schedule.__call__` of a tensor."""
    at = tf.cast(step, tf.float64)
    (start, low), *rest = schedule.points
    value = _number(low)
    for end, high in rest:
        line = _number(low) + (high - low) * ((at - start) / (end - start))
        value = tf.where(at >= end, _number(high), tf.where(at >= start, line, value))
        start, low = end, high
    return value


def _table(
    units: Sequence[Any],
    places: tf.Tensor,
    floor: tf.Tensor,
    norm: tf.Tensor,
    scale: tf.Tensor,
    clipped: tf.Tensor,
    finite: tf.Tensor,
) -> tf.Tensor:
    """Telemetry by parameter, from values by unit (AGC-11); see :class:`Stats`."""
    rows = len(units)
    ratio = tf.where(finite & (norm > 0), norm / floor, _number(0))
    flags = tf.cast(tf.stack([clipped, ~finite], 1), tf.float64)
    counts = tf.math.unsorted_segment_sum(flags, places, rows)
    largest = tf.maximum(tf.math.unsorted_segment_max(ratio, places, rows), _number(0))
    smallest = tf.minimum(tf.math.unsorted_segment_min(scale, places, rows), _number(1))
    looked_at = tf.cast(tf.stack(units), tf.float64)
    return tf.concat([looked_at[:, None], counts, largest[:, None], smallest[:, None]], 1)


def _raise_nonfinite(table: tf.Tensor, names: tuple[str, ...]) -> tf.Operation | None:
    """Raise if any unit's norm is not finite: now, or inside a graph when it runs (AGC-4)."""
    what = (
        "have units whose norm is not finite, or a schedule whose value is no finite number above 0 "
        "(AGC-4, nonfinite='raise')"
    )
    if in_xla():
        raise ConfigError(
            "nonfinite='raise' cannot work under XLA, which drops assertions; "
            "compile(..., jit_compile=False), or use nonfinite='propagate' or 'zero'"
        )
    if tf.executing_eagerly():
        bad = [name for name, count in zip(names, table[:, 2].numpy(), strict=True) if count]
        if bad:
            raise NonFiniteError(f"parameters {', '.join(map(repr, bad))} {what}")
        return None
    bad = tf.boolean_mask(tf.constant(names), table[:, 2] > 0)
    return tf.debugging.Assert(
        tf.equal(tf.size(bad), 0), [f"{NonFiniteError.__name__}: parameters", bad, what]
    )


def _host_stats(row: Sequence[float]) -> agc_reference.Stats:
    units, clipped, nonfinite, max_ratio, min_scale = row
    return agc_reference.Stats(int(units), int(clipped), int(nonfinite), max_ratio, min_scale)
