"""Parameters of NFNets to and from the neutral form: arrays by name (:mod:`agc.nfnet`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from agc.errors import ParameterError
from agc.nfnet import ParameterSpec, check_arrays, parameters
from agc_tensorflow.nfnet import NFNet, check_standardised
from agc_tensorflow.sam import SharpnessAwareModel
from agc_tensorflow.units import Model, Variable, named_variables

__all__ = ["from_neutral", "to_neutral"]

Array = npt.NDArray[Any]


def to_neutral(model: Model) -> dict[str, Array]:
    """Return a copy of a model's parameters in the neutral form.

    Parameters
    ----------
    model : NFNet
        Not folded or batch-normalised; may be wrapped
        (:class:`agc_tensorflow.SharpnessAwareModel`).

    Returns
    -------
    dict of str to array
        By canonical name, in the neutral layout, which is Keras' own, and in the order of the
        forward pass; C-contiguous. float16, float32 and float64 stay what they are, bfloat16
        becomes float32, which holds the same numbers.

    Raises
    ------
    ParameterError
        If this is not an NFNet, or is folded or batch-normalised.

    Examples
    --------
    >>> from agc_tensorflow import nfnet
    >>> to_neutral(nfnet("tiny"))["stem.conv0.weight"].shape
    (3, 3, 3, 16)
    """
    return {spec.name: array_of(variable) for spec, variable in pairs_of(model)}


def from_neutral(model: Model, arrays: Mapping[str, Any]) -> None:
    """Put parameters in the neutral form into a model, in place.

    Parameters
    ----------
    model : NFNet
        As in :func:`to_neutral`. Its dtype stays.
    arrays : mapping of str to array
        Exactly the model's parameters, by canonical name, in the neutral layout.

    Raises
    ------
    ParameterError
        If a tensor is missing, unknown or of another shape; the message names them, and the model
        is as it was. Also as :func:`to_neutral`.
    """
    pairs = pairs_of(model)
    check_arrays((spec for spec, _ in pairs), arrays)
    for spec, variable in pairs:
        assign_array(variable, arrays[spec.name])


def pairs_of(model: Model) -> list[tuple[ParameterSpec, Variable]]:
    """Return each parameter with its facts, in the model's order; raise as :func:`to_neutral`."""
    bare = model.model if isinstance(model, SharpnessAwareModel) else model
    if not isinstance(bare, NFNet):
        raise ParameterError(f"this needs a model made by nfnet(...), got {type(bare).__name__}")
    check_standardised(bare)
    named = named_variables(bare)
    options = bare.options
    specs = parameters(options.variant, options.num_classes, options.in_channels)
    return [(spec, named[spec.name]) for spec in specs]


def array_of(variable: Variable) -> Array:
    """Return a copy of a parameter, or what has its shape, in the neutral layout."""
    tensor = tf.convert_to_tensor(variable)
    if tensor.dtype == tf.bfloat16:
        tensor = tf.cast(tensor, tf.float32)
    return np.array(tensor.numpy(), order="C")


def assign_array(variable: Variable, values: Any) -> None:
    """Put an array in the neutral layout into a parameter, or what has its shape."""
    array = np.asarray(values)
    array = array.astype(array.dtype.newbyteorder("="))  # TensorFlow reads no other
    variable.assign(tf.cast(array, variable.dtype))
