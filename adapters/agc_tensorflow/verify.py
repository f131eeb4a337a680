"""A probe that tells whether gradients are those of sharpness-aware minimization (SAM-14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

__all__ = ["Verification", "verify_sam"]

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_sam` saw.

    Attributes
    ----------
    passes : int
        Different points at which the loss was evaluated.
    perturbation : float
        Distance of the last point from the weights; should be rho.
    cosine : float
        Cosine between that displacement and the gradient at the weights; should be 1 (for ASAM: above
        0).
    gradient_error : float
        Relative distance between the gradients returned and those at the last point.
    restored : bool
        Whether the variables hold, bit for bit, what they held before.
    """

    passes: int
    perturbation: float
    cosine: float
    gradient_error: float
    restored: bool

    @property
    def ok(self) -> bool:
        """Whether this was SAM: two points, moved uphill, right gradient, weights restored."""
        moved = self.passes >= 2 and self.perturbation > 0 and self.cosine > 0
        return moved and self.gradient_error < 1e-3 and self.restored


def verify_sam(
    gradients_of: Callable[[Loss], Sequence[Any]], loss_fn: Loss, variables: Sequence[Any]
) -> Verification:
    """Tell whether gradients really are taken at the perturbed weights (SAM-14).

    Parameters
    ----------
    gradients_of : callable
        Computes the gradients under test from a loss function, for example
        ``lambda f: sam_value_and_gradients(f, variables, SAM())[1]``. Runs eagerly.
    loss_fn : callable
        ``loss_fn()``, a scalar; deterministic.
    variables : sequence of keras.Variable
        The weights.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    visited: list[Any] = []

    def watched() -> Any:
        visited.append(_flatten([tf.convert_to_tensor(v) for v in variables]))
        return loss_fn()

    before = [tf.identity(tf.convert_to_tensor(v)) for v in variables]
    start = _flatten(before)
    found = _flatten_gradients(gradients_of(watched), before)
    after = _flatten([tf.convert_to_tensor(v) for v in variables])

    def assign(values: list[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def gradient_at(values: list[Any]) -> Any:
        # By TensorFlow alone: the weights are really there.
        assign(values)
        try:
            with tf.GradientTape() as tape:
                loss = loss_fn()
            gradients = tape.gradient(loss, [variable.value for variable in variables])
        finally:
            assign(before)
        return _flatten_gradients(gradients, before)

    last = max(visited, key=lambda point: float(tf.norm(point - start)), default=start)
    pieces, offset = [], 0
    for value in before:
        size = int(tf.size(value))
        parts = []
        for _ in range(1 + value.dtype.is_complex):
            parts.append(tf.reshape(last[offset : offset + size], value.shape))
            offset += size
        whole = tf.complex(*parts) if value.dtype.is_complex else parts[0]
        pieces.append(tf.cast(whole, value.dtype))
    uphill, wanted = gradient_at(before), gradient_at(pieces)
    moved = last - start
    length = float(tf.norm(moved) * tf.norm(uphill))
    return Verification(
        passes=len({point.numpy().tobytes() for point in visited}),
        perturbation=float(tf.norm(moved)),
        cosine=float(tf.tensordot(moved, uphill, 1)) / length if length else 0.0,
        gradient_error=float(tf.norm(found - wanted) / tf.norm(wanted)),
        restored=bool(tf.reduce_all(after == start)),
    )


def _flatten(tensors: Sequence[Any]) -> Any:
    parts = [
        part
        for t in tensors
        for part in ([tf.math.real(t), tf.math.imag(t)] if t.dtype.is_complex else [t])
    ]
    return tf.concat([tf.reshape(tf.cast(part, tf.float64), [-1]) for part in parts], 0)


def _flatten_gradients(gradients: Sequence[Any], like: Sequence[Any]) -> Any:
    pairs = zip(gradients, like, strict=True)
    return _flatten(
        [tf.zeros_like(value) if g is None else tf.convert_to_tensor(g) for g, value in pairs]
    )
