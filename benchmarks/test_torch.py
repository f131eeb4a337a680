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
from benchmarks.shapes import declared, shapes_of

CONTESTANTS = ("ours", "timm", "pytorch_optimizer", "bound")
timm_agc = timm_peer.load()


class Tensors:
    """A model's parameters, and the gradients of every round."""

    def __init__(self, model: str, condition: str) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.gradients: list[torch.Tensor] = []
        self.condition = condition
        for seed, (name, shape) in enumerate(shapes_of(model).items()):
            weight, gradient = map(torch.from_numpy, draw(shape, condition, seed))
            self.parameters[name] = torch.nn.Parameter(weight)
            self.parameters[name].grad = gradient.clone()
            self.gradients.append(gradient)
        units = declared(shapes_of(model), "o i ... -> o")
        self.rule = AGC(clipping=0.01, units=units)
        self.plan = agc_torch.plan(self.parameters, self.rule)

    def restore(self) -> None:
        grads = [parameter.grad for parameter in self.parameters.values()]
        torch._foreach_copy_(grads, self.gradients)

    def contestant(self, name: str) -> Callable[[], Any]:
        parameters = list(self.parameters.values())
        if name == "ours":
            return lambda: agc_torch.adaptive_clip_grad_(self.parameters, self.rule, plan=self.plan)
        if name == "timm":
            return lambda: timm_agc.adaptive_clip_grad(parameters, clip_factor=0.01)
        if name == "pytorch_optimizer":

            def one_by_one() -> None:
                for parameter in parameters:
                    parameter.grad = pytorch_optimizer_agc(parameter.detach(), parameter.grad)

            return one_by_one
        weights, gradients = [p.detach() for p in parameters], [p.grad for p in parameters]
        return bound(weights, gradients, self.condition)


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
    run = tensors.contestant(contestant)
    tensors.restore()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = benchmark.pedantic(run, rounds=1)
    del result
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0, "the profiler saw no allocation"
    whole = sum(p.numel() * p.element_size() for p in tensors.parameters.values())
    benchmark.extra_info["peak_memory"] = peak / whole
