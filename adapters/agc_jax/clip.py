"""The numerics: clip a tree of gradients by the norms of its parameters' units.

Letters at the end of a name: V a parameter's view with split axes taken apart, U one number a unit,
K one a parameter, KU units of K parameters that have equally many.

The numbers of the units are float64 wherever that is cheap. JAX has no float64 unless it is
switched on for the whole process, so it is switched on around these few operations; nothing of it
is seen from outside. How squares are added up depends on where the program runs, which is settled
when it is lowered: :mod:`agc_jax.norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agc import AGC, Plan, PlanEntry, Schedule
from agc.errors import ConfigError, NonFiniteError, ParameterError
from agc.units import UnitAxes
from agc_jax.norms import SAFE_EPS, sums_of_squares
from agc_jax.schedules import value_at
from agc_jax.stats import PerParameter, Stats, no_stats
from agc_jax.units import ModelUnits, PyTree, check_options, flatten, plan_tree
from agc_jax.views import Views, views

__all__ = ["Clipper", "adaptive_clip_gradients", "clipper"]


def adaptive_clip_gradients(
    gradients: PyTree,
    params: PyTree,
    rule: AGC,
    *,
    units: ModelUnits | None = None,
    step: int | jax.Array = 0,
) -> tuple[PyTree, Stats]:
    """Clip gradients by hand, for a loop without optax (AGC-1 to AGC-12).

    Parameters
    ----------
    gradients : tree of arrays
        Gradients. None, ``optax.MaskedNode`` and ``float0`` leaves are left alone.
    params : tree of arrays
        Their parameters, with the same names and shapes; it may have more leaves than the
        gradients.
    rule : AGC
        The configuration.
    units : ModelUnits, optional
        What ``agc_jax.units(model)`` returned. Without it the types or names in ``params`` decide.
    step : int or scalar array, default 0
        The optimizer step, for schedules (AGC-10).

    Returns
    -------
    gradients : tree of arrays
        The same tree, each array in the dtype it came in. Units that are not clipped keep their
        bits.
    stats : Stats
        Telemetry, on the device (AGC-11).

    Raises
    ------
    ConfigError
        If ``rule`` is not an AGC, a schedule's value is known and is not a finite number above 0,
        or ``nonfinite="raise"`` is compiled for several processes.
    ParameterError
        If ``params`` is None or lacks a parameter that has a gradient.
    ShapeError
        If a gradient and its parameter differ in shape.
    DTypeError
        If either is neither floating point nor complex.
    MissingGradientError
        If no leaf is a gradient, unless there are no parameters either.
    NonFiniteError
        If ``rule.nonfinite`` is ``"raise"`` and a norm is not finite. Inside ``jax.jit`` the error
        surfaces as JAX's own runtime error, whose message holds this one.
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`.

    Notes
    -----
    Works inside and outside ``jax.jit``, ``vmap``, ``scan`` and ``grad``; the factor that a unit is
    scaled by counts as a constant in derivatives: those *through* a clipping step, as meta-learning
    takes them, are exact only where nothing is clipped. Outside it is compiled on first use, once
    for each rule: make the rule, and callables in it, once as well, since a new ``lambda`` in each
    step is a new program.

    Examples
    --------
    >>> params = {"dense": {"kernel": jnp.array([[10.0, 0.1], [0.0, 0.1], [0.0, 0.1]])}}
    >>> clipped, stats = adaptive_clip_gradients(jax.tree.map(jnp.ones_like, params), params, AGC())
    >>> print(clipped["dense"]["kernel"].round(5))
    [[0.05774 0.001  ]
     [0.05774 0.001  ]
     [0.05774 0.001  ]]
    >>> int(stats.clipped), int(stats.units)
    (2, 2)
    """
    return clipper(rule, units)(gradients, params, step, by_hand=True)


class Clipper:
    """A rule with the units of a model, and what was prepared for the trees that came by.

    Parameters
    ----------
    rule : AGC
        The configuration.
    units : ModelUnits, optional
        What ``agc_jax.units(model)`` returned.
    """

    def __init__(self, rule: AGC, units: ModelUnits | None) -> None:
        self.rule = rule
        self.units = units
        self._plans: dict[Any, Plan] = {}
        self._programs: dict[Any, Any] = {}

    def plan(self, params: PyTree) -> Plan:
        """Return the plan of a tree of parameters, made once for each structure."""
        _, leaves, structure = flatten(params)
        key = (structure, tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves))
        if key not in self._plans:
            # optax initialises state for empty trees; no pattern can match there.
            self._plans[key] = plan_tree(params, self.rule, self.units) if leaves else Plan(())
        return self._plans[key]

    def __call__(
        self,
        gradients: PyTree,
        params: PyTree,
        step: int | jax.Array,
        clipping: jax.Array | None = None,
        *,
        by_hand: bool = False,
    ) -> tuple[PyTree, Stats]:
        """Clip; ``clipping``, if given, stands for every threshold that is not None.

        Without any gradient there is nothing to do, which is an error by hand (AGC-5).
        """
        if params is None:
            raise ParameterError(
                "AGC compares gradients with parameters, and params is None: "
                "call update(gradients, state, params)"
            )
        plan = self.plan(params)
        pairs = views(plan, gradients, params, by_hand=by_hand)
        if not pairs.places:
            return gradients, no_stats(len(plan))
        clipped, stats = self._run(plan, pairs, step, clipping)
        return pairs.tree(clipped), stats

    def _run(
        self, plan: Plan, pairs: Views, step: Any, clipping: Any
    ) -> tuple[list[jax.Array], Stats]:
        """Clip the parameters that have a gradient; compile that unless it is being traced."""
        entries = [plan.entries[place] for place in pairs.places]
        scheduled = clipping is None and any(callable(entry.clipping) for entry in entries)
        if scheduled and not isinstance(step, jax.core.Tracer):
            # What is compiled cannot raise if a schedule returns nonsense.
            _call_schedules(entries, np.int32(step) if isinstance(step, int) else step)
        step = jax.device_put(np.int32(step)) if scheduled and isinstance(step, int) else step
        arguments = (pairs.gradients, pairs.weights, step if scheduled else None, clipping)
        program = partial(_clip_anywhere, self.rule, plan, pairs.places)
        raises = self.rule.nonfinite == "raise"
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            if raises and jax.process_count() > 1:
                raise ConfigError(
                    f"nonfinite='raise' inside compiled code of {jax.process_count()} processes would raise on "
                    "the first alone, and leave the others waiting; clip outside jit, or use "
                    "nonfinite='propagate' with optax.apply_if_finite"
                )
            clipped, stats = program(*arguments)
            if raises:
                jax.debug.callback(partial(_raise_if_any, plan), stats.columns.nonfinite)
            return clipped, stats
        key = (id(plan), pairs.places)  # the plan is kept in self._plans
        if key not in self._programs:
            self._programs[key] = jax.jit(program)
        clipped, stats = self._programs[key](*arguments)
        if raises:
            _raise_if_any(plan, stats.columns.nonfinite)
        return clipped, stats


def clipper(rule: AGC, units: ModelUnits | None) -> Clipper:
    """Return the clipper of a rule, the same one each time, so that nothing is prepared twice."""
    check_options(rule, units)  # before they are hashed
    return _clipper(rule, units)


_clipper = lru_cache(maxsize=32)(Clipper)


def _raise_if_any(plan: Plan, nonfinite: Any) -> None:
    counts = jax.device_get(nonfinite)
    if counts.ndim == 1 and (bad := np.flatnonzero(counts)).size:
        entry = plan.entries[bad[0]]
        others = f", and so of {bad.size - 1} other parameters" if bad.size > 1 else ""
        raise NonFiniteError(
            f"parameter {entry.name!r}: {counts[bad[0]]} of {entry.count} units have a norm "
            f"that is not finite, or a threshold that is not a finite number above 0{others}"
        )


# --- what is compiled -----------------------------------------------------------------------------

_SMALL: Final = 1 << 12
"""Elements up to which a copy costs less than starting a kernel."""


def _clip_anywhere(
    rule: AGC,
    plan: Plan,
    places: tuple[int, ...],
    gradients: list[jax.Array],
    weights: list[jax.Array],
    *others: jax.Array | None,
) -> tuple[list[jax.Array], Stats]:
    """Clip; where shardings are types, leave those inside to the compiler (AGC-8)."""
    clip = partial(_clip, rule, plan, places)
    shardings = [jax.typeof(array).sharding for array in (*gradients, *weights)]
    mesh = next((sharding.mesh for sharding in shardings if sharding.mesh.explicit_axes), None)
    if mesh is None:
        return clip(gradients, weights, *others)
    whole = jax.NamedSharding(mesh, jax.P())
    stats = Stats(
        whole, whole, whole, whole, whole, PerParameter(whole, whole, whole, whole, whole)
    )
    clip = jax.sharding.auto_axes(
        clip,
        axes=mesh.explicit_axes,
        out_sharding=(shardings[: len(gradients)], stats),
    )
    return clip(gradients, weights, *others)  # type: ignore[no-any-return]


def _clip(
    rule: AGC,
    plan: Plan,
    places: tuple[int, ...],
    gradients: list[jax.Array],
    weights: list[jax.Array],
    step: jax.Array | None,
    clipping: jax.Array | None,
) -> tuple[list[jax.Array], Stats]:
    """Clip the parameters at these places of the plan, and say what was done to all of them."""
    entries = [plan.entries[place] for place in places]
    given = _call_schedules(entries, step) if clipping is None else [clipping] * len(entries)
    fixed = [None if isinstance(value, jax.Array) else value for value in given]
    traced = [value if isinstance(value, jax.Array) else None for value in given]
    double, single = (
        partial(_clip_in, wide, rule, entries, fixed) for wide in (np.float64, np.float32)
    )
    clipped, rows = lax.platform_dependent(
        gradients, weights, traced, step, tpu=single, default=double
    )
    return clipped, Stats.of(_columns(plan, places, rows))


def _call_schedules(entries: Sequence[PlanEntry], step: jax.Array | None) -> list[Any]:
    """Replace callables by what they return for the step; a Schedule is left for later."""
    known: dict[int, float | jax.Array] = {}
    values: list[Any] = []
    for entry in entries:
        value = entry.clipping
        if callable(value) and not isinstance(value, Schedule):
            if id(value) not in known:
                known[id(value)] = value_at(f"clipping of {entry.name!r}", value, step)
            value = known[id(value)]
        values.append(value)
    return values


def _columns(plan: Plan, places: tuple[int, ...], rows: Rows) -> PerParameter:
    """Put the numbers of the parameters that were clipped at their places in the plan."""
    units = np.zeros(len(plan), np.int32)
    units[list(places)] = [plan.entries[place].count for place in places]
    if places != tuple(range(len(plan))):
        # Parameters that were not clipped read the idle entry appended below.
        where = np.full(len(plan), len(places))
        where[list(places)] = np.arange(len(places))
        clipped, nonfinite, max_ratio, min_scale = (
            jnp.append(column, np.array(idle, column.dtype))[where]
            for column, idle in zip(rows, (0, 0, 0, 1), strict=True)
        )
        rows = clipped, nonfinite, max_ratio, min_scale
    return PerParameter(jnp.asarray(units), *rows)


Rows: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Clipped and non-finite units, largest ratio and smallest scale of some parameters."""


def _clip_in(
    wide: type[np.floating[Any]],
    rule: AGC,
    entries: Sequence[PlanEntry],
    fixed: Sequence[float | Schedule | None],
    gradients: list[jax.Array],
    weights: list[jax.Array],
    traced: Sequence[jax.Array | None],
    step: jax.Array | None,
) -> tuple[list[jax.Array], Rows]:
    """Clip with the numbers of the units in this precision, or float64 if an array is."""
    real = jnp.zeros((), float).dtype
    outputs: list[jax.Array] = list(gradients)
    counted: dict[Any, tuple[_ClipSpec, list[tuple[list[int], Any, Any, Any]]]] = {}
    with nullcontext() if wide is np.float32 else jax.enable_x64(True):
        for group in _group_small(entries, gradients, weights):
            entry, gradient, weight = entries[group[0]], gradients[group[0]], weights[group[0]]
            double = any(array.dtype in (np.float64, np.complex128) for array in (gradient, weight))
            spec = _ClipSpec(entry.axes, _Limits(double, rule.eps, rule.div_eps), rule.nonfinite)
            clipping_K = _thresholds(
                [(fixed[i], traced[i]) for i in group],
                step,
                np.dtype(np.float64 if double else wide),
            )
            out_K, g_KU, w_KU = _clip_group(
                [gradients[i] for i in group], [weights[i] for i in group], clipping_K, spec=spec
            )
            for index, out in zip(group, out_K, strict=True):
                outputs[index] = out
            members = counted.setdefault((entry.count, double), (spec, []))[1]
            members.append((group, g_KU, w_KU, clipping_K))
        # Parameters with equally many units are counted together: few small operations for a whole
        # model.
        rows = []
        for spec, members in counted.values():
            _, *columns = zip(*members, strict=True)
            rows.append(_count_units(*map(jnp.concatenate, columns), limits=spec.limits))
        clipped, nonfinite, max_ratio, min_scale = (
            jnp.concatenate(column) for column in zip(*rows, strict=True)
        )
        order = np.argsort(
            [i for _, members in counted.values() for group, *_ in members for i in group]
        )
        if (order != np.arange(len(order))).any():
            clipped, nonfinite, max_ratio, min_scale = (
                column[order] for column in (clipped, nonfinite, max_ratio, min_scale)
            )
        return outputs, (
            clipped,
            nonfinite,
            lax.convert_element_type(max_ratio, real),
            lax.convert_element_type(min_scale, real),
        )


def _group_small(
    entries: Sequence[PlanEntry], gradients: Sequence[jax.Array], weights: Sequence[jax.Array]
) -> list[list[int]]:
    """Group small parameters, such as biases, that can be clipped as one; a large one is alone."""
    groups: dict[Any, list[int]] = {}
    for index, (entry, gradient, weight) in enumerate(
        zip(entries, gradients, weights, strict=True)
    ):
        key: Any = index
        if gradient.size <= _SMALL:
            key = (entry.axes, gradient.dtype, weight.dtype)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _count_units(g: jax.Array, w: jax.Array, clipping: jax.Array, *, limits: _Limits) -> Rows:
    """Numbers of K parameters with U units each, from squared norms.

    Four reductions, each of which is an all-reduce of K numbers where units are sharded. Of one
    with four results XLA makes an exchange that grows with the number of devices.
    """
    units = _decide(g, w, clipping, limits=limits)
    clipped, bad = (
        lax.reduce_sum(lax.convert_element_type(mask, np.int32), (1,))
        for mask in (units.clipped, units.bad)
    )
    max_ratio, max_clipped = (
        lax.reduce(ratio, g.dtype.type(0), lax.max, (1,))
        for ratio in (
            _ratio(units.norm, units.floor, limits),
            lax.select(units.clipped, units.ratio, lax.full_like(g, 0)),
        )
    )
    one = lax.full_like(max_ratio, 1)
    scale = lax.div(jnp.asarray(clipping, g.dtype), max_clipped)
    return clipped, bad, max_ratio, lax.select(clipped > 0, lax.min(scale, one), one)


def _thresholds(
    given: Sequence[tuple[float | Schedule | None, jax.Array | None]],
    step: jax.Array | None,
    wide: np.dtype[Any],
) -> Any:
    """Thresholds of K parameters, ``(K,)``; what is known is an array of NumPy's."""
    values = []
    for fixed, traced in given:
        if traced is not None:
            values.append(lax.convert_element_type(traced, wide))
        elif isinstance(fixed, Schedule):
            values.append(value_at("clipping", fixed, step, wide))
        else:
            values.append(np.array(fixed, wide))
    known = all(isinstance(value, np.ndarray) for value in values)
    return np.stack(values) if known else jnp.stack(values)


class _Decision(NamedTuple):
    """Squared norms of gradients, squared floors of weights, and what follows; of any shape."""

    norm: jax.Array
    floor: jax.Array
    bad: jax.Array
    bad_threshold: jax.Array
    """Units whose threshold is not a finite number above 0; they are bad as well."""
    clipped: jax.Array
    clipping: jax.Array
    ratio: jax.Array
    """Norm over floor, neither squared; the factor of a clipped unit is the threshold over it."""


@dataclass(frozen=True)
class _Limits:
    """What is known of norms and limits before they are compiled."""

    double: bool
    """Whether gradients or weights are float64."""
    eps: float
    div_eps: float


@partial(jax.jit, static_argnames="limits")
def _decide(g: jax.Array, w: jax.Array, clipping: jax.Array, *, limits: _Limits) -> _Decision:
    """Compare squared norms with squared limits, so that only the factors need a root.

    A sum that float32 cannot hold counts as infinite on every platform.
    """
    wide = g.dtype
    largest = lax.full_like(g, jnp.finfo(np.float64 if limits.double else np.float32).max)
    least = max(limits.eps**2, float(jnp.finfo(wide).tiny)) if limits.eps else 0
    zero, one = lax.full_like(g, 0), lax.full_like(g, 1)
    known = (clipping > 0) & (clipping < np.inf)  # a schedule may return anything (AGC-10)
    clipping_KU, sensible_KU = (
        lax.broadcast_in_dim(column, g.shape, (0,)) for column in (clipping, known)
    )
    good = lax.le(g, largest) & lax.le(w, largest) & sensible_KU  # AGC-4
    norm = lax.select(good, g, zero)
    floor = lax.select(lax.eq(norm, zero), one, lax.max(w, lax.full_like(w, least)))
    clipped = lax.gt(norm, lax.mul(lax.square(clipping_KU), floor))  # AGC-1, AGC-2: strictly
    divided = lax.max(norm, lax.full_like(norm, limits.div_eps**2))
    ratio = _ratio(divided, floor, limits)
    bad, bad_threshold = lax.bitwise_not(good), lax.bitwise_not(sensible_KU)
    return _Decision(norm, floor, bad, bad_threshold, clipped, clipping_KU, ratio)


def _ratio(norm: jax.Array, floor: jax.Array, limits: _Limits) -> jax.Array:
    """Return norm over floor of their squares, whose own quotient may be too large."""
    quotient = lax.div(norm, floor)
    ratio = lax.sqrt(quotient)
    if norm.dtype == np.float64 and not limits.double:  # which holds quotients of float32
        return ratio
    # Two roots round once more, so they are for what one cannot do.
    infinite = lax.eq(quotient, lax.full_like(quotient, np.inf))
    return lax.select(infinite, lax.div(lax.sqrt(norm), lax.sqrt(floor)), ratio)


@dataclass(frozen=True)
class _ClipSpec:
    """What is known of the arithmetic of one parameter before it is compiled."""

    axes: UnitAxes
    limits: _Limits
    nonfinite: str


@partial(jax.jit, static_argnames="spec")
def _clip_group(
    gradients: list[jax.Array], weights: list[jax.Array], clipping: jax.Array, *, spec: _ClipSpec
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Clip K gradients of one kind; also the squared norms of all units, ``(K, U)``, of both."""
    clipping = lax.stop_gradient(clipping)
    g_KU, w_KU = (
        sums_of_squares(
            [lax.stop_gradient(array) for array in arrays],
            spec.axes,
            clipping.dtype,
            eps=spec.limits.eps,
        )
        for arrays in (gradients, weights)
    )
    factors = _factors(g_KU, w_KU, clipping, limits=spec.limits, nonfinite=spec.nonfinite)
    clipped = [
        _scale(gradient, factor_U, spec)
        for gradient, factor_U in zip(gradients, factors, strict=True)
    ]
    return clipped, g_KU, w_KU


@partial(jax.jit, static_argnames=("limits", "nonfinite"))
def _factors(
    g: jax.Array, w: jax.Array, clipping: jax.Array, *, limits: _Limits, nonfinite: str
) -> Sequence[jax.Array]:
    """Return the factors of the units of K gradients, a row for each; 1 keeps a unit."""
    units = _decide(g, w, clipping, limits=limits)
    one, poison = lax.full_like(g, 1), lax.full_like(g, np.nan)
    if nonfinite == "zero":
        poison = lax.select(units.bad_threshold, poison, lax.full_like(g, np.inf))
    ratio_KU = lax.select(units.bad, poison, lax.select(units.clipped, units.ratio, one))
    clipping_KU = lax.select(units.clipped, units.clipping, one)
    if g.dtype == np.float64 and limits.eps >= SAFE_EPS and not limits.double:
        # float32 can hold every factor
        ratio_KU = lax.convert_element_type(lax.div(ratio_KU, clipping_KU), np.float32)
        clipping_KU = lax.full_like(ratio_KU, 1)
    # A division comes last: XLA fuses anything cheaper into all that follows, at worst into every
    # element. It divides by no threshold: by a constant XLA multiplies with a rounded reciprocal.
    factor_KU = lax.div(clipping_KU, ratio_KU)
    if len(factor_KU) == 1:
        return [lax.squeeze(factor_KU, (0,))]
    return lax.platform_dependent(factor_KU, cpu=_rows_by_sums, default=list)  # type: ignore[no-any-return]


def _rows_by_sums(array: jax.Array) -> list[jax.Array]:
    """Take an array apart along its first axis, for a CPU.

    There each slice is a program of its own, and so is what uses it. A reduction whose results are
    the rows is one program, and what uses them is alike.
    """
    index = lax.broadcasted_iota(np.int32, array.shape, 0)
    zero = lax.full_like(array, 0)
    alone = [lax.select(lax.eq(index, np.int32(k)), array, zero) for k in range(len(array))]
    nothing = [array.dtype.type(0)] * len(array)
    return list(lax.reduce(alone, nothing, lambda a, b: list(map(lax.add, a, b)), (0,)))


def _scale(gradient: jax.Array, factor: jax.Array, spec: _ClipSpec) -> jax.Array:
    """Multiply every unit by its factor; units with the factor 1 keep their bits."""
    g_V = lax.reshape(gradient, spec.axes.view)
    kept = [size for axis, size in enumerate(spec.axes.view) if axis in spec.axes.keep]
    factor_V = lax.broadcast_in_dim(lax.reshape(factor, kept), spec.axes.view, spec.axes.keep)
    out_V = _times(g_V, factor_V)
    if spec.nonfinite == "zero":
        out_V = lax.select(
            lax.eq(factor_V, lax.full_like(factor_V, 0)), lax.full_like(out_V, 0), out_V
        )
    out_V = lax.select(lax.eq(factor_V, lax.full_like(factor_V, 1)), g_V, out_V)
    return lax.reshape(out_V, gradient.shape)


def _times(array: jax.Array, factor: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        return lax.complex(_times(lax.real(array), factor), _times(lax.imag(array), factor))
    product = lax.mul(lax.convert_element_type(array, factor.dtype), factor)
    return lax.convert_element_type(product, array.dtype)
