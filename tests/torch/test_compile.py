"""``torch.compile``: the clipping alone as one graph, and a whole training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import agc_torch
from agc import AGC, Schedule
from agc.errors import ParameterError

pytestmark = [
    # What PyTorch itself warns of while it compiles.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
RULES = {
    "plain": AGC(clipping=0.01),
    "zero": AGC(clipping={"0.*": 0.02, "*": 0.01}, nonfinite="zero", exclude=["3.bias"]),
    "schedule": AGC(clipping=Schedule([(0, 0.1), (5, 0.01)])),
    "callable": AGC(clipping=lambda step: 0.1 / (1 + step)),
}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Flatten(), nn.Linear(384, 7)
    )


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(IMAGES).square().sum().backward()


def close(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=4e-7, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_one_graph(name):
    rule = RULES[name]
    model, eager = network(), network()
    plan = agc_torch.plan(model, rule)

    def clip(step: torch.Tensor) -> agc_torch.Stats:
        return agc_torch.adaptive_clip_grad_(model, rule, plan=plan, step=step)

    compiled = torch.compile(clip, backend="aot_eager", fullgraph=True)
    for step in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            backward(model), backward(eager)
            stats = compiled(torch.tensor(step))
        expected = agc_torch.adaptive_clip_grad_(eager, rule, step=step)
        close(model, eager)
        assert stats.total().clipped == expected.total().clipped > 0
        assert stats.total().min_scale == pytest.approx(expected.total().min_scale)


@pytest.mark.long
def test_inductor():
    model, eager = network(), network()
    rule = RULES["plain"]
    plan = agc_torch.plan(model, rule)

    @torch.compile(fullgraph=True)
    def clip() -> agc_torch.Stats:
        return agc_torch.adaptive_clip_grad_(model, rule, plan=plan)

    backward(model), backward(eager)
    assert clip().total().clipped == agc_torch.adaptive_clip_grad_(eager, rule).total().clipped
    close(model, eager)


@pytest.mark.parametrize("options", [{}, {"clipping": 0.1, "units": {"*": "o ... -> o"}}])
def test_a_plan_is_made_before(options):
    model = network()
    backward(model)

    @torch.compile(backend="eager", fullgraph=True)
    def clip() -> agc_torch.Stats:
        return agc_torch.adaptive_clip_grad_(model, AGC(**options))

    with pytest.raises((ParameterError, RuntimeError), match="a plan cannot be made inside"):
        clip()


@pytest.mark.filterwarnings("ignore:.*record_function.*:UserWarning")
def test_whole_step():
    """Forward, backward, clipping and the update; PyTorch itself breaks the graph around them."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, agc_torch.Handle]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, agc_torch.attach(optimizer, model, RULES["schedule"])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        backward(model)
        optimizer.step()

    model, optimizer, handle = start()
    eager, eager_optimizer, eager_handle = start()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(4):
        compiled(model, optimizer)
        step(eager, eager_optimizer)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert handle.steps == eager_handle.steps == 4
    assert handle.stats().total().clipped == eager_handle.stats().total().clipped
