"""Clipping inside ``optimizer.step()``: each way of training is either right or a clear error."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import agc_torch
from agc import AGC, Schedule
from agc.errors import ConfigError, FormatError, NonFiniteError, ParameterError, ShapeError
from agc.reference import Stats
from tests.torch.driver import COPIES, never_look_at_values

with warnings.catch_warnings():
    # PyTorch still uses torch.jit.script.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import (
        PostLocalSGDOptimizer,
        _apply_optimizer_in_backward,
        _get_in_backward_optimizers,
    )

RULE = AGC(clipping=0.02, exclude=["2.bias"])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    return (10 * model(batch(step))).square().mean()


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, **options)


def attached(
    model: nn.Module | None = None, rule: AGC = RULE, **options: Any
) -> tuple[Any, torch.optim.Optimizer, agc_torch.Handle]:
    """Return a model, its optimizer and the handle."""
    model = network() if model is None else model
    optimizer = sgd(model, **options)
    return model, optimizer, agc_torch.attach(optimizer, model, rule)


def train(
    model: nn.Module, optimizer: Any, steps: Iterable[int] = (0, 1, 2), rule: AGC | None = None
) -> None:
    """Train; with a rule, clip by hand."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if rule is not None:
            stats = agc_torch.adaptive_clip_grad_(model, rule, step=step)
            assert stats.total().clipped > 0
        optimizer.step()


def by_hand(rule: AGC = RULE, steps: Iterable[int] = (0, 1, 2), **options: Any) -> nn.Module:
    """Return a model as it must come out."""
    model = network()
    train(model, sgd(model, **options), steps, rule)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "amsgrad maximize": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, maximize=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_clipping_by_hand(name):
    expected, model = network(), network()
    train(expected, OPTIMIZERS[name](expected.parameters()), rule=RULE)
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = agc_torch.attach(optimizer, model, RULE)
    train(model, optimizer)
    assert same(model, expected)
    assert handle.steps == 3
    assert handle.stats().total().clipped > 0


def test_two_optimizers_share_a_model():
    """One for the matrices (Muon, where it is), one for the rest; each clips its own."""
    model = network()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    of_matrices = getattr(torch.optim, "Muon", torch.optim.SGD)  # which older releases lack
    muon, adam = of_matrices(matrices, 0.01), torch.optim.AdamW(vectors, 0.01)
    first, second = (agc_torch.attach(o, model, RULE) for o in (muon, adam))
    loss_of(model).backward()
    raw = [p.grad.clone() for p in vectors]
    muon.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(vectors, raw, strict=True))
    adam.step()
    assert list(first.stats().parameters()) == ["0.weight", "2.weight"]
    assert list(second.stats().parameters()) == ["0.bias"]
    assert first.plan == second.plan
    adam.zero_grad()
    adam.step()  # as in plain PyTorch, an optimizer without gradients does nothing
    assert second.stats().units == 0


# Closures


def evaluate(model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 0) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_clips_every_evaluation(line_search):
    model = network()
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=4, line_search_fn=line_search
    )
    handle = agc_torch.attach(optimizer, model, RULE)
    seen = []
    gather = optimizer._gather_flat_grad

    def spy() -> Tensor:
        seen.append(all(is_clipped(p, name) for name, p in model.named_parameters()))
        return gather()

    optimizer._gather_flat_grad = spy
    optimizer.step(lambda: evaluate(model, optimizer))
    assert len(seen) > 2
    assert all(seen)
    assert handle.steps == 1


def is_clipped(p: nn.Parameter, name: str) -> bool:
    return name == "2.bias" or bool((norms(p.grad) <= limits(p) * (1 + 1e-5)).all())


def norms(values: Tensor) -> Tensor:
    """Return the norms of units: rows of a matrix, a whole vector."""
    return values.detach().reshape(-1, values.shape[-1]).norm(dim=1)


def limits(weight: Tensor) -> Tensor:
    return 0.02 * norms(weight).clamp(min=1e-3)


# Schedulers and schedules


@pytest.mark.parametrize("first", ["agc", "scheduler"])
def test_learning_rate_schedulers(first):
    """A scheduler patches ``step`` on the optimizer object."""
    expected, model = network(), network()
    plain, optimizer = sgd(expected), sgd(model)
    if first == "agc":
        agc_torch.attach(optimizer, model, RULE)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(each, 0.1, total_steps=5) for each in (plain, optimizer)
    ]
    if first == "scheduler":
        agc_torch.attach(optimizer, model, RULE)
    for step in range(3):
        train(expected, plain, [step], RULE)
        train(model, optimizer, [step])
        for scheduler in schedulers:
            scheduler.step()
    assert same(model, expected)


def test_checkpoint_resumes_the_schedule():
    rule = AGC(clipping=Schedule([(0, 0.5), (2, 0.01)]))
    parts = attached(rule=rule, momentum=0.9)
    train(*parts[:2], range(2))
    saved = pickle.dumps([part.state_dict() for part in parts])
    parts = attached(rule=rule, momentum=0.9)
    for part, state in zip(parts, pickle.loads(saved), strict=True):
        part.load_state_dict(state)
    train(*parts[:2], range(2, 4))
    assert same(parts[0], by_hand(rule, range(4), momentum=0.9))
    assert parts[2].state_dict() == {"steps": 4}


@pytest.mark.parametrize("state", [None, {}, {"steps": -1}, {"steps": "2"}, {"steps": True}])
def test_state_that_is_none(state):
    _, _, handle = attached()
    with pytest.raises(FormatError, match="not the state of an AGC handle"):
        handle.load_state_dict(state)


def test_the_message_about_a_wrong_state_is_short():
    model, optimizer, handle = attached()
    train(model, optimizer, [0])
    with pytest.raises(FormatError) as caught:
        handle.load_state_dict(optimizer.state_dict() | {"weights": torch.ones(4000)})
    assert len(str(caught.value)) < 500


def test_the_optimizers_own_state_stays_its_own():
    model = network()
    plain = torch.optim.AdamW(model.parameters(), 0.1)
    before = copy.deepcopy(plain.state_dict())
    kind = type(plain)
    agc_torch.attach(plain, model, RULE)
    assert plain.state_dict() == before
    assert type(plain) is kind
    loss_of(model).backward()
    plain.step()
    assert set(plain.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert plain.state_dict()["param_groups"] == before["param_groups"]


# Loss scaling


def scaled_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    step: int = 0,
    *,
    unscale: bool = False,
    poison: bool = False,
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if poison:
        model[0].weight.grad[0, 0] = torch.inf
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_ first"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_grad_scaler(kind, fused, unscale):
    """A step that is skipped halves the scale, and the schedule does not advance."""
    rule = AGC(clipping=Schedule([(0, 0.05), (2, 0.01)]))
    expected, model = network(), network()
    train(expected, kind(expected.parameters(), 0.1, fused=fused), rule=rule)
    optimizer = kind(model.parameters(), 0.1, fused=fused)
    handle = agc_torch.attach(optimizer, model, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step, poison in ((0, False), (1, True), (1, False), (2, False)):
        scaled_step(model, optimizer, scaler, step, unscale=unscale, poison=poison)
        assert handle.stats().total().max_ratio < 1e4  # of unscaled gradients
    assert handle.steps == 3
    for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_policy_raise_leaves_a_skipped_step_to_the_scaler(fused):
    model, optimizer, handle = attached(rule=AGC(nonfinite="raise"), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled_step(model, optimizer, scaler, poison=True)
    assert (handle.steps, scaler.get_scale()) == (0, 2.0)
    optimizer.zero_grad()
    loss_of(model).backward()
    model[0].weight.grad[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"):
        optimizer.step()


def test_step_that_takes_the_scaler_itself():
    class Old(torch.optim.SGD):
        def step(self, closure=None, grad_scaler=None):
            return super().step(closure)

    model = network()
    optimizer = Old(model.parameters(), 0.1)
    agc_torch.attach(optimizer, model, RULE)
    loss_of(model).backward()
    with pytest.raises(ConfigError, match=r"Old\.step takes the GradScaler.*scaler\.unscale_"):
        optimizer.step(grad_scaler=torch.amp.GradScaler("cpu"))


# Whose parameters


def test_parameters_that_join_later():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    handle = agc_torch.attach(optimizer, model, RULE)
    train(model, optimizer, [0])
    assert list(handle.stats().parameters()) == ["0.weight", "0.bias"]
    model.append(nn.Linear(3, 2))
    for layer in (2, 3):
        optimizer.add_param_group({"params": model[layer].parameters()})
    train(model, optimizer, [0])
    assert list(handle.stats().parameters())[2:] == ["2.weight", "3.weight", "3.bias"]
    assert "3.weight" in handle.plan


def test_parameter_of_another_model():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ParameterError, match=r"of shape \(5, 6\) that is not the model's"):
        agc_torch.attach(optimizer, network(), RULE)
    assert agc_torch.attached(optimizer) is None  # nothing is left of what failed
    assert not optimizer._optimizer_step_pre_hooks
    agc_torch.attach(optimizer, model, RULE)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    loss_of(model).backward()
    with pytest.raises(ParameterError, match=r"of shape \(7,\) that is not the model's"):
        optimizer.step()


@pytest.mark.parametrize("given", [None, object(), "sgd"])
def test_what_is_no_optimizer(given):
    assert agc_torch.attached(given) is None
    with pytest.raises(ParameterError, match=r"needs a torch\.optim\.Optimizer, got "):
        agc_torch.attach(given, network(), RULE)


@pytest.mark.parametrize("given", [dict, lambda named: iter(dict(named).items())])
def test_named_tensors_instead_of_a_module(given):
    model = network()
    optimizer = sgd(model)
    rule = AGC(clipping=0.02, units={"*.weight": "o i -> o"})
    handle = agc_torch.attach(optimizer, given(model.named_parameters()), rule)
    for _ in range(2):  # an iterator is read once, and clips at every step
        train(model, optimizer, [0])
        assert handle.stats().total().clipped > 0


@pytest.mark.parametrize("closure", [False, True])
def test_step_without_gradients_clips_nothing_and_counts(closure):
    model, optimizer, handle = attached()
    optimizer.step(lambda: torch.zeros(())) if closure else optimizer.step()
    assert same(model, network())
    assert handle.steps == 1
    assert handle.stats().parameters() == {}
    assert handle.stats().total() == Stats(0, 0, 0, 0.0, 1.0)


def test_telemetry_before_the_first_step_is_empty():
    """A GradScaler skips first steps until its scale fits, and a loop logs after every step."""
    model, optimizer, handle = attached()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch() * torch.inf).square().mean()).backward()
    scaler.step(optimizer)
    assert handle.steps == 0
    assert handle.stats().total() == Stats(0, 0, 0, 0.0, 1.0)
    assert handle.stats().to_dict()["agc/clipped_fraction"] == 0


def test_the_plan_says_what_the_optimizer_lacks_and_what_is_frozen():
    model = network()
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    handle = agc_torch.attach(optimizer, model, AGC(clipping=0.02))
    train(model, optimizer, [0])
    assert {entry.name: entry.inactive for entry in handle.plan} == {
        "0.weight": "not in the optimizer",
        "0.bias": "not in the optimizer",
        "2.weight": None,
        "2.bias": "frozen",
    }
    assert handle.plan.count == handle.stats().units == 3
    assert "not in the optimizer" in str(handle.plan)
    model[2].bias.requires_grad_(True)
    train(model, optimizer, [0])
    assert handle.plan.count == handle.stats().units == 4


# The norm of all gradients together


@pytest.mark.parametrize("scaled", [False, True], ids=["", "grad scaler"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("max_norm", [0.03, 1e3])
def test_global_norm_comes_after_agc(max_norm, fused, scaled):
    expected, model = network(), network()
    optimizer = sgd(expected, fused=fused)
    for step in range(3):
        evaluate(expected, optimizer, step)
        agc_torch.adaptive_clip_grad_(expected, RULE)
        nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        optimizer.step()
    optimizer = sgd(model, fused=fused)
    handle = agc_torch.attach(optimizer, model, RULE, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    for step in range(3):
        scaled_step(model, optimizer, scaler, step)
    assert copy.deepcopy((model, optimizer, handle))[2].max_norm == max_norm
    for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_a_small_global_norm_is_the_limit():
    """``clip_grad_norm_`` adds 1e-6 to the norm, and would come out 0.03 % too small here."""
    model = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    agc_torch.attach(optimizer, model, AGC(clipping=None), max_norm=1e-6)
    model.weight.grad = torch.full((3, 4), 1e-3)
    optimizer.step()
    assert float(model.weight.detach().norm()) == pytest.approx(1e-6, rel=1e-6)


GRADIENTS = {
    "float32": torch.linspace(-1, 2, 12).view(3, 4),
    "transposed": torch.linspace(-1, 2, 12).view(3, 4).t(),
    "channels last": torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(3.0),
    "empty": torch.ones(0, 4),
    "bfloat16": torch.linspace(-1, 2, 12, dtype=torch.bfloat16),
    "float16": torch.linspace(-1, 2, 12, dtype=torch.float16),
    "float64": torch.linspace(-1, 2, 12, dtype=torch.float64),
    "complex": torch.linspace(-1, 2, 12, dtype=torch.complex64) * (1 + 2j),
    "sparse": torch.sparse_coo_tensor(
        [[1, 3]], torch.linspace(-1, 2, 8).view(2, 4), (5, 4), check_invariants=True
    ),
}


@pytest.mark.parametrize("kept", ["all", "none", "not finite"])
@pytest.mark.parametrize("way", ["host", "accelerator"])
def test_global_norm_of_all_kinds_of_gradients(way, kept, monkeypatch):
    """Each is rounded once, also where the factor itself has no place in the gradient's dtype."""
    if way == "accelerator":
        never_look_at_values(monkeypatch)
    gradients = {name: gradient.clone() for name, gradient in GRADIENTS.items()}
    if kept == "not finite":
        gradients["float16"][3] = torch.nan
    dense = [g.to_dense() if g.is_sparse else g for g in gradients.values()]
    flat = torch.cat([g.flatten().to(torch.complex128) for g in dense])
    norm = float(flat.abs().square().sum().sqrt())
    parameters = {}
    for name, gradient in gradients.items():
        parameters[name] = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
        parameters[name].grad = gradient
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    rule = AGC(clipping=None, nonfinite="zero")
    agc_torch.attach(optimizer, parameters, rule, max_norm=2 * norm if kept == "all" else 1.7)
    optimizer.step()
    factor = {"all": 1.0, "none": 1.7 / norm, "not finite": 0.0}[kept]
    for name, before in GRADIENTS.items():
        wide = torch.complex128 if before.is_complex() else torch.float64
        before = (before.to_dense() if before.is_sparse else before).to(wide)
        found = parameters[name].grad
        found = found.to_dense() if found.is_sparse else found
        expected = (before * factor).to(found.dtype)
        exact = found.dtype in (torch.bfloat16, torch.float16)
        rtol = 0 if exact else 1e-14 if found.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0, msg=name)


@pytest.mark.parametrize("policy", ["propagate", "zero", "raise"])
def test_global_norm_that_is_not_finite(policy):
    """A gradient that AGC leaves alone is infinite; no other one becomes 0 by that."""
    model = network()
    rule = AGC(clipping=0.01, exclude=["0.weight"], nonfinite=policy)
    optimizer = sgd(model)
    agc_torch.attach(optimizer, model, rule, max_norm=1.0)
    evaluate(model, optimizer)
    model[0].weight.grad[0, 0] = torch.inf
    if policy == "raise":
        with pytest.raises(
            NonFiniteError, match=r"all gradients together.* is inf.*\['0.weight'\]"
        ):
            optimizer.step()
        return
    optimizer.step()
    for parameter in model.parameters():
        want = torch.nan if policy == "propagate" else 0.0
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, want), equal_nan=True)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_global_norm_that_is_none(max_norm):
    model = network()
    with pytest.raises(ConfigError, match="max_norm must be a finite number above 0, got"):
        agc_torch.attach(sgd(model), model, RULE, max_norm=max_norm)


# Parameters that change under way


def test_parameter_resized_in_place():
    """As a vocabulary that grows: ``resize_token_embeddings`` of some libraries."""
    model, optimizer, handle = attached(nn.Embedding(5, 3), AGC())
    for rows in (5, 7):
        optimizer.zero_grad()
        model.weight.data = torch.randn(rows, 3)
        model(torch.arange(rows)).sum().backward()
        optimizer.step()
        assert handle.stats().units == handle.plan.count == rows


def test_gradient_of_another_shape_is_still_refused():
    model, optimizer, _ = attached(nn.Embedding(5, 3), AGC())
    model.weight.grad = torch.ones(5, 3)
    model.weight.data = torch.ones(7, 3)
    with pytest.raises(ShapeError, match=r"'weight' has shape \(7, 3\), its gradient \(5, 3\)"):
        optimizer.step()


def assign(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_layer(model: nn.Module) -> None:
    model[2] = nn.Linear(5, 4)


def new_head(model: nn.Module) -> None:
    model[2] = nn.Sequential(nn.Linear(5, 4), nn.Tanh())


@pytest.mark.parametrize("replace", [assign, lambda model: assign(model[2]), new_layer, new_head])
def test_parameters_that_were_replaced_after_the_optimizer_was_made(replace):
    model, optimizer, _ = attached()
    train(model, optimizer, [0])
    optimizer.zero_grad()
    replace(model)
    loss_of(model).backward()
    with pytest.raises(
        ParameterError, match=r"no longer the model's.*load_state_dict\(assign=True"
    ):
        optimizer.step()


@pytest.mark.parametrize("put", [nn.Identity(), None], ids=["identity", "nothing"])
def test_a_layer_that_was_taken_out_is_left_alone(put):
    model, optimizer, handle = attached()
    train(model, optimizer, [0])
    optimizer.zero_grad()
    if put is None:
        del model[2]
    else:
        model[2] = put
    loss_of(model).backward()
    optimizer.step()
    assert list(handle.stats().parameters()) == ["0.weight", "0.bias"]


# Whose step it is


class Child(torch.optim.SGD):
    """Calls its parent class's step, whose hooks PyTorch runs as well."""

    def step(self, closure=None):
        return super().step(closure)


class Grandchild(Child):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


@pytest.mark.parametrize("given", ["gradients", "closure", "closure by name"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, Child, Grandchild])
def test_one_step_counts_once(kind, given):
    for parent in (torch.optim.SGD, Child):  # PyTorch hooks the class of every optimizer there is
        parent(network().parameters(), 0.1)
    rule = AGC(clipping=Schedule([(0, 0.5), (2, 0.01)]))
    model = network()
    optimizer = kind(model.parameters(), 0.1)
    handle = agc_torch.attach(optimizer, model, rule)
    for step in range(3):
        closure = functools.partial(evaluate, model, optimizer, step)
        if given == "gradients":
            closure()
            optimizer.step()
        else:
            loss = (
                optimizer.step(closure) if given == "closure" else optimizer.step(closure=closure)
            )
            assert loss.item() > 0
        assert handle.stats().total().clipped > 0
    assert handle.steps == 3
    assert same(model, by_hand(rule))


def test_step_that_fails_leaves_no_trace():
    class Failing(Child):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = network()
    optimizer = Failing(model.parameters(), 0.1)
    handle = agc_torch.attach(optimizer, model, RULE)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="out of memory") as kept:
        optimizer.step()
    optimizer.fails = False
    failed = handle.stats()
    train(model, optimizer, [1])
    assert handle.steps == 1
    assert handle.stats() is not failed
    assert kept.value.__traceback__ is not None  # it keeps the frames of the step that failed


class NoOptimizer:
    """As apex's FP16_Optimizer: a wrapper that is not a subclass."""

    name = "optimizer"

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        setattr(self, self.name, inner)

    param_groups = property(lambda self: getattr(self, self.name).param_groups)

    def step(self, closure=None):
        return getattr(self, self.name).step(closure)

    def zero_grad(self):
        getattr(self, self.name).zero_grad()


class Wrapper(NoOptimizer, torch.optim.Optimizer):
    """A subclass without hooks, whose step calls the inner one's."""


class Lookahead(Wrapper):
    """As timm's: hook dictionaries that nobody reads."""

    name = "_base_optimizer"

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}


class Hooked(Lookahead):
    """As pytorch_optimizer's: hooks of its own around the inner step."""

    name = "base_optimizer"

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self._patch_step_function()


def average(inner: torch.optim.Optimizer) -> torch.optim.Optimizer:
    averager = type("Averager", (), {"average_parameters": lambda self, params: None})()
    return PostLocalSGDOptimizer(inner, averager)


WRAPPERS = {
    "none": lambda inner: inner,
    "plain": Wrapper,
    "lookahead": Lookahead,
    "hooked": Hooked,
    "no optimizer": NoOptimizer,
    "post-local SGD": average,
    "twice": lambda inner: Lookahead(Wrapper(inner)),
    "scheduler inside": lambda inner: (
        torch.optim.lr_scheduler.LambdaLR(inner, lambda epoch: 1.0) and Wrapper(inner)
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_looked_through(name):
    model = network()
    inner = sgd(model)
    optimizer = WRAPPERS[name](inner)
    assert agc_torch.attached(optimizer) is None
    handle = agc_torch.attach(optimizer, model, RULE)
    assert agc_torch.attached(optimizer) is agc_torch.attached(inner) is handle
    with pytest.raises(ParameterError, match=r"attached to this .* already; remove\(\)"):
        agc_torch.attach(optimizer, model, RULE)
    train(model, optimizer)
    assert handle.steps == 3
    assert same(model, by_hand())
    handle.remove()
    handle.remove()
    assert agc_torch.attached(optimizer) is None
    agc_torch.attach(optimizer, model, RULE)


class Ascent(torch.optim.Optimizer):
    """As SAM of pytorch_optimizer: two passes, and the inner optimizer's step on restored
    weights.
    """

    def __init__(self, params: Any, inner: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = inner(self.param_groups)

    @torch.no_grad()
    def first_step(self):
        for p in _all(self):
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=100)  # far enough for its norm to matter

    @torch.no_grad()
    def second_step(self):
        for p in _all(self):
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def _all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("how", ["step", "by hand"])
def test_two_passes_clip_the_last_gradient_against_restored_weights(how):
    model = network()
    optimizer = Ascent(model.parameters(), lambda groups: torch.optim.SGD(groups, 1.0))
    handle = agc_torch.attach(optimizer, model, RULE)
    evaluate(model, optimizer)
    if how == "step":
        optimizer.step(lambda: evaluate(model, optimizer))
    else:
        optimizer.first_step()
        evaluate(model, optimizer)
        optimizer.second_step()
    assert handle.steps == 1
    before = dict(network().named_parameters())
    for name, p in model.named_parameters():
        moved = norms(p - before[name])
        assert name == "2.bias" or (moved <= limits(before[name]) * 1.001).all()


class Dead(Wrapper):
    """Holds an optimizer with other parameters, and steps by itself."""

    def __init__(self, params: Any) -> None:
        self.groups = [{"params": list(params)}]
        super().__init__(torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1))

    param_groups = property(lambda self: self.groups)


def replaced(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, 0.1)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)
    return optimizer


def overlapped(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, 0.1)
    optimizer._overlap_with_ddp = True
    return optimizer


@pytest.mark.parametrize("build", [Dead, replaced, overlapped])
def test_a_step_that_never_runs_the_hooks_is_refused(build):
    model = network()
    optimizer = build(model.parameters())
    with pytest.raises(ParameterError, match="would never act; give the optimizer inside"):
        agc_torch.attach(optimizer, model, RULE)
    assert agc_torch.attached(optimizer) is None


def logged(optimizer: torch.optim.Optimizer) -> None:
    inner = optimizer.step
    optimizer.step = lambda *args: inner(*args)


def partially(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step = functools.partial(optimizer.step)


@pytest.mark.parametrize("replace", [logged, partially])
def test_a_step_that_calls_the_one_it_replaced(replace):
    model = network()
    optimizer = sgd(model)
    replace(optimizer)
    handle = agc_torch.attach(optimizer, model, RULE)
    train(model, optimizer, [0])
    assert handle.stats().total().clipped > 0


def test_optimizers_inside_backward():
    model, rule = network(), AGC(clipping=0.02)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ParameterError, match=r"inside backward\(\).*_get_in_backward_optimizers"):
        agc_torch.attach(sgd(model), model, rule)
    handles = [agc_torch.attach(one, model, rule) for one in _get_in_backward_optimizers(model)]
    loss_of(model).backward()
    assert [handle.steps for handle in handles] == [1] * 4
    assert same(model, by_hand(rule, [0]))


# Removing, copying, pickling


def test_removed_as_a_context_manager():
    model, optimizer, handle = attached()
    loss_of(model).backward()
    raw = model[0].weight.grad.clone()
    with handle:
        pass
    optimizer.step()
    assert torch.equal(model[0].weight.grad, raw)


some_copies = pytest.mark.parametrize("how", ["deepcopy", "pickle"])


@some_copies
@pytest.mark.parametrize("order", [1, -1], ids=["handle last", "handle first"])
def test_copy_of_model_optimizer_and_handle_clips(how, order):
    model, optimizer, handle = parts = attached(momentum=0.9)
    train(model, optimizer, [0])
    twin, twin_optimizer, twin_handle = COPIES[how](parts[::order])[::order]
    assert agc_torch.attached(twin_optimizer) is twin_handle
    assert agc_torch.attached(optimizer) is handle
    assert twin_handle.model is twin
    assert (twin_handle.steps, twin_handle.plan) == (1, handle.plan)
    train(model, optimizer, [1])
    train(twin, twin_optimizer, [1])
    assert same(model, twin)


@some_copies
def test_copy_of_the_optimizer_alone_is_seen_to_be_detached(how):
    parts = attached()
    assert agc_torch.attached(COPIES[how](parts[1])) is None


@pytest.mark.parametrize("how", COPIES)
def test_a_model_that_keeps_its_handle(how):
    model, optimizer, handle = attached(momentum=0.9)
    model.agc = handle
    train(model, optimizer, [0])
    twin = COPIES[how](model)
    assert twin.agc.model is twin
    assert agc_torch.attached(twin.agc.optimizer) is twin.agc
    assert agc_torch.attached(optimizer) is handle
    assert (twin.agc.steps, twin.agc.plan) == (1, model.agc.plan)
    for one in (model, twin):
        train(one, one.agc.optimizer, [1])
        assert one.agc.stats().total().clipped > 0
    assert same(model, twin)


@some_copies
def test_a_copy_that_starts_at_the_handle_of_a_model_that_keeps_it(how):
    model, _, model.agc = attached()
    handle = COPIES[how](model.agc)
    assert handle.model.agc is handle
    assert {id(p) for p in handle.model.parameters()} == {id(p) for p in _all(handle.optimizer)}


def test_a_copy_of_a_removed_handle_does_not_clip():
    _, _, handle = attached()
    handle.remove()
    assert agc_torch.attached(copy.deepcopy(handle).optimizer) is None


def test_nothing_is_kept_alive():
    parts = attached()
    gone = weakref.ref(parts[0])
    del parts
    gc.collect()
    assert gone() is None


# What is remembered between steps


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def elsewhere(tensor: Tensor) -> Tensor:
    """Return a copy that starts at no multiple of 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].copy_(tensor.flatten()).view(tensor.shape)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor | None]]] = {
    "gone": ("grad", lambda g: None),
    "turned": ("grad", turned),
    "elsewhere": ("grad", elsewhere),
    "wide": ("grad", Tensor.double),
    "sparse": ("grad", lambda g: g.to_sparse(1)),
    "holes": ("grad", lambda g: g.repeat_interleave(2, 1)[:, ::2]),
    "weights turned": ("data", turned),
    "weights elsewhere": ("data", elsewhere),
    "weights half": ("data", Tensor.half),
}


@pytest.mark.parametrize(("attribute", "change"), CHANGES.values(), ids=CHANGES)
def test_a_step_unlike_the_one_before(attribute, change):
    torch.manual_seed(0)
    rule = AGC(clipping=0.02)
    # Rows that are summed in blocks.
    model, _, handle = attached(nn.Linear(600, 9, bias=False), rule)
    for differs in (False, True, False):
        model.zero_grad()
        (10 * model(torch.randn(4, 600).to(model.weight.dtype))).square().mean().backward()
        if differs:
            model.weight.grad_dtype = None  # a gradient of any dtype
            setattr(model.weight, attribute, change(getattr(model.weight, attribute)))
        alone = copy.deepcopy(model)
        alone.weight.grad_dtype = None
        gradient = model.weight.grad
        alone.weight.grad = None if gradient is None else gradient.clone()
        handle._clip()
        if gradient is None:
            assert handle.stats().units == 0
            continue
        expected = agc_torch.adaptive_clip_grad_(alone, rule)
        assert int(handle.stats().clipped) == int(expected.clipped) > 0
        torch.testing.assert_close(gradient.to_dense(), alone.weight.grad.to_dense())


def test_gradients_are_let_go():
    model, optimizer, _ = attached()
    for _ in range(2):
        loss_of(model).backward()
        gradients = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(gradient() is None for gradient in gradients)


class Operations(TorchDispatchMode):
    """Lists the operations of PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def cost(count: int, bias: bool) -> tuple[list[str], int]:
    """Return the operations and the calls by Python of a step that clips none of some layers."""
    layers = nn.ModuleList(nn.Linear(31, 32, bias=bias) for _ in range(count))
    for p in layers.parameters():
        p.grad = torch.full_like(p, 1e-8)
    _, optimizer, handle = attached(layers, AGC(clipping=0.01))
    optimizer.step()
    with Operations() as operations:
        handle._clip()
    calls = 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        handle._clip()
    finally:
        sys.setprofile(None)
    units = (32 + bias) * count
    assert (handle.stats().units, int(handle.stats().clipped)) == (units, 0)
    return operations.names, calls


@pytest.mark.parametrize(("bias", "most"), [(False, (11, 90)), (True, (18, 100))])
def test_a_step_that_clips_nothing_costs_the_same_of_any_number_of_parameters(bias, most):
    """Unlike ``clip_grad_norm_``, which calls Python some five times for each."""
    operations, calls = cost(25, bias)
    assert (operations, calls) == cost(100, bias)
    assert len(operations) <= most[0]
    assert calls <= most[1]
