"""What the frameworks share of clipping: how much is clipped, the least traffic, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc import Units
from agc.reference import clip_units
from agc_conformance.verdict import LIMITS, ulp_error
from benchmarks.common import draw
from benchmarks.gpu.race import Outcome, relative
from benchmarks.shapes import MODELS

__all__ = [
    "CLIPPING",
    "CONDITIONS",
    "COPIED",
    "DTYPES",
    "Truth",
    "drawn",
    "least_bytes",
    "louder",
    "samples",
    "shapes_of",
    "with_ratios",
]

Array = npt.NDArray[Any]

CLIPPING: Final = 0.01
"""The threshold of all contestants."""
CONDITIONS: Final = ("all", "none", "tenth")
"""Every unit is clipped, or none, or a random tenth of them."""
DTYPES: Final = ("float32", "bfloat16")
COPIED: Final = 1 << 30
"""Bytes of the copy that bandwidth is measured by: far more than any cache."""
_QUIET: Final = np.float32(1e-8)
"""What makes a gradient that is clipped one that is not."""
_LARGEST: Final = 1 << 20
"""Elements of a tensor that is compared with the reference, at most."""
_TINY: Final = 8
"""Longest axis of a rehearsal."""
_FEW: Final = 24
"""Tensors of a rehearsal: the first of a model are of all its kinds."""


def shapes_of(model: str, *, tiny: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's tensors."""
    shapes = MODELS[model]()
    if not tiny:
        return shapes
    few = islice(shapes.items(), _FEW)
    return {name: tuple(min(n, _TINY) for n in shape) for name, shape in few}


@lru_cache(maxsize=2)
def drawn(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, tuple[Array, Array]]:
    """Return weights and gradients by name, in float32; every unit would be clipped."""
    return {name: draw(shape, "all", seed) for seed, (name, shape) in enumerate(shapes)}


def louder(shape: tuple[int, ...], axis: int, condition: str, seed: int) -> Array:
    """Return a factor for every unit of a gradient that is clipped: 1, or one that quiets it.

    ``axis`` names the units of tensors with two axes or more; others are one unit.
    """
    units = [1] * len(shape)
    if len(shape) > 1:
        units[axis] = shape[axis]
    share = {"all": 1.0, "none": 0.0, "tenth": 0.1}[condition]
    chosen = np.random.default_rng(seed).random(units) < share
    return np.where(chosen, np.float32(1), _QUIET)


def least_bytes(size: int, clipped: float) -> float:
    """Return the traffic that clipping needs, from the bytes of the weights and the share clipped.

    All weights and gradients are read for the norms; what is clipped is read again and written.
    """
    return (2 + 2 * clipped) * size


def samples(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the first and last tensor of each rank, among those of moderate size."""
    names: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        if prod(shape) <= _LARGEST:
            names.setdefault(len(shape), []).append(name)
    return [name for group in names.values() for name in dict.fromkeys((group[0], group[-1]))]


class Truth:
    """Clipped gradients of some tensors, from the float64 reference (AGC-2, AGC-3).

    Parameters
    ----------
    tensors : mapping of name to (weight, gradient)
        In float64, which holds every value of the dtype.
    units : mapping of name to str
        Units patterns.
    dtype : str
        Dtype of the gradients.
    """

    def __init__(
        self, tensors: Mapping[str, tuple[Array, Array]], units: Mapping[str, str], dtype: str
    ) -> None:
        self._dtype = dtype
        self._gradients = {name: gradient for name, (_, gradient) in tensors.items()}
        self._clipped = {
            name: clip_units(gradient, weight, Units(units[name]), clipping=CLIPPING)
            for name, (weight, gradient) in tensors.items()
        }

    def compare(self, find: Callable[[str], Array]) -> Outcome:
        """Return the largest error in ULP, and whether it is ``right``.

        Right is what is within the limit of the conformance suite, and has changed not a bit of an
        unclipped unit.

        Parameters
        ----------
        find : callable
            From a name to the clipped gradient, in float64.
        """
        worst, kept = 0.0, True
        for name, truth in self._clipped.items():
            found, gradient = find(name), self._gradients[name]
            worst = max(worst, float(ulp_error(found, truth.gradient, self._dtype).max()))
            still = np.broadcast_to(~truth.clipped, found.shape)
            kept = kept and bool((found[still] == gradient[still]).all())
        return {"max_ulp": worst, "right": worst <= LIMITS[self._dtype] and kept}

    def deviation(self, find: Callable[[str], Array]) -> Outcome:
        """Return the largest error in ULP of a peer, whose formula may differ."""
        return {"max_ulp": self.compare(find)["max_ulp"]}


def with_ratios(
    outcomes: Mapping[str, Outcome], least: Mapping[str, float], base: str
) -> dict[str, Outcome]:
    """Add ``relative``, each time as a multiple of the base's, and ``of_copy_bandwidth``.

    ``queued_of_copy_bandwidth`` is that of calls on a device that is busy when they begin.

    The copy itself gains ``gigabytes_per_second``.

    Parameters
    ----------
    outcomes : mapping of name to outcome
        One of them is ``copy``.
    least : mapping of name to float
        Bytes that the work of a contestant needs at least.
    base : str
        What the others are compared with.
    """
    copy = outcomes["copy"]
    compared = {}
    for name, outcome in outcomes.items():
        compared[name] = outcome | {"relative": relative(outcome, outcomes[base])}
        slower = relative(copy, outcome)
        if name in least and slower is not None:
            share = least[name] / (2 * copy["copied_bytes"]) * slower
            compared[name] |= {"least_bytes": least[name], "of_copy_bandwidth": share}
            if "queued_ms" in outcome:
                sooner = outcome["device_ms"]["median"] / outcome["queued_ms"]["median"]
                compared[name]["queued_of_copy_bandwidth"] = share * sooner
    if "device_ms" in copy:
        speed = 2e-6 * copy["copied_bytes"] / copy["device_ms"]["median"]
        compared["copy"]["gigabytes_per_second"] = speed
    return compared
