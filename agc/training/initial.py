"""The state before the first step: drawn from the seed, or begun from a file of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.data import initial_values
from agc.errors import ConfigError, ParameterError
from agc.nfnet import HEAD, check_arrays, parameters
from agc.recipe import Recipe
from agc.training.state import State
from agc.weights import open_weights

__all__ = ["initial_state"]

Array = npt.NDArray[Any]


def initial_state(recipe: Recipe, file: Path | None = None) -> State:
    """Return the state before the first step: momentum is 0, the average begins at the weights.

    Its arrays have the dtype ``precision.state``; what is drawn are the same float32 numbers in
    either.

    Parameters
    ----------
    recipe : Recipe
    file : Path, optional
        Weights of ``model.init = "file"``, of any float dtype. With ``model.head = "new"`` its
        classifier, of any number of classes, is left out and drawn anew.

    Raises
    ------
    FormatError, MissingPackageError, OSError
        As :func:`agc.weights.open_weights`.
    ConfigError
        If the file says that its weights are for another activation or epsilon.
    ParameterError
        If they are not those of the recipe's model; the message names them.
    """
    dtype, facts = recipe.precision.state, {}
    values: dict[str, Array] = {
        name: value.astype(dtype, copy=False) for name, value in initial_values(recipe).items()
    }
    if file is not None:
        values = _from_file(recipe, file, values)
        digest = hashlib.sha256()
        for value in values.values():
            digest.update(value.tobytes())
        facts["init"] = {"file": str(file), "sha256": digest.hexdigest()}
    zeros = {name: np.zeros_like(value) for name, value in values.items()}
    ema = values if recipe.ema else None
    return State(step=0, parameters=values, momentum=zeros, ema=ema, facts=facts)


def _from_file(recipe: Recipe, file: Path, drawn: dict[str, Array]) -> dict[str, Array]:
    wanted, dtype = recipe.model.options(), recipe.precision.state
    with open_weights(file) as found:
        for name in ("activation", "ws_eps"):
            said: Any = getattr(found.options, name)
            if found.complete and said != getattr(wanted, name):
                raise ConfigError(
                    f'{file}: its weights are for {name}={said!r}; set model.{name}="{said}"'
                )
        values = {name: array.astype(dtype) for name, array in found.arrays().items()}
    if recipe.model.head == "new":
        values |= {name: drawn[name] for name in drawn if name.startswith(f"{HEAD}.")}
    specs = parameters(wanted.variant, wanted.num_classes, wanted.in_channels)
    try:
        check_arrays(specs, values)
    except ParameterError as error:
        new = '. For other classes set model.head="new"' if recipe.model.head == "keep" else ""
        raise ParameterError(f"{file}: {error}{new}") from None
    return {spec.name: np.asarray(values[spec.name], order="C") for spec in specs}
