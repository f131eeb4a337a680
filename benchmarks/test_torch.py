"""PyTorch on the CPU: ours, timm's ``agc.py`` and pytorch_optimizer's ``agc``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer.optimizer.agc import agc as pytorch_optimizer_agc

import agc_torch
from agc import AGC
from agc_conformance.backends.peers import timm as timm_peer
from benchmarks.common import Measure, bound, draw
from benchmarks.memory_torch import peak_memory
from benchmarks.shapes import declared, shapes_of

CONTESTANTS = ("ours", "timm", "pytorch_optimizer", "bound", "two operations")
timm_agc = timm_peer.load()


class Tensors:
    """A model's parameters, and the gradients of every round."""

    def __init__(self, model: str, condition: str) -> None:
        self.module = torch.nn.Module()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.gradients: list[torch.Tensor] = []
        self.condition = condition
        for seed, (name, shape) in enumerate(shapes_of(model).items()):
            weight, gradient = map(torch.from_numpy, draw(shape, condition, seed))
            self.parameters[name] = torch.nn.Parameter(weight)
            self.parameters[name].grad = gradient.clone()
            self.gradients.append(gradient)
            register(self.module, name, self.parameters[name])
        units = declared(shapes_of(model), "o i ... -> o")
        self.rule = AGC(clipping=0.01, units=units)

    def restore(self) -> None:
        grads = [parameter.grad for parameter in self.parameters.values()]
        torch._foreach_copy_(grads, self.gradients)

    def renew(self) -> None:
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient.clone()

    def contestant(self, name: str) -> Callable[[], Any]:
        parameters = list(self.parameters.values())
        if name == "ours":
            return lambda: agc_torch.adaptive_clip_grad_(self.module, self.rule)
        if name == "timm":
            return lambda: timm_agc.adaptive_clip_grad(parameters, clip_factor=0.01)
        if name == "pytorch_optimizer":

            def one_by_one() -> None:
                for parameter in parameters:
                    parameter.grad = pytorch_optimizer_agc(parameter.detach(), parameter.grad)

            return one_by_one
        weights, gradients = [p.detach() for p in parameters], [p.grad for p in parameters]
        if name == "two operations":
            return two_operations(weights, gradients, self.condition)
        return bound(weights, gradients, self.condition)


def two_operations(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], condition: str
) -> Callable[[], None]:
    """Return a function that calls PyTorch for each tensor as seldom as clipping allows.

    It takes norms in float32, which is not accurate enough, and decides nothing. If everything is
    clipped, it multiplies each gradient by a factor a unit.
    """
    pairs = [
        [tensor.view(len(tensor) if tensor.dim() > 1 else 1, -1) for tensor in pair]
        for pair in zip(weights, gradients, strict=True)
    ]
    norms = [torch.empty(len(weight)) for weight, _ in pairs]
    factors = [torch.ones(len(weight), 1) for weight, _ in pairs]

    def run() -> None:
        for (weight, gradient), out, factor in zip(pairs, norms, factors, strict=True):
            torch.linalg.vector_norm(weight, 2, 1, out=out)
            torch.linalg.vector_norm(gradient, 2, 1, out=out)
            if condition == "all":
                gradient.mul_(factor)

    return run


def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Put a parameter of a dotted name where it belongs."""
    *path, leaf = name.split(".")
    for key in path:
        if key not in module._modules:
            module.add_module(key, torch.nn.Module())
        module = module._modules[key]
    module.register_parameter(leaf, parameter)


@pytest.fixture(scope="module")
def tensors(model: str, condition: str) -> Tensors:
    return Tensors(model, condition)


def test_speed(
    measure: Measure, tensors: Tensors, model: str, condition: str, turn: int, contestant: str
) -> None:
    case = {"framework": "torch", "model": model, "condition": condition}
    run = tensors.contestant(contestant)
    measure(run, tensors.restore, **case, turn=turn, contestant=contestant)


def test_contestants_do_the_same_work(tensors: Tensors, condition: str) -> None:
    tensors.restore()
    total = tensors.contestant("ours")().total()
    assert total.clipped == (total.units if condition == "all" else 0)
    ours = [p.grad.clone() for p in tensors.parameters.values()]
    for peer in ("timm", "pytorch_optimizer"):
        tensors.restore()
        tensors.contestant(peer)()
        for mine, parameter in zip(ours, tensors.parameters.values(), strict=True):
            torch.testing.assert_close(parameter.grad, mine, rtol=1e-5, atol=0)


@pytest.mark.parametrize("contestant", ["ours", "timm", "pytorch_optimizer"])
def test_peak_memory(
    benchmark: Any, tensors: Tensors, model: str, condition: str, contestant: str
) -> None:
    """Peak memory allocated, as a share of the parameters' bytes."""
    benchmark.group = "torch peak memory"
    benchmark.extra_info.update(
        framework="torch", model=model, condition=condition, contestant=contestant
    )
    peak = peak_memory(benchmark, tensors.contestant(contestant), tensors.renew)
    whole = sum(p.numel() * p.element_size() for p in tensors.parameters.values())
    benchmark.extra_info["peak_memory"] = peak / whole
