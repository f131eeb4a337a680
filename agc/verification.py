"""What a probe of sharpness-aware minimization saw (SAM-14)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Verification"]


@dataclass(frozen=True)
class Verification:
    """What an adapter's ``verify_sam`` saw of one training step or gradient function.

    Attributes
    ----------
    passes : int
        Points at which the loss was evaluated; should be 2 or more.
    perturbation : float
        Distance of the weights at the last point from those at the first; should be rho.
    cosine : float
        Cosine between that displacement and the gradient at the first point; should be 1 (for ASAM:
        above 0).
    gradient_error : float
        Relative distance between the gradient under test and the gradient at the last point; should
        be about rounding error.
    restored : bool
        Whether the weights were, bit for bit, those of the start when the optimizer acts on them.
    """

    passes: int
    perturbation: float
    cosine: float
    gradient_error: float
    restored: bool

    @property
    def ok(self) -> bool:
        """Whether this was SAM: two points, moved uphill, right gradient, weights restored."""
        return (
            self.passes >= 2
            and self.perturbation > 0
            and self.cosine > 0
            and self.gradient_error < 1e-3
            and self.restored
        )
