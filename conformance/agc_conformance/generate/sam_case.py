"""Problems of SAM: weights, and a batch of examples that differ in every element.

The loss is :class:`agc_conformance.backend.Examples`', quadratic in every weight; an example is a
curvature and a center for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from agc_conformance.backend import Examples
from agc_conformance.data import splitmix_values
from agc_conformance.generate.parameters import (
    CONV2D,
    DENSE,
    WHOLE,
    Data,
    Layouts,
    VectorParameter,
    inline,
)
from agc_conformance.generate.unit_table import Array

__all__ = [
    "EIGHT_EXAMPLES",
    "HARD_TO_RESTORE",
    "SIX_EXAMPLES",
    "TEN_EXAMPLES",
    "SamCase",
    "sam_case",
]


@dataclass(frozen=True)
class SamCase:
    """Weights and one batch.

    Attributes
    ----------
    parameters : sequence of VectorParameter
        Without gradients.
    curvatures, centers : mapping of str to array
        By parameter, ``(examples, *shape)``; the loss does not depend on missing parameters.
    """

    parameters: Sequence[VectorParameter]
    curvatures: Mapping[str, Array]
    centers: Mapping[str, Array]

    @property
    def weights(self) -> dict[str, Array]:
        """Weights by name."""
        return {p.name: p.weight_array for p in self.parameters}

    @property
    def examples(self) -> Examples:
        """The batch."""
        return Examples(self.curvatures, self.centers)

    def scaled(self, power: int) -> SamCase:
        """Return the case with its loss multiplied by ``2**power``."""
        curvatures = {name: np.ldexp(value, power) for name, value in self.curvatures.items()}
        return replace(self, curvatures=curvatures)

    def poisoned(self, example: int, value: float) -> SamCase:
        """Return the case with a center of the head's weight replaced in one example."""
        center = self.centers["head.weight"].copy()
        center[example, 1, 1] = value
        return replace(self, centers={**self.centers, "head.weight": center})

    def batch_to_json(self) -> Data:
        """Return the batch as it stands in a file."""
        return {
            "count": len(self.examples),
            "curvatures": {name: inline(value) for name, value in self.curvatures.items()},
            "centers": {name: inline(value) for name, value in self.centers.items()},
        }


# Name, canonical axes, number of unit axes, layouts, binary exponent of the weights.
_MODEL: Final[list[tuple[str, dict[str, int], int, Layouts, int]]] = [
    ("conv.weight", {"o": 2, "i": 2, "h": 1, "w": 2}, 1, CONV2D, -4),
    ("conv.bias", {"o": 2}, 0, WHOLE, -6),
    ("head.weight", {"o": 3, "i": 2}, 1, DENSE, -3),
    ("head.bias", {"o": 3}, 0, WHOLE, -5),
]


def sam_case(
    seed: int, examples: int = 6, *, loss_exponent: int = 4, by_framework: bool = False
) -> SamCase:
    """Return a model of 19 weights and a batch, different in every element.

    Parameters
    ----------
    seed : int
        Seed of all numbers.
    examples : int
        Size of the batch.
    loss_exponent : int
        Binary exponent of the loss; 4 gives curvatures from 1 to 64, steeper in some examples.
    by_framework : bool
        Whether frameworks store the weights in different ways, which matters only to AGC's units.
    """
    parameters, curvatures, centers = [], {}, {}
    for number, (name, axes, units, layouts, exponent) in enumerate(_MODEL):
        parameter_seed = 1000 * seed + 100 * number
        shape = tuple(axes.values())
        ones = [1] * len(shape)
        weight = splitmix_values(shape, seed=parameter_seed, exponent=exponent, spread=ones)
        parameters.append(
            VectorParameter(
                name, axes, units, inline(weight), None, layouts if by_framework else {}
            )
        )
        batch_shape = (examples, *shape)
        curvatures[name] = np.abs(
            splitmix_values(
                batch_shape,
                seed=parameter_seed + 20,
                exponent=loss_exponent - 4,
                spread=[2, *(0 for _ in shape)],
            )
        )
        # Centers are a little larger than the weights.
        centers[name] = splitmix_values(
            batch_shape, seed=parameter_seed + 50, exponent=exponent + 1, spread=[1, *ones]
        )
    return SamCase(parameters, curvatures, centers)


def _hard_to_restore() -> SamCase:
    case = sam_case(4)
    values = [0.0001220703125, -3.0517578125e-05, 5.9604644775390625e-08, -0.0, 0.25, -7, 1.5, 2]
    first, *others = case.parameters
    return replace(case, parameters=[replace(first, weight=inline(values)), *others])


SIX_EXAMPLES: Final = sam_case(1)
EIGHT_EXAMPLES: Final = sam_case(2, 8)
TEN_EXAMPLES: Final = sam_case(3, 10)
HARD_TO_RESTORE: Final = _hard_to_restore()
"""A case in whose convolution some weights differ from ``(w + e) - e``, and one is -0.0."""
