"""AGC: clipping by hand, inside an optimizer, and in the settings of real training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc import AGC
from agc_conformance.backend import Gradient, Optimizer, Outcome, Problem, Unsupported
from agc_conformance.backends.torch.arrays import (
    gradient_arrays,
    plain_sgd,
    set_gradient,
    to_array,
    to_parameters,
    to_tensor,
)
from agc_conformance.backends.torch.device import Device
from agc_conformance.backends.torch.processes import enter, leave, together
from agc_torch.clip import adaptive_clip_grad_
from agc_torch.optimizer import Handle, attach
from agc_torch.units import plan

__all__ = ["Clipping", "attach_sgd"]

Array = npt.NDArray[Any]


class Clipping(Device):
    """AGC by :mod:`agc_torch`."""

    paths = ("compiled", "as_on_device", "triton")

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_torch.adaptive_clip_grad_`."""
        tensors = to_parameters(problem, self.device)
        stats = adaptive_clip_grad_(tensors, problem.declared_rule, step=problem.step)
        return Outcome(gradient_arrays(tensors), stats.parameters())

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Gradient]]
    ) -> list[Mapping[str, Array]]:
        """Step ``torch.optim.SGD`` with AGC attached and return the weights after each step."""
        tensors = to_parameters(problem, self.device)
        sgd, _ = _sgd(tensors, optimizer, problem.declared_rule)
        steps: list[Mapping[str, Array]] = []
        for of_step in gradients:
            for name, tensor in tensors.items():
                set_gradient(tensor, to_tensor(of_step.get(name), self.device))
            sgd.step()
            steps.append({name: to_array(tensor) for name, tensor in tensors.items()})
        return steps

    def scenario_optimizer(self, problem: Problem) -> Outcome:
        """Clip inside ``SGD.step()``."""
        return _step(problem, to_parameters(problem, self.device))

    def scenario_idle(self, problem: Problem) -> Outcome:
        """Step once without gradients, then clip."""
        return _step(problem, to_parameters(problem, self.device), idle=True)

    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        """Let autograd add up the gradients of micro-batches, each loss divided by their number."""
        tensors = to_parameters(problem, self.device)
        for tensor in tensors.values():
            tensor.grad = None
        for gradients in micro:
            for name, gradient in gradients.items():
                if gradient is not None:
                    tensors[name].backward(to_tensor(gradient, self.device) / len(micro))
        return _step(problem, tensors)

    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        """Let ``GradScaler`` unscale the gradients and step the optimizer."""
        scaler = torch.amp.GradScaler(self.device, init_scale=float(scale))
        scaler.scale(torch.zeros((), device=self.device))  # initializes the scaler
        return _step(problem, to_parameters(problem, self.device), step=scaler.step)

    def scenario_compiled(self, problem: Problem) -> Outcome:
        """Clip under ``torch.compile``, in one graph."""
        tensors = to_parameters(problem, self.device)
        rule = problem.declared_rule
        made = plan(tensors, rule)

        def clip(step: Tensor) -> Any:
            return adaptive_clip_grad_(tensors, rule, plan=made, step=step)

        torch.compiler.reset()
        stats = torch.compile(clip, fullgraph=True)(torch.tensor(problem.step))
        return Outcome(gradient_arrays(tensors), stats.parameters())

    def scenario_as_on_device(self, problem: Problem) -> Outcome:
        """Clip as on an accelerator without Triton, whose values the host does not read."""
        with ExitStack() as stack:
            for module in ("clip", "norms", "schedules"):
                stack.enter_context(patch(f"agc_torch.{module}.on_host", lambda _: False))
            return self.clip(problem)

    def scenario_triton(self, problem: Problem) -> Outcome:
        """Clip by the kernels for GPUs, on a CPU in Triton's interpreter."""
        if self.device == "cuda":
            raise Unsupported("on a GPU these kernels are what clips by hand")
        if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
            raise Unsupported("Triton's interpreter is not switched on: set TRITON_INTERPRET=1")
        with patch("agc_torch.fused.available", lambda _: True):
            return self.clip(problem)

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        """Clip DTensors that are split over processes."""
        if self.device == "cuda" and torch.cuda.device_count() < shards:
            raise Unsupported(f"{shards} shards need as many GPUs")
        with tempfile.TemporaryDirectory() as folder:
            together(_clip_shard, shards, folder, self.device, problem)
            outcome = torch.load(Path(folder) / "outcome", weights_only=False)
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Outcome)
        return outcome


def _step(
    problem: Problem, tensors: Mapping[str, Tensor], *, idle: bool = False, step: Any = None
) -> Outcome:
    """Clip by one step of an optimizer that moves nothing, at the problem's step.

    ``idle`` asks for a step without gradients before it; ``step``, if given, is called with the
    optimizer in place of the optimizer's own step.
    """
    sgd, handle = _sgd(tensors, Optimizer(lr=0.0), problem.declared_rule)
    if idle:
        gradients = {name: tensor.grad for name, tensor in tensors.items()}
        sgd.zero_grad()
        sgd.step()
        for name, gradient in gradients.items():
            tensors[name].grad = gradient
    handle.load_state_dict({"steps": problem.step})
    if step is None:
        sgd.step()
    else:
        step(sgd)
    stats = handle.stats()
    assert stats is not None
    return Outcome(gradient_arrays(tensors), stats.parameters())


def _sgd(
    tensors: Mapping[str, Tensor], optimizer: Optimizer, rule: AGC
) -> tuple[torch.optim.SGD, Handle]:
    sgd = plain_sgd(tensors, optimizer)
    return sgd, attach_sgd(sgd, tensors, rule, optimizer)


def attach_sgd(sgd: torch.optim.SGD, model: Any, rule: AGC, optimizer: Optimizer) -> Handle:
    """Attach AGC, then decoupled decay, which SGD lacks: AGC sees undecayed weights (AGC-7)."""
    handle = attach(sgd, model, rule)
    if optimizer.decoupled:

        def decay(*_: Any) -> None:
            for parameter in sgd.param_groups[0]["params"]:
                parameter.data.mul_(1 - optimizer.lr * optimizer.weight_decay)

        sgd.register_step_pre_hook(decay)
    return handle


def _clip_shard(rank: int, shards: int, folder: str, device: str, problem: Problem) -> None:
    """Clip one process's shards; process 0 writes the outcome of all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    enter(rank, shards, folder, device)
    mesh = init_device_mesh(device, (shards,))
    tensors = to_parameters(problem, device)
    spread: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        split = tensor.dim() > 0 and tensor.shape[0] % shards == 0
        placements = [Shard(0) if split else Replicate()]
        spread[name] = nn.Parameter(distribute_tensor(tensor.detach(), mesh, placements))
        if tensor.grad is not None:
            set_gradient(spread[name], distribute_tensor(tensor.grad, mesh, placements))
    outcome: Outcome | Exception
    try:
        stats = adaptive_clip_grad_(spread, problem.declared_rule, step=problem.step)
        for name, tensor in tensors.items():
            gradient: Any = spread[name].grad
            tensor.grad = None
            set_gradient(tensor, None if gradient is None else gradient.full_tensor())
        outcome = Outcome(gradient_arrays(tensors), stats.parameters())
    except Exception as error:
        outcome = error
    if rank == 0:
        torch.save(outcome, Path(folder) / "outcome")
    leave()
