"""A probe that tells whether gradients are those of sharpness-aware minimization (SAM-14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from agc.verification import Verification

__all__ = ["Verification", "verify_sam"]

Loss = Callable[..., Any]


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
    returned = _flatten_gradients(gradients_of(watched), before)
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
    uphill, wanted = gradient_at(before), gradient_at(_unflatten(last, before))
    moved = last - start
    length = float(tf.norm(moved) * tf.norm(uphill))
    return Verification(
        passes=len({point.numpy().tobytes() for point in visited}),
        perturbation=float(tf.norm(moved)),
        cosine=float(tf.tensordot(moved, uphill, 1)) / length if length else 0.0,
        gradient_error=float(tf.norm(returned - wanted) / tf.norm(wanted)),
        restored=bool(tf.reduce_all(after == start)),
    )


def _flatten(tensors: Sequence[Any]) -> Any:
    reals = [
        real
        for t in tensors
        for real in ([tf.math.real(t), tf.math.imag(t)] if t.dtype.is_complex else [t])
    ]
    return tf.concat([tf.reshape(tf.cast(real, tf.float64), [-1]) for real in reals], 0)


def _unflatten(flat: Any, like: Sequence[Any]) -> list[Any]:
    values, offset = [], 0
    for value in like:
        reals = []
        for _ in range(1 + value.dtype.is_complex):
            size = int(tf.size(value))
            reals.append(tf.reshape(flat[offset : offset + size], value.shape))
            offset += size
        whole = tf.complex(*reals) if value.dtype.is_complex else reals[0]
        values.append(tf.cast(whole, value.dtype))
    return values


def _flatten_gradients(gradients: Sequence[Any], like: Sequence[Any]) -> Any:
    pairs = zip(gradients, like, strict=True)
    return _flatten(
        [tf.zeros_like(value) if g is None else tf.convert_to_tensor(g) for g, value in pairs]
    )
