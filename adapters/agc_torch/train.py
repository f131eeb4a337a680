"""The step of ``agc train`` in PyTorch; the loop around it is :mod:`agc.training`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from agc import AGC
from agc import nfnet as core
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.errors import ConfigError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Sharpness, Weights
from agc.training import (
    Hosts,
    Launch,
    Metrics,
    State,
    Totals,
    ascent_first,
    check_offered,
    trained_names,
)
from agc_torch.nfnet import NFNet
from agc_torch.optimizer import attached
from agc_torch.recipe import sgd_nfnet
from agc_torch.sam import SharpnessAware
from agc_torch.weights import array_of, copy_array_, from_neutral, pairs_of, to_neutral

__all__ = ["Trainer", "trainer"]


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is a GPU if None and there is one.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model cannot do, or there is no such device.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        check_offered(recipe, launch, "PyTorch", parts=True)
        self._recipe = recipe
        self._microbatch = launch.microbatch or recipe.train.batch
        self._device = _device(launch.device)
        self.hosts = Hosts()
        self.facts: Mapping[str, Any] = {
            "framework": "torch",
            "torch": str(torch.__version__),
            "device": str(self._device),
        }
        model = NFNet(recipe.model.options(), device=self._device)
        self._model = model.to(memory_format=torch.channels_last)
        trained = trained_names(recipe)
        for spec, parameter in pairs_of(self._model):
            parameter.requires_grad_(spec.name in trained)
        self._average = None
        if recipe.ema:
            self._average = copy.deepcopy(self._model).eval().requires_grad_(False)
        self._optimizer = sgd_nfnet(
            self._model,
            lr=0.0,
            momentum=recipe.optimizer.momentum,
            weight_decay=recipe.optimizer.weight_decay,
            rule=self._rule(),
        )
        self._handle = attached(self._optimizer)
        self._sam = self._sharpness(recipe.sam) if recipe.sam else None
        table = normalisation_table(recipe.input.mean, recipe.input.std)
        self._table = torch.from_numpy(table).to(self._device)
        self._first = ascent_first(recipe)
        self._made = 0
        self._now: Numbers | None = None

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        pairs = pairs_of(self._model)
        core.check_arrays((spec for spec, _ in pairs), state.momentum)
        from_neutral(self._model, state.parameters)
        if self._average is not None:
            from_neutral(self._average, state.ema or {})
        for spec, parameter in pairs:
            buffer = torch.zeros_like(parameter)
            copy_array_(buffer, state.momentum[spec.name])
            self._optimizer.state[parameter] = {"momentum_buffer": buffer}
        if self._sam:
            self._sam.load_state_dict({"version": 1, "count": state.step})
        self._made = state.step

    def state(self) -> State:
        """Return a copy of the state."""
        buffers = self._optimizer.state
        return State(
            step=self._made,
            parameters=to_neutral(self._model),
            momentum={
                spec.name: array_of(buffers[parameter]["momentum_buffer"])
                for spec, parameter in pairs_of(self._model)
            },
            ema=None if self._average is None else to_neutral(self._average),
            facts=self.facts,
        )

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        self._now = numbers
        for group in self._optimizer.param_groups:
            group["lr"] = float(numbers.rate)
        # What the model draws by itself is a function of the step too, so that to resume is exact.
        torch.manual_seed((self._recipe.seed * 2**32 + self._made) % 2**63)
        tensors = self._tensors(batch)
        perturbed = None
        if self._sam:
            loss = self._sam.step(self._optimizer, self._loss, batch=tensors)
            stats = self._sam.stats()
            if stats and float(numbers.rho or 0):
                perturbed = stats.perturbed_loss
        else:
            loss = self._loss(*tensors)
            self._optimizer.step()
        if numbers.ema_decay is not None:
            self._follow(numbers.ema_decay)
        self._made += 1
        clipping = self._handle.stats() if self._handle and self._recipe.agc else None
        if clipping is None:
            return Metrics(loss=loss, perturbed_loss=perturbed)
        return Metrics(
            loss=loss,
            perturbed_loss=perturbed,
            units=clipping.units,
            clipped=clipping.clipped,
            max_ratio=clipping.max_ratio,
        )

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """Return what the loss takes: images, targets, and the masks that there are."""
        recipe = self._recipe
        assert recipe.model.num_classes is not None
        targets = soft_labels(batch, recipe.model.num_classes, recipe.train.smoothing)
        arrays = [targets, *(mask for mask in batch.masks if mask is not None)]
        tensors = [self._images(batch.images), *(self._tensor(array) for array in arrays)]
        if self._first is not None:
            order = self._tensor(self._first)
            tensors = [tensor[order] for tensor in tensors]
        return tensors

    def _images(self, images: Any) -> Tensor:
        """Return images with their channels second; bytes are normalised as the core does it."""
        tensor = self._tensor(images)
        if tensor.dtype == torch.uint8:
            channels = torch.arange(tensor.shape[3], device=self._device)
            tensor = self._table[tensor.long(), channels]
        return tensor.permute(0, 3, 1, 2)

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array).to(self._device, non_blocking=True)

    def _loss(self, *tensors: Tensor) -> Tensor:
        """Leave the gradient of the mean loss on the parameters, and return the loss."""
        self._optimizer.zero_grad()
        examples = len(tensors[0])
        total = torch.zeros((), device=self._device)
        for images, targets, *masks in zip(
            *(tensor.split(self._microbatch) for tensor in tensors), strict=True
        ):
            with self._precision():
                logits = self._model(images, masks=self._masks(masks))
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / examples
            loss.backward()
            total += loss.detach()
        return total

    def _precision(self) -> Any:
        low = self._recipe.precision.compute == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=low)

    def _masks(self, masks: Iterable[Tensor]) -> core.Masks:
        named = dict(zip(_masks_of(self._recipe), masks, strict=True))
        return core.Masks(named.get("stochastic_depth"), named.get("dropout"))

    def _follow(self, decay: Any) -> None:
        """Move the average towards the updated weights."""
        assert self._average is not None
        averages, weights = (
            [parameter.detach() for parameter in model.parameters()]
            for model in (self._average, self._model)
        )
        torch._foreach_mul_(averages, float(decay))
        torch._foreach_add_(averages, weights, alpha=float(np.float32(1) - decay))

    # --- an evaluation ----------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[EvaluationBatch], weights: Weights) -> Totals:
        """Classify all images; of equal logits, that of the lowest class counts as the largest."""
        model = self._average if weights == "ema" else self._model
        assert model is not None
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        counts = torch.zeros(3, dtype=torch.int64, device=self._device)
        model.eval()
        with torch.no_grad():
            for batch in batches:
                labels, real = self._tensor(batch.labels).long(), self._tensor(batch.weight) > 0
                logits = model(self._images(batch.images))
                losses = F.cross_entropy(logits, labels, reduction="none")
                loss += losses[real].double().sum()
                rank = _rank(logits, labels)[real]
                top1, top5 = ((rank < min(n, logits.shape[1])).sum() for n in (1, 5))
                counts += torch.stack([top1, top5, real.sum()])
        self._model.train()
        return Totals(loss.item(), *counts.tolist())

    # --- rules that follow the numbers of the step ------------------------------------------------

    def _rule(self) -> AGC:
        rule = self._recipe.agc
        if rule is None:
            return AGC(clipping=None)
        patterns = rule.clipping if isinstance(rule.clipping, Mapping) else ["*"]
        return replace(
            rule, clipping={pattern: partial(self._threshold, pattern) for pattern in patterns}
        )

    def _threshold(self, pattern: str, _: int) -> float:
        assert self._now is not None
        return float(self._now.clipping[pattern])

    def _sharpness(self, sam: Sharpness) -> SharpnessAware:
        count = 1 if sam.group == "batch" else self._recipe.train.batch // sam.group
        return SharpnessAware(self._model, replace(sam.rule, rho=self._radius, microbatches=count))

    def _radius(self, _: int) -> float:
        assert self._now is not None
        assert self._now.rho is not None
        return float(self._now.rho)


def trainer(recipe: Recipe, launch: Launch) -> Trainer:
    """Return a training; see :meth:`agc.cli.frameworks.Framework.trainer`."""
    return Trainer(recipe, launch)


def _masks_of(recipe: Recipe) -> list[str]:
    """Return which masks are part of a batch, in the batch's order."""
    model = recipe.model
    rates = {"stochastic_depth": model.stochastic_depth, "dropout": model.dropout}
    return [name for name, rate in rates.items() if name in recipe.train.masks and rate]


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r}: PyTorch cannot use it: {error}") from None
    return device


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the right one; all of them if its logit is NaN."""
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    behind = (own > logits) | ((own == logits) & (classes >= labels[:, None]))
    return logits.shape[1] - behind.sum(1)
