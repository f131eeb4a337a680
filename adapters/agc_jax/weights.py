"""Parameters of NFNets to and from the neutral form: arrays by name (:mod:`agc.nfnet`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from agc.errors import ParameterError
from agc.nfnet import ParameterSpec, check_arrays, parameters
from agc_jax.nfnet import NFNet
from agc_jax.units import flatten

__all__ = ["from_neutral", "to_neutral"]

Array = npt.NDArray[Any]


def to_neutral(model: nnx.Module) -> dict[str, Array]:
    """Return a copy of a model's parameters in the neutral form.

    Parameters
    ----------
    model : NFNet
        Not folded or batch-normalised.

    Returns
    -------
    dict of str to array
        By canonical name, in the neutral layout and in the model's order; C-contiguous. float16,
        float32 and float64 stay what they are, bfloat16 becomes float32, which holds the same
        numbers.

    Raises
    ------
    ParameterError
        If this is not an NFNet, is folded or batch-normalised, or has no storage
        (``nnx.eval_shape``).

    Examples
    --------
    >>> from agc_jax import nfnet
    >>> to_neutral(nfnet("tiny", rngs=nnx.Rngs(0)))["stem.conv0.weight"].shape
    (3, 3, 3, 16)
    """
    return {spec.name: _array(leaf) for spec, leaf in _pairs(model)}


def from_neutral(model: nnx.Module, arrays: Mapping[str, Any]) -> None:
    """Put parameters in the neutral form into a model, in place.

    Parameters
    ----------
    model : NFNet
        As in :func:`to_neutral`. Its dtype and sharding stay.
    arrays : mapping of str to array
        Exactly the model's parameters, by canonical name, in the neutral layout.

    Raises
    ------
    ParameterError
        If a tensor is missing, unknown or of another shape; the message names them, and the model
        is as it was. Also as :func:`to_neutral`.
    """
    pairs = _pairs(model)
    check_arrays((spec for spec, _ in pairs), arrays)
    with jax.enable_x64(True):  # float64 stays what it is, whatever the mode
        put = {
            spec.name: jax.device_put(np.array(arrays[spec.name]).astype(leaf.dtype), leaf.sharding)
            for spec, leaf in pairs
        }
    names, _, structure = flatten(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.unflatten(structure, [put[name] for name in names]))


def _pairs(model: nnx.Module) -> list[tuple[ParameterSpec, jax.Array]]:
    if not isinstance(model, NFNet):
        raise ParameterError(f"this needs a model made by nfnet(...), got {type(model).__name__}")
    names, leaves, _ = flatten(nnx.state(model, nnx.Param))
    named = dict(zip(names, leaves, strict=True))
    options = model.options
    specs = parameters(options.variant, options.num_classes, options.in_channels)
    for spec in specs:
        if spec.name not in named:
            raise ParameterError(
                f"the model has no parameter {spec.name!r}: it is folded or batch-normalised; "
                "use the model that it was made from"
            )
        if not isinstance(named[spec.name], jax.Array):
            raise ParameterError(
                f"parameter {spec.name!r} is a {type(named[spec.name]).__name__} and has no numbers; "
                "make the model with nfnet(...) itself, not under nnx.eval_shape"
            )
    return [(spec, named[spec.name]) for spec in specs]


def _array(leaf: jax.Array) -> Array:
    return np.array(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, order="C")
