"""Parameters of NFNets to and from the neutral form: arrays by name (:mod:`agc.nfnet`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc.errors import ParameterError
from agc.layouts import out_first_axes, out_last_axes
from agc.nfnet import ParameterSpec, check_arrays, parameters
from agc_torch.nfnet import NFNet
from agc_torch.shards import gathered, held_rows, is_dtensor, local
from agc_torch.units import named_parameters, unwrap

__all__ = ["array_of", "copy_array_", "from_neutral", "pairs_of", "to_neutral"]

Array = npt.NDArray[Any]


def to_neutral(model: nn.Module) -> dict[str, Array]:
    """Return a copy of a model's parameters in the neutral form.

    Parameters
    ----------
    model : NFNet
        Not folded or batch-normalised; may be wrapped (``DistributedDataParallel``,
        ``torch.compile``), or sharded (``fully_shard``): all processes then call this.

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
        (``device="meta"``).

    Examples
    --------
    >>> from agc_torch import nfnet
    >>> to_neutral(nfnet("tiny"))["stem.conv0.weight"].shape
    (3, 3, 3, 16)
    """
    return {spec.name: array_of(tensor) for spec, tensor in pairs_of(model)}


def from_neutral(model: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Put parameters in the neutral form into a model, in place.

    Parameters
    ----------
    model : NFNet
        As in :func:`to_neutral`. Its dtype and device stay.
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
    for spec, tensor in pairs:
        copy_array_(tensor, arrays[spec.name])


def pairs_of(model: nn.Module) -> list[tuple[ParameterSpec, Tensor]]:
    """Return each parameter with its facts, in the model's order; raise as :func:`to_neutral`."""
    bare = unwrap(model)
    if not isinstance(bare, NFNet):
        raise ParameterError(f"this needs a model made by nfnet(...), got {type(bare).__name__}")
    named = named_parameters(bare)
    options = bare.options
    specs = parameters(options.variant, options.num_classes, options.in_channels)
    for spec in specs:
        if spec.name not in named:
            raise ParameterError(
                f"the model has no parameter {spec.name!r}: it is folded or batch-normalised; "
                "use the model that it was made from"
            )
        if named[spec.name].is_meta:
            raise ParameterError(
                f"parameter {spec.name!r} is on the device 'meta' and has no numbers; "
                "give the model storage first, with model.to_empty(device='cpu')"
            )
    return [(spec, named[spec.name]) for spec in specs]


def array_of(tensor: Tensor) -> Array:
    """Return a copy of a parameter, or what has its shape, in the neutral layout."""
    tensor = gathered(tensor).cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.array(tensor.permute(out_last_axes(tensor.dim())).numpy(), order="C")


def copy_array_(tensor: Tensor, values: Any) -> None:
    """Put an array in the neutral layout into a parameter, or what has its shape.

    Of a ``DTensor``, each process is given the whole array.
    """
    array = np.asarray(values)
    if array.dtype.name not in ("float16", "float32", "float64"):
        array = array.astype(np.float32)  # bfloat16 and the like, which PyTorch does not read
    # Nor does it read another byte order, or strides that run backwards.
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    whole = torch.tensor(array).permute(out_first_axes(array.ndim))
    for axis in range(tensor.dim()) if is_dtensor(tensor) else ():
        rows = held_rows(tensor, axis, whole.device)
        whole = whole if rows is None else whole.index_select(axis, rows)
    local(tensor).copy_(whole)
