"""The optax transformation: one line in front of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from agc import AGC
from agc.config import Clipping
from agc.errors import ParameterError
from agc_jax.clip import clipper
from agc_jax.stats import Stats, no_stats
from agc_jax.units import ModelUnits, PyTree, check_options

__all__ = ["AdaptiveGradClipState", "adaptive_grad_clip", "stats"]


def adaptive_grad_clip(
    rule: AGC,
    *,
    units: ModelUnits | None = None,
    clipping: Clipping | jax.Array = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip gradients unit by unit, as a transformation in front of an optimizer (AGC-1 to AGC-12).

    Parameters
    ----------
    rule : AGC
        The configuration.
    units : ModelUnits, optional
        What ``agc_jax.units(model)`` returned. Without it the types or names in the parameters
        decide.
    clipping : float, scalar array or callable, optional
        Takes the place of every threshold of the rule that is not None, so that it can be a
        hyper-parameter of ``optax.inject_hyperparams``. With parameters in low precision give that
        ``hyperparam_dtype=jnp.float32``: it has the thresholds in the parameters' dtype otherwise,
        and 0.01 in bfloat16 is 0.0100098.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``update`` needs the parameters. Its state is an :class:`AdaptiveGradClipState`.

    Raises
    ------
    ConfigError
        If ``rule`` is not an AGC or a threshold is not a finite number above 0; see the notes.
    ParameterError
        By ``update``, if it is called without parameters.
    SelectorError, AmbiguousUnitsError, UnitsError
        By ``init``, as :func:`agc.plan.make_plan`.
    ShapeError, DTypeError, NonFiniteError
        By ``update``, as :func:`agc_jax.adaptive_clip_gradients`.

    Notes
    -----
    *Order* (AGC-7). Put it first in ``optax.chain``: after gradients are averaged and unscaled,
    before ``optax.add_decayed_weights`` and the optimizer. ``optax.MultiSteps`` and
    ``optax.apply_if_finite`` go around the chain.

    *Sharding* (AGC-8). Under ``jax.jit`` the result does not depend on how arrays are sharded.
    Inside ``shard_map`` and ``pmap`` code sees one shard: average the gradients first
    (``lax.pmean``), and keep the parameters whole there; a parameter that is split is an error if
    ``units`` is given. Without ``check_vma=False``, ``jax.grad`` inside ``shard_map`` returns a sum
    over the devices, unless the parameters are ``jax.lax.pcast(params, axis, to="varying")``.

    *Schedules* (AGC-10). ``agc.Schedule`` is evaluated on the device; any other callable is given
    the step, traced under ``jit``. A threshold that is not a finite number above 0 is an error
    where its value is known, as it is outside ``jit``. Inside, which cannot raise, every unit it
    belongs to becomes NaN under every policy and counts as non-finite; ``nonfinite="raise"``
    reports it, too.

    *Gradients that are missing* (AGC-5). None and ``optax.MaskedNode`` are left alone; a step
    without any gradient clips nothing, and its telemetry is empty.

    *Masks*. What ``optax.masked`` and ``optax.partition`` leave out is left alone. Give ``units``
    there, so that the name patterns of the rule are verified with the whole model.

    Examples
    --------
    >>> from flax import nnx
    >>> import agc_jax
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(
    ...     agc_jax.adaptive_grad_clip(AGC(), units=agc_jax.units(model)),
    ...     optax.sgd(0.1, 0.9, nesterov=True),
    ... )
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    A threshold that changes from step to step:

    >>> decay = optax.linear_schedule(0.04, 0.01, 1000)
    >>> tx = optax.inject_hyperparams(agc_jax.adaptive_grad_clip)(AGC(), clipping=decay)
    >>> params = {"kernel": jax.numpy.ones((3, 2))}
    >>> print(tx.init(params).hyperparams["clipping"])
    0.04
    """
    check_options(rule, units)
    dynamic = None
    if isinstance(clipping, jax.Array | np.ndarray):
        dynamic = jax.numpy.asarray(clipping)
        if dynamic.shape != ():
            raise ParameterError(f"clipping must be a scalar, got the shape {dynamic.shape}")
        if not isinstance(clipping, jax.core.Tracer):
            replace(rule, clipping=float(clipping))  # raises if it is not a finite number above 0
    elif clipping is not None:
        rule = _with_clipping(rule, clipping)
    clip = clipper(rule, units)

    def init(params: PyTree) -> AdaptiveGradClipState:
        return AdaptiveGradClipState(
            jax.device_put(np.int32(0), may_alias=False), no_stats(len(clip.plan(params)))
        )

    def update(
        updates: PyTree, state: AdaptiveGradClipState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AdaptiveGradClipState]:
        del extra
        clipped, stats = clip(updates, params, state.steps, dynamic)
        return clipped, AdaptiveGradClipState(_increment(state.steps), stats)

    return optax.GradientTransformationExtraArgs(init, update)


class AdaptiveGradClipState(NamedTuple):
    """State of :func:`adaptive_grad_clip`: arrays only, so it is saved and sharded like any other.

    Attributes
    ----------
    steps : array of int32
        Steps taken, for schedules (AGC-10). No state of optax has a field of this name, so that
        ``optax.tree_utils.tree_get(state, "count")`` finds optax's own.
    stats : Stats
        Telemetry of the last step (AGC-11).
    """

    steps: jax.Array
    stats: Stats


jax.export.register_namedtuple_serialization(
    AdaptiveGradClipState, serialized_name="agc_jax.AdaptiveGradClipState"
)

_increment = jax.jit(optax.safe_increment)


def stats(opt_state: PyTree) -> Stats:
    """Return the telemetry inside an optimizer state, however deep it lies (AGC-11).

    Parameters
    ----------
    opt_state : tree
        State of a transformation that has one ``adaptive_grad_clip`` in it.

    Returns
    -------
    Stats
        Still on the device: nothing waits until its numbers are read.

    Raises
    ------
    ParameterError
        If there is none, or more than one.

    Examples
    --------
    >>> import agc_jax
    >>> params = {"kernel": jax.numpy.ones((3, 2))}
    >>> tx = optax.chain(agc_jax.adaptive_grad_clip(AGC()), optax.sgd(0.1))
    >>> _, opt_state = tx.update(params, tx.init(params), params)
    >>> stats = agc_jax.stats(opt_state)
    >>> print(stats.clipped, stats.units, stats.max_ratio)
    2 2 1.0
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AdaptiveGradClipState))
    states = [node for node in nodes if isinstance(node, AdaptiveGradClipState)]
    if not states:
        raise ParameterError(
            "this optimizer state holds no state of adaptive_grad_clip; give that of a chain which has one. A "
            "checkpoint that is read without a target comes back as dictionaries: read it with tx.init(params)"
        )
    if len(states) > 1:
        raise ParameterError(
            f"this optimizer state holds {len(states)} states of adaptive_grad_clip; give the part that "
            "belongs to one of them"
        )
    return states[0].stats


def _with_clipping(rule: AGC, clipping: Clipping) -> AGC:
    if isinstance(rule.clipping, Mapping):
        return replace(
            rule, clipping={name: old and clipping for name, old in rule.clipping.items()}
        )
    return replace(rule, clipping=rule.clipping and clipping)
