"""A probe that tells whether a gradient function is sharpness-aware minimization (SAM-14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from agc.verification import Verification

__all__ = ["Verification", "verify_sam"]

Tree = Any


def verify_sam(
    make: Callable[[Callable[..., jax.Array]], Callable[..., Any]],
    loss_fn: Callable[..., jax.Array],
    weights: Tree,
    *args: Any,
) -> Verification:
    """Tell whether a gradient function really is taken at the perturbed weights (SAM-14).

    Parameters
    ----------
    make : callable
        Builds the gradient function under test from a loss function, for example
        ``lambda f: sam_value_and_grad(f, SAM())``. It must take the weights first and return
        ``(value, gradients)``.
    loss_fn : callable
        ``loss_fn(weights, *args)``, a scalar.
    weights : pytree
        The weights.
    *args
        The batch and whatever else the loss needs.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    visited: list[jax.Array] = []

    def watched(point: Tree, *rest: Any) -> jax.Array:
        jax.debug.callback(
            lambda flat: visited.append(flat), jax.lax.stop_gradient(_flatten(point))
        )
        return loss_fn(point, *rest)

    start = _flatten(weights)
    before = np.asarray(start).tobytes()
    _, gradients = make(watched)(weights, *args)
    jax.effects_barrier()
    after = np.asarray(_flatten(weights)).tobytes()  # NumPy's arrays can be written to
    points = {np.asarray(point).tobytes(): point for point in visited}
    last = max(
        points.values(), key=lambda point: float(jnp.linalg.norm(point - start)), default=start
    )
    unflatten = jax.flatten_util.ravel_pytree(weights)[1]
    uphill = _flatten(jax.grad(loss_fn)(weights, *args))
    wanted = _flatten(jax.grad(loss_fn)(unflatten(last), *args))
    moved = last - start
    length = float(jnp.linalg.norm(moved) * jnp.linalg.norm(uphill))
    return Verification(
        passes=len(points),
        perturbation=float(jnp.linalg.norm(moved)),
        # JAX's gradient of complex weights is the conjugate of the direction uphill.
        cosine=float((moved @ uphill).real) / length if length else 0.0,
        gradient_error=float(
            jnp.linalg.norm(_flatten(gradients) - wanted) / jnp.linalg.norm(wanted)
        ),
        restored=after == before,
    )


def _flatten(tree: Tree) -> jax.Array:
    return jax.flatten_util.ravel_pytree(tree)[0]
