"""Sharpness-aware minimization as an ordinary ``value_and_grad``.

``sam_value_and_grad`` has the signature and the purity of :func:`jax.value_and_grad`: it computes the
gradient at the weights, moves to ``w + e``, and returns the gradient there. The weights given are never
changed, so there is nothing to restore; the optimizer, and AGC in front of it, see that one gradient and
the original weights.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from agc.config import SAM, Schedule, check_rule
from agc.errors import ConfigError, DTypeError, NonFiniteError, ParameterError
from agc.plan import canonical_name, perturbed_names
from agc_jax.clip import call_schedule

__all__ = ["SamStats", "Verification", "sam_value_and_grad", "verify_sam"]

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


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    rule: SAM,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] | None = None,
    axis_name: str | Sequence[str] | None = None,
    has_stats: bool = False,
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
        Whether ``loss_fn`` returns auxiliary data, such as updated normalisation statistics. What is
        returned comes from the clean pass, or with ``fraction`` below 1 from the pass that saw the
        whole batch (SAM-12); with ``microbatches``, stacked along a new first axis.
    batch_argnums : int or sequence of int, optional
        Which positional arguments are the batch (pytrees of arrays that share their first axis).
        Needed for ``fraction`` below 1 and ``microbatches`` above 1; the loss must be a mean.
    axis_name : str or sequence of str, optional
        Mesh axes to average over inside ``shard_map`` (or ``pmap``). The descent gradient always is
        averaged, the ascent gradient if ``rule.scope`` is ``"global"`` (SAM-9). Outside, leave it out:
        under GSPMD the gradient is that of the whole batch, which is the global scope.
    has_stats : bool, default False
        Whether to return :class:`SamStats` as a third item.

    Returns
    -------
    callable
        Takes ``loss_fn``'s arguments, and ``step=`` (an integer, traced or not) if ``rho`` is a schedule
        or ``every`` is above 1. Returns ``(value, gradients)``, ``((value, aux), gradients)`` with
        ``has_aux``, and the stats behind them with ``has_stats``.

    Raises
    ------
    ConfigError
        If ``rule`` is not a SAM, ``fraction`` or ``microbatches`` is given without ``batch_argnums``, a
        step is missing, an argument is not there, or a schedule of rho returns what is known not to be a
        finite number above 0.
    DTypeError
        If a weight is neither floating point nor complex.
    ParameterError
        If two weights have the same name.
    SelectorError
        If a name pattern matches nothing, or nothing is left to perturb.

    Notes
    -----
    Every argument, random keys among them, is the same in both passes (SAM-12). If the norm of the
    ascent gradient is not finite, ``nonfinite="skip_step"`` returns gradients of NaN, for
    :func:`optax.apply_if_finite` to skip the step; ``"raise"`` works outside ``jit`` only (SAM-5).
    A schedule of rho is called with the step as it is given. Traced, it cannot raise: where it returns
    nonsense the gradients are NaN under every policy (SAM-11).

    The gradients of complex weights are those of :func:`jax.grad`, conjugates of the steepest ascent;
    the perturbation goes uphill.

    Examples
    --------
    >>> def loss_fn(w, x):
    ...     return jnp.mean((x @ w) ** 2)
    >>> value, gradients = sam_value_and_grad(loss_fn, SAM(rho=0.05))(jnp.ones(3), jnp.ones((4, 3)))
    """
    check_rule(rule, SAM)
    weights_at = _positions("argnums", argnums)
    batch_at = () if batch_argnums is None else _positions("batch_argnums", batch_argnums)
    if (rule.fraction != 1 or rule.microbatches != 1) and not batch_at:
        raise ConfigError(
            f"fraction={rule.fraction} and microbatches={rule.microbatches} take parts of the batch: "
            "say which arguments are the batch, for example batch_argnums=(1, 2)"
        )
    _check_apart(weights_at, batch_at)
    gradient_fn = (
        jax.value_and_grad(loss_fn, argnums=weights_at, has_aux=True)
        if has_aux
        else (_with_aux(jax.value_and_grad(loss_fn, argnums=weights_at)))
    )

    @functools.wraps(loss_fn)
    def value_and_grad(*args: Any, step: Any = None, **kwargs: Any) -> Any:
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

        def sharpness_aware() -> Any:
            return _gradients(compute, weights, batch, rule, _radius(rule, step), axes)

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
        return (*result, stats) if has_stats else result

    return value_and_grad


# --- one step, part by part -------------------------------------------------------------------------


def _gradients(
    compute: Callable[..., Any],
    weights: tuple[Tree, ...],
    batch: tuple[Tree, ...],
    rule: SAM,
    rho: float | jax.Array,
    axes: Any,
) -> Any:
    """Clean loss, auxiliary data, descent gradients and stats of one batch."""
    if rule.microbatches == 1:
        return _two_passes(compute, weights, batch, rule, rho, axes)
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ConfigError(
            f"the arrays of the batch must share their first axis, got {sorted(sizes)}"
        )
    (examples,) = sizes
    if examples < rule.microbatches:
        raise ConfigError(f"microbatches={rule.microbatches} is more than the {examples} examples")

    def run(part: tuple[Tree, ...]) -> Any:
        return _two_passes(compute, weights, part, rule, rho, axes)

    if examples % rule.microbatches == 0:
        shape = (rule.microbatches, examples // rule.microbatches)
        stacked = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), batch)
        lengths = [shape[1]] * rule.microbatches
        results = jax.lax.map(run, stacked)
    else:
        bounds = [_boundary(examples, i, rule.microbatches) for i in range(rule.microbatches + 1)]
        lengths = [high - low for low, high in itertools.pairwise(bounds)]
        parts = [
            run(jax.tree.map(lambda leaf, a=low, b=high: leaf[a:b], batch))
            for low, high in itertools.pairwise(bounds)
        ]
        results = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    values, aux, gradients, stats = results
    ascents = [math.ceil(rule.fraction * length) for length in lengths]
    gradients = jax.tree.map(lambda leaf: _average(leaf, lengths), gradients)
    value = _average(values, ascents)
    stats = SamStats(stats.norm.max(), value, _average(stats.perturbed_loss, lengths))
    return value, aux, gradients, stats


def _boundary(examples: int, index: int, parts: int) -> int:
    """Return where part ``index`` begins: contiguous parts, the longer ones first (SAM-8)."""
    size, longer = divmod(examples, parts)
    return index * size + min(index, longer)


def _average(stacked: jax.Array, counts: Sequence[int]) -> jax.Array:
    wide = _wide(stacked.dtype)
    shares = jnp.asarray([count / sum(counts) for count in counts], wide)
    return jnp.tensordot(shares, stacked.astype(wide), axes=1).astype(stacked.dtype)


def _two_passes(
    compute: Callable[..., Any],
    weights: tuple[Tree, ...],
    batch: tuple[Tree, ...],
    rule: SAM,
    rho: float | jax.Array,
    axes: Any,
) -> Any:
    first = batch
    if rule.fraction < 1:
        first = jax.tree.map(lambda leaf: leaf[: math.ceil(rule.fraction * leaf.shape[0])], batch)
    (value, clean_aux), ascent = compute(weights, first)
    if axes is not None and rule.scope == "global":
        ascent = _varying(jax.lax.pmean(ascent, axes), axes)
    moved, norm = _perturb(weights, ascent, rule, rho)
    (perturbed_value, aux), descent = compute(moved, batch)
    sound = jnp.isfinite(norm)
    if rule.nonfinite == "raise":
        _raise_unless(sound, norm)
    if rule.nonfinite == "skip_perturb":
        sound = jnp.ones_like(sound)
    sound &= jnp.isfinite(rho)
    descent = jax.tree.map(lambda leaf: jnp.where(sound, leaf, jnp.nan).astype(leaf.dtype), descent)
    kept = clean_aux if rule.fraction == 1 else aux
    stats = SamStats(norm.astype(_norm_dtype(weights)), value, perturbed_value)
    return value, kept, descent, stats


def _perturb(
    weights: tuple[Tree, ...], ascent: tuple[Tree, ...], rule: SAM, rho: float | jax.Array
) -> tuple[tuple[Tree, ...], jax.Array]:
    """Return the weights at ``w + e`` and the norm of the ascent gradient (SAM-1, SAM-2, SAM-10)."""
    tree = weights[0] if len(weights) == 1 else weights
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [canonical_name(_name(path)) or "w" for path, _ in paths]
    for name, count in Counter(names).items():
        if count > 1:
            raise ParameterError(f"two parameters are called {name!r}")
    chosen = set(perturbed_names(names, rule))
    leaves = [leaf for _, leaf in paths]
    gradients = jax.tree.leaves(ascent)
    directions = {}
    for name, w, g in zip(names, leaves, gradients, strict=True):
        if name in chosen:
            # JAX's gradient of a complex weight is the conjugate of the steepest ascent.
            directions[name] = jnp.conj(g.astype(_wide(g.dtype))) * _scale(w, rule)
    nothing = jnp.zeros((), jnp.float32)
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(d)) for d in directions.values() if d.size], nothing
    )
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = [jnp.sum(jnp.square(jnp.abs(d / safe))) for d in directions.values()]
    norm = jnp.sqrt(functools.reduce(jnp.add, squares)) * safe
    factor = rho / (norm + rule.eps)
    usable = (norm > 0) & jnp.isfinite(norm)
    moved = []
    for name, w in zip(names, leaves, strict=True):
        if name in directions:
            e = factor * directions[name] * _scale(w, rule)
            moved.append((w + jnp.where(usable, e, 0)).astype(w.dtype))
        else:
            moved.append(w)
    out = jax.tree.unflatten(structure, moved)
    return ((out,) if len(weights) == 1 else out), norm


def _scale(w: jax.Array, rule: SAM) -> Any:
    if rule.adaptive and w.ndim >= 2:
        return jnp.abs(w).astype(_wide(jnp.abs(w).dtype)) + rule.eta
    return 1


def _radius(rule: SAM, step: Any) -> float | jax.Array:
    """Rho at a step; NaN if it is traced and not a finite number above 0."""
    if isinstance(rule.rho, Schedule):
        steps, values = zip(*rule.rho.points, strict=True)
        return jnp.interp(
            jnp.asarray(step, float), jnp.asarray(steps, float), jnp.asarray(values, float)
        )
    if not callable(rule.rho):
        return rule.rho
    rho = call_schedule("rho", rule.rho, step)
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


# --- probe ------------------------------------------------------------------------------------------


class Verification(NamedTuple):
    """What :func:`verify_sam` saw.

    Attributes
    ----------
    passes : int
        Different points at which the loss was evaluated.
    perturbation : float
        Distance of the last point from the weights; should be rho.
    cosine : float
        Cosine between that displacement and the gradient at the weights; should be 1 (for ASAM: above
        0).
    gradient_error : float
        Relative distance between the gradient returned and the gradient at the last point.
    """

    passes: int
    perturbation: float
    cosine: float
    gradient_error: float

    @property
    def ok(self) -> bool:
        """Whether this was SAM: two points, moved uphill, right gradient."""
        moved = self.passes >= 2 and self.perturbation > 0 and self.cosine > 0
        return moved and self.gradient_error < 1e-3


def verify_sam(
    make: Callable[[Callable[..., jax.Array]], Callable[..., Any]],
    loss_fn: Callable[..., jax.Array],
    weights: Tree,
    *args: Any,
) -> Verification:
    """Tell whether a gradient function really is taken at the perturbed weights (SAM-14).

    Parameters
    ----------
    make : callable
        Builds the gradient function under test from a loss function, for example
        ``lambda f: sam_value_and_grad(f, SAM())``. It must take the weights first and return
        ``(value, gradients)``.
    loss_fn : callable
        ``loss_fn(weights, *args)``, a scalar.
    weights : pytree
        The weights.
    *args
        The batch and whatever else the loss needs.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    visited: list[jax.Array] = []

    def watched(point: Tree, *rest: Any) -> jax.Array:
        jax.debug.callback(
            lambda flat: visited.append(flat), jax.lax.stop_gradient(_flatten(point))
        )
        return loss_fn(point, *rest)

    start = _flatten(weights)
    _, gradients = make(watched)(weights, *args)
    jax.effects_barrier()
    points = {np.asarray(point).tobytes(): point for point in visited}
    last = max(
        points.values(), key=lambda point: float(jnp.linalg.norm(point - start)), default=start
    )
    unflatten = jax.flatten_util.ravel_pytree(weights)[1]
    uphill = _flatten(jax.grad(loss_fn)(weights, *args))
    wanted = _flatten(jax.grad(loss_fn)(unflatten(last), *args))
    moved = last - start
    length = float(jnp.linalg.norm(moved) * jnp.linalg.norm(uphill))
    return Verification(
        passes=len(points),
        perturbation=float(jnp.linalg.norm(moved)),
        # JAX's gradient of complex weights is the conjugate of the direction uphill.
        cosine=float((moved @ uphill).real) / length if length else 0.0,
        gradient_error=float(
            jnp.linalg.norm(_flatten(gradients) - wanted) / jnp.linalg.norm(wanted)
        ),
    )


# --- helpers ----------------------------------------------------------------------------------------


def _positions(name: str, given: int | Sequence[int]) -> tuple[int, ...]:
    positions = given if isinstance(given, Sequence) else (given,)
    if not all(isinstance(one, int) for one in positions):
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


def _arrays(weights: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """Return the weights as JAX's arrays, as ``jit`` makes them of NumPy's and of Python's numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        weights[0] if len(weights) == 1 else weights
    ):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise DTypeError(
                f"parameter {_name(path) or 'w'!r}: the weight has dtype {jnp.result_type(leaf)}; SAM needs "
                "floating point or complex: give other arrays in an argument that is not in argnums"
            )
    arrays: tuple[Tree, ...] = jax.tree.map(jnp.asarray, weights)
    return arrays


def _norm_dtype(weights: tuple[Tree, ...]) -> Any:
    """Dtype of the norm over these weights: float32, or float64 if one of them is."""
    return jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(weights))).dtype


def _flatten(tree: Tree) -> jax.Array:
    return jax.flatten_util.ravel_pytree(tree)[0]


def _with_aux(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        value, gradients = function(*args, **kwargs)
        return (value, None), gradients

    return call


def _varying(tree: Tree, axes: Any) -> Tree:
    """Make replicated values differ by device in the type system, so that gradients stay local."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def cast(leaf: jax.Array) -> jax.Array:
        kind = jax.typeof(
            leaf
        )  # where it says which axes a value varies over depends on the version
        known = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
        missing = tuple(name for name in names if name not in known)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _name(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="."))


def _wide(dtype: Any) -> Any:
    """Dtype to compute norms and perturbations in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
