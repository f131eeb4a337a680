"""Sharpness-aware minimization as an ordinary ``value_and_grad``.

``sam_value_and_grad`` is called like :func:`jax.value_and_grad` and as pure: it computes the
gradient at the weights, moves to ``w + e``, and returns the gradient there. The weights given are
never changed, so there is nothing to restore; the optimizer, and AGC in front of it, see that one
gradient and the original weights.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agc.checks import check_batch_given, check_distinct, check_microbatches, check_rule
from agc.config import SAM
from agc.errors import ConfigError, DTypeError, NonFiniteError, ParameterError
from agc.selectors import perturbed_names
from agc_jax.layers import Layers
from agc_jax.schedules import value_at
from agc_jax.units import flatten, is_absent

__all__ = ["SamStats", "sam_value_and_grad"]

Tree = Any


class SamStats(NamedTuple):
    """What one step did, as device scalars (SAM-12).

    Attributes
    ----------
    norm : Array
        Norm of the ascent gradient (the largest, if there were several micro-batches); 0 in a plain
        step. In float32, or float64 if a weight is.
    loss, perturbed_loss : Array
        Mean loss at ``w`` (of the examples of the ascent pass) and at ``w + e``.
    """

    norm: jax.Array
    loss: jax.Array
    perturbed_loss: jax.Array

    @property
    def sharpness(self) -> jax.Array:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss


jax.export.register_namedtuple_serialization(SamStats, serialized_name="agc_jax.SamStats")


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    rule: SAM,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] | None = None,
    axis_name: str | Sequence[str] | None = None,
    return_stats: bool = False,
) -> Callable[..., Any]:
    """Return a function that computes the clean loss and the sharpness-aware gradient.

    Parameters
    ----------
    loss_fn : callable
        As for :func:`jax.value_and_grad`: returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
    rule : SAM
        The configuration.
    argnums : int or sequence of int, default 0
        Which positional arguments are the weights.
    has_aux : bool, default False
        Whether ``loss_fn`` returns auxiliary data, such as updated normalisation statistics. What
        is returned comes from the clean pass, or with ``fraction`` below 1 from the pass that saw
        the whole batch (SAM-12); with ``microbatches``, stacked along a new first axis.
    batch_argnums : int or sequence of int, optional
        Which positional arguments are the batch (pytrees of arrays that share their first axis).
        Needed for ``fraction`` below 1 and ``microbatches`` above 1; the loss must be a mean. What
        is not split by example, a scalar or a random key, belongs in another argument, which each
        part of the batch is given whole.
    axis_name : str or sequence of str, optional
        Mesh axes to average over inside ``shard_map`` (or ``pmap``). The descent gradient always is
        averaged, the ascent gradient if ``rule.scope`` is ``"global"`` (SAM-9). Outside, leave it
        out: under GSPMD the gradient is that of the whole batch, which is the global scope.
    return_stats : bool, default False
        Whether to return :class:`SamStats` as a third item.

    Returns
    -------
    callable
        Takes ``loss_fn``'s arguments, and ``step=`` (an integer, traced or not) if ``rho`` is a
        schedule or ``every`` is above 1. A loss with a parameter ``step``, or with ``**kwargs``, is
        given it as well. Returns ``(value, gradients)``, ``((value, aux), gradients)`` with
        ``has_aux``, and the stats behind them with ``return_stats``.

    Raises
    ------
    ConfigError
        If ``rule`` is not a SAM, ``fraction`` or ``microbatches`` is given without
        ``batch_argnums``, a step is missing, an argument is not there, or a schedule of rho returns
        what is known not to be a finite number above 0. By the function also if the arrays of the
        batch do not share their first axis.
    DTypeError
        If a weight is neither floating point nor complex, or no array.
    ParameterError
        If two weights have the same name, or an NNX module is given that holds more than weights.
    SelectorError
        If a name pattern matches nothing, or nothing is left to perturb.

    Notes
    -----
    Every argument, random keys among them, is the same in both passes (SAM-12). If the norm of the
    ascent gradient is not finite, ``nonfinite="skip_step"`` returns gradients of NaN, for
    :func:`optax.apply_if_finite` to skip the step; ``"raise"`` works outside ``jit`` only (SAM-5).
    A schedule of rho is called with the step as it is given. Traced, it cannot raise: where it
    returns nonsense the gradients are NaN under every policy (SAM-11).

    A model is split first, so that the first argument is its weights alone:
    ``nnx.split(model, nnx.Param, ...)`` for Flax NNX,
    ``eqx.partition(model, eqx.is_inexact_array)`` for Equinox. ``exclude`` and ``only`` take the
    names that ``agc_jax.plan`` prints.

    The gradients of complex weights are those of :func:`jax.grad`, conjugates of the steepest
    ascent; the perturbation goes uphill.

    Examples
    --------
    >>> def loss_fn(w, x):
    ...     return jnp.mean((x @ w) ** 2)
    >>> value, gradients = sam_value_and_grad(loss_fn, SAM(rho=0.05))(jnp.ones(3), jnp.ones((4, 3)))
    """
    check_rule(rule, SAM)
    weights_at = _positions("argnums", argnums)
    batch_at = () if batch_argnums is None else _positions("batch_argnums", batch_argnums)
    check_batch_given(
        rule.fraction,
        rule.microbatches,
        given=bool(batch_at),
        cure="say which arguments are the batch, for example batch_argnums=(1, 2)",
    )
    _check_apart(weights_at, batch_at)
    gradient_fn = (
        jax.value_and_grad(loss_fn, argnums=weights_at, has_aux=True)
        if has_aux
        else (_with_aux(jax.value_and_grad(loss_fn, argnums=weights_at)))
    )

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, step: Any = None, **kwargs: Any) -> Any:
        if step is not None and _takes_step(loss_fn, len(args)):
            kwargs["step"] = step
        if step is None and (callable(rule.rho) or rule.every != 1):
            raise ConfigError(
                "rho is a schedule, or every is above 1: call with step=, the optimizer's step count"
            )
        _check_call(weights_at, batch_at, len(args))
        axes = axis_name
        weights = _arrays(tuple(args[i] for i in weights_at))
        if axes is not None:
            weights = _varying(weights, axes)

        def compute(weights: tuple[Tree, ...], batch: tuple[Tree, ...]) -> Any:
            merged = list(args)
            for i, value in zip((*weights_at, *batch_at), (*weights, *batch), strict=True):
                merged[i] = value
            return gradient_fn(*merged, **kwargs)

        batch = tuple(args[i] for i in batch_at)
        if rule.fraction != 1 or rule.microbatches != 1:
            _check_batch(batch, batch_at)

        def sharpness_aware() -> Any:
            return sharpen(compute, weights, batch, rule, _radius(rule, step), axes)

        def plain() -> Any:
            (value, aux), gradients = compute(weights, batch)
            if rule.microbatches > 1:  # the same structure as the other branch
                aux = jax.tree.map(lambda leaf: jnp.stack([leaf] * rule.microbatches), aux)
            norm = jnp.zeros_like(value, _norm_dtype(weights))
            return value, aux, gradients, SamStats(norm, value, value)

        perturbs = rule.every == 1 or step % rule.every == 0
        if isinstance(perturbs, jax.core.Tracer):
            value, aux, gradients, stats = jax.lax.cond(perturbs, sharpness_aware, plain)
        else:
            value, aux, gradients, stats = sharpness_aware() if perturbs else plain()
        if axes is not None:
            value, gradients, stats = jax.lax.pmean((value, gradients, stats), axes)
        gradients = gradients[0] if isinstance(argnums, int) else gradients
        result = ((value, aux) if has_aux else value, gradients)
        return (*result, stats) if return_stats else result

    return value_and_grad


# --- the stages of one step -----------------------------------------------------------------------


def sharpen(
    compute: Callable[..., Any],
    weights: tuple[Tree, ...],
    batch: tuple[Tree, ...],
    rule: SAM,
    rho: float | jax.Array,
    axes: Any = None,
) -> Any:
    """Clean loss, auxiliary data, descent gradients and stats of one batch.

    ``compute`` takes weights and batch, and returns loss and auxiliary data, and gradients.
    """

    def run(part: tuple[Tree, ...]) -> Any:
        first = part
        if rule.fraction < 1:
            first = jax.tree.map(
                lambda leaf: _examples(leaf, 0, math.ceil(rule.fraction * len(leaf))), part
            )
        return two_passes(compute, weights, first, part, rule, rho, axes)

    if rule.microbatches == 1:
        return run(batch)
    examples = len(jax.tree.leaves(batch)[0])
    check_microbatches(rule.microbatches, examples)
    if examples % rule.microbatches == 0:
        size = examples // rule.microbatches
        stacked = jax.tree.map(lambda leaf: _stacked(leaf, size), batch)
        lengths = [size] * rule.microbatches
        results = jax.lax.map(run, stacked)
    else:
        bounds = [_boundary(examples, i, rule.microbatches) for i in range(rule.microbatches + 1)]
        lengths = [high - low for low, high in itertools.pairwise(bounds)]
        separate = [
            run(jax.tree.map(lambda leaf, a=low, b=high: _examples(leaf, a, b), batch))
            for low, high in itertools.pairwise(bounds)
        ]
        results = jax.tree.map(lambda *leaves: jnp.stack(leaves), *separate)
    values, aux, gradients, stats = results
    ascents = [math.ceil(rule.fraction * length) for length in lengths]
    gradients = jax.tree.map(lambda leaf: _average(leaf, lengths), gradients)
    value = _average(values, ascents)
    stats = SamStats(stats.norm.max(), value, _average(stats.perturbed_loss, lengths))
    return value, aux, gradients, stats


def _boundary(examples: int, index: int, count: int) -> int:
    """Return where micro-batch ``index`` of several begins; the longer ones come first (SAM-8)."""
    size, longer = divmod(examples, count)
    return index * size + min(index, longer)


def _average(stacked: jax.Array, counts: Sequence[int]) -> jax.Array:
    wide = _wide(stacked.dtype)
    shares = jnp.asarray([count / sum(counts) for count in counts], wide)
    return jnp.tensordot(shares, stacked.astype(wide), axes=1).astype(stacked.dtype)


def two_passes(
    compute: Callable[..., Any],
    weights: tuple[Tree, ...],
    first: tuple[Tree, ...],
    batch: tuple[Tree, ...],
    rule: SAM,
    rho: float | jax.Array,
    axes: Any,
) -> Any:
    """As :func:`sharpen`, of one perturbation, by the ascent gradient of the ``first`` batch."""
    (value, clean_aux), ascent = compute(weights, first)
    if axes is not None and rule.scope == "global":
        ascent = _varying(jax.lax.pmean(ascent, axes), axes)
    moved, norm = _perturb(weights, ascent, rule, rho)
    (perturbed_value, aux), descent = compute(moved, batch)
    usable = jnp.isfinite(norm)
    if rule.nonfinite == "raise":
        _raise_unless(usable, norm)
    if rule.nonfinite == "skip_perturb":
        usable = jnp.ones_like(usable)
    usable &= jnp.isfinite(rho)
    descent = jax.tree.map(
        lambda leaf: jnp.where(usable, leaf, jnp.nan).astype(leaf.dtype), descent
    )
    kept = clean_aux if rule.fraction == 1 else aux
    stats = SamStats(norm.astype(_norm_dtype(weights)), value, perturbed_value)
    return value, kept, descent, stats


def _perturb(
    weights: tuple[Tree, ...], ascent: tuple[Tree, ...], rule: SAM, rho: float | jax.Array
) -> tuple[tuple[Tree, ...], jax.Array]:
    """Return ``w + e`` and the norm of the ascent gradient (SAM-1, SAM-2, SAM-10)."""
    names, leaves, structure = flatten(_as_one_tree(weights))
    selected = set(perturbed_names(_distinct(names, leaves), rule))
    gradients = iter(jax.tree.leaves(ascent))
    directions = {}
    for name, w in _named_arrays(names, leaves):
        g = next(gradients)
        if name in selected:
            # JAX's gradient of a complex weight is the conjugate of the steepest ascent.
            directions[name] = jnp.conj(g.astype(_wide(g.dtype))) * _scale(w, rule)
    nothing = jnp.zeros((), jnp.float32)
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(d)) for d in directions.values() if d.size], nothing
    )
    # What the norm is divided by, and a root at 0, would make derivatives through this step NaN.
    safe = jax.lax.stop_gradient(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))
    squares = [jnp.sum(jnp.square(jnp.abs(d / safe))) for d in directions.values()]
    total = functools.reduce(jnp.add, squares)
    norm = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)) * safe, total)
    usable = (norm > 0) & jnp.isfinite(norm)
    factor = rho / jnp.where(usable, norm + rule.eps, 1)
    moved = []
    for name, w in zip(names, leaves, strict=True):
        if (name or "w") in directions and not is_absent(w):
            e = factor * directions[name or "w"] * _scale(w, rule)
            moved.append((w + jnp.where(usable, e, 0)).astype(w.dtype))
        else:
            moved.append(w)
    out = jax.tree.unflatten(structure, moved)
    return ((out,) if len(weights) == 1 else out), norm


def _as_one_tree(weights: tuple[Tree, ...]) -> Tree:
    """Return the only tree of weights, or all of them as one tree."""
    return weights[0] if len(weights) == 1 else weights


def _named_arrays(names: Sequence[str], leaves: Sequence[Any]) -> list[tuple[str, Any]]:
    """Name the weights that are there, as AGC does; a lone array is called ``w``."""
    pairs = zip(names, leaves, strict=True)
    return [(name or "w", leaf) for name, leaf in pairs if not is_absent(leaf)]


def _distinct(names: Sequence[str], leaves: Sequence[Any]) -> list[str]:
    distinct = [name for name, _ in _named_arrays(names, leaves)]
    check_distinct(distinct)
    return distinct


def _scale(w: jax.Array, rule: SAM) -> Any:
    if rule.adaptive and w.ndim >= 2:
        return jnp.abs(w).astype(_wide(jnp.abs(w).dtype)) + rule.eta
    return 1


def _radius(rule: SAM, step: Any) -> float | jax.Array:
    """Rho at a step; NaN if it is traced and not a finite number above 0."""
    rho = value_at("rho", rule.rho, step)
    return rho if isinstance(rho, float) else jnp.where((rho > 0) & (rho < jnp.inf), rho, jnp.nan)


def _raise_unless(finite: jax.Array, norm: jax.Array) -> None:
    if isinstance(finite, jax.core.Tracer):
        raise ConfigError(
            "nonfinite='raise' needs the value, which a traced function does not have; use "
            "nonfinite='skip_step' with optax.apply_if_finite under jit"
        )
    if not finite:
        raise NonFiniteError(
            f"the norm of the ascent gradient is {norm}; SAM(nonfinite='skip_step') skips such steps"
        )


# --- helpers --------------------------------------------------------------------------------------


def _positions(name: str, given: int | Sequence[int]) -> tuple[int, ...]:
    positions = given if isinstance(given, Sequence) else (given,)
    if not all(isinstance(position, int) for position in positions):
        raise ConfigError(
            f"{name} must be positions of arguments, such as 0 or (0, 2), got {given!r}"
        )
    return tuple(positions)


def _check_apart(weights_at: Sequence[int], batch_at: Sequence[int]) -> None:
    for position in weights_at:
        if position in batch_at:
            raise ConfigError(f"argument {position} is in both argnums and batch_argnums")


def _check_call(weights_at: Sequence[int], batch_at: Sequence[int], count: int) -> None:
    for name, positions in (("argnums", weights_at), ("batch_argnums", batch_at)):
        for position in positions:
            if not -count <= position < count:
                raise ConfigError(
                    f"{name}: there is no argument {position} in a call with {count} positional arguments"
                )
    _check_apart([at % count for at in weights_at], [at % count for at in batch_at])


def _takes_step(loss_fn: Callable[..., Any], given: int) -> bool:
    """Tell whether a loss called with so many positional arguments takes the keyword ``step``."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):  # a callable that does not say
        return False
    for position, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_KEYWORD or (
            parameter.name == "step" and parameter.kind is parameter.KEYWORD_ONLY
        ):
            return True
        if parameter.name == "step" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            return position >= given
    return False


def _check_batch(batch: tuple[Tree, ...], batch_at: Sequence[int]) -> None:
    """Raise unless every leaf of the batch has its examples along its first axis."""
    sizes: dict[int, str] = {}
    for position, tree in zip(batch_at, batch, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = f"argument {position}" + (f", {_name(path)!r}," if path else "")
            if not np.shape(leaf):
                raise ConfigError(
                    f"{where} has no first axis to take examples from: it is a scalar or a random key. Give "
                    "it in an argument that is not in batch_argnums, which every part of the batch sees whole"
                )
            sizes.setdefault(np.shape(leaf)[0], where)
    if len(sizes) > 1:
        listing = "; ".join(f"{where} has {size}" for size, where in sizes.items())
        raise ConfigError(
            f"the arrays of the batch must share their first axis, got {sorted(sizes)}: {listing}. Give what "
            "is not split by example in an argument that is not in batch_argnums"
        )
    if not sizes:
        raise ConfigError("the arguments in batch_argnums hold no array")


def _examples(leaf: Any, low: int, high: int) -> jax.Array:
    """Return the examples from ``low`` to ``high``."""
    return _placed(lambda array: array[low:high], leaf, (high - low,))


def _stacked(leaf: Any, size: int) -> jax.Array:
    """Return micro-batches of one size behind each other, along a new first axis."""
    return _placed(
        lambda array: array.reshape(-1, size, *array.shape[1:]), leaf, (len(leaf) // size, size)
    )


def _placed(take: Callable[[jax.Array], jax.Array], leaf: Any, front: tuple[int, ...]) -> jax.Array:
    """Take examples, whose axes in front are then these.

    Where shardings are types, examples stay split over the devices if their number allows it.
    """
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    sharding = jax.typeof(array).sharding
    axes: list[Any] = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    first, others = axes[0], axes[1:]
    names = first if isinstance(first, tuple) else (first,) if first else ()
    if not set(names) & set(sharding.mesh.explicit_axes):
        return take(array)
    split = math.prod(sharding.mesh.shape[name] for name in names)
    stays = first if front[-1] % split == 0 else None
    spec = jax.P(*(None,) * (len(front) - 1), stays, *others)
    place = jax.NamedSharding(sharding.mesh, spec)
    automatic = jax.sharding.auto_axes(take, axes=sharding.mesh.explicit_axes, out_sharding=place)
    return automatic(array)


def _arrays(weights: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """Return weights as JAX's arrays, as ``jit`` makes them of NumPy's and Python's numbers."""
    names, leaves, _ = flatten(_as_one_tree(weights))
    for name, leaf in _named_arrays(names, leaves):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise DTypeError(
                f"parameter {name!r} is no array but {leaf!r}{_cure(weights)}"
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise DTypeError(
                f"parameter {name!r}: the weight has dtype {dtype}; SAM needs floating point or "
                f"complex{_cure(weights)}"
            )
    for module in filter(_is_nnx, weights):
        others = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param)))
        for path, variable in others:
            raise ParameterError(
                f"{'.'.join(map(str, path))!r} of the NNX module {type(module).__name__} is a "
                f"{type(variable).__name__}, no weight{_cure(weights)}"
            )
    arrays: tuple[Tree, ...] = jax.tree.map(jnp.asarray, weights)
    return arrays


def _is_nnx(tree: Tree) -> bool:
    return isinstance(tree, nnx.Module)


def _cure(weights: tuple[Tree, ...]) -> str:
    """Say how to give the weights alone."""
    if any(map(_is_nnx, weights)):
        return (
            ". Split the module: graphdef, params, rest = nnx.split(model, nnx.Param, ...), give params as "
            "the weights, and merge the three in the loss"
        )
    if any(Layers(tree).in_equinox(()) for tree in weights):
        return (
            ". Partition the module: params, static = eqx.partition(model, eqx.is_inexact_array), give "
            "params as the weights, and eqx.combine the two in the loss"
        )
    return ": give what is no weight in an argument that is not in argnums"


def _norm_dtype(weights: tuple[Tree, ...]) -> Any:
    """Dtype of the norm over these weights: float32, or float64 if one of them is."""
    return jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(weights))).dtype


def _with_aux(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        value, gradients = function(*args, **kwargs)
        return (value, None), gradients

    return call


def _varying(tree: Tree, axes: Any) -> Tree:
    """Make replicated values differ by device in the type system, so that gradients stay local."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def cast(leaf: jax.Array) -> jax.Array:
        aval = jax.typeof(leaf)
        # The attribute moved between JAX versions.
        known = aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma
        missing = tuple(name for name in names if name not in known)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _name(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="."))


def _wide(dtype: Any) -> Any:
    """Dtype to compute norms and perturbations in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
