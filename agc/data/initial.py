"""Initial values of a model: a pure function of the recipe's seed, the same in every framework.

Normal numbers come from the ratio of uniforms (Kinderman and Monahan, 1977): of pairs (u, v), those
with ``x^2 <= -4 ln u`` for ``x = v / u`` give x. A logarithm decides about a pair, but the number
itself is a quotient, which IEEE arithmetic fixes to the last bit.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.data.uniforms import Purpose, Stream
from agc.nfnet import Initial, parameters
from agc.recipe import Recipe

__all__ = ["initial_values", "normal_numbers"]

_WIDTH: Final = 2 * math.sqrt(2 / math.e)
_PAIRS: Final = 1.5
"""Pairs that are drawn for each number; 1.37 of them are needed on average."""


def initial_values(recipe: Recipe) -> dict[str, npt.NDArray[np.float32]]:
    """Return the parameters of a recipe's model as DeepMind initialises them.

    Parameters
    ----------
    recipe : Recipe

    Returns
    -------
    dict of str to float32 array
        Canonical name to values in the neutral layout, in the model's order; see :mod:`agc.nfnet`.
    """
    options = recipe.model.options()
    stream = Stream(recipe.seed, Purpose.INITIAL)
    specs = parameters(options.variant, options.num_classes, options.in_channels)
    return {
        spec.name: _drawn(stream, number, spec.initial, spec.shape)
        for number, spec in enumerate(specs)
    }


def normal_numbers(
    stream: Stream, number: int, count: int, bound: float = math.inf
) -> npt.NDArray[np.float64]:
    """Return the first normal numbers of an item.

    Parameters
    ----------
    stream : Stream
    number : int
        Of the item.
    count : int
    bound : float
        Numbers whose magnitude is larger are left out.
    """
    pairs = math.ceil(_PAIRS * count) + 64
    while True:
        u, v = stream.uniforms(number, 2 * pairs).reshape(pairs, 2).T
        u = 1 - u  # above 0
        x = (v - 0.5) * _WIDTH / u
        accepted: Any = x[(x * x <= -4 * np.log(u)) & (np.abs(x) <= bound)]
        if len(accepted) >= count:
            return np.asarray(accepted[:count])
        pairs *= 2  # the first ones stay what they are


def _drawn(
    stream: Stream, number: int, how: Initial, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    if how.distribution == "constant":
        return np.full(shape, how.value, np.float32)
    bound = 2.0 if how.distribution == "truncated" else math.inf
    values = normal_numbers(stream, number, math.prod(shape), bound)
    return (how.value * values).astype(np.float32).reshape(shape)
