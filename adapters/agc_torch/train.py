"""The step of ``agc train`` in PyTorch; the loop around it is :mod:`agc.training`."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from agc import AGC
from agc import nfnet as core
from agc.data import Batch, EvaluationBatch, normalisation_table, soft_labels
from agc.data.batches import block_of
from agc.errors import ConfigError, FormatError, NonFiniteError
from agc.recipe import Numbers, Recipe
from agc.recipe.tables import Sharpness, Weights
from agc.training import (
    Launch,
    Metrics,
    State,
    Totals,
    ascent_first,
    check_offered,
    trained_names,
)
from agc_torch.nfnet import NFNet
from agc_torch.optimizer import attach, attached
from agc_torch.processes import ENGINES, join, mean_, replicate, shard
from agc_torch.recipe import sgd_nfnet
from agc_torch.sam import SharpnessAware
from agc_torch.shards import gathered, is_dtensor, local
from agc_torch.weights import array_of, copy_array_, from_neutral, pairs_of

__all__ = ["Trainer", "trainer"]


class Trainer:
    """A recipe's model, optimizer, SAM and average; see :class:`agc.training.Trainer`.

    Parameters
    ----------
    recipe : Recipe
        Of an NFNet.
    launch : Launch
        ``device`` is a GPU if None and there is one, each process its own. ``engine`` is ``"ddp"``
        or ``"fsdp2"``, of several processes.

    Raises
    ------
    ConfigError
        If the recipe asks for what the model or the engine cannot do, there is no such device, or
        there are no processes for the engine.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        check_offered(launch, "PyTorch", engines=ENGINES)
        self._recipe = recipe
        self.hosts, self._device = join(launch.device)
        self._engine = _engine(recipe, launch)
        self._part = block_of("train.batch", recipe.train.batch, self.hosts.index, self.hosts.count)
        self._microbatch = launch.microbatch or len(self._part)
        facts: dict[str, Any] = {
            "framework": "torch",
            "torch": str(torch.__version__),
            "device": str(self._device),
        }
        if self._engine:
            facts |= {"processes": self.hosts.count, "engine": self._engine}
        self.facts: Mapping[str, Any] = facts
        self._model = NFNet(recipe.options(), device=self._device)
        if self._engine != "fsdp2":  # which takes contiguous parameters alone
            self._model.to(memory_format=torch.channels_last)
        trained = trained_names(recipe)
        for spec, parameter in pairs_of(self._model):
            parameter.requires_grad_(spec.name in trained)
        self._average = None
        if recipe.ema:
            self._average = copy.deepcopy(self._model).eval().requires_grad_(False)
        self._spread()
        self._optimizer = sgd_nfnet(
            self._model,
            lr=0.0,
            momentum=recipe.optimizer.momentum,
            weight_decay=recipe.optimizer.weight_decay,
            rule=self._rule(),
            max_norm=recipe.optimizer.max_norm,
        )
        self._handle = attached(self._optimizer)
        self._apart = bool(self._engine and recipe.sam and recipe.sam.group != "batch")
        if self._apart and self._handle:
            # Once for all groups of a step: after their gradients are added up, before AGC clips.
            self._handle.remove()
            self._optimizer.register_step_pre_hook(lambda *_: _average_gradients(self._model))
            self._handle = attach(
                self._optimizer, self._model, self._rule(), max_norm=recipe.optimizer.max_norm
            )
        self._sam = self._sharpness(recipe.sam) if recipe.sam else None
        table = normalisation_table(recipe.input.mean, recipe.input.std)
        self._table = torch.from_numpy(table).to(self._device)
        first = ascent_first(recipe)
        self._first = None if first is None else _of_part(first, self._part)
        self._made = 0
        self._now: Numbers | None = None

    def _spread(self) -> None:
        """Spread model and average over the processes."""
        self._parallel: Any = self._model
        if self._engine == "ddp":
            self._parallel = replicate(self._model)
        elif self._engine == "fsdp2":
            shard(self._model)
            if self._average is not None:
                shard(self._average)

    # --- the state --------------------------------------------------------------------------------

    def load(self, state: State) -> None:
        """Take over a state, and raise ParameterError if it is of another model."""
        pairs = pairs_of(self._model)
        core.check_arrays((spec for spec, _ in pairs), state.momentum)
        from_neutral(self._model, state.parameters)
        if self._average is not None:
            from_neutral(self._average, state.ema or {})
        self._begin(state.step)
        for name, buffer in self._parts()["momentum"].items():
            copy_array_(buffer, state.momentum[name])

    def _begin(self, step: int) -> None:
        """Begin at a step, with a momentum of 0."""
        for _, parameter in pairs_of(self._model):
            buffer = torch.zeros_like(parameter, requires_grad=False)
            self._optimizer.state[parameter] = {"momentum_buffer": buffer}
        if self._sam:
            self._sam.load_state_dict({"version": 1, "count": step})
        self._made = step

    def state(self) -> State:
        """Return a copy of the state; without arrays in all processes but the first."""
        parts: dict[str, Any] = {}
        for part, tensors in self._parts().items():
            whole = ((name, gathered(tensor)) for name, tensor in tensors.items())
            parts[part] = {name: array_of(tensor) for name, tensor in whole if self.hosts.first}
        return State(step=self._made, facts=self.facts, **parts)

    def save_sharded(self, folder: Path) -> None:
        """Write the state by ``torch.distributed.checkpoint``, each process its part."""
        tensors = self._tensors_by_name()
        finite = [local(tensor).isfinite().all() for tensor in tensors.values()]
        if self.hosts.any(not torch.stack(finite).all()):
            raise NonFiniteError(f"the state is not finite before step {self._made}")
        with _checkpoints(OSError, f"{folder}: cannot be written") as module:
            module.save(tensors, checkpoint_id=folder)

    def load_sharded(self, folder: Path, step: int) -> None:
        """Take over what :meth:`save_sharded` has written, on any number of processes."""
        self._begin(step)
        with _checkpoints(FormatError, f"{folder}: cannot be read") as module:
            module.load(self._tensors_by_name(), checkpoint_id=folder)

    def _tensors_by_name(self) -> dict[str, Tensor]:
        parts = self._parts().items()
        return {f"{part}.{name}": t.detach() for part, of in parts for name, t in of.items()}

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the parts of the state by canonical name, as they are in this process."""
        pairs, buffers = pairs_of(self._model), self._optimizer.state
        parts = {
            "parameters": {spec.name: parameter for spec, parameter in pairs},
            "momentum": {spec.name: buffers[p]["momentum_buffer"] for spec, p in pairs},
        }
        if self._average is not None:
            parts["ema"] = {spec.name: average for spec, average in pairs_of(self._average)}
        return parts

    # --- a step -----------------------------------------------------------------------------------

    def step(self, batch: Batch, numbers: Numbers) -> Metrics:
        """Make one step."""
        self._now = numbers
        for group in self._optimizer.param_groups:
            group["lr"] = float(numbers.rate)
        # What the model draws by itself is a function of the step too, so that to resume is exact.
        number = self._made * self.hosts.count + self.hosts.index
        torch.manual_seed((self._recipe.seed * 2**32 + number) % 2**63)
        tensors = self._tensors(batch)
        perturbed = None
        if self._sam:
            with self._parallel.no_sync() if self._apart else nullcontext():
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
        if self._engine:
            losses = [loss.float()] if perturbed is None else [loss.float(), perturbed.float()]
            mean_(losses)
            loss, perturbed = losses[0], losses[1] if losses[1:] else None
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
        """Leave the gradient of the mean loss on the parameters, and return this process's loss.

        Its mean over the processes is the mean over their examples.
        """
        self._optimizer.zero_grad()
        chosen, examples = self._chosen(tensors)
        total = torch.zeros((), device=self._device)
        columns = [tensor.split(self._microbatch) for tensor in chosen]
        last = len(columns[0]) - 1
        for number, (images, targets, *masks) in enumerate(zip(*columns, strict=True)):
            alone = self._engine == "ddp" and number < last
            with self._parallel.no_sync() if alone else nullcontext():
                with self._precision():
                    logits = self._parallel(images, masks=self._masks(masks))
                loss = F.cross_entropy(logits.float(), targets, reduction="sum") / examples
                loss.backward()
            total += loss.detach()
        if self._engine == "fsdp2":
            _average_gradients(self._model)
        return total

    def _chosen(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
        """Return what a pass takes, and by how many examples its sum of losses is divided."""
        sam = self._sam
        if self._first is None or not sam or sam.is_perturbed or not sam.rule.perturbs(sam.count):
            return tensors, len(tensors[0])
        # The ascent of all processes together: each has its own of the examples, but as many rows.
        assert self._recipe.sam
        places = self._recipe.sam.ascent(self._recipe.train.batch)
        counts = Counter(place // len(self._part) for place in places)
        images, targets, *masks = (tensor[: max(counts.values())] for tensor in tensors)
        targets = targets.clone()
        targets[counts[self.hosts.index] :] = 0
        return [images, targets, *masks], len(places) / self.hosts.count

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
            [local(parameter) for parameter in model.parameters()]
            for model in (self._average, self._model)
        )
        torch._foreach_lerp_(averages, weights, float(np.float32(1) - decay))

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
        total, *hits = self.hosts.total([loss.item(), *counts.tolist()])
        return Totals(total, *map(int, hits))

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
        rule = replace(sam.rule, rho=self._radius)
        if sam.group == "batch":  # whose ascent is chosen by _loss, over all processes
            rule = replace(rule, fraction=1.0, scope="global")
        else:
            rule = replace(rule, microbatches=len(self._part) // sam.group)
        return SharpnessAware(self._parallel, rule)

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


def _engine(recipe: Recipe, launch: Launch) -> str | None:
    """Return what spreads the training over processes; None of one that nobody launched."""
    engine = launch.engine
    if not (dist.is_available() and dist.is_initialized()):
        if engine:
            raise ConfigError(
                f'engine="{engine}" is of several processes: start them with torchrun, or leave it out'
            )
        return None
    if engine == "fsdp2" and recipe.sam and recipe.sam.group != "batch":
        raise ConfigError(
            f'engine="fsdp2": every gradient is that of all processes, and sam.group={recipe.sam.group} '
            'needs those of groups; set sam.group="batch", or engine="ddp"'
        )
    return engine or "ddp"


@contextmanager
def _checkpoints(failure: type[Exception], what: str) -> Iterator[Any]:
    """Give PyTorch's module of sharded checkpoints; raise a failure in place of its own."""
    # Here, because it takes longer to import than PyTorch itself.
    import torch.distributed.checkpoint as module

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield module
    except (module.CheckpointException, OSError, RuntimeError, ValueError) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()]  # by process
        raise failure(f"{what}: {[*causes, error][0]}") from None


def _of_part(places: Iterable[int], part: range) -> npt.NDArray[np.int64]:
    """Return those of the places in a batch that are a process's, counted from its first."""
    return np.array([place - part.start for place in places if place in part])


def _average_gradients(model: NFNet) -> None:
    """Average over all processes the gradients that nothing else has."""
    mean_([p.grad for p in model.parameters() if p.grad is not None and not is_dtensor(p)])


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the right one; all of them if its logit is NaN."""
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    behind = (own > logits) | ((own == logits) & (classes >= labels[:, None]))
    return logits.shape[1] - behind.sum(1)
