"""optax's ``adaptive_grad_clip``, DeepMind's AGC as a gradient transformation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from agc.backend import Array, Gradient, Optimizer, Outcome, Problem, Unavailable, Unsupported
from agc.reference import RowSparse
from agc_conformance.peers import Peer

__all__ = ["OptaxPeer", "backend"]


class OptaxPeer(Peer):
    """Clips the whole tree under jit; 64-bit types are on, so that no input is narrowed."""

    name: ClassVar[str] = "optax"
    layout: ClassVar[Any] = "flax"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )
    packages: ClassVar[tuple[str, ...]] = ("optax", "jax")

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        if find_spec("optax") is None:
            raise Unavailable("optax is not installed")

    def clip(self, problem: Problem) -> Outcome:
        """Clip a problem's gradients."""
        import jax
        import optax

        clip = optax.adaptive_grad_clip(self.threshold(problem.rule), eps=problem.rule.eps)
        with jax.enable_x64(True):
            gradients = _tree(problem.gradients)
            # optax takes a tree with holes, if the parameters have the same ones.
            weights = {
                name: None if gradient is None else jax.numpy.asarray(problem.parameters[name])
                for name, gradient in gradients.items()
            }
            clipped, _ = jax.jit(clip.update)(gradients, clip.init(weights), weights)
        return Outcome({n: None if g is None else np.asarray(g) for n, g in clipped.items()})

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Gradient]]
    ) -> list[Mapping[str, Array]]:
        """Chain clipping, coupled weight decay and ``optax.sgd``."""
        import jax
        import optax

        if optimizer.decoupled:
            raise Unsupported("optax.sgd has no decoupled weight decay")
        threshold = self.threshold(problem.rule)
        chain = optax.chain(
            optax.adaptive_grad_clip(threshold, eps=problem.rule.eps),
            optax.add_decayed_weights(optimizer.weight_decay),
            optax.sgd(optimizer.lr, optimizer.momentum or None, optimizer.nesterov),
        )
        trajectory: list[Mapping[str, Array]] = []
        with jax.enable_x64(True):
            weights = {n: jax.numpy.asarray(w) for n, w in problem.parameters.items()}
            state = chain.init(weights)
            for step in gradients:
                updates, state = chain.update(_tree(step), state, weights)
                weights = optax.apply_updates(weights, updates)
                trajectory.append({name: np.asarray(w) for name, w in weights.items()})
        return trajectory


def _tree(gradients: Mapping[str, Gradient]) -> dict[str, Any]:
    import jax

    if any(isinstance(gradient, RowSparse) for gradient in gradients.values()):
        raise Unsupported("JAX has no row-sparse gradients")
    return {n: None if g is None else jax.numpy.asarray(g) for n, g in gradients.items()}


backend = OptaxPeer
