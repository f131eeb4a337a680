"""SAM in front of an optimizer that only records gradients, and of one that trains."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc.config import AGC
from agc_conformance.backend import (
    Examples,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    Unsupported,
)
from agc_conformance.backends.torch.arrays import (
    Recorder,
    mean_loss,
    plain_sgd,
    to_array,
    to_tensor,
)
from agc_conformance.backends.torch.clipping import attach_sgd
from agc_conformance.backends.torch.device import Device
from agc_conformance.backends.torch.processes import enter, leave, together
from agc_torch.sam import SharpnessAware

__all__ = ["Sharpness"]

Array = npt.NDArray[Any]


class Sharpness(Device):
    """SAM by :class:`agc_torch.SharpnessAware`."""

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Take one step with an optimizer that records the gradients and moves nothing."""
        return self._step(problem, _Quadratic(problem.parameters, self.device))

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compile the model."""
        torch.compiler.reset()
        model = _Quadratic(problem.parameters, self.device)
        return _look(problem, model, torch.compile(model), _batch(problem.examples, self.device))

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Hand a ``GradScaler`` to the step."""
        scaler = torch.amp.GradScaler(self.device, init_scale=float(scale))
        return self._step(problem, _Quadratic(problem.parameters, self.device), scaler)

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Wrap the model in DistributedDataParallel, in one process for each replica."""
        if self.device == "cuda" and torch.cuda.device_count() < replicas:
            raise Unsupported(f"{replicas} replicas need as many GPUs")
        with tempfile.TemporaryDirectory() as folder:
            together(_replica, replicas, folder, self.device, problem)
            outcomes: list[SharpnessOutcome] = [
                torch.load(Path(folder) / f"outcome{rank}", weights_only=False)
                for rank in range(replicas)
            ]
        first = outcomes[0]
        for outcome in outcomes[1:]:
            for name, gradient in first.gradients.items():
                mine, theirs = np.asarray(gradient), np.asarray(outcome.gradients[name])
                if not np.array_equal(mine, theirs, equal_nan=True):
                    raise RuntimeError(f"{name}: the replicas have different gradients")
        loss = float(np.mean([outcome.loss for outcome in outcomes]))
        return SharpnessOutcome(first.gradients, first.weights, loss, skipped=first.skipped)

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Start with gradients of 1, which the loop never clears."""
        return self.sharpen_fixed(problem, (), ())

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Freeze parameters, and leave some out of the optimizer; all have gradients of 1."""
        model = _Quadratic(problem.parameters, self.device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        batch = _batch(problem.examples, self.device)
        return _look(problem, model, model, batch, absent=absent, clear=False)

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Keep the number in a buffer."""
        model = _Counting(problem.parameters, self.device)
        self._step(problem, model)
        return self._step(problem, model)

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Step SAM, AGC and ``torch.optim.SGD`` and return the weights after each step."""
        training = _Training(task, self.device)
        steps: list[Mapping[str, Array]] = []
        for index, examples in enumerate(task.batches):
            if index == task.restart:
                saved = training.save()
                training = _Training(task, self.device)
                training.load(saved)
            training.step(_batch(examples, self.device))
            steps.append(training.model.arrays())
        return steps

    def _step(
        self,
        problem: SharpnessProblem,
        model: _Quadratic,
        scaler: torch.amp.GradScaler | None = None,
    ) -> SharpnessOutcome:
        return _look(problem, model, model, _batch(problem.examples, self.device), scaler)


class _Training:
    """A model, SAM, AGC and an optimizer, as a user would put them together."""

    def __init__(self, task: SharpnessTask, device: str) -> None:
        problem, optimizer = task.problem, task.optimizer
        self.model = _Quadratic(problem.parameters, device)
        self.sam = SharpnessAware(self.model, problem.rule)
        tensors = dict(self.model.named_parameters())
        self.sgd = plain_sgd(tensors, optimizer)
        clipping = problem.clipping or AGC(clipping=None)
        self.handle = attach_sgd(self.sgd, tensors, clipping, optimizer)

    def step(self, batch: tuple[Tensor, ...]) -> None:
        def closure(*part: Tensor) -> Tensor:
            self.sgd.zero_grad()
            loss: Tensor = self.model(*part)
            loss.backward()
            return loss

        self.sam.step(self.sgd, closure, batch=batch)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.sgd, "sam": self.sam, "agc": self.handle}

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])


class _Quadratic(nn.Module):  # type: ignore[misc]
    """The loss of :class:`agc_conformance.backend.Examples`; parameters keep their dotted names."""

    def __init__(self, parameters: Mapping[str, Array], device: str) -> None:
        super().__init__()
        for name, value in parameters.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(to_tensor(value, device)))
        self.used: Sequence[str] = list(parameters)

    def forward(self, *batch: Tensor) -> Tensor:
        half = len(batch) // 2
        curvatures, centers = (
            dict(zip(self.used, arrays, strict=False)) for arrays in (batch[:half], batch[half:])
        )
        return mean_loss(dict(self.named_parameters()), curvatures, centers)

    def arrays(self) -> dict[str, Array]:
        return {name: to_array(parameter) for name, parameter in self.named_parameters()}


class _Counting(_Quadratic):
    """The loss times a buffer that every forward pass doubles."""

    state: Tensor

    def __init__(self, parameters: Mapping[str, Array], device: str) -> None:
        super().__init__(parameters, device)
        self.register_buffer("state", torch.ones((), device=device))

    def forward(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.state * super().forward(*batch)
        self.state = 2 * self.state
        return loss


def _batch(examples: Examples, device: str) -> tuple[Tensor, ...]:
    arrays = [*examples.curvatures.values(), *examples.centers.values()]
    return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)


def _look(
    problem: SharpnessProblem,
    model: _Quadratic,
    forward: Callable[..., Tensor],
    batch: tuple[Tensor, ...],
    scaler: torch.amp.GradScaler | None = None,
    *,
    absent: Collection[str] = (),
    clear: bool = True,
) -> SharpnessOutcome:
    held = {name: p for name, p in model.named_parameters() if name not in absent}
    recorder = Recorder(held.values())
    wrapped = forward if isinstance(forward, nn.parallel.DistributedDataParallel) else model
    sam = SharpnessAware(wrapped, problem.rule)
    sam.load_state_dict({"version": 1, "count": problem.step})

    def closure(*part: Tensor) -> Tensor:
        if clear:
            recorder.zero_grad()
        loss = forward(*part)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    loss = sam.step(recorder, closure, batch=batch, scaler=scaler)
    stats = None if scaler is not None else sam.stats()
    received = recorder.received
    return SharpnessOutcome(
        {} if received is None else dict(zip(held, received, strict=True)),
        model.arrays(),
        float(loss),
        None if stats is None else float(stats.perturbed_loss),
        None if stats is None else float(stats.norm),
        skipped=received is None,
    )


def _replica(rank: int, replicas: int, folder: str, device: str, problem: SharpnessProblem) -> None:
    """Compute one process's part of the batch."""
    enter(rank, replicas, folder, device)
    model = _Quadratic(problem.parameters, device)
    parallel = nn.parallel.DistributedDataParallel(model)
    share = [part.chunk(replicas)[rank] for part in _batch(problem.examples, device)]
    torch.save(_look(problem, model, parallel, tuple(share)), Path(folder) / f"outcome{rank}")
    leave()
