"""The numerics: one norm per unit, one comparison for all units, scaling of what is clipped.

The norms of all units stand in one flat float64 vector for the weights and one for the gradients,
so limits, decisions and scales are a handful of small operations whatever the number of parameters.
Small tensors of one shape are stacked, and handled as one; large ones are never copied. Then

* on the CPU, in graphs and eagerly, gradients without a clipped unit are passed on as they are;
* under XLA and on accelerators every gradient is selected and scaled in one pass, without a branch.

Letters at the end of a name: U units, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import tensorflow as tf

from agc import AGC, Schedule
from agc.checks import NO_GRADIENT
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, ParameterError
from agc.plan import PlanEntry
from agc_tensorflow.devices import in_xla
from agc_tensorflow.norms import WIDE, branches, is_large, sum_of_squares
from agc_tensorflow.schedules import Step, value_at
from agc_tensorflow.stats import IDLE, Stats, stats_table
from agc_tensorflow.units import Model, Variable, resolve, variable_key
from agc_tensorflow.views import Gradient, StackedView, View, view_of

__all__ = ["adaptive_clip_gradients", "clip"]


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
        What ``tape.gradient(loss, variables)`` returns: floating point or complex, in the
        variable's dtype or another. None, for a variable that the loss does not depend on, stays
        None.
    variables : sequence of keras.Variable or tf.Variable
        The variables, in the order of the gradients.
    rule : AGC
        The configuration.
    model : keras.Layer, tf.Module, or mapping of name to variable, optional
        What the variables belong to: its layer types settle the units. The variables may be a part
        of its parameters. Without it, vectors are one unit, matrices follow the layout convention
        with a warning, and the rest has to be declared in the rule.
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
        If a gradient and its variable differ in shape, are not floating point or complex, if a
        row-sparse gradient does not fit its units, or if a norm is not finite and
        ``nonfinite="raise"``. The message names the parameter.
    SelectorError, AmbiguousUnitsError, ParameterError
        As :func:`agc_tensorflow.plan`; or a variable is not the model's.
    ConfigError
        If ``nonfinite="raise"`` under XLA, which cannot raise.
    tf.errors.InvalidArgumentError
        In place of NonFiniteError inside a ``tf.function``, which raises only when it runs.

    Notes
    -----
    Call it after unscaling, accumulation and reduction across replicas, before the optimizer's step
    (AGC-7); :class:`agc_tensorflow.AdaptiveGradClip` does that by itself. Inside ``strategy.run`` a
    Keras optimizer reduces in its own ``apply``, so there is no place for this before it.

    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \epsilon)}{\|G_i\|} G_i
        \quad\text{if}\quad \|G_i\| > \lambda \max(\|W_i\|, \epsilon)

    On the CPU TensorFlow flushes subnormal results to zero, also in what is scaled here; what is
    not clipped keeps its bits.

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


def clip(
    gradients: Sequence[Gradient],
    variables: Sequence[Variable],
    entries: Sequence[PlanEntry],
    rule: AGC,
    *,
    step: Step = 0,
    densify: bool = False,
) -> tuple[list[Gradient], Stats]:
    """Clip gradients paired with their entries of a plan; see :func:`adaptive_clip_gradients`.

    With ``densify``, row-sparse gradients whose rows are not units are made dense instead of
    refused.
    """
    names = tuple(entry.name for entry in entries)
    if all(gradient is None for gradient in gradients):
        raise MissingGradientError(NO_GRADIENT)
    out: list[Gradient] = list(gradients)
    views: list[View] = []
    for place, (gradient, variable, entry) in enumerate(
        zip(gradients, variables, entries, strict=True)
    ):
        if gradient is not None:
            view = view_of(place, entry, gradient, variable, densify=densify)
            views += [] if view is None else [view]
    if not views:
        return out, Stats(names, tf.constant([IDLE] * len(names), tf.float64))

    views = _stacked(views)
    sizes = [view.count * len(view.places) for view in views]
    ids_U = _repeat(range(len(views)), sizes)
    wides = [_is_wide(rule, view.entry) for view in views]
    squares = [_squares(view, wide=wide) for view, wide in zip(views, wides, strict=True)]
    g_U, w_U = (tf.sqrt(tf.concat(column, 0)) for column in zip(*squares, strict=True))
    finite_U = tf.math.is_finite(w_U) & tf.math.is_finite(g_U)
    floor_U = tf.maximum(w_U, _number(rule.eps))
    threshold_U = _thresholds(views, ids_U, step)
    limit_U = threshold_U * floor_U  # AGC-1
    # A schedule that returns nonsense inside a graph, which cannot raise, poisons its units.
    bad_threshold_U = tf.math.is_nan(threshold_U)
    finite_U &= ~bad_threshold_U
    clipped_U = finite_U & (g_U > limit_U)  # AGC-2: strictly
    scale_U = tf.where(clipped_U, limit_U / tf.maximum(g_U, _number(rule.div_eps)), _number(1))
    view_of_place = {place: view for view in views for place in view.places}
    places_U = _repeat(list(view_of_place), [view.count for view in view_of_place.values()])
    units_P = [view_of_place[p].units if p in view_of_place else 0 for p in range(len(names))]
    table = stats_table(units_P, places_U, floor_U, g_U, scale_U, clipped_U, finite_U)
    poison_U = _number(math.nan)
    if rule.nonfinite == "zero":
        poison_U = tf.where(bad_threshold_U, poison_U, _number(0))
    scale_U = tf.where(finite_U, scale_U, poison_U)  # AGC-4
    guard = _raise_nonfinite(table, names) if rule.nonfinite == "raise" else None

    touched_U = tf.cast(scale_U != 1, tf.int32)
    touched = tf.unstack(tf.math.unsorted_segment_sum(touched_U, ids_U, len(views)) > 0)
    scales = tf.split(scale_U, sizes) if len(views) > 1 else [scale_U]
    zero = rule.nonfinite == "zero"
    run = _scale if tf.executing_eagerly() else _scale_traced
    for view, scale, is_touched, wide in zip(views, scales, touched, wides, strict=True):
        shapes, branch = (view.fold.view, view.fold.unit_shape), branches(view.fold)
        values = run(view.gradient, scale, is_touched, *shapes, wide, zero, branch)
        for place, gradient in zip(view.places, view.with_values(values), strict=True):
            out[place] = gradient
    if guard is not None:
        with tf.control_dependencies([guard]):
            out = [None if g is None else tf.identity(g) for g in out]
    return out, Stats(names, table)


def _squares(view: View, *, wide: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Squared norms of the units of a gradient and of its weight."""
    gradient = sum_of_squares(view.gradient, view.fold, wide=wide)
    weight = sum_of_squares(view.weight, view.weight_fold, wide=wide)
    return gradient, view.only_units(weight)


def _stacked(views: Sequence[View]) -> list[View]:
    """Take small dense tensors of one shape, dtype and threshold as one."""
    groups: dict[object, list[View]] = {}
    for view in views:
        alike = (
            view.entry.shape,
            view.fold,
            view.gradient.dtype,
            view.weight.dtype,
            _threshold_key(view),
        )
        small = type(view) is View and not is_large(view.fold)
        groups.setdefault(alike if small else view, []).append(view)
    return [group[0] if len(group) == 1 else StackedView(group) for group in groups.values()]


def _scale(
    gradient: tf.Tensor,
    scale: tf.Tensor,
    touched: tf.Tensor,
    view: tuple[int, ...],
    unit_shape: tuple[int, ...],
    wide: bool,
    zero: bool,
    branch: bool,
) -> tf.Tensor:
    """Multiply units by their scales; where that is 1 they keep their bits (AGC-2).

    Parameters
    ----------
    gradient : tensor, floating point or complex
        Any shape that can be reshaped to the view.
    scale : tensor of float64, shape (units,)
        Factors.
    touched : scalar tensor of bool
        Whether one of them is not 1.
    view, unit_shape : tuple of int
        Of the fold.
    wide : bool
        Whether to multiply in float64.
    zero : bool
        Whether a scale of 0 makes zeros of NaN and infinities too.
    branch : bool
        Whether to pass on the gradient as it is if it is not touched.

    Returns
    -------
    tensor
        The gradient's shape and dtype.
    """
    compiles = branch and not tf.executing_eagerly() and tf.test.is_built_with_xla()
    select = _select_compiled if compiles else _select
    run = partial(select, gradient, scale, view, unit_shape, wide, zero)
    return tf.cond(touched, run, lambda: gradient) if branch else run()


def _select(
    gradient: tf.Tensor,
    scale: tf.Tensor,
    view: tuple[int, ...],
    unit_shape: tuple[int, ...],
    wide: bool,
    zero: bool,
) -> tf.Tensor:
    wide = wide or gradient.dtype in WIDE
    scale = tf.reshape(tf.cast(scale, tf.float64 if wide else tf.float32), unit_shape)
    # A select, because multiplying by 1 would flush subnormal numbers.
    keep = scale == 1
    if gradient.dtype.is_complex:
        scale = tf.cast(scale, tf.complex128 if wide else tf.complex64)
    times = tf.math.multiply_no_nan if zero else tf.multiply
    values = tf.reshape(gradient, view)
    scaled = tf.cast(times(tf.cast(values, scale.dtype), scale), values.dtype)
    return tf.reshape(tf.where(keep, values, scaled), tf.shape(gradient))


# Traced and compiled once for every shape, however many tensors have it.
_scale_traced: Final[Any] = tf.function(_scale, autograph=False)
_select_compiled: Final[Any] = tf.function(_select, autograph=False, jit_compile=True)


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


def _repeat(numbers: Sequence[int], counts: Sequence[Any]) -> tf.Tensor:
    """Repeat each number as often as its count says, an int or a scalar tensor."""
    if all(isinstance(count, int) for count in counts):
        return tf.constant(np.repeat(np.asarray(numbers, np.int32), counts))
    return tf.concat([tf.fill([n], number) for number, n in zip(numbers, counts, strict=True)], 0)


def _thresholds(views: Sequence[View], ids: tf.Tensor, step: Step) -> tf.Tensor:
    """Clipping threshold, one for all units or one each (AGC-10)."""
    known: dict[Any, tf.Tensor] = {}
    values = []
    for view in views:
        clipping = view.entry.clipping
        assert clipping is not None  # only what is clipped has a view
        key = _threshold_key(view)
        if key not in known:
            name = f"clipping of {view.entry.name!r}"
            known[key] = value_at(name, clipping, step, tf.float64)
        values.append(known[key])
    if len(known) == 1:
        return values[0]
    return tf.gather(tf.stack(values), ids)


def _threshold_key(view: View) -> object:
    """Return what is equal for equal thresholds; two schedules are not compared."""
    clipping = view.entry.clipping
    return id(clipping) if callable(clipping) else clipping


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
