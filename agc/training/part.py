"""Which parameters a recipe trains."""

from __future__ import annotations

from agc.nfnet import HEAD, parameters
from agc.recipe import Recipe
from agc.selectors import select

__all__ = ["trained_names"]


def trained_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the canonical names of the parameters that ``train.only`` means, in model order.

    All others are constants: they have no gradient, no momentum and no decay, SAM does not perturb
    them, and AGC does not see them.

    Raises
    ------
    SelectorError
        If a pattern matches no parameter.
    """
    model = recipe.model.options()
    specs = parameters(model.variant, model.num_classes, model.in_channels)
    shapes = {spec.name: spec.shape for spec in specs}
    if not recipe.train.only:
        return tuple(shapes)
    chosen = {
        name
        for selector in recipe.train.only
        for name in select(selector, shapes, HEAD, "train.only")
    }
    return tuple(name for name in shapes if name in chosen)
