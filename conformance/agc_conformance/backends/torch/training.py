"""Training of the suite's network on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc.recipe import Recipe
from agc.training import Launch, Trainer
from agc_conformance.backend import TrainingTask, TrainStep, Unsupported
from agc_conformance.backends.torch.arrays import gradient_arrays, plain_sgd, to_array
from agc_conformance.backends.torch.clipping import attach_sgd
from agc_conformance.backends.torch.device import Device
from agc_conformance.training.processes import Process, anew, free_addresses, started
from agc_conformance.training.within import Within
from agc_torch.sam import SharpnessAware
from agc_torch.train import trainer

__all__ = ["Training"]

Array = npt.NDArray[Any]


class Training(Device):
    """A training loop as users write it."""

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        """Train the suite's network with SAM, if asked for, and ``torch.optim.SGD`` with AGC."""
        model = _Network(task.weights).to(self.device)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(task.weights[name]))
        # Gradients and weights given to the step, before AGC; weights of the last forward pass.
        raw: dict[str, Array] = {}
        given: dict[str, Array] = {}
        seen: dict[str, Array] = {}

        def weights() -> dict[str, Array]:
            return {name: to_array(parameter) for name, parameter in parameters.items()}

        model.register_forward_pre_hook(lambda *_: seen.update(weights()))
        sgd = plain_sgd(parameters, task.optimizer)
        sgd.register_step_pre_hook(lambda *_: raw.update(gradient_arrays(parameters)))
        sgd.register_step_pre_hook(lambda *_: given.update(weights()))
        handle = attach_sgd(sgd, model, task.rule, task.optimizer)
        sam = None if task.sharpness is None else SharpnessAware(model, task.sharpness)

        def closure(images: Tensor, labels: Tensor) -> Tensor:
            sgd.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        for arrays in task.batches:
            before = weights()
            batch = [torch.from_numpy(array).to(self.device) for array in arrays]
            if sam is None:
                loss = closure(*batch).detach()
                sgd.step()
            else:
                loss = sam.step(sgd, closure, batch=batch)
            yield TrainStep(
                float(loss),
                before,
                dict(raw),
                gradient_arrays(parameters),
                weights(),
                handle.plan,
                dict(seen),
                dict(given),
            )

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Train as ``agc train`` does, with TF32 switched off."""
        return Within(trainer(recipe, replace(launch, device=self.device)), self.exact)

    def processes(self, count: int) -> AbstractContextManager[Callable[[Recipe, Launch], Trainer]]:
        """Start processes as ``torchrun`` does."""
        if self.device != "cpu":
            raise Unsupported("several processes are started on the CPU alone")
        (address,) = free_addresses(1)
        host, _, port = address.partition(":")
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": host, "MASTER_PORT": port}
        crew = [
            Process({**group, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, {"device": "cpu"})
            for rank in range(count)
        ]
        return started("agc_torch.train:trainer", crew)

    def elsewhere(self) -> Callable[[Recipe, Launch], Trainer]:
        """Make this backend there too."""
        if self.device != "cpu":
            raise Unsupported("another process is started on the CPU alone")
        return partial(anew, type(self), self.device)


class _Network(nn.Module):  # type: ignore[misc]
    """The network of :class:`agc_conformance.backend.TrainingTask`."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        super().__init__()
        first, channels = weights["conv1.weight"].shape[:2]
        second = len(weights["conv2.weight"])
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.head = nn.Linear(second, len(weights["head.weight"]))

    def forward(self, images: Tensor) -> Any:
        hidden = nn.functional.silu(self.conv1(images))
        hidden = nn.functional.silu(self.conv2(hidden))
        return self.head(hidden.mean((2, 3)))
