"""The conformance backend's answers about SAM, carried out by :class:`agc_torch.SharpnessAware`."""

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

from agc.backend import Examples, Optimizer, SharpnessOutcome, SharpnessProblem, Unsupported
from agc.config import AGC
from agc_torch.backend import attach_sgd, leave, plain_sgd, to_array, to_tensor
from agc_torch.sam import SharpnessAware

__all__ = ["sharpen", "sharpness_scenario", "sharpness_trajectory"]

Array = npt.NDArray[Any]


def sharpen(
    problem: SharpnessProblem,
    device: str,
    *,
    compiled: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> SharpnessOutcome:
    """Take one step with an optimizer that only looks."""
    model = _Quadratic(problem.parameters, device)
    forward: Callable[..., Tensor] = torch.compile(model) if compiled else model
    return _look(problem, model, forward, _batch(problem.examples, device), scaler)


def sharpness_scenario(
    name: str, problem: SharpnessProblem, device: str, settings: Mapping[str, Any]
) -> SharpnessOutcome:
    """Compute a sharpness-aware gradient in one of the settings of real training."""
    if name == "compiled":
        torch.compiler.reset()
        return sharpen(problem, device, compiled=True)
    if name == "scaled":
        scaler = torch.amp.GradScaler(device, init_scale=float(settings["scale"]))
        return sharpen(problem, device, scaler=scaler)
    if name == "replicas":
        return _replicas(problem, device, int(settings["replicas"]))
    if name == "stateful":
        counting, batch = _Counting(problem.parameters, device), _batch(problem.examples, device)
        _look(problem, counting, counting, batch)
        return _look(problem, counting, counting, batch)
    if name in ("stale", "fixed"):
        model = _Quadratic(problem.parameters, device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for frozen in settings.get("frozen", ()):
            model.get_parameter(frozen).requires_grad_(False)
        absent = set(settings.get("absent", ()))
        return _look(
            problem, model, model, _batch(problem.examples, device), absent=absent, clear=False
        )
    raise Unsupported(f"torch has no scenario {name!r} for SAM")


def sharpness_trajectory(
    problem: SharpnessProblem,
    optimizer: Optimizer,
    batches: Sequence[Examples],
    device: str,
    restart: int | None,
) -> list[Mapping[str, Array]]:
    """Take steps with ``torch.optim.SGD``, with AGC attached if asked for."""
    training = _Training(problem, optimizer, device)
    steps: list[Mapping[str, Array]] = []
    for index, examples in enumerate(batches):
        if index == restart:
            saved = training.save()
            training = _Training(problem, optimizer, device)
            training.load(saved)
        training.step(_batch(examples, device))
        steps.append(training.model.arrays())
    return steps


class _Training:
    """A model, SAM, AGC and an optimizer, as a user would put them together."""

    def __init__(self, problem: SharpnessProblem, optimizer: Optimizer, device: str) -> None:
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
    """The loss of :class:`agc.backend.Examples`, with parameters under their own dotted names."""

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
        losses = []
        for name, a, c in zip(self.used, batch[:half], batch[half:], strict=False):
            away = self.get_parameter(name).to(c.dtype) - c
            losses.append((0.5 * a * away**2).flatten(1).sum(1))
        return torch.stack(losses).sum(0).mean()

    def arrays(self) -> dict[str, Array]:
        return {name: to_array(parameter) for name, parameter in self.named_parameters()}


class _Counting(_Quadratic):
    """The same, times a buffer that every forward pass doubles."""

    state: Tensor

    def __init__(self, parameters: Mapping[str, Array], device: str) -> None:
        super().__init__(parameters, device)
        self.register_buffer("state", torch.ones((), device=device))

    def forward(self, *batch: Tensor) -> Tensor:
        loss: Tensor = self.state * super().forward(*batch)
        self.state = 2 * self.state
        return loss


class _Recorder(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer that remembers the gradients and moves nothing."""

    def __init__(self, model: _Quadratic, absent: Collection[str]) -> None:
        self.held = {name: p for name, p in model.named_parameters() if name not in absent}
        super().__init__(self.held.values(), {})
        self.received: dict[str, Array | None] | None = None

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        self.received = {
            name: None if p.grad is None else to_array(p.grad) for name, p in self.held.items()
        }


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
    recorder = _Recorder(model, absent)
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
    stats = sam.stats()
    told = stats is not None and scaler is None
    return SharpnessOutcome(
        recorder.received or {},
        model.arrays(),
        float(loss),
        float(stats.perturbed_loss) if stats is not None and told else None,
        float(stats.norm) if stats is not None and told else None,
        skipped=recorder.received is None,
    )


def _replicas(problem: SharpnessProblem, device: str, replicas: int) -> SharpnessOutcome:
    """Wrap the model in DistributedDataParallel, in as many processes."""
    if device == "cuda" and torch.cuda.device_count() < replicas:
        raise Unsupported(f"{replicas} replicas need as many GPUs")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (replicas, folder, device, problem)
        torch.multiprocessing.spawn(_replica, arguments, nprocs=replicas)
        found = [
            torch.load(Path(folder) / f"outcome{rank}", weights_only=False)
            for rank in range(replicas)
        ]
    first: SharpnessOutcome = found[0]
    loss = float(np.mean([one.loss for one in found]))
    for one in found[1:]:
        for name, gradient in first.gradients.items():
            mine, theirs = np.asarray(gradient), np.asarray(one.gradients[name])
            if not np.array_equal(mine, theirs, equal_nan=True):
                raise RuntimeError(f"{name}: the replicas have different gradients")
    return SharpnessOutcome(first.gradients, first.weights, loss, skipped=first.skipped)


def _replica(rank: int, replicas: int, folder: str, device: str, problem: SharpnessProblem) -> None:
    """Compute one process's part of the batch."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=replicas,
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    model = _Quadratic(problem.parameters, device)
    parallel = nn.parallel.DistributedDataParallel(model)
    share = [part.chunk(replicas)[rank] for part in _batch(problem.examples, device)]
    torch.save(_look(problem, model, parallel, tuple(share)), Path(folder) / f"outcome{rank}")
    leave()
