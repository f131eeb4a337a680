"""SAM in front of PyTorch optimizers, and the failures of other code."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from agc.config import SAM
from agc.errors import (
    ConfigError,
    FormatError,
    MissingGradientError,
    NonFiniteError,
    OrderError,
    ParameterError,
    ShapeError,
)
from agc_torch.sam import SharpnessAware
from agc_torch.verify import verify_sam
from tests.contract.sam import SamContract, VerifyContract
from tests.torch.driver import COPIES, TorchDriver

FAR = SAM(rho=1.0)
"""A radius with which the perturbed loss is far from the clean one."""


class TestSam(SamContract):
    driver = TorchDriver()
    batch_cure = r"step\(optimizer, closure, batch="


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 8, dtype=dtype)
        self.outer = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (20,), generator=generator)


class Trainer:
    """A model, SAM in front of the optimizer of what ``of`` returns, and one batch.

    A loss is computed inside the context ``inside``. If ``poisoned``, the first pass leaves an
    infinity in a gradient.
    """

    def __init__(self, rule=FAR, model=None, *, of=lambda model: model, lr=0.1):
        self.model = Net(torch.float32) if model is None else model
        self.x, self.y = data(next(self.model.parameters()).dtype)
        self.optimizer = torch.optim.SGD(of(self.model).parameters(), lr=lr)
        self.sam = SharpnessAware(self.model, rule)
        self.scaler, self.inside, self.poisoned = None, nullcontext, False

    def loss(self, *batch):
        x, y = batch or (self.x, self.y)
        with self.inside():
            return cross_entropy(self.model(x), y)

    def closure(self, *batch):
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.poisoned and not self.sam.is_perturbed:
            [*self.model.parameters()][-1].grad[0] = torch.inf
        return loss

    def step(self):
        """Return the clean and the perturbed loss."""
        batch = (self.x, self.y)
        loss = self.sam.step(self.optimizer, self.closure, batch=batch, scaler=self.scaler)
        return loss.item(), self.sam.stats().perturbed_loss.item()

    def by_hand(self):
        """Do what :meth:`step` does, but for the optimizer's step."""
        first = self.closure()
        with self.sam.perturbed():
            second = self.loss()
            second.backward()
        return first.item(), second.item()

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(map(torch.equal, model.parameters(), before))


def test_the_contexts_are_the_same_as_the_step():
    train, other = Trainer(), Trainer()
    train.step()
    other.by_hand()
    other.optimizer.step()
    assert same(train.model, other.model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("AdamW", {"foreach": True}), ("AdamW", {"fused": True}), ("LBFGS", {"max_iter": 3})],
)
def test_any_optimizer_learns(optimizer, options):
    train = Trainer(SAM())
    make = getattr(torch.optim, optimizer)
    train.optimizer = make(train.model.parameters(), lr=0.05, **options)
    losses = [train.step()[0] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert train.sam.count == 30


def test_weights_are_intact_when_the_second_forward_fails():
    train = Trainer()
    before, places = snapshot(train.model), [p.data_ptr() for p in train.model.parameters()]
    weights = []

    def closure():
        weights.append(train.model.inner.weight.detach().clone())
        if len(weights) == 2:
            raise KeyboardInterrupt
        return train.closure()

    with pytest.raises(KeyboardInterrupt):
        train.sam.step(train.optimizer, closure)
    assert not torch.equal(*weights)
    assert same(train.model, before)
    assert places == [p.data_ptr() for p in train.model.parameters()]
    train.step()  # and the next step works
    assert not same(train.model, before)


class TestPoisonedAscent:
    @pytest.mark.parametrize("how", ["step", "by_hand"])
    def test_raise_leaves_the_weights(self, how):
        train = Trainer(SAM(nonfinite="raise"))
        train.poisoned, before = True, snapshot(train.model)
        message = "norm of the ascent gradient is inf; the weights are unchanged"
        with pytest.raises(NonFiniteError, match=message):
            getattr(train, how)()
        assert same(train.model, before)

    @pytest.mark.parametrize(
        ("policy", "leaves"), [("skip_step", torch.isnan), ("skip_perturb", torch.isfinite)]
    )
    def test_what_a_block_leaves(self, policy, leaves):
        train = Trainer(SAM(nonfinite=policy))
        train.poisoned = True
        train.by_hand()
        assert leaves(train.gradient()).all()

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64]
    )
    @pytest.mark.parametrize("poisoned", [False, True])
    def test_gradients_of_a_step_that_is_not_skipped_keep_their_bits(self, poisoned, dtype):
        values = torch.tensor([-0.0, 2.0**-24, -1.5, torch.inf]).to(dtype)
        if dtype.is_complex:
            values = torch.complex(values.real, values.real.flip(0))
        model = nn.ParameterList([torch.zeros(4, dtype=dtype)])
        (weight,) = model.parameters()
        weight.grad = torch.full((4,), torch.inf if poisoned else 1.0).to(dtype)
        with SharpnessAware(model, SAM()).perturbed():
            weight.grad = values.clone()
        if poisoned:
            assert weight.grad.isnan().all()
        else:
            assert torch.equal(weight.grad.view(torch.uint8), values.view(torch.uint8))

    @pytest.mark.parametrize("poisoned", [False, True])
    def test_a_scaler_sees_it_in_sparse_gradients_too(self, poisoned):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, sparse=True)
        train = Trainer(SAM(), nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 3)))
        train.x, train.y = torch.tensor([[0, 1], [1, 1], [5, 0]]), torch.tensor([0, 1, 2])
        train.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        train.poisoned, before = poisoned, snapshot(train.model)
        train.step()
        assert embedding.weight.grad.is_sparse
        assert poisoned == bool(embedding.weight.grad.to_dense()[[0, 1, 5]].isnan().all())
        for parameter, kept in zip(train.model.parameters(), before, strict=True):
            assert torch.equal(parameter, kept) == poisoned
        assert train.scaler.get_scale() == (512.0 if poisoned else 1024.0)


def step_with_gradient(start, gradient, rule):
    """Return a parameter's values in both passes, and the norm, where this is its gradient."""
    weight, seen = nn.Parameter(start), []

    def closure():
        seen.append(weight.detach().clone())
        weight.grad = gradient.clone()
        return torch.tensor(1.0)

    sam = SharpnessAware(nn.ParameterList([weight]), rule)
    sam.step(torch.optim.SGD([weight], lr=0.0), closure)
    return *seen, sam.stats().norm.item()


@pytest.mark.parametrize(("w", "g"), [(0.01, 1e-6), (300.0, 300.0)], ids=["underflow", "overflow"])
def test_adaptive_norm_of_half_precision(w, g):
    weight, gradient = (torch.full((2, 2), value, dtype=torch.float16) for value in (w, g))
    _, moved, norm = step_with_gradient(weight, gradient, SAM(rho=0.5, adaptive=True))
    weight, gradient = weight.double(), gradient.double()
    wanted = ((weight + 0.01) * gradient).norm()
    assert norm == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(
        moved.double(), weight + 0.5 * (weight + 0.01) ** 2 * gradient / wanted, rtol=1e-3, atol=0
    )


def test_a_subnormal_norm_moves_weights_no_further_than_rho():
    clean, moved, _ = step_with_gradient(torch.ones(4), torch.full((4,), 1e-41), SAM(rho=0.05))
    assert 0 < (moved - clean).norm() <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize("active", [1, 2], ids=["only-first", "only-second"])
def test_a_parameter_with_a_gradient_in_only_one_pass(active):
    train, passes = Trainer(), itertools.count(1)
    train.model.inner.register_forward_hook(
        lambda _m, _i, out: out if next(passes) == active else out.detach()
    )
    before = train.model.inner.weight.detach().clone()
    train.step()
    assert torch.equal(before, train.model.inner.weight) == (active == 1)


class Stateful(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.double()


class Rebinding(Stateful):
    """Normalisation written by hand: new tensors take the place of old ones, one of them grows."""

    def __init__(self):
        zeros = {"mean": torch.zeros(6), "n": torch.tensor(0), "queue": torch.zeros(0, 6)}
        super().__init__(**zeros, first=None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.n = self.n + 1
        self.queue = torch.cat([self.queue, x[:1]])
        if self.first is None:
            self.first = x.mean(0)
        return self.layer(x - self.mean)


class Recurrent(Stateful):
    """A state, changed in place, that the output depends on."""

    def __init__(self):
        super().__init__(state=torch.zeros(6))
        self.seen = []

    def forward(self, x):
        self.seen.append(self.state.clone())
        self.state += x.mean(0)
        return self.layer(x + self.state)


def normalised():
    return nn.Sequential(nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3))


def parametrized(parametrize):
    model = Net(torch.float32)
    parametrize(model.inner)
    return model


weight_normalised, power_iterated = (
    partial(parametrized, parametrize)
    for parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm)
)


class TestBothPassesComputeTheSameFunction:
    @pytest.mark.parametrize(
        ("make", "rule"),
        [
            *itertools.product(
                (Rebinding, Recurrent, normalised),
                (FAR, SAM(rho=1.0, fraction=0.5), SAM(rho=1.0, microbatches=2)),
            ),
            (power_iterated, FAR),
        ],
    )
    def test_buffers_are_updated_once(self, make, rule):
        """As in a model that saw every part of the batch once."""
        train = Trainer(rule, make())
        twin = copy.deepcopy(train.model)
        for part in train.x.chunk(rule.microbatches):
            twin(part)
        train.step()
        for name, buffer in twin.named_buffers():
            assert torch.equal(train.model.get_buffer(name), buffer), name

    @pytest.mark.parametrize("rule", [SAM(), SAM(fraction=0.5)], ids=["plain", "fraction"])
    def test_both_start_from_the_same_buffers(self, rule):
        train = Trainer(rule, Recurrent())
        train.step(), train.step()
        first, second, third, fourth = train.model.seen
        assert torch.equal(first, second)
        assert torch.equal(third, fourth)
        assert torch.equal(third, train.x.mean(0))

    def test_dropout_has_the_same_mask_in_both_passes_and_moves_on(self):
        train = Trainer(model=nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        masks = []
        train.model[1].register_forward_hook(lambda _m, _i, out: masks.append(out == 0))
        train.step(), train.step()
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[1], masks[2])

    def test_by_hand_the_clean_pass_is_the_one_that_counts(self):
        train = Trainer(model=nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
        twin = copy.deepcopy(train.model)
        twin(train.x)
        train.by_hand()
        for buffer, expected in zip(train.model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, expected)

    def test_layers_without_shapes_yet(self):
        train = Trainer(model=nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
        for step in (1, 2):
            clean, perturbed = train.step()
            assert train.model[1].num_batches_tracked == step
        assert perturbed > clean

    def test_a_failed_pass_leaves_the_buffers(self):
        train = Trainer(model=Recurrent())
        with pytest.raises(ConfigError):
            train.sam.step(train.optimizer, lambda: train.model(train.x).unbind())
        assert not train.model.state.any()


class Taught(Stateful):
    """A model inside whose forward pass a teacher follows the weights."""

    def __init__(self, rebinds):
        super().__init__()
        self.teacher = copy.deepcopy(self.layer).requires_grad_(False)
        self.rebinds = rebinds

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
                if self.rebinds:
                    slow.data = 0.5 * slow.data + 0.5 * fast.data
                else:
                    slow.lerp_(fast, 0.5)
        return self.layer(x)


@pytest.mark.parametrize("rebinds", [False, True], ids=["in-place", "data"])
@pytest.mark.parametrize("rule", [SAM(rho=9.0), SAM(rho=9.0, fraction=0.5)], ids=["all", "part"])
def test_a_teacher_follows_the_weights_and_not_the_perturbed_ones(rebinds, rule):
    train = Trainer(rule, Taught(rebinds))
    twin = copy.deepcopy(train.model)
    for _ in range(3):
        twin.layer.load_state_dict(train.model.layer.state_dict())
        twin(train.x)
        train.step()
        teacher = train.model.teacher.weight
        torch.testing.assert_close(teacher, twin.teacher.weight, rtol=1e-14, atol=0)


def test_plain_steps_take_one_pass():
    train, calls = Trainer(SAM(every=3)), []
    train.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(6):
        train.step()
    assert len(calls) == 2 * 2 + 4


def test_gradient_accumulation_in_the_closure():
    train, whole = (Trainer(model=Net()) for _ in range(2))

    def closure():
        train.optimizer.zero_grad()
        total = 0
        for part in zip(train.x.chunk(4), train.y.chunk(4), strict=True):
            loss = train.loss(*part) / 4
            loss.backward()
            total += loss.detach()
        return total

    train.sam.step(train.optimizer, closure)
    whole.step()
    torch.testing.assert_close(train.gradient(), whole.gradient(), rtol=1e-11, atol=1e-14)


PERTURBED = "weights are perturbed: save after"


class KeepsItsOwn(Net):
    def __init__(self):
        super().__init__(torch.float32)
        self.sam = SharpnessAware(self, SAM(rho=0.5))


class TestCopies:
    """A model under SAM is copied and saved like any other, unless its weights are perturbed."""

    def test_the_copy_is_not_under_sam(self):
        train = Trainer()
        train.step()
        copies, before = [make(train.model) for make in COPIES.values()], snapshot(train.model)
        train.closure()
        with train.sam.perturbed():
            for model in copies:
                assert model.state_dict()
                assert same(model, before)
            train.closure()
        for model in copies:
            other = Trainer(model=model)
            other.step()
            with other.sam.perturbed(), pytest.raises(OrderError, match=PERTURBED):
                model.state_dict()

    def test_the_copy_goes_on_with_a_sam_that_it_keeps(self):
        train = Trainer(model=KeepsItsOwn(), lr=0.0)
        original = train.sam = train.model.sam
        train.step()
        for make in COPIES.values():
            model = make(train.model)
            other = Trainer(model=model, lr=0.0)
            other.sam = model.sam
            assert model.sam.model is model
            assert (model.sam.count, model.sam.rule) == (1, original.rule)
            before = snapshot(model)
            clean, perturbed = other.step()
            assert perturbed > clean
            assert model.sam.count == 2
            with model.sam.perturbed():
                assert not same(model, before)
                with pytest.raises(OrderError, match=PERTURBED):
                    model.state_dict()
                assert train.model.state_dict()
            assert same(model, before)
        assert original.count == 1
        alone = pickle.loads(pickle.dumps(original))
        assert alone.model.sam is alone

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    @pytest.mark.parametrize("owned", [False, True])
    def test_not_while_the_weights_are_perturbed(self, how, owned):
        train = Trainer(model=KeepsItsOwn() if owned else None)
        sam = train.model.sam if owned else train.sam
        train.closure()
        with sam.perturbed():
            for original in (train.model, sam):
                with pytest.raises(OrderError, match=PERTURBED):
                    COPIES[how](original)
        assert COPIES[how](train.model)

    def test_what_is_inside_a_wrapper_is_not_saved_either(self):
        train = Trainer()
        wrapped = nn.DataParallel(train.model)
        train.closure()
        # Patterns mean the names of AGC's plan, whatever is wrapped around the model.
        with SharpnessAware(wrapped, SAM(exclude=["outer.*"])).perturbed():
            for model in (wrapped, train.model):
                with pytest.raises(OrderError, match=PERTURBED):
                    model.state_dict()


class TestWhatIsRemembered:
    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(31, 32),
            nn.Conv2d(8, 64, 3),
            nn.Linear(768, 10),
            nn.Linear(12, 12, dtype=torch.float64),
            nn.Conv2d(64, 16, 3).to(memory_format=torch.channels_last),
            nn.Linear(6, 5, dtype=torch.bfloat16),
            nn.Linear(4, 3, dtype=torch.complex64),
        )

    def draw_(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_it_changes_no_bit(self, adaptive):
        """Of gradients whose layout, number or place among the others changes."""
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, SAM(rho=30.0, adaptive=adaptive))

        def check() -> None:
            gradients = [p.grad for p in model.parameters()]
            found = []
            for each in (sam, SharpnessAware(model, sam.rule)):
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = None if gradient is None else gradient.clone()
                before = [p.detach().clone() for p in model.parameters()]
                with each.perturbed(optimizer):
                    found.append([p.detach().clone() for p in model.parameters()])
                assert all(map(torch.equal, before, model.parameters()))
            assert all(map(torch.equal, *found))
            moved = [
                not torch.equal(*pair) for pair in zip(model.parameters(), found[0], strict=True)
            ]
            assert moved == [gradient is not None for gradient in gradients]

        for _ in range(3):
            self.draw_(model)
            check()
        self.draw_(model)
        model[4].weight.grad = model[4].weight.grad.contiguous()
        model[2].weight.grad = model[2].weight.grad.t().contiguous().t()
        check()
        self.draw_(model)
        model[0].weight.grad = model[3].bias.grad = None
        check()
        self.draw_(model)
        check()
        self.draw_(model)
        sam.rule = SAM(rho=30.0, adaptive=not adaptive)
        check()
        self.draw_(model)
        model[2].weight = nn.Parameter(torch.randn(10, 700))
        model[2].weight.grad = torch.randn(10, 700)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        check()

    def test_no_gradient_and_no_weight_of_before_is_kept(self):
        model = self.model()
        sam = SharpnessAware(model, SAM())
        for _ in range(2):
            self.draw_(model)
            gradients = [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters()]
            with sam.perturbed():
                assert all(gradient.expired() for gradient in gradients)
        weight = StorageWeakRef(model[0].weight.untyped_storage())
        model[0].weight.data = torch.zeros(32, 31)
        assert weight.expired()

    def test_a_step_remembered_takes_few_calls_of_python(self):
        """Which are what an accelerator waits for: no more than 15 a parameter, both passes."""
        model = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(200)])
        sam = SharpnessAware(model, SAM())

        def perturb() -> int:
            for parameter in model:
                parameter.grad = torch.ones_like(parameter)
            calls = 0

            def count(_frame: Any, event: str, _arg: Any) -> None:
                nonlocal calls
                calls += event == "call"

            sys.setprofile(count)
            try:
                with sam.perturbed():
                    pass
            finally:
                sys.setprofile(None)
            return calls

        first, second = perturb(), perturb()
        assert second < first / 2
        assert second < 15 * 200


class TestErrors:
    def test_parts_of_the_batch(self):
        train = Trainer(SAM(fraction=0.2))
        with pytest.raises(ConfigError, match="the closure ignores the batch"):
            train.sam.step(train.optimizer, lambda: None, batch=(train.x, train.y))
        with pytest.raises(ConfigError, match="perturbed"), train.sam.perturbed():
            pass
        for batch in ({"x": train.x}, train.x, (train.x, torch.tensor(3))):
            with pytest.raises(ConfigError, match=r"^batch(\[1\])? (must be|has no)"):
                train.sam.step(train.optimizer, lambda *_: None, batch=batch)
        train.y = train.y[1:]
        with pytest.raises(ConfigError, match=r"share their first axis, got \[20, 19\]"):
            train.step()

    def test_order(self):
        train = Trainer()
        with pytest.raises(MissingGradientError, match="the closure must call backward"):
            train.sam.perturbed().__enter__()
        train.closure()
        with train.sam.perturbed():
            for refuses in (train.model.state_dict, train.sam.state_dict):
                with pytest.raises(OrderError, match=PERTURBED):
                    refuses()
            with pytest.raises(OrderError, match=r"step\(\) inside perturbed"):
                train.step()
            with pytest.raises(OrderError, match="already perturbed"), train.sam.perturbed():
                pass
        assert train.model.state_dict()

    def test_a_second_thread(self):
        train, caught = Trainer(), []

        def second():
            try:
                train.step()
            except OrderError as error:
                caught.append(str(error))

        def closure():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            return train.closure()

        train.sam.step(train.optimizer, closure)
        assert caught == ["a step of this SharpnessAware is already under way"] * 2

    def test_model(self):
        with pytest.raises(ParameterError, match=r"needs a torch\.nn\.Module, got generator"):
            SharpnessAware(Net().parameters(), SAM())

    def test_state(self):
        sam = SharpnessAware(Net(), SAM())
        good = {"version": 1, "count": 3}
        bad = [{"count": 3}, {}, None, 3, [3], {**good, "version": 2}]
        for state in [*bad, *({**good, "count": count} for count in (-3, True, 1.0, "3", None))]:
            with pytest.raises(FormatError, match="not a state of SharpnessAware"):
                sam.load_state_dict(state)
        assert sam.count == 0
        sam.load_state_dict(good)
        assert sam.state_dict() == good


class TestVerify(VerifyContract):
    driver = TorchDriver()

    def probe(self, step):
        """Verify a function of a Trainer."""
        train = Trainer(model=Net())
        seen = verify_sam(lambda: step(train), train.model, train.optimizer, train.closure)
        assert not seen.ok
        return seen

    def test_the_first_gradient_used_twice(self):
        def step(train):
            train.closure()
            stale = [p.grad.clone() for p in train.model.parameters()]
            with train.sam.perturbed():
                train.model(train.x)
            for p, g in zip(train.model.parameters(), stale, strict=True):
                p.grad = g
            train.optimizer.step()

        assert self.probe(step).gradient_error > 1e-3

    def test_weights_left_perturbed(self):
        def step(train):
            train.closure()
            with torch.no_grad():
                for p in train.model.parameters():
                    p += 0.01 * p.grad
            train.closure()
            train.optimizer.step()

        assert not self.probe(step).restored


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class Replayed:
    """A closure as a CUDA graph replays it: the loss of every pass is in the same memory."""

    def __init__(self, train):
        self.closure = train.closure
        self.loss = torch.zeros((), dtype=torch.float64)

    def __call__(self, *batch):
        return self.loss.copy_(self.closure(*batch).detach())


def test_the_clean_loss_outlives_the_second_pass():
    train, replayed = Trainer(FAR), Trainer(FAR)
    wanted = train.sam.step(train.optimizer, train.closure)
    assert replayed.sam.step(replayed.optimizer, Replayed(replayed)) == wanted
    assert replayed.sam.stats().sharpness == train.sam.stats().sharpness > 0.1


def test_no_graph_records_a_whole_step(monkeypatch):
    train = Trainer()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(ConfigError, match="a CUDA graph cannot record a whole step of SAM"):
        train.sam.step(train.optimizer, train.closure)
    assert train.sam.count == 0


def test_several_devices_and_dtypes_in_few_launches(monkeypatch):
    """One operation takes many tensors a launch if they are of one device and dtype."""
    monkeypatch.setattr("agc_torch.ascent.on_host", lambda device: False)
    norms, copies = [], []
    norm, copy_ = torch._foreach_norm, torch._foreach_copy_

    def kinds(tensors):
        return {(tensor.device.type, tensor.dtype) for tensor in tensors}

    monkeypatch.setattr(
        "torch._foreach_norm", lambda t, *how: (norms.append(kinds(t)), norm(t, *how))[1]
    )
    monkeypatch.setattr(
        "torch._foreach_copy_", lambda t, of: (copies.append(kinds(t)), copy_(t, of))[1]
    )
    of = [("meta", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
    model = nn.ParameterList(torch.zeros(4, 4, device=d, dtype=dtype) for d, dtype in of * 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sam = SharpnessAware(model, SAM(rho=0.1))
    sam._ascent(sam._reach(()))
    # Between the two, a factor without a value would have to leave its device.
    sam._backup = [(p.detach(), torch.empty_like(p)) for p in model.parameters()]
    sam._refusal = SimpleNamespace(remove=lambda: None)
    sam._restore()
    assert norms == copies == [{one} for one in of]


class TestNothingOutlivesTheWeights:
    """SAM-15: what PyTorch has computed from the weights is not used at other weights."""

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    @pytest.mark.parametrize("place", ["inside", "around", "disabled-around"])
    def test_autocast(self, how, place):
        train, exact = Trainer(), Trainer()
        wanted = getattr(exact, how)()
        if place != "around":
            train.inside = autocast
        with nullcontext() if place == "inside" else autocast(place == "around"):
            answer = getattr(train, how)()
        assert wanted[1] > wanted[0] + 0.1
        assert answer == pytest.approx(wanted, abs=0.01)
        error = (train.gradient() - exact.gradient()).norm()
        assert 0 < error < 0.02 * exact.gradient().norm()

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    def test_the_weights_seen_after_the_step_are_clean(self, how):
        train = Trainer(lr=0.0)
        with autocast():
            clean, perturbed = getattr(train, how)()
            assert perturbed > clean + 0.1
            assert train.loss().item() == pytest.approx(clean, abs=1e-6)

    def test_plain_steps_between_move_the_weights_too(self):
        train = Trainer(SAM(rho=1e-6, every=2), lr=5.0)
        with autocast():
            losses = [train.step()[0] for _ in range(4)]
        assert len({round(loss, 4) for loss in losses}) == 4

    def test_every_evaluation_of_lbfgs_sees_the_weights_of_its_own(self):
        weights = []
        for outside in (nullcontext(), autocast(), autocast(enabled=False)):
            train = Trainer(SAM(rho=0.05, every=2))
            train.optimizer = torch.optim.LBFGS(train.model.parameters(), lr=0.5, max_iter=4)
            train.inside = autocast
            with outside:
                train.step(), train.step()
            weights.append(snapshot(train.model))
        for other in weights[1:]:
            assert all(map(torch.equal, weights[0], other))

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    def test_cached_parametrizations(self, how):
        wanted = getattr(Trainer(model=weight_normalised()), how)()
        train = Trainer(model=weight_normalised())
        with torch.nn.utils.parametrize.cached():
            assert getattr(train, how)() == wanted
        assert wanted[1] > wanted[0] + 0.1

    def test_old_style_hooks_compute_the_weight_anew(self):
        model = Net(torch.float32)
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model.inner)
        clean, perturbed = Trainer(model=model).step()
        assert perturbed > clean + 0.1

    @pytest.mark.parametrize("stale", [False, True])
    def test_verify_inside_autocast_sees_stale_weights(self, stale, monkeypatch):
        if stale:  # autocast still has the clean weights in the second pass
            monkeypatch.setattr("agc_torch.sam.forget_weights", lambda _: None)
        train = Trainer()
        with autocast():
            seen = verify_sam(train.step, train.model, train.optimizer, train.closure)
        assert (seen.gradient_error > 0.1) == stale
        assert (seen.gradient_error == 0) == seen.ok == (not stale)


def outer(model):
    return model.outer


class TestPerturbedSet:
    """SAM-4: selected, trainable, held by the optimizer, with a gradient of this step."""

    def moves(self, train, step):
        """Return the distance of every parameter in the second pass from where it was."""
        before = {n: p.detach().clone() for n, p in train.model.named_parameters()}
        moved = {}

        def look(*_):
            for name, p in train.model.named_parameters():
                moved[name] = (p.detach() - before[name]).norm().item()

        handle = train.model.register_forward_pre_hook(look)
        step()
        handle.remove()
        return moved

    def check_only_outer_moves(self, train, step):
        moved = self.moves(train, step)
        assert moved["inner.weight"] == moved["inner.bias"] == 0
        assert math.hypot(moved["outer.weight"], moved["outer.bias"]) == pytest.approx(0.5)

    def test_only_what_the_optimizer_holds(self):
        train = Trainer(SAM(rho=0.5), of=outer)
        norms = []
        for _ in range(5):
            self.check_only_outer_moves(train, train.step)
            norms.append(train.sam.stats().norm.item())
        assert norms == sorted(norms, reverse=True)
        # What the optimizer does not hold has the gradient of one backward pass.
        total = train.model.inner.weight.grad
        train.step()
        assert train.model.inner.weight.grad.norm() < 1.2 * total.norm()

    def test_a_layer_frozen_later(self):
        train = Trainer(SAM(rho=0.5))
        train.step()
        train.model.inner.requires_grad_(False)
        assert train.model.inner.weight.grad is not None
        self.check_only_outer_moves(train, train.step)
        assert train.model.inner.weight.grad is None

    @pytest.mark.parametrize("told", [False, True], ids=["", "told"])
    def test_a_frozen_layer_by_hand(self, told):
        train = Trainer(SAM(rho=0.5))
        train.closure()
        train.model.inner.requires_grad_(False)

        def block():
            with train.sam.perturbed(*[train.optimizer][:told]):
                train.closure()

        self.check_only_outer_moves(train, block)

    def test_the_optimizer_of_a_block(self):
        train, by_step, other = (Trainer(SAM(rho=0.5), of=outer) for _ in range(3))
        by_step.step()
        for _ in range(2):  # the second time, the rest of the model has gradients from before
            train.closure()
            with train.sam.perturbed(train.optimizer):
                train.closure()
        assert torch.equal(train.gradient(), by_step.gradient())
        with pytest.raises(ParameterError, match="none of the model's parameters"):
            train.sam.perturbed(other.optimizer).__enter__()
        with pytest.raises(OrderError, match="accumulates"):
            train.sam.perturbed(Wrapper(train.optimizer, sync=False)).__enter__()

    def test_two_optimizers(self):
        train, whole = Trainer(SAM(rho=0.5)), Trainer(SAM(rho=0.5))
        layers = (train.model.inner, train.model.outer)
        train.optimizer = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
        whole.step()
        train.sam.step(train.optimizer, lambda: backward(train.loss()))
        assert same(train.model, whole.model.parameters())

    @pytest.mark.parametrize(
        "rule", [SAM(fraction=0.5), SAM(microbatches=2), SAM(every=2)], ids=str
    )
    @pytest.mark.parametrize("forgets", ["zero_grad", "nothing"])
    def test_a_closure_that_clears_nothing(self, rule, forgets):
        clearing, train = (Trainer(rule, Net()) for _ in range(2))
        for _ in range(3):
            clearing.step()
            train.sam.step(
                train.optimizer,
                lambda *batch: backward(train.loss(*batch)),
                batch=(train.x, train.y),
            )
            if forgets == "zero_grad":
                train.optimizer.zero_grad()
        assert same(train.model, clearing.model.parameters())

    def test_parameters_outside_the_model(self):
        train, scale = Trainer(), nn.Parameter(torch.ones(()))
        train.optimizer.add_param_group({"params": [scale]})
        train.sam.step(train.optimizer, lambda: backward(scale * train.loss()))
        assert scale.grad.item() == pytest.approx(train.sam.stats().perturbed_loss.item())

    def test_a_layer_replaced_later(self):
        train = Trainer(SAM(rho=0.5, exclude=["inner.*"]))
        train.model.outer = nn.Linear(8, 3)
        train.optimizer = torch.optim.SGD(train.model.parameters(), lr=0.1)
        self.check_only_outer_moves(train, train.step)

    def test_nothing_in_it(self):
        train = Trainer(SAM(only=["inner.*"]), of=outer)
        with pytest.raises(ParameterError, match=r"SGD holds none .* only=\['inner.\*'\]"):
            train.sam.step(train.optimizer, lambda: pytest.fail("the closure is not called"))
        with pytest.raises(ParameterError, match="empty list of optimizers"):
            train.sam.step([], train.closure)
        train.optimizer = torch.optim.SGD(train.model.parameters(), lr=0.1)
        train.model.inner.requires_grad_(False)
        with pytest.raises(MissingGradientError, match="not frozen"):
            train.step()


def backward(loss):
    loss.backward()
    return loss


class Wrapper:
    """An optimizer inside another object, as Accelerate's: it may do nothing, or step through a
    scaler.
    """

    def __init__(self, optimizer, sync=True, scaler=None, tells=True):
        self.optimizer, self.scaler, self._scaler = optimizer, scaler, scaler
        self.gradient_state = SimpleNamespace(sync_gradients=sync)
        if tells:
            self.param_groups = optimizer.param_groups

    def zero_grad(self):
        if self.gradient_state.sync_gradients:
            self.optimizer.zero_grad()

    def step(self, closure=None):
        if not self.gradient_state.sync_gradients:
            return
        if self._scaler is None:
            self.optimizer.step(closure) if closure else self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()


class TestWrappedOptimizers:
    def test_accumulating_is_refused(self):
        train = Trainer()
        train.optimizer = Wrapper(train.optimizer, sync=False)
        before, calls = snapshot(train.model), []
        with pytest.raises(OrderError, match="Wrapper accumulates gradients at present"):
            train.sam.step(train.optimizer, lambda: calls.append(1))
        assert not calls
        assert train.sam.count == 0
        assert same(train.model, before)
        train.optimizer.gradient_state.sync_gradients = True
        train.step()
        assert train.sam.count == 1

    def test_accumulating_at_the_end_of_the_closure(self):
        train = Trainer()
        train.optimizer = Wrapper(train.optimizer)

        def closure():
            loss = train.closure()
            train.optimizer.gradient_state.sync_gradients = False
            return loss

        with pytest.raises(OrderError, match="accumulates"):
            train.sam.step(train.optimizer, closure)
        assert train.sam.count == 0

    @pytest.mark.parametrize("tells", [True, False])
    def test_it_is_looked_through(self, tells):
        train = Trainer(of=outer)
        inner = train.model.inner.weight.detach().clone()
        train.optimizer = Wrapper(train.optimizer, tells=tells)
        train.model.register_forward_pre_hook(
            lambda model, _: torch.testing.assert_close(model.inner.weight, inner, rtol=0, atol=0)
        )
        train.step()
        train.optimizer = Wrapper(Trainer().optimizer, tells=tells)
        with pytest.raises(ParameterError, match="Wrapper holds none of the model's parameters"):
            train.step()

    def test_lbfgs_inside(self):
        train, twin = Trainer(SAM()), Trainer(SAM())
        for one in (train, twin):
            one.optimizer = torch.optim.LBFGS(one.model.parameters(), lr=0.1, max_iter=3)
        train.optimizer = Wrapper(train.optimizer)
        train.step(), twin.step()
        assert same(train.model, twin.model.parameters())

    @pytest.mark.parametrize("place", ["accelerate", "precision_plugin", "precision"])
    def test_a_scaler_of_its_own_sees_a_poisoned_ascent(self, place):
        """Lightning's optimizers have it in their strategy's precision."""
        train = Trainer()
        train.scaler, train.poisoned = torch.amp.GradScaler("cpu", init_scale=1024.0), True
        wrapper = train.optimizer = Wrapper(train.optimizer, scaler=train.scaler)
        if place != "accelerate":
            precision = SimpleNamespace(scaler=train.scaler)
            wrapper._strategy = SimpleNamespace(**{place: precision})
            del wrapper.scaler
        before = snapshot(train.model)
        train.sam.step(train.optimizer, train.closure)
        assert same(train.model, before)
        assert train.scaler.get_scale() == 512.0

    @pytest.mark.parametrize("wrapped", [False, True], ids=["given", "wrapped"])
    @pytest.mark.parametrize("parts", [1, 4])
    def test_a_scaler_changes_neither_the_norm_nor_eps(self, parts, wrapped):
        rule = SAM(rho=0.1, eps=0.5, microbatches=parts)
        want, got = Trainer(rule), Trainer(rule)
        want.step()
        got.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if wrapped:
            got.optimizer = Wrapper(got.optimizer, scaler=scaler)
        batch, given = (got.x, got.y), None if wrapped else scaler
        got.sam.step(got.optimizer, got.closure, batch=batch, scaler=given)
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
        for name in ("norm", "loss", "perturbed_loss"):
            close(getattr(got.sam.stats(), name), getattr(want.sam.stats(), name))
        for one, other in zip(got.model.parameters(), want.model.parameters(), strict=True):
            close(one, other)

    def test_a_scaler_that_is_off_cannot_skip(self):
        train = Trainer()
        train.scaler, train.poisoned = torch.amp.GradScaler("cpu", enabled=False), True
        before = snapshot(train.model)
        train.step()
        assert same(train.model, before)


class TestSchedulers:
    """A learning rate scheduler puts a function in front of ``step``, which needs no closure."""

    def train(self, *, scheduled, scaled=False):
        train = Trainer(SAM())
        if scaled:
            train.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if scheduled:
            torch.optim.lr_scheduler.ConstantLR(train.optimizer, factor=1.0)
        return train

    @pytest.mark.parametrize("scaled", [False, True])
    def test_the_step_is_the_same(self, scaled):
        plain, scheduled = (self.train(scheduled=each, scaled=scaled) for each in (False, True))
        before = snapshot(plain.model)
        assert plain.step() == scheduled.step()
        assert same(scheduled.model, plain.model.parameters())
        assert not same(plain.model, before)

    def test_a_poisoned_step_is_skipped(self):
        train = self.train(scheduled=True)
        train.poisoned, before = True, snapshot(train.model)
        train.step()
        assert same(train.model, before)

    def test_several_optimizers(self):
        train = self.train(scheduled=True)
        parts = [torch.optim.SGD(part.parameters(), 0.1) for part in train.model.children()]
        for optimizer in parts:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        train.sam.step(parts, train.closure)
        plain = self.train(scheduled=False)
        plain.step()
        assert same(train.model, plain.model.parameters())

    def test_lbfgs_still_needs_one(self):
        train, twin = self.train(scheduled=False), self.train(scheduled=False)
        for one in (train, twin):
            one.optimizer = torch.optim.LBFGS(one.model.parameters(), lr=0.1, max_iter=3)
        torch.optim.lr_scheduler.ConstantLR(train.optimizer, factor=1.0)
        assert train.step() == twin.step()
        assert same(train.model, twin.model.parameters())


RETURNS = {
    "none": (
        lambda loss: None,
        ConfigError,
        r"returned None; its last line must be 'return loss'",
    ),
    "pair": (lambda loss: (loss, 3), ConfigError, r"a tuple \(Tensor, int\); .*return loss"),
    "dict": (lambda loss: {"loss": loss}, ConfigError, r"returned dict; .*return loss"),
    "unreduced": (lambda loss: loss.expand(16), ShapeError, r"of shape \(16,\); .*loss.mean"),
}


class TestClosures:
    """A closure that does not return the loss is an error that says so; the weights stay."""

    def check_refusal(self, train, answers, error, match):
        """Take a step whose passes return these functions of the loss."""
        before, count, answers = snapshot(train.model), train.sam.count, iter(answers)
        with pytest.raises(error, match=match):
            train.sam.step(train.optimizer, lambda: next(answers)(train.closure()))
        assert same(train.model, before)
        assert train.sam.count == count

    @pytest.mark.parametrize("which", RETURNS)
    @pytest.mark.parametrize("every", [1, 2], ids=["sam", "plain"])
    def test_it_says_what_is_wrong(self, which, every):
        returns, error, match = RETURNS[which]
        train = Trainer(SAM(every=every))
        for _ in range(every - 1):
            train.step()
        self.check_refusal(train, [returns], error, match)

    def test_only_in_the_second_pass(self):
        answers = [lambda loss: loss, lambda loss: None]
        self.check_refusal(Trainer(), answers, ConfigError, "return loss")

    @pytest.mark.parametrize("returns", [lambda loss: loss.item(), lambda loss: loss.view(1)])
    def test_one_number_is_enough(self, returns):
        train = Trainer()
        wanted = train.loss().item()
        loss = train.sam.step(train.optimizer, lambda: returns(train.closure()))
        assert loss.shape == ()
        assert loss.item() == pytest.approx(wanted)


# An optimizer that somebody else steps


def test_gradients_for_a_trainer_that_steps_by_itself():
    want, got = Trainer(), Trainer()
    for _ in range(2):
        want.sam.step(want.optimizer, want.closure)
        loss = got.sam.gradients(got.optimizer, got.closure)
        assert loss == got.sam.stats().loss
        assert not got.sam.is_perturbed
        got.optimizer.step()
    assert got.sam.count == 2
    for one, other in zip(got.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(one, other)
    got.poisoned = True
    got.sam.gradients(got.optimizer, got.closure)
    assert all(parameter.grad.isnan().all() for parameter in got.model.parameters())
