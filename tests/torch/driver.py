"""PyTorch, as the contract speaks with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import agc_torch
from agc import AGC
from agc import nfnet as core
from agc_conformance.backend import Backend
from agc_conformance.backends.torch.backend import TorchBackend
from agc_conformance.nfnets.golden import SMOOTHING
from agc_torch.nfnet import Activation, WSConv2d
from tests.contract.driver import Driver, Optimizer, Outputs, SamProblem, Sharpened
from tests.helpers import Array


def tensor(array: Array) -> Tensor:
    """Return an array as a tensor, images with their channels first."""
    if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not read it
        return tensor(array.astype("float32")).bfloat16()
    made = torch.tensor(array)
    return made.permute(0, 3, 1, 2).contiguous() if made.ndim == 4 else made


def numpy(value: Tensor) -> Array:
    """Return a tensor as an array, features of images with their channels last."""
    value = value.detach()
    value = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
    if value.dtype == torch.bfloat16:
        return value.float().numpy().astype(ml_dtypes.bfloat16)
    return value.numpy()


def numpy_of(values: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: numpy(value) for name, value in values.items()}


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "save": saved_and_loaded,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}
"""Ways to copy a model."""


def never_look_at_values(patch: pytest.MonkeyPatch) -> None:
    """Go the way of an accelerator, where reading a value is a host sync."""
    for module in ("clip", "norms", "schedules"):
        patch.setattr(f"agc_torch.{module}.on_host", lambda device: False)


def mean_loss(logits: Tensor, labels: Array) -> Tensor:
    return F.cross_entropy(logits, torch.tensor(labels), label_smoothing=SMOOTHING)


class TorchOptimizer(Optimizer):
    def __init__(self, model: nn.Module, lr: float, options: dict[str, Any]) -> None:
        self.model = model
        self.inner = agc_torch.sgd_nfnet(model, lr, **options)

    def step(self, images: Array, labels: Array) -> float:
        self.inner.zero_grad()
        loss = mean_loss(self.model(tensor(images)), labels)
        loss.backward()
        self.inner.step()
        return loss.item()

    def update(self, gradient: float) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        self.inner.step()

    def total(self) -> Any:
        return agc_torch.attached(self.inner).stats().total()

    def has_momentum(self) -> bool:
        return any(state.get("momentum_buffer") is not None for state in self.inner.state.values())


class LossOfWeights(nn.ParameterDict):
    """A model whose output is a loss."""

    __call__ = nn.Module.__call__  # ParameterDict refuses

    def __init__(self, problem: SamProblem) -> None:
        weights = {name: nn.Parameter(tensor(value)) for name, value in problem.weights.items()}
        super().__init__(weights)
        self.loss, self.batch = problem.loss, [*map(tensor, problem.batch)]

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(torch, self, *(batch or self.batch))

    def backward(self, *batch: Tensor) -> Tensor:
        value = self(*batch)
        value.backward()
        return value


class TorchDriver(Driver):
    adapter = agc_torch
    norm_names = ("weight", "bias", "running_mean", "running_var")
    unbiased = True
    channels_first = True
    modes = ("contiguous", "channels_last")
    ways = ("foreach", "fused", "one by one")
    backend = TorchBackend
    clip_ways = ("host", "accelerator", "a few at a time")
    accurate_ways = ("host",)

    def nfnet(self, variant: Any, *arguments: Any, dtype: str, seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        stored = getattr(torch, "float32" if dtype == "mixed_bfloat16" else dtype)
        return agc_torch.nfnet(variant, *arguments, dtype=stored, **options).eval()

    def abstract(self, variant: Any, **options: Any) -> Any:
        return agc_torch.nfnet(variant, device="meta", **options)

    def two_layers(self) -> Any:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def own_layer(self, shape: tuple[int, ...]) -> type[Any]:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Parameter(torch.zeros(shape))

        return Own

    def parameters(self, model: nn.Module) -> Mapping[str, Tensor]:
        return model.state_dict()

    def layers(self, model: nn.Module) -> list[Any]:
        return [*model.modules()]

    def conv(
        self, conv: Any, ws_eps: str, dtype: str, values: Mapping[str, Array], **options: Any
    ) -> Any:
        made = WSConv2d(conv, ws_eps, **options, dtype=getattr(torch, dtype))
        weight = tensor(values["weight"].transpose(3, 0, 1, 2))  # o h w i
        made.load_state_dict({name: tensor(a) for name, a in values.items()} | {"weight": weight})
        return made

    def standardised(self, conv: Any) -> Array:
        return numpy(conv.standardised()).transpose(1, 2, 3, 0)

    def _norms(self, twin: Any) -> dict[str, Tensor]:
        tensors = {n: t for n, t in twin.state_dict().items() if ".norm." in n and t.ndim}
        return {self.canonical(name): value for name, value in tensors.items()}

    def norms(self, twin: Any) -> dict[str, Array]:
        return {name: numpy(value).copy() for name, value in self._norms(twin).items()}

    def set_norms(self, twin: Any, values: Mapping[str, Array]) -> None:
        for name, value in self._norms(twin).items():
            value.copy_(tensor(values[name]))

    def standardised_in_bfloat16(self, conv: Any, gradient: Array) -> tuple[Array, Array, Array]:
        found = conv.standardised(torch.bfloat16)
        found.backward(tensor(gradient.transpose(3, 0, 1, 2)).bfloat16())
        weight, back = (numpy(t).transpose(1, 2, 3, 0) for t in (found, conv.weight.grad))
        return weight, back, numpy(conv.gain.grad)

    def activation(self, name: str, x: Array) -> Array:
        return numpy(Activation(name)(tensor(x)))

    @contextmanager
    def clipping(self, way: str) -> Iterator[Backend]:
        with pytest.MonkeyPatch.context() as patch:
            if way == "accelerator":
                never_look_at_values(patch)
            elif way == "a few at a time":
                patch.setattr("agc_torch.clip._CHUNK", 100)
            yield TorchBackend()

    def integer(self, value: int) -> Tensor:
        return torch.tensor(value)

    def rule_takers(self) -> list[Callable[[AGC], Any]]:
        model = nn.Linear(2, 2)
        return [
            partial(agc_torch.plan, model),
            partial(agc_torch.plan, dict(model.named_parameters())),
            partial(agc_torch.adaptive_clip_grad_, model),
            partial(agc_torch.adaptive_clip_grad_, model, plan=agc_torch.plan(model, AGC())),
            partial(agc_torch.attach, torch.optim.SGD(model.parameters()), model),
        ]

    def limited_step(
        self,
        rule: AGC,
        max_norm: float,
        weights: Mapping[str, Array],
        gradients: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        parameters = {name: nn.Parameter(tensor(value)) for name, value in weights.items()}
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        agc_torch.attach(optimizer, parameters, rule, max_norm=max_norm)
        for name, value in gradients.items():
            parameters[name].grad = tensor(value)
        optimizer.step()
        return numpy_of(parameters)

    def logged(
        self, rule: AGC, weights: Mapping[str, Array], gradients: Mapping[str, Array]
    ) -> dict[str, float]:
        parameters = {name: nn.Parameter(tensor(value)) for name, value in weights.items()}
        for name, value in gradients.items():
            parameters[name].grad = tensor(value)
        return agc_torch.adaptive_clip_grad_(parameters, rule).to_dict()

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def run(self, layer: nn.Module, x: Array, train: bool = False, **options: Any) -> Array:
        with torch.no_grad():
            return numpy(layer.train(train)(tensor(x), **options))

    def call(self, model: nn.Module, method: str, x: Array) -> Any:
        return getattr(model, method)(torch.tensor(x))

    def signals(self, model: Any, images: Array) -> Mapping[str, Array]:
        return numpy_of(model.signals(tensor(images)))

    def outputs(
        self,
        model: nn.Module,
        images: Array,
        labels: Array,
        mode: str | None = None,
        masks: core.Masks | None = None,
    ) -> Outputs:
        x = tensor(images)
        model.train(masks is not None)
        if mode == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
        model.zero_grad()
        logits = model(x, masks=masks)
        loss = mean_loss(logits, labels)
        loss.backward()
        gradients = numpy_of({name: p.grad for name, p in model.named_parameters()})
        maps: tuple[Any, Any] = ({}, {})
        if masks is None:
            with torch.no_grad():
                maps = (numpy_of(model.features(x)), numpy_of(model.signals(x)))
        return Outputs(loss.item(), numpy(logits), gradients, *maps)

    def check_gradients(self, conv: Any, images: Array) -> None:
        def run(weight: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
            values = {"weight": weight, "gain": gain, "bias": bias}
            return torch.func.functional_call(conv, values, (tensor(images),))

        inputs = (conv.weight, conv.gain, conv.bias)
        assert torch.autograd.gradcheck(run, inputs, eps=1e-8, atol=1e-4)
        assert torch.autograd.gradgradcheck(run, inputs, eps=1e-8, atol=1e-3)

    def export(self, model: nn.Module, folder: Path) -> Callable[[Array], Array]:
        shapes = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
        example = torch.zeros(3, 3, *self.exported_sizes[0][1:])
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        torch.export.save(program, folder / "program.pt2")
        loaded = torch.export.load(folder / "program.pt2").module()
        return lambda images: numpy(loaded(tensor(images)))

    def optimizer(self, model: Any, lr: float, way: str | None = None, **options: Any) -> Optimizer:
        if way is not None:
            options |= {"fused": True} if way == "fused" else {"foreach": way == "foreach"}
        return TorchOptimizer(model, lr, options)

    def sharpen(self, problem: SamProblem, mode: str = "eager") -> Sharpened:
        model = LossOfWeights(problem)
        sam = agc_torch.SharpnessAware(model, problem.rule)
        sam.load_state_dict({"version": 1, "count": problem.step or 0})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        value = sam.step(optimizer, model.backward, batch=model.batch or None).item()
        stats = sam.stats()
        perturbed, norm = (stats.perturbed_loss, stats.norm) if stats else (value, 0.0)
        gradients = numpy_of({name: p.grad for name, p in model.named_parameters()})
        return Sharpened(value, float(perturbed), float(norm), gradients)

    def verify_sam(self, problem: SamProblem) -> Any:
        model = LossOfWeights(problem)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> None:
            if problem.rule is None:
                model.backward()
                optimizer.step()
            else:
                agc_torch.SharpnessAware(model, problem.rule).step(optimizer, model.backward)

        return agc_torch.verify_sam(step, model, optimizer, model.backward)
