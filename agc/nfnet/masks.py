"""Masks of stochastic depth and dropout that are given to a model instead of drawn by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from agc.errors import ConfigError, DTypeError, ShapeError
from agc.nfnet.architecture import features
from agc.nfnet.variants import Variant

__all__ = ["Masks", "check_masks"]


class Masks(NamedTuple):
    """What a model in training mode keeps of a batch (DATA-8).

    Arrays are NumPy's or a framework's. A model draws what is None by itself, and nothing else.

    Attributes
    ----------
    stochastic_depth : bool array, shape (n, blocks), or None
        The residual branches that each image keeps, in the order of :func:`agc.nfnet.blocks`. What
        is kept is not rescaled.
    dropout : bool array, shape (n, features), or None
        What each image keeps of the features that the classifier is given. What is kept is divided
        by ``1 - dropout``, with the model's rate.
    """

    stochastic_depth: Any
    dropout: Any


def check_masks(
    masks: Masks | None,
    variant: Variant,
    images: int | None,
    *,
    convert: Callable[[Any], Any],
    boolean: object = None,
    training: bool = True,
) -> Masks:
    """Return the masks of a model's forward pass as arrays of its framework.

    Parameters
    ----------
    masks : Masks, optional
        What the model was given.
    variant : Variant
        The model's.
    images : int, optional
        Number of images; None in a graph that does not know it.
    convert : callable
        Makes an array of the framework.
    boolean : object, optional
        The framework's bool dtype; any dtype passes if None.
    training : bool
        Whether the model is in training mode.

    Raises
    ------
    ConfigError
        If these are not ``Masks``, or the model is in evaluation mode, where all is kept.
    ShapeError, DTypeError
        If a mask is not one of this model's and these images.
    """
    if masks is None:
        return Masks(None, None)
    if not isinstance(masks, Masks):
        raise ConfigError(
            "masks must be an agc.nfnet.Masks(stochastic_depth, dropout), "
            f"got {type(masks).__name__}"
        )
    if not training:
        raise ConfigError(
            "masks are for training mode, and the model is in evaluation mode, which keeps "
            "everything; switch the mode or leave the masks out"
        )
    axes = Masks(("blocks", sum(variant.depths)), ("features", features(variant)))
    arrays = []
    for field, mask, (axis, size) in zip(Masks._fields, masks, axes, strict=True):
        array = None if mask is None else convert(mask)
        arrays.append(array)
        if array is None:
            continue
        shape = tuple(array.shape)
        if len(shape) != 2 or not (_same(shape[0], images) and _same(shape[1], size)):
            raise ShapeError(
                f"masks.{field} must have the shape (n, {axis}), here ({images}, {size}), got {shape}"
            )
        if boolean is not None and array.dtype != boolean:
            raise DTypeError(
                f"masks.{field} must be bool, True where it keeps, got {array.dtype}; "
                "the model itself rescales what dropout keeps"
            )
    return Masks(*arrays)


def _same(found: int | None, expected: int | None) -> bool:
    return found is None or expected is None or found == expected
