"""Masks of stochastic depth and dropout (DATA-8), so that every framework drops the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agc.data.uniforms import Purpose, Stream
from agc.nfnet import blocks, features
from agc.recipe import Recipe

__all__ = ["RecipeMasks"]


class RecipeMasks:
    """The masks of a recipe's examples.

    Parameters
    ----------
    recipe : Recipe
        ``train.masks`` says which there are; a rate of 0 has none.
    """

    def __init__(self, recipe: Recipe) -> None:
        model = recipe.model
        self._seed = recipe.seed
        self._rates: dict[Purpose, npt.NDArray[np.float64]] = {}
        if "stochastic_depth" in recipe.train.masks and model.stochastic_depth:
            variant = model.options().variant
            rates = [model.stochastic_depth * block.stochastic_depth for block in blocks(variant)]
            self._rates[Purpose.STOCHASTIC_DEPTH] = np.array(rates)
        if "dropout" in recipe.train.masks and model.dropout:
            size = features(model.options().variant)
            self._rates[Purpose.DROPOUT] = np.full(size, model.dropout)

    def of(self, purpose: Purpose, numbers: range) -> npt.NDArray[np.bool_] | None:
        """Return what is kept, shape (examples, blocks or features); None if nothing is dropped."""
        rates = self._rates.get(purpose)
        if rates is None:
            return None
        stream = Stream(self._seed, purpose)
        rows: list[Any] = [stream.uniforms(number, len(rates)) >= rates for number in numbers]
        return np.array(rows, np.bool_)
