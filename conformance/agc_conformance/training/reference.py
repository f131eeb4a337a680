"""The step of a recipe's training in float64, written from the specification.

:class:`ReferenceTrainer` is cut into parts that a mutant replaces one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from agc import AGC
from agc.data import Batch, EvaluationBatch, normalise, soft_labels
from agc.errors import ConfigError
from agc.nfnet import HEAD, Masks, ParameterSpec, parameters
from agc.plan import Parameter, Plan, make_plan
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Weights
from agc.reference import Result, adaptive_clip, sharpness_aware_gradients
from agc.reference.nfnet import NFNet
from agc.training import Hosts, Launch, Metrics, State, Totals, trained_names

__all__ = ["ReferenceTrainer"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class ReferenceTrainer:
    """A training in NumPy; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet, whose masks are all in its batches.
    launch : Launch, optional
        Only ``microbatch`` counts.
    dtype : dtype
        Of the state between the steps: float64 for the right numbers, that of the recipe for a
        training that goes on from a file bit for bit. Every step is computed in float64.
    processes : int
        Whose batches these are; no number depends on it.

    Attributes
    ----------
    clipping : Result or None
        What AGC did in the last step.
    """

    network: type[NFNet] = NFNet

    def __init__(
        self,
        recipe: Recipe,
        launch: Launch | None = None,
        *,
        dtype: npt.DTypeLike = np.float64,
        processes: int = 1,
    ) -> None:
        self.facts: Mapping[str, Any] = {"framework": "reference", "numpy": np.__version__}
        self.hosts = Hosts()
        self.recipe, self.dtype, self.processes = recipe, np.dtype(dtype), processes
        self.microbatch = (launch and launch.microbatch) or recipe.train.batch
        model = recipe.model.options()
        self.variant, self.dropout = model.variant, model.dropout
        every = parameters(model.variant, model.num_classes, model.in_channels)
        self.names = [spec.name for spec in every]
        trained = trained_names(recipe)
        self.trained = [spec for spec in every if spec.name in trained]
        self.plan = self.make_plan()
        self.clipping: Result | None = None
        self.made = 0
        self.now: Numbers | None = None
        self.weights: dict[str, Array] = {}
        self.momentum: dict[str, Array] = {}
        self.average: dict[str, Array] | None = None

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state."""
        self.weights, self.momentum = self.stored(state.parameters), self.stored(state.momentum)
        self.average = None if state.ema is None else self.stored(state.ema)
        self.made = state.step

    def state(self) -> State:
        """Return a copy of the state; its arrays have the dtype of this training."""
        return State(
            step=self.made,
            parameters=self.stored(self.weights),
            momentum=self.stored(self.momentum),
            ema=None if self.average is None else self.stored(self.average),
            facts=self.facts,
        )

    def stored(self, arrays: Arrays) -> dict[str, Array]:
        """Return copies in the dtype of the state."""
        return {name: np.array(arrays[name], self.dtype) for name in self.names}

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step: ascent of SAM, gradient, AGC, norm, decay, momentum, average (AGC-7)."""
        self.now = numbers
        with threadpool_limits(1, "blas"):  # more threads slow down small products
            loss, perturbed, gradients = self.gradients(self.arrays(batch))
        wide = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        gradients = self.limit(self.clip(wide, gradients))
        for spec in self.trained:
            name = spec.name
            wide[name], buffer = self.updated(
                spec, wide[name], gradients[name], self.momentum[name], float(numbers.rate)
            )
            self.momentum[name] = buffer.astype(self.dtype)
        self.weights = self.stored(wide)
        if self.average is not None and numbers.ema_decay is not None:
            self.average = self.stored(self.followed(self.average, float(numbers.ema_decay)))
        self.made += 1
        if self.clipping is None:
            return Metrics(loss=loss, perturbed_loss=perturbed)
        total = self.clipping.total
        return Metrics(
            loss=loss,
            perturbed_loss=perturbed,
            units=total.units,
            clipped=total.clipped,
            max_ratio=total.max_ratio,
        )

    def arrays(self, batch: Batch) -> list[Array]:
        """Return images, targets and masks, in float64 where they are numbers."""
        model, images = self.recipe.model, batch.images
        if images.dtype == np.uint8:
            images = normalise(images, self.recipe.input.mean, self.recipe.input.std)
        assert model.num_classes is not None
        smoothing = self.recipe.train.smoothing
        targets = soft_labels(batch, model.num_classes, smoothing, np.float64)
        masks = []
        for rate, mask in zip((model.stochastic_depth, model.dropout), batch.masks, strict=True):
            if mask is None and rate:
                raise ConfigError("the reference draws no masks; name both in train.masks")
            # An empty mask stands for none, and can be cut like the others.
            masks.append(np.ones((len(targets), 0), np.bool_) if mask is None else mask)
        return [images, targets, *masks]

    def gradients(self, arrays: list[Array]) -> tuple[float, float | None, Arrays]:
        """Return the loss, that at the perturbed weights if there is one, and the gradients."""
        sam = self.recipe.sam
        if sam is None:
            loss, gradients = self.mean_gradients(self.weights, arrays)
            return loss, None, gradients
        examples = len(arrays[0])
        groups = 1 if sam.group == "batch" else examples // sam.group
        if sam.group == "batch":
            first = self.ascent(examples)
            order = [*first, *(n for n in range(examples) if n not in first)]
            arrays = [array[order] for array in arrays]
        rule = replace(sam.rule, microbatches=groups, rho=self.radius)
        result = sharpness_aware_gradients(
            self.mean_gradients, self.weights, arrays, rule, step=self.made
        )
        perturbed = result.perturbed_loss if result.norms else None
        return result.loss, perturbed, result.gradients  # type: ignore[return-value]

    def radius(self, _: int) -> float:
        """Return rho in the step that is made (RECIPE-3)."""
        assert self.now is not None
        return float(self.now.rho or 0)

    def ascent(self, examples: int) -> Sequence[int]:
        """Return the examples of the ascent, if the whole batch shares a perturbation (SAM-7)."""
        assert self.recipe.sam is not None
        return self.recipe.sam.ascent(examples)

    def mean_gradients(self, weights: Arrays, arrays: Sequence[Array]) -> tuple[float, Arrays]:
        """Return the mean loss of examples and its gradient, one micro-batch after another."""
        examples = len(arrays[0])
        total, sums = 0.0, dict.fromkeys(self.names, np.zeros(()))
        for start in range(0, examples, self.microbatch):
            part = [array[start : start + self.microbatch] for array in arrays]
            share = self.share(len(part[0]), examples)
            loss, gradients = self.part_gradients(weights, part)
            total += share * loss
            sums = {name: sums[name] + share * gradients[name] for name in sums}
        return total, sums

    def share(self, part: int, examples: int) -> float:
        """Return the weight of a micro-batch's mean."""
        return part / examples

    def part_gradients(self, weights: Arrays, part: Sequence[Array]) -> tuple[float, Arrays]:
        """Return the mean loss of one micro-batch, and its gradient; constants have zeros."""
        images, targets, *masks = part
        given = Masks(*(mask if mask.shape[1] else None for mask in masks))
        forward = self.network(self.variant, weights, dropout=self.dropout)(images, given)
        shifted = forward.logits - forward.logits.max(1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        gradients = forward.backward((np.exp(log_probabilities) - targets) / len(targets))
        loss = float(-np.sum(targets * log_probabilities) / len(targets))
        trained = {spec.name for spec in self.trained}
        zeros = {name: np.zeros_like(w) for name, w in weights.items() if name not in trained}
        return loss, gradients | zeros

    def make_plan(self) -> Plan | None:
        """Return the plan of AGC, if the recipe has it."""
        known = [Parameter(s.name, s.shape, s.units, "out-last") for s in self.trained]
        return make_plan(known, self.rule(), head=HEAD) if self.recipe.agc else None

    def rule(self) -> AGC:
        """Return the rule of AGC, with the thresholds of the step (RECIPE-3)."""
        rule = self.recipe.agc
        assert rule is not None
        patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
        return replace(rule, clipping={name: partial(self.threshold, name) for name in patterns})

    def threshold(self, pattern: str, _: int) -> float:
        """Return the threshold of a pattern in the step that is made."""
        assert self.now is not None
        return float(self.now.clipping[pattern])

    def clip(self, weights: Arrays, gradients: Arrays) -> Arrays:
        """Return the clipped gradients of what is trained."""
        if self.plan is None or self.recipe.agc is None:
            return gradients
        own, given = ({s.name: of[s.name] for s in self.trained} for of in (weights, gradients))
        self.clipping = adaptive_clip(own, given, self.plan, self.recipe.agc, step=self.made)
        return self.clipping.gradients  # type: ignore[return-value]

    def limit(self, gradients: Arrays) -> Arrays:
        """Return gradients whose norm all together is at most the recipe's ``max_norm``."""
        most = self.recipe.optimizer.max_norm
        norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values())))
        if most is None or norm <= most:
            return gradients
        return {name: gradient * (most / norm) for name, gradient in gradients.items()}

    def updated(
        self, spec: ParameterSpec, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        """Return a weight after decay, momentum and rate, and its momentum."""
        rule = self.recipe.optimizer
        if self.decays(spec):
            gradient = gradient + rule.weight_decay * weight
        buffer = rule.momentum * buffer + gradient
        return weight - rate * (gradient + rule.momentum * buffer), buffer

    def decays(self, spec: ParameterSpec) -> bool:
        """Tell whether a parameter is decayed."""
        return spec.decays

    def followed(self, average: Arrays, decay: float) -> Arrays:
        """Return the average after it moved towards the updated weights."""
        return {
            name: decay * value + (1 - decay) * self.weights[name]
            for name, value in average.items()
        }

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images in float64; of equal logits, that of the lowest class comes first."""
        network = self.network(self.variant, self.evaluated(weights))
        loss, top1, top5, images = 0.0, 0, 0, 0
        for logits, labels in self._classified(network, batches):
            shifted = logits - logits.max(1, keepdims=True)
            own = np.take_along_axis(shifted, labels[:, None], 1)
            loss += float(np.sum(np.log(np.exp(shifted).sum(1, keepdims=True)) - own))
            earlier = np.arange(logits.shape[1]) < labels[:, None]
            rank = np.sum((shifted > own) | ((shifted == own) & earlier), 1)
            top1, top5 = top1 + int(np.sum(rank < 1)), top5 + int(np.sum(rank < 5))
            images += len(labels)
        return Totals(loss, top1, top5, images)

    def evaluated(self, weights: Weights) -> Arrays:
        """Return the arrays that are evaluated."""
        arrays = self.average if weights == "ema" else self.weights
        assert arrays is not None
        return arrays

    def real(self, batch: EvaluationBatch) -> npt.NDArray[np.bool_]:
        """Tell which entries of a batch are images."""
        return batch.weight > 0

    def _classified(
        self, network: NFNet, batches: Iterable[EvaluationBatch]
    ) -> Iterator[tuple[Array, Array]]:
        with threadpool_limits(1, "blas"):
            for batch in batches:
                real = self.real(batch)
                yield network(batch.images[real]).logits, batch.labels[real]
