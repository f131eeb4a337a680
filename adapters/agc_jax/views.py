"""Gradients and weights as the numerics see them: paired, checked, arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agc import Plan
from agc.checks import NO_GRADIENT, check_inexact, check_shapes
from agc.errors import MissingGradientError, ParameterError
from agc_jax.units import PyTree, flatten, is_absent

__all__ = ["Views", "views"]


@dataclass(frozen=True)
class Views:
    """What is clipped of a tree of gradients.

    Attributes
    ----------
    places : tuple of int
        Indices in the plan of the parameters that have a gradient and are clipped.
    gradients, weights : list of array
        One each; a gradient and its weight have the same shape.
    """

    places: tuple[int, ...]
    gradients: list[jax.Array]
    weights: list[jax.Array]
    _indices: list[int]  # in the tree
    _leaves: list[Any]
    _structure: Any

    def tree(self, gradients: list[jax.Array]) -> PyTree:
        """Return the tree of gradients with these in the place of those that are clipped."""
        leaves = list(self._leaves)
        for index, gradient in zip(self._indices, gradients, strict=True):
            leaves[index] = gradient
        return jax.tree.unflatten(self._structure, leaves)


def views(plan: Plan, gradients: PyTree, params: PyTree, *, by_hand: bool) -> Views:
    """Pair gradients with their weights.

    Parameters
    ----------
    plan : Plan
        The plan of ``params``.
    gradients, params : trees of arrays
        As :func:`agc_jax.adaptive_clip_gradients` takes them.
    by_hand : bool
        Whether it is an error that there is no gradient (AGC-5).

    Raises
    ------
    ParameterError
        If a gradient has no parameter.
    ShapeError, DTypeError
        If a gradient does not belong to its parameter.
    MissingGradientError
        If ``by_hand``, and no leaf is a gradient although there are parameters.
    """
    names, leaves, structure = flatten(gradients)
    weights = dict(zip(*flatten(params)[:2], strict=True))
    places = {entry.name: place for place, entry in enumerate(plan)}
    pairs: dict[int, tuple[int, jax.Array, jax.Array]] = {}
    present = False
    for index, (name, gradient) in enumerate(zip(names, leaves, strict=True)):
        if is_absent(gradient) or getattr(gradient, "dtype", None) == jax.dtypes.float0:
            continue
        present = True
        if is_absent(weights.get(name)):
            raise ParameterError(f"{name!r} has a gradient, but there is no such parameter")
        gradient, weight = _array(name, "gradient", gradient), _array(name, "weight", weights[name])
        if gradient.shape != weight.shape:
            check_shapes(name, weight=weight.shape, gradient=gradient.shape, plan=weight.shape)
        if (place := places.get(name)) is None:
            raise ParameterError(f"{name!r} has a gradient, but is a setting of an Equinox module")
        if plan.entries[place].clipped:
            pairs[place] = (index, gradient, weight)
    masked = any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)
    if by_hand and weights and not present and not masked:
        raise MissingGradientError(NO_GRADIENT)
    return Views(
        tuple(pairs),
        [gradient for _, gradient, _ in pairs.values()],
        [weight for _, _, weight in pairs.values()],
        [index for index, _, _ in pairs.values()],
        leaves,
        structure,
    )


def _array(name: str, what: str, leaf: Any) -> jax.Array:
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        check_inexact(f"parameter {name!r}: the {what}", array.dtype, inexact=False)
    return array
