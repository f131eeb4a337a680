"""Mutants of recipes: wrong files, batches and numbers, and wrong trainings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.data import Batch, Batches, EvaluationBatch, open_source
from agc.errors import AGCError
from agc.nfnet import HEAD, Block, ParameterSpec
from agc.plan import Parameter, Plan, make_plan
from agc.recipe import Numbers, Recipe, load_recipe
from agc.recipe import numbers as numbers_of
from agc.recipe.tables import Weights
from agc.reference.nfnet import NFNet
from agc.training import Metrics, State
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.core.functions import Core
from agc_conformance.mutants.mutant import MUTANTS, Mutant, registered
from agc_conformance.training.reference import Array, Arrays, ReferenceTrainer

__all__: list[str] = []

Trainers = type[ReferenceTrainer]

# --- what no framework computes -------------------------------------------------------------------

_core_mutant = registered("recipes", "recipe: ")


@_core_mutant("RecipeLenient", "what cannot be read is the default recipe")
class _LenientFile(Core):
    def recipe(self, toml: str) -> Recipe:
        try:
            return super().recipe(toml)
        except AGCError:
            return load_recipe("conformance")


@_core_mutant("RecipeId", "the id is of the file's own keys, notes among them")
class _IdWithNotes(Core):
    def canonical(self, recipe: Recipe) -> str:
        return super().canonical(recipe) + "".join(recipe.notes)


@_core_mutant("RecipeId", "the seed is no part of the id")
class _IdWithoutSeed(Core):
    def canonical(self, recipe: Recipe) -> str:
        return super().canonical(replace(recipe, seed=0))


@_core_mutant("RateStep", "the rate of step t + 1")
class _RateOfTheNextStep(Core):
    def numbers(self, recipe: Recipe) -> Numbers:
        table = super().numbers(recipe)
        return replace(table, rate=np.append(table.rate[1:], table.rate[-1:]))


@_core_mutant("WarmupRounded", "integer steps, as torch's schedulers want")
class _WholeWarmup(Core):
    def numbers(self, recipe: Recipe) -> Numbers:
        whole = replace(recipe.schedule, warmup_epochs=None, warmup_steps=round(recipe.warmup))
        return super().numbers(replace(recipe, schedule=whole))


@_core_mutant("EmaWarmup", "a constant decay, as of Keras' use_ema")
class _ConstantDecay(Core):
    def numbers(self, recipe: Recipe) -> Numbers:
        ema = recipe.ema and replace(recipe.ema, warmup=False)
        return super().numbers(replace(recipe, ema=ema))


@_core_mutant("HostShuffle", "the seed of the order is the host's")
class _OwnShuffle(Core):
    def batch(self, recipe: Recipe, step: int, host: int = 0, hosts: int = 1) -> Batch:
        return super().batch(replace(recipe, seed=recipe.seed + host), step, host, hosts)


@_core_mutant("PartialEpoch", "drop_last=True of a loader")
class _PartialEpochDropped(Core):
    def batch(self, recipe: Recipe, step: int, host: int = 0, hosts: int = 1) -> Batch:
        split = recipe.data.train
        images = split.images - split.images % (2 * recipe.train.batch)
        if 2 * (step + 1) * recipe.train.batch <= images:
            return super().batch(recipe, step, host, hosts)
        source = open_source(recipe, "train")
        whole = replace(recipe, data=replace(recipe.data, train=replace(split, images=images)))
        rows = [source[row] for row in range(images)]
        return Batches(whole, rows, host=host, hosts=hosts)[step]


@_core_mutant("MixRatio", "the ratio is that of the second image")
class _OtherRatio(Core):
    def batch(self, recipe: Recipe, step: int, host: int = 0, hosts: int = 1) -> Batch:
        batch = super().batch(recipe, step, host, hosts)
        return batch._replace(ratio=1 - batch.ratio)


@_core_mutant("CutMixBox", "the first image is the one around the box")
class _OtherBox(Core):
    def batch(self, recipe: Recipe, step: int, host: int = 0, hosts: int = 1) -> Batch:
        batch = super().batch(recipe, step, host, hosts)
        cut = batch.numbers % 2 == 1
        return batch._replace(ratio=np.where(cut, 1 - batch.ratio, batch.ratio))


# --- trainings ------------------------------------------------------------------------------------


def _training(
    name: str, comment: str, clause: str = "RECIPE-5", kinds: str = "trajectory"
) -> Callable[[Trainers], Trainers]:
    """Register a wrong training."""

    def register(trainer: Trainers) -> Trainers:
        class Wrong(ReferenceBackend):
            training = trainer

        MUTANTS.append(Mutant(f"training: {name}", clause, comment, "training", Wrong, kinds))
        return trainer

    return register


@_training("rate of the next step", "the scheduler steps before the optimizer")
class _NextRate(ReferenceTrainer):
    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        following = min(self.made + 1, self.recipe.steps - 1)
        rate = numbers_of(self.recipe).at(following).rate
        return super().step(batch, replace(numbers, rate=rate))


@_training("float64 in float32", "a model made without the recipe's dtype")
class _Narrow(ReferenceTrainer):
    def stored(self, arrays: Arrays) -> dict[str, Array]:
        narrow = {name: array.astype(np.float32) for name, array in arrays.items()}
        return super().stored(narrow)


@_training("average begins at updated weights", "the first update copies (torch, Keras)")
class _CopiedAverage(ReferenceTrainer):
    def followed(self, average: Arrays, decay: float) -> Arrays:
        return super().followed(average, 0.0 if self.made == 0 else decay)


@_training("average without warm-up", "a constant decay")
class _ConstantAverage(ReferenceTrainer):
    def followed(self, average: Arrays, decay: float) -> Arrays:  # noqa: ARG002
        assert self.recipe.ema
        return super().followed(average, self.recipe.ema.decay)


@_training("average moves every micro-batch", "as Keras does when it accumulates")
class _EagerAverage(ReferenceTrainer):
    def followed(self, average: Arrays, decay: float) -> Arrays:
        for _ in range(self.recipe.train.batch // self.microbatch):
            average = super().followed(average, decay)
        return average


@_training("momentum contains the rate", "Keras' velocity")
class _RateInMomentum(ReferenceTrainer):
    def updated(
        self, spec: ParameterSpec, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        rule = self.recipe.optimizer
        if self.decays(spec):
            gradient = gradient + rule.weight_decay * weight
        buffer = rule.momentum * buffer + rate * gradient
        return weight - rate * gradient - rule.momentum * buffer, buffer


@_training("decay on biases", "all parameters in one group")
class _DecayedBiases(ReferenceTrainer):
    def decays(self, spec: ParameterSpec) -> bool:  # noqa: ARG002
        return True


@_training("accumulated sum", "gradients of micro-batches are added, not averaged")
class _Summed(ReferenceTrainer):
    def share(self, part: int, examples: int) -> float:  # noqa: ARG002
        return 1.0


@_training("AGC on every micro-batch", "clipped before the mean")
class _ClippedParts(ReferenceTrainer):
    def part_gradients(self, weights: Arrays, part: Sequence[Array]) -> tuple[float, Arrays]:
        loss, gradients = super().part_gradients(weights, part)
        return loss, self.clip({name: np.asarray(w) for name, w in weights.items()}, gradients)


@_training("masks drawn anew", "SAM's second pass drops something else")
class _NewMasks(ReferenceTrainer):
    def mean_gradients(self, weights: Arrays, arrays: Sequence[Array]) -> tuple[float, Arrays]:
        if weights is not self.weights and not self.at_weights(weights):
            images, targets, *masks = arrays
            arrays = [images, targets, *(np.roll(mask, 1, axis=0) for mask in masks)]
        return super().mean_gradients(weights, arrays)

    def at_weights(self, weights: Arrays) -> bool:
        """Tell whether these are not perturbed."""
        return all(np.array_equal(weights[name], self.weights[name]) for name in weights)


class _RescalingNetwork(NFNet):
    def block(self, block: Block, x: Any, keep: Any) -> Any:
        return super().block(block, x, keep / (1 - 0.25 * block.stochastic_depth))


@_training("keep rescaled", "what stochastic depth keeps is divided by its share (timm)")
class _Rescaled(ReferenceTrainer):
    network = _RescalingNetwork


class _DeafNetwork(NFNet):
    def __call__(self, images: Any, masks: Any = None) -> Any:
        return super().__call__(images, masks and masks._replace(dropout=None))


@_training("dropout ignored", "the given mask is not used", "RECIPE-4", "mask")
class _NoDropout(ReferenceTrainer):
    network = _DeafNetwork


@_training("gradient of one process", "replicas that nothing averages", kinds="processes")
class _OwnGradient(ReferenceTrainer):
    def gradients(self, arrays: list[Array]) -> tuple[float, float | None, Arrays]:
        loss, perturbed, _ = super().gradients(arrays)
        own = [array[: len(array) // self.processes] for array in arrays]
        return loss, perturbed, super().gradients(own)[2]


@_training("AGC in every process", "clipped before the mean over processes", kinds="processes")
class _ClippedProcesses(ReferenceTrainer):
    def gradients(self, arrays: list[Array]) -> tuple[float, float | None, Arrays]:
        loss, perturbed, _ = super().gradients(arrays)
        wide = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        parts = zip(*(np.split(array, self.processes) for array in arrays), strict=True)
        derive = super().gradients
        clipped = [self.clip(wide, derive(list(part))[2]) for part in parts]
        mean = {name: np.mean([each[name] for each in clipped], axis=0) for name in clipped[0]}
        return loss, perturbed, mean


@_training("ascent of one host", "the first fifth of the batch", kinds="sam")
class _FirstHost(ReferenceTrainer):
    def ascent(self, examples: int) -> Sequence[int]:
        return range(len(super().ascent(examples)))


@_training("global norm forgotten", "max_norm is read, and not used", kinds="sam")
class _Unlimited(ReferenceTrainer):
    def limit(self, gradients: Arrays) -> Arrays:
        return gradients


@_training("global norm before AGC", "clip_grad_norm_ before the step", "AGC-7", "sam")
class _LimitedFirst(ReferenceTrainer):
    def clip(self, weights: Arrays, gradients: Arrays) -> Arrays:
        return super().clip(weights, super().limit(gradients))

    def limit(self, gradients: Arrays) -> Arrays:
        return gradients


@_training("norm of each parameter", "Keras' clipnorm for its global_clipnorm", kinds="sam")
class _LimitedApart(ReferenceTrainer):
    def limit(self, gradients: Arrays) -> Arrays:
        parts = [super(_LimitedApart, self).limit({n: g}) for n, g in gradients.items()]
        return {name: gradient for part in parts for name, gradient in part.items()}


@_training("groups ignored", "one perturbation for the whole batch")
class _OneGroup(ReferenceTrainer):
    def gradients(self, arrays: list[Array]) -> tuple[float, float | None, Arrays]:
        recipe = self.recipe
        if recipe.sam:
            self.recipe = replace(recipe, sam=replace(recipe.sam, group="batch"))
        try:
            return super().gradients(arrays)
        finally:
            self.recipe = recipe


@_training("new head clipped", "what is excluded is the old head's name", "RECIPE-8", "finetune")
class _OldHead(ReferenceTrainer):
    def make_plan(self) -> Plan | None:
        if self.recipe.agc is None or self.recipe.model.head == "keep":
            return super().make_plan()
        known = [Parameter(s.name, s.shape, s.units, "out-last") for s in self.trained]
        return make_plan(known, replace(self.rule(), exclude=()), head=HEAD)


@_training("one batch again", "the step of a checkpoint is the last one made", "RECIPE-7", "resume")
class _OneBatchAgain(ReferenceTrainer):
    def load(self, state: State) -> None:
        super().load(replace(state, step=max(0, state.step - 1)))


_PROCESS: Final = secrets.randbits(64)
"""A seed that another process does not have."""


@_training("random rounding", "its seed is that of the process", "RECIPE-7", "resume")
class _RandomRounding(ReferenceTrainer):
    def stored(self, arrays: Arrays) -> dict[str, Array]:
        random = np.random.Generator(np.random.Philox(key=[_PROCESS, self.made]))
        near = super().stored(arrays)
        for name, rounded in near.items():
            off = arrays[name] - rounded.astype(np.float64)
            other = np.nextafter(rounded, np.where(off > 0, np.inf, -np.inf).astype(rounded.dtype))
            share = np.abs(off) / np.abs(other.astype(np.float64) - rounded)
            near[name] = np.where(random.random(rounded.shape) < share, other, rounded)
        return near


@_training("momentum left out", "checkpoints on the way are weights alone", "RECIPE-7", "migrate")
class _WeightsAlone(ReferenceTrainer):
    def state(self) -> State:
        state, recipe = super().state(), self.recipe
        if self.made == recipe.steps or self.made % recipe.checkpoint.every_steps:
            return state
        zeros = {name: np.zeros_like(array) for name, array in state.momentum.items()}
        return replace(state, momentum=zeros)


@_training("momentum forgotten", "a checkpoint of weights alone", "RECIPE-7", "migrate")
class _NoMomentum(ReferenceTrainer):
    def load(self, state: State) -> None:
        zeros = {name: np.zeros_like(array) for name, array in state.momentum.items()}
        super().load(replace(state, momentum=zeros))


@_training("average for weights", "raw accuracy is the average's", "RECIPE-6", "evaluate")
class _OnlyAverage(ReferenceTrainer):
    def evaluated(self, weights: Weights) -> Arrays:  # noqa: ARG002
        return super().evaluated("ema")


@_training("padding counted", "what fills the last batch up is classified", "RECIPE-6", "evaluate")
class _CountedPadding(ReferenceTrainer):
    def real(self, batch: EvaluationBatch) -> npt.NDArray[np.bool_]:
        return np.ones_like(super().real(batch))


@_training("last batch dropped", "drop_last=True of a loader", "RECIPE-6", "evaluate")
class _LastBatchDropped(ReferenceTrainer):
    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Any:
        whole = [batch for batch in batches if self.real(batch).all()]
        return super().evaluate(whole, weights)
