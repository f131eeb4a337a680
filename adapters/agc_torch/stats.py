"""Telemetry: what one clipping did, on the device until somebody reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agc import reference

__all__ = ["Stats", "UnitNumbers"]


@dataclass(frozen=True)
class UnitNumbers:
    """The numbers behind a clipping, one a unit, of all parameters that have one home.

    Attributes
    ----------
    counts : list of (str, int)
        Parameters and their number of units, in the order of the buffers.
    floor, limit, norm : Tensor of float64, shape (units,)
        ``max(norm(W_i), eps)``, the limit that follows from it, and ``norm(G_i)`` (AGC-1).
    div_eps : float
        Floor of ``norm`` in the division.
    """

    counts: list[tuple[str, int]]
    floor: Tensor
    limit: Tensor
    norm: Tensor
    div_eps: float

    @property
    def bad(self) -> Tensor:
        """Whether a norm of the unit is not finite (AGC-4)."""
        return ((self.norm < torch.inf) & (self.floor < torch.inf)).logical_not()

    @property
    def clipped(self) -> Tensor:
        """Whether the unit is scaled down (AGC-2)."""
        return (self.norm > self.limit) & self.bad.logical_not()

    @property
    def scale(self) -> Tensor:
        """Factor of the unit; 1 if it is not clipped, and if it is not finite."""
        return torch.where(self.bad, 1.0, self.finite_scale)

    @property
    def factor(self) -> Tensor:
        """What the gradient is multiplied by: the scale, but NaN if the unit is not finite."""
        return torch.where(self.bad, torch.nan, self.finite_scale)

    @property
    def finite_scale(self) -> Tensor:
        """Factor of the unit if it is finite."""
        return torch.where(self.norm > self.limit, self.quotient, 1.0)

    @property
    def quotient(self) -> Tensor:
        """Factor of the unit if it is clipped."""
        return self.limit / self.norm.clamp(min=self.div_eps)

    @property
    def ratio(self) -> Tensor:
        """``norm(G_i) / max(norm(W_i), eps)``; 0 if the gradient is 0 or the unit not finite."""
        return torch.where(self.bad | (self.norm == 0), 0.0, self.norm / self.floor)


class Stats:
    """What one clipping did (AGC-11).

    The four properties are scalars on the device: a few small kernels, no host sync.
    :meth:`total` and :meth:`parameters` bring the numbers to the host.

    Attributes
    ----------
    units : int
        Units looked at.
    """

    def __init__(self, names: Sequence[str], numbers: Sequence[UnitNumbers]) -> None:
        self._names = names
        self._numbers = numbers
        self.units = sum(group.norm.numel() for group in numbers)

    @property
    def clipped(self) -> Tensor:
        """Number of units that were scaled down."""
        return _over(torch.sum, [group.clipped for group in self._numbers], 0)

    @property
    def nonfinite(self) -> Tensor:
        """Number of units that fell under the non-finite policy (AGC-4)."""
        return _over(torch.sum, [group.bad for group in self._numbers], 0)

    @property
    def max_ratio(self) -> Tensor:
        """Largest ``norm(G_i) / max(norm(W_i), eps)`` of the finite units; 0 if there are none."""
        return _over(torch.amax, [group.ratio for group in self._numbers], 0.0)

    @property
    def min_scale(self) -> Tensor:
        """Smallest factor applied to a finite unit; 1 if none was clipped."""
        return _over(torch.amin, [group.scale for group in self._numbers], 1.0)

    def total(self) -> reference.Stats:
        """Return the numbers of all parameters together."""
        return reference.Stats(
            units=self.units,
            clipped=int(self.clipped),
            nonfinite=int(self.nonfinite),
            max_ratio=float(self.max_ratio),
            min_scale=float(self.min_scale),
        )

    def parameters(self) -> dict[str, reference.Stats]:
        """Return the numbers of every parameter that AGC acts on and that had a gradient.

        A trainable ``DTensor`` is among them in any case: no process knows alone whether it had
        one.
        """
        stats = {}
        for group in self._numbers:
            sizes = [count for _, count in group.counts]
            columns = (group.clipped, group.bad, group.ratio, group.scale)
            rows = zip(*(column.cpu().split(sizes) for column in columns), strict=True)
            for (name, count), (clipped, bad, ratio, scale) in zip(group.counts, rows, strict=True):
                stats[name] = reference.Stats(
                    units=count,
                    clipped=int(clipped.sum()),
                    nonfinite=int(bad.sum()),
                    max_ratio=float(_over(torch.amax, [ratio], 0.0)),
                    min_scale=float(_over(torch.amin, [scale], 1.0)),
                )
        return {name: stats[name] for name in self._names}

    def to_dict(self, prefix: str = "agc/", *, parameters: bool = True) -> dict[str, float]:
        """Return the numbers as flat floats for a logger, the same keys in every framework.

        Parameters
        ----------
        prefix : str
            What every key starts with.
        parameters : bool
            Whether the numbers of every parameter are among them.

        Returns
        -------
        dict of str to float
            As :func:`agc.reference.to_floats`.
        """
        return reference.to_floats(self.total(), self.parameters() if parameters else {}, prefix)

    def __repr__(self) -> str:
        return f"<Stats of {len(self._names)} parameters, {self.units} units; total() reads it>"


def _over(reduce: Callable[[Tensor], Tensor], columns: list[Tensor], empty: float) -> Tensor:
    """Reduce over all columns, on the device of the first."""
    values = [reduce(column) for column in columns if column.numel()]
    if not values:
        return torch.tensor(empty)
    return reduce(torch.stack([value.to(values[0].device) for value in values]))
