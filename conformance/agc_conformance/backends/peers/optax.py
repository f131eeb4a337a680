"""optax's ``adaptive_grad_clip`` (DeepMind's AGC as a transformation) and ``optax.contrib.sam``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from agc import AGC
from agc.reference import RowSparse
from agc_conformance.backend import (
    Array,
    Examples,
    Gradient,
    Optimizer,
    Outcome,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.peers import Peer

__all__ = ["OptaxPeer", "backend"]


class OptaxPeer(Peer):
    """Clips the whole tree under jit; 64-bit types are on, so that no input is narrowed.

    SAM is run in opaque mode, in which one call is one step; the caller computes the first
    gradients.
    """

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
            # optax accepts None for a gradient if the parameter is None too.
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

        chain = self._chain(problem.rule, optimizer)
        trajectory: list[Mapping[str, Array]] = []
        with jax.enable_x64(True):
            weights = {n: jax.numpy.asarray(w) for n, w in problem.parameters.items()}
            state = chain.init(weights)
            for step in gradients:
                updates, state = chain.update(_tree(step), state, weights)
                weights = optax.apply_updates(weights, updates)
                trajectory.append({name: np.asarray(w) for name, w in weights.items()})
        return trajectory

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Put SAM in front of a transformation that changes nothing."""
        import jax
        import optax

        sam = self._sam(problem, optax.identity())
        with jax.enable_x64(True):
            weights = _tree(problem.parameters)
            gradients, _ = _update(sam)(weights, sam.init(weights), *_batch(problem.examples))
        return SharpnessOutcome(
            {name: np.asarray(g) for name, g in gradients.items()},
            {name: np.asarray(w) for name, w in weights.items()},
        )

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Put SAM in front of clipping (if asked for), coupled weight decay and ``optax.sgd``."""
        import jax
        import optax

        problem = task.problem
        sam = self._sam(problem, self._chain(problem.clipping, task.optimizer))
        trajectory: list[Mapping[str, Array]] = []
        with jax.enable_x64(True):
            weights = _tree(problem.parameters)
            state = sam.init(weights)
            for index, examples in enumerate(task.batches):
                if index == task.restart:
                    saved = [np.asarray(leaf) for leaf in jax.tree.leaves((weights, state))]
                    fresh = sam.init(_tree(problem.parameters))
                    structure = jax.tree.structure((problem.parameters, fresh))
                    weights, state = jax.tree.unflatten(structure, saved)
                updates, state = _update(sam)(weights, state, *_batch(examples))
                weights = optax.apply_updates(weights, updates)
                trajectory.append({name: np.asarray(w) for name, w in weights.items()})
        return trajectory

    def _chain(self, rule: AGC | None, optimizer: Optimizer) -> Any:
        """Chain clipping, if there is a rule, coupled weight decay and ``optax.sgd``."""
        import optax

        if optimizer.decoupled:
            raise Unsupported("optax.sgd has no decoupled weight decay")
        clip = optax.identity()
        if rule is not None:
            clip = optax.adaptive_grad_clip(self.threshold(rule), eps=rule.eps)
        return optax.chain(
            clip,
            optax.add_decayed_weights(optimizer.weight_decay),
            optax.sgd(optimizer.lr, optimizer.momentum or None, optimizer.nesterov),
        )

    def _sam(self, problem: SharpnessProblem, behind: Any) -> Any:
        """Build SAM as optax's documentation does to reproduce the paper."""
        import optax

        rule = problem.rule
        rho = self.radius(rule)
        self.lacks({"adaptive": rule.adaptive, f"eps={rule.eps}": rule.eps != 0})
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        return optax.contrib.sam(behind, ascent, opaque_mode=True)


def _update(sam: Any) -> Any:
    """Return one step, jitted, as a function of weights, state and batch."""
    import jax

    def update(weights: Any, state: Any, *batch: Any) -> Any:
        gradient = functools.partial(jax.grad(_mean_loss), curvatures=batch[0], centers=batch[1])
        return sam.update(
            gradient(weights), state, weights, grad_fn=lambda weights, _: gradient(weights)
        )

    return jax.jit(update)


def _mean_loss(weights: Any, *, curvatures: Any, centers: Any) -> Any:
    """Return the loss of :class:`agc_conformance.backend.Examples`."""
    import jax

    losses = []
    for name, a in curvatures.items():
        away = weights[name].astype(a.dtype) - centers[name]
        losses.append(jax.numpy.sum(0.5 * a * away**2, axis=tuple(range(1, a.ndim))))
    return jax.numpy.mean(sum(losses[1:], losses[0]))


def _batch(examples: Examples) -> tuple[dict[str, Any], dict[str, Any]]:
    return _tree(examples.curvatures), _tree(examples.centers)


def _tree(gradients: Mapping[str, Gradient]) -> dict[str, Any]:
    import jax

    if any(isinstance(gradient, RowSparse) for gradient in gradients.values()):
        raise Unsupported("JAX has no row-sparse gradients")
    return {n: None if g is None else jax.numpy.asarray(g) for n, g in gradients.items()}


backend = OptaxPeer
