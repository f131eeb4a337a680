"""The state of a training: all that has to be kept to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.errors import NonFiniteError

__all__ = ["State"]

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class State:
    """A training before a step, in the neutral form: every framework can go on from it.

    Arrays are float32, or float64 if the recipe's ``precision.compute`` is.

    Attributes
    ----------
    step : int
        How many steps have been made; the batches need nothing else.
    parameters : mapping of str to array
        By canonical name, in the neutral layout; see :mod:`agc.nfnet`.
    momentum : mapping of str to array
        Of SGD, by the same names. It does not contain the learning rate.
    ema : mapping of str to array, or None
        Average of the parameters, if the recipe has one.
    facts : mapping of str to JSON data
        Whatever is worth knowing: framework, versions, accuracies.
    """

    step: int
    parameters: Arrays
    momentum: Arrays
    ema: Arrays | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, Arrays]]:
        """Yield the name and the arrays of each part that there is."""
        for name in ("parameters", "momentum", "ema"):
            arrays = getattr(self, name)
            if arrays is not None:
                yield name, arrays

    def check_finite(self) -> None:
        """Raise NonFiniteError if a number is NaN or infinite; the message names the array."""
        for part, arrays in self.parts():
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise NonFiniteError(f"{part} {name!r} is not finite before step {self.step}")
