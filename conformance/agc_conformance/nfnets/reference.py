"""The right answers about NFNets: :class:`agc.reference.nfnet.NFNet`, and its training.

:class:`ReferenceModels` is cut into parts that a mutant replaces one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from agc import AGC
from agc.nfnet import HEAD, Masks, blocks, parameters, variant
from agc.plan import Parameter, Plan, make_plan
from agc.reference import Result, adaptive_clip
from agc.reference.nfnet import NFNet, smoothed_cross_entropy
from agc_conformance.backend import (
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
)

__all__ = ["MOMENTUM", "RULE", "WEIGHT_DECAY", "ReferenceModels"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

RULE: Final = AGC.profile("deepmind")
"""Configuration of AGC in all questions about NFNets."""
# Written again, not imported from the recipe: a slip there must show.
MOMENTUM: Final = 0.9
WEIGHT_DECAY: Final = 2e-5
"""Weight decay of DeepMind's optimizer."""


class ReferenceModels:
    """NFNets in float64."""

    network: type[NFNet] = NFNet

    def forward(self, problem: ModelProblem) -> ModelForward:
        """Run forward; in training mode, draw stochastic depth from a separate generator."""
        masks = None
        if problem.stochastic_depth is not None:
            random = np.random.RandomState(0)
            kept = [
                self.kept(rate, random.uniform(size=len(problem.images)))
                for block in blocks(problem.variant)
                for rate in [block.stochastic_depth * problem.stochastic_depth]
            ]
            masks = Masks(np.stack(kept, axis=1), None)
        with threadpool_limits(1, "blas"):  # more threads slow down small products
            forward = self.network(problem.variant, problem.parameters)(problem.images, masks)
        return ModelForward(forward.logits, forward.outputs, forward.signals)

    def gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run forward and backward, and clip."""
        loss, gradients = self.loss_and_gradients(problem, problem.parameters)
        plan = self.plan(problem)
        return ModelGradients(loss, gradients, self.clip(plan, problem.parameters, gradients), plan)

    def training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train: clip, decay, momentum, move (AGC-7)."""
        plan = self.plan(problem)
        weights = {n: np.asarray(w, np.float64) for n, w in problem.parameters.items()}
        buffers = {name: np.zeros_like(weight) for name, weight in weights.items()}
        for rate in recipe.rates:
            loss, gradients = self.loss_and_gradients(problem, weights)
            clipped = self.clip(plan, weights, gradients)
            for name, weight in weights.items():
                if recipe.optimizer == "nfnet":
                    update, buffers[name] = self.nfnet_update(
                        weight, clipped[name], buffers[name], rate
                    )
                else:
                    buffers[name] = recipe.momentum * buffers[name] + clipped[name]
                    update = rate * buffers[name]
                weights[name] = weight - update
            yield ModelStep(loss, dict(weights))

    # -- parts ----------------------------------------------------------------------------------

    def kept(self, rate: float, uniform: Array) -> Array:
        """Return the factor by which stochastic depth multiplies each image's residual branch."""
        return np.floor(1 - rate + uniform)

    def loss_and_gradients(
        self, problem: ModelProblem, weights: Arrays
    ) -> tuple[float, dict[str, Array]]:
        """Run forward and backward with some weights."""
        with threadpool_limits(1, "blas"):
            forward = self.network(problem.variant, weights)(problem.images)
            loss, d_logits = smoothed_cross_entropy(
                forward.logits, problem.labels, problem.smoothing
            )
            gradients = forward.backward(d_logits)
        return loss, {name: gradients[name] for name in weights}

    def plan(self, problem: ModelProblem) -> Plan:
        """Return the plan of the model, with the units of the neutral layout."""
        classes = len(problem.parameters[f"{HEAD}.bias"])
        specs = parameters(variant(problem.variant), classes, problem.images.shape[3])
        known = [Parameter(spec.name, spec.shape, spec.units, "out-last") for spec in specs]
        return make_plan(known, RULE, head=HEAD)

    def clipping(self, plan: Plan, weights: Arrays, gradients: Arrays) -> Result:
        """Clip, and return norms and limits too."""
        return adaptive_clip(weights, gradients, plan, RULE)

    def clip(self, plan: Plan, weights: Arrays, gradients: Arrays) -> dict[str, Array]:
        """Return the clipped gradients."""
        return dict(self.clipping(plan, weights, gradients).gradients)  # type: ignore[arg-type]

    def nfnet_update(
        self, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        """Return the change that DeepMind's optimizer subtracts from a weight, and the momentum."""
        decayed = gradient + (WEIGHT_DECAY * weight if weight.ndim > 1 else 0.0)
        buffer = MOMENTUM * buffer + decayed
        return rate * (decayed + MOMENTUM * buffer), buffer
