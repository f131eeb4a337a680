"""The conformance backend: problems in NumPy arrays, carried out by this adapter."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc import AGC, Plan
from agc.backend import (
    Backend,
    Examples,
    Layer,
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
    Optimizer,
    Outcome,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    Task,
    TrainStep,
    Unavailable,
    Unsupported,
)
from agc.reference import RowSparse
from agc_torch.clip import adaptive_clip_grad_
from agc_torch.optimizer import Handle, attach
from agc_torch.sam import SharpnessAware
from agc_torch.units import plan

__all__ = ["TorchBackend"]

Array = npt.NDArray[Any]


class TorchBackend(Backend):
    """AGC in PyTorch, as the conformance suite asks for it."""

    name: ClassVar[str] = "torch"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        if device not in ("cpu", "cuda"):
            raise Unavailable(f"torch runs on cpu and cuda here, not on {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"PyTorch {torch.__version__} sees no CUDA device")
        self.device = device

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {"torch": str(torch.__version__), "numpy": np.__version__}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        return "cpu" if self.device == "cpu" else str(torch.cuda.get_device_name())

    def clip(self, problem: Problem) -> Outcome:
        """Clip by :func:`agc_torch.adaptive_clip_grad_`."""
        tensors = self._tensors(problem)
        stats = adaptive_clip_grad_(tensors, problem.declared_rule, step=problem.step)
        return Outcome(_gradients(tensors), stats.parameters())

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the PyTorch layer and return its plan."""
        if layer.kind not in _LAYERS:
            raise Unsupported(_ABSENT.get(layer.kind, f"PyTorch has no layer {layer.kind!r}"))
        return plan(_LAYERS[layer.kind](dict(layer.sizes)), rule)

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Array]]:
        """Step ``torch.optim.SGD`` with AGC attached and return the weights after each step."""
        tensors = self._tensors(problem)
        sgd, _ = _sgd(tensors, optimizer, problem.declared_rule)
        steps: list[Mapping[str, Array]] = []
        for one in gradients:
            for name, tensor in tensors.items():
                _set_gradient(tensor, self._tensor(one.get(name)))
            sgd.step()
            steps.append({name: to_array(tensor) for name, tensor in tensors.items()})
        return steps

    def scenario(self, name: str, problem: Problem, settings: Mapping[str, Any]) -> Outcome:
        """Clip in one of the settings of real training."""
        if name == "compiled":
            return self._compiled(problem)
        if name == "sharded":
            return self._sharded(problem, int(settings["shards"]))
        if name not in ("optimizer", "idle", "accumulate", "unscale"):
            return super().scenario(name, problem, settings)
        tensors = self._tensors(problem)
        sgd, handle = _sgd(tensors, Optimizer(lr=0.0), problem.declared_rule)
        if name == "idle":
            gradients = {name: tensor.grad for name, tensor in tensors.items()}
            sgd.zero_grad()
            sgd.step()
            for key, gradient in gradients.items():
                tensors[key].grad = gradient
        handle.load_state_dict({"steps": problem.step})
        if name == "accumulate":
            _accumulate(tensors, [self._gradients(one) for one in settings["micro"]])
        if name == "unscale":
            scaler = torch.amp.GradScaler(self.device, init_scale=float(settings["scale"]))
            scaler.scale(torch.zeros((), device=self.device))  # makes the scaler ready
            scaler.step(sgd)
        else:
            sgd.step()
        stats = handle.stats()
        assert stats is not None
        return Outcome(_gradients(tensors), stats.parameters())

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Step :class:`agc_torch.SharpnessAware` with an optimizer that only looks."""
        from agc_torch import sam_backend  # it builds on this module

        return sam_backend.sharpen(problem, self.device)

    def sharpness_trajectory(
        self,
        problem: SharpnessProblem,
        optimizer: Optimizer,
        batches: Sequence[Examples],
        *,
        restart: int | None = None,
    ) -> list[Mapping[str, Array]]:
        """Step SAM, AGC and ``torch.optim.SGD`` and return the weights after each step."""
        from agc_torch import sam_backend

        return sam_backend.sharpness_trajectory(problem, optimizer, batches, self.device, restart)

    def sharpness_scenario(
        self, name: str, problem: SharpnessProblem, settings: Mapping[str, Any]
    ) -> SharpnessOutcome:
        """Compute a sharpness-aware gradient in one of the settings of real training."""
        from agc_torch import sam_backend

        return sam_backend.sharpness_scenario(name, problem, self.device, settings)

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run :func:`agc_torch.nfnet`, with a hook on every block."""
        from agc_torch import model_backend  # it builds on this module

        return model_backend.model_forward(problem, self.device)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run :func:`agc_torch.nfnet` forward and backward, and clip."""
        from agc_torch import model_backend

        return model_backend.model_gradients(problem, self.device)

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train by :func:`agc_torch.sgd_nfnet`, or SGD with AGC attached."""
        from agc_torch import model_backend

        yield from model_backend.model_training(problem, recipe, self.device)

    def train(self, task: Task) -> Iterator[TrainStep]:
        """Train the suite's network with AGC attached to ``torch.optim.SGD``, behind SAM if it is asked for."""
        model = _Network(task.weights).to(self.device)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(task.weights[name]))
        # What the optimizer is given, before AGC: gradients and weights; and what the last forward saw.
        raw: dict[str, Array] = {}
        given: dict[str, Array] = {}
        seen: dict[str, Array] = {}

        def weights() -> dict[str, Array]:
            return {name: to_array(parameter) for name, parameter in parameters.items()}

        model.register_forward_pre_hook(lambda *_: seen.update(weights()))
        sgd = plain_sgd(parameters, task.optimizer)
        sgd.register_step_pre_hook(lambda *_: raw.update(_gradients(parameters)))
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
                _gradients(parameters),
                weights(),
                handle.plan,
                dict(seen),
                dict(given),
            )

    def _compiled(self, problem: Problem) -> Outcome:
        tensors = self._tensors(problem)
        rule = problem.declared_rule
        made = plan(tensors, rule)

        def clip(step: Tensor) -> Any:
            return adaptive_clip_grad_(tensors, rule, plan=made, step=step)

        torch.compiler.reset()
        stats = torch.compile(clip, fullgraph=True)(torch.tensor(problem.step))
        return Outcome(_gradients(tensors), stats.parameters())

    def _sharded(self, problem: Problem, shards: int) -> Outcome:
        if self.device == "cuda" and torch.cuda.device_count() < shards:
            raise Unsupported(f"{shards} shards need as many GPUs")
        with tempfile.TemporaryDirectory() as folder:
            arguments = (shards, folder, self.device, problem)
            torch.multiprocessing.spawn(_clip_shard, arguments, nprocs=shards)
            outcome = torch.load(Path(folder) / "outcome", weights_only=False)
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Outcome)
        return outcome

    def _tensors(self, problem: Problem) -> dict[str, Tensor]:
        """Return parameters that have their gradients."""
        tensors = {}
        for name, value in problem.parameters.items():
            tensor = self._tensor(value)
            if tensor.is_floating_point() or tensor.is_complex():
                tensor = nn.Parameter(tensor)
            _set_gradient(tensor, self._tensor(problem.gradients.get(name)))
            tensors[name] = tensor
        return tensors

    def _gradients(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._tensor(value) for name, value in gradients.items()}

    def _tensor(self, value: Any) -> Any:
        return to_tensor(value, self.device)


def to_tensor(value: Any, device: str) -> Any:
    if value is None:
        return None
    if isinstance(value, RowSparse):
        rows = torch.from_numpy(np.array(value.indices, np.int64))
        values = to_tensor(value.values, device)
        return torch.sparse_coo_tensor(
            rows[None].to(device), values, value.shape, check_invariants=True
        )
    array = np.array(value, order="C")
    if array.dtype.name == "bfloat16":  # NumPy's comes from ml_dtypes; PyTorch does not know it
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        bits: Array = tensor.contiguous().view(torch.uint16).numpy().copy()
        return bits.view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())


def _set_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """Give a tensor a gradient, also of another dtype or shape: refusing those is AGC's task."""
    if gradient is None or (gradient.shape == tensor.shape and gradient.dtype == tensor.dtype):
        tensor.grad = gradient
    else:
        tensor.grad = torch.zeros_like(tensor)
        tensor.grad.data = gradient


def _gradients(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        gradient = tensor.grad
        if gradient is not None and gradient.layout == torch.sparse_coo:
            gradient = gradient.coalesce()
            rows = gradient.indices()[0].cpu().numpy()
            found[name] = RowSparse(rows, to_array(gradient.values()), tuple(gradient.shape))
        else:
            found[name] = None if gradient is None else to_array(gradient)
    return found


def _accumulate(tensors: Mapping[str, Tensor], micro: Sequence[Mapping[str, Any]]) -> None:
    """Let autograd add up the gradients of micro-batches, each loss divided by their number."""
    for tensor in tensors.values():
        tensor.grad = None
    for one in micro:
        for name, gradient in one.items():
            if gradient is not None:
                tensors[name].backward(gradient / len(micro))


def _sgd(
    tensors: Mapping[str, Tensor], optimizer: Optimizer, rule: AGC
) -> tuple[torch.optim.SGD, Handle]:
    sgd = plain_sgd(tensors, optimizer)
    return sgd, attach_sgd(sgd, tensors, rule, optimizer)


def plain_sgd(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> torch.optim.SGD:
    return torch.optim.SGD(
        tensors.values(),
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=0.0 if optimizer.decoupled else optimizer.weight_decay,
    )


def attach_sgd(sgd: torch.optim.SGD, model: Any, rule: AGC, optimizer: Optimizer) -> Handle:
    """Attach AGC, and then decoupled decay, which SGD lacks: AGC sees the weights before it (AGC-7)."""
    handle = attach(sgd, model, rule)
    if optimizer.decoupled:

        def decay(*_: Any) -> None:
            for parameter in sgd.param_groups[0]["params"]:
                parameter.data.mul_(1 - optimizer.lr * optimizer.weight_decay)

        sgd.register_step_pre_hook(decay)
    return handle


def _clip_shard(rank: int, shards: int, folder: str, device: str, problem: Problem) -> None:
    """Clip one process's part; process 0 writes the outcome of all."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=shards,
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (shards,))
    tensors = TorchBackend(device)._tensors(problem)
    spread: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        split = tensor.dim() > 0 and tensor.shape[0] % shards == 0
        placements = [Shard(0) if split else Replicate()]
        spread[name] = nn.Parameter(distribute_tensor(tensor.detach(), mesh, placements))
        if tensor.grad is not None:
            _set_gradient(spread[name], distribute_tensor(tensor.grad, mesh, placements))
    outcome: Outcome | Exception
    try:
        stats = adaptive_clip_grad_(spread, problem.declared_rule, step=problem.step)
        for name, tensor in tensors.items():
            gradient: Any = spread[name].grad
            tensor.grad = None
            _set_gradient(tensor, None if gradient is None else gradient.full_tensor())
        outcome = Outcome(_gradients(tensors), stats.parameters())
    except Exception as error:
        outcome = error
    if rank == 0:
        torch.save(outcome, Path(folder) / "outcome")
    leave()


def leave() -> NoReturn:
    """End a process of a group that has done its work, all processes together.

    Python's own way out would abort the process if one of the group's threads, on a machine that is busy, asks
    for the interpreter's lock while it shuts down.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Network(nn.Module):  # type: ignore[misc]
    """The network of :class:`agc.backend.Task`."""

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


Sizes = dict[str, int]


def _conv(make: Callable[..., nn.Module], axes: str) -> Callable[[Sizes], nn.Module]:
    def build(s: Sizes) -> nn.Module:
        return make(s["i"], s["o"], tuple(s[axis] for axis in axes), groups=s.get("g", 1))

    return build


def _hf_conv1d(s: Sizes) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        raise Unsupported("transformers, which has this layer, is not installed") from None
    return Conv1D(s["o"], s["i"])


def _unknown(name: str, shape: tuple[int, ...]) -> nn.Module:
    """Return a layer of a type that the table does not know, with one parameter."""
    layer = nn.Module()
    layer.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return layer


_LAYERS: Final[dict[str, Callable[[Sizes], nn.Module]]] = {
    "dense": lambda s: nn.Linear(s["i"], s["o"]),
    "conv1d": _conv(nn.Conv1d, "w"),
    "conv2d": _conv(nn.Conv2d, "hw"),
    "conv3d": _conv(nn.Conv3d, "thw"),
    "grouped_conv2d": _conv(nn.Conv2d, "hw"),
    "depthwise_conv2d": lambda s: nn.Conv2d(
        s["c"], s["c"] * s["m"], (s["h"], s["w"]), groups=s["c"]
    ),
    "conv_transpose1d": _conv(nn.ConvTranspose1d, "w"),
    "conv_transpose2d": _conv(nn.ConvTranspose2d, "hw"),
    "grouped_conv_transpose2d": _conv(nn.ConvTranspose2d, "hw"),
    "embedding": lambda s: nn.Embedding(s["v"], s["d"]),
    "attention": lambda s: nn.MultiheadAttention(s["i"], s["h"]),
    "lstm": lambda s: nn.LSTM(s["i"], s["o"]),
    "gru": lambda s: nn.GRU(s["i"], s["o"]),
    "rnn": lambda s: nn.RNN(s["i"], s["o"]),
    "bilinear": lambda s: nn.Bilinear(s["i"], s["j"], s["o"]),
    "hf_conv1d": _hf_conv1d,
    "layer_norm": lambda s: nn.LayerNorm(s["o"]),
    "class_token": lambda s: _unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _unknown("table", (s["a"], s["b"], s["c"])),
}
_ABSENT: Final = {
    "einsum": "PyTorch has no einsum layer",
    "stacked_dense": "PyTorch stacks no layers in one module; declare the units of stacked arrays",
}
