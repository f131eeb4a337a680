"""SAM in front of PyTorch optimizers, against the float64 reference and the failures of other
code.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agc.config import AGC, SAM
from agc.errors import (
    ConfigError,
    FormatError,
    MissingGradientError,
    NonFiniteError,
    OrderError,
    ParameterError,
    SelectorError,
    ShapeError,
)
from agc.reference import sharpness_aware_gradients
from agc.schedule import Schedule
from agc_torch.sam import SharpnessAware
from agc_torch.units import named_parameters
from agc_torch.verify import verify_sam


class Net(nn.Module):
    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(6, 8, dtype=dtype)
        self.outer = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def data(n=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def make_closure(model, optimizer, x=None, y=None):
    def closure(*batch):
        inputs, targets = batch or (x, y)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return closure


def by_reference(model, batch, rule, step=0, replicas=1):
    """The reference's gradients of the same network."""
    scratch = copy.deepcopy(model).double()

    def gradients(weights, part):
        with torch.no_grad():
            for name, p in scratch.named_parameters():
                p.copy_(torch.from_numpy(np.array(weights[name])))
        scratch.zero_grad()
        loss = nn.functional.cross_entropy(
            scratch(torch.from_numpy(part[0])), torch.from_numpy(part[1])
        )
        loss.backward()
        return loss.item(), {n: p.grad.numpy().copy() for n, p in scratch.named_parameters()}

    weights = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    arrays = [
        tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
        for tensor in batch
    ]
    return sharpness_aware_gradients(gradients, weights, arrays, rule, step=step, replicas=replicas)


RULES = {
    "plain": SAM(rho=0.1),
    "fraction": SAM(rho=0.1, fraction=0.2),
    "microbatches": SAM(rho=0.1, microbatches=3),
    "both": SAM(rho=0.1, microbatches=3, fraction=0.5),
    "adaptive": SAM(rho=0.5, adaptive=True),
    "only": SAM(rho=0.1, only=["outer.*"]),
    "exclude": SAM(rho=0.1, exclude=["*.bias"]),
    "schedule": SAM(rho=Schedule([(0, 0.3), (5, 0.1)])),
    "davda54": SAM.profile("davda54"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_equal_the_reference(rule):
    model, batch = Net(), data()
    want = by_reference(model, batch, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sam = SharpnessAware(model, rule)
    loss = sam.step(optimizer, make_closure(model, optimizer), batch=batch)
    assert loss.item() == pytest.approx(want.loss, rel=1e-13)
    assert sam.stats().perturbed_loss.item() == pytest.approx(want.perturbed_loss, rel=1e-13)
    assert sam.stats().norm.item() == pytest.approx(max(want.norms), rel=1e-13)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), want.gradients[name], rtol=1e-12, atol=1e-15)


def test_the_contexts_are_the_same_as_the_step():
    model, (x, y) = Net(), data()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SharpnessAware(model, SAM()).step(optimizer, make_closure(model, optimizer, x, y))
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    sam = SharpnessAware(twin, SAM())
    nn.functional.cross_entropy(twin(x), y).backward()
    with sam.perturbed():
        assert sam.is_perturbed
        nn.functional.cross_entropy(twin(x), y).backward()
    other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_learns(make):
    model, (x, y) = Net(), data()
    optimizer = make(model.parameters())
    sam = SharpnessAware(model, SAM())
    losses = [sam.step(optimizer, make_closure(model, optimizer, x, y)).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert sam.count == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_restored_bit_for_bit(dtype):
    model, (x, y) = Net(dtype=dtype), data(dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sam = SharpnessAware(model, SAM(rho=0.5))
    for _ in range(50):
        sam.step(optimizer, make_closure(model, optimizer, x, y))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_intact_when_the_second_forward_fails(error):
    model, (x, y) = Net(), data()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = make_closure(model, optimizer, x, y)
    calls = []

    def closure():
        calls.append(model.inner.weight.detach().clone())
        if len(calls) == 2:
            raise error
        return plain()

    sam = SharpnessAware(model, SAM())
    with pytest.raises(error):
        sam.step(optimizer, closure)
    assert not torch.equal(calls[0], calls[1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    sam.step(optimizer, plain)  # and the next step works
    assert not torch.equal(before[0], model.inner.weight)


class TestNonFinite:
    def run(self, rule):
        model, (x, y) = Net(), data()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plain = make_closure(model, optimizer, x, y)
        calls = []

        def closure():
            loss = plain()
            calls.append(loss)
            if len(calls) == 1:
                model.inner.weight.grad[0, 0] = torch.inf
            return loss

        sam = SharpnessAware(model, rule)
        try:
            sam.step(optimizer, closure)
        finally:
            self.same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            self.finite = all(p.isfinite().all() for p in model.parameters())
        return model

    def test_skip_step(self):
        self.run(SAM())
        assert all(self.same)

    def test_skip_perturb_takes_a_plain_step(self):
        model = self.run(SAM(nonfinite="skip_perturb"))
        twin, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        make_closure(twin, optimizer, x, y)()
        optimizer.step()
        assert self.finite
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
        )

    def test_raise(self):
        with pytest.raises(
            NonFiniteError, match="norm of the ascent gradient is inf; the weights are unch"
        ):
            self.run(SAM(nonfinite="raise"))
        assert all(self.same)


def test_zero_gradient_is_a_plain_step():
    model, (x, y) = Net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    plain = make_closure(model, optimizer, x, y)

    def closure():
        loss = 0 * plain()
        for p in model.parameters():
            p.grad.zero_()
        return loss

    before = model.inner.weight.detach().clone()
    SharpnessAware(model, SAM()).step(optimizer, closure)
    # A loss of exactly zero still decays the weights.
    assert torch.allclose(model.inner.weight, 0.95 * before, rtol=1e-15)


def test_fp16_gradients_whose_norm_overflows_still_perturb():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    model = nn.Module()
    model.weight = weight
    seen = []

    def closure():
        seen.append(weight.detach().clone())
        weight.grad = torch.full((4,), 60000.0, dtype=torch.float16)
        return torch.tensor(1.0)

    SharpnessAware(model, SAM(rho=1.0)).step(torch.optim.SGD([weight], lr=0.0), closure)
    assert torch.allclose(seen[1], torch.full((4,), 0.5, dtype=torch.float16))


class Conditional(nn.Module):
    """A branch that takes part in only some passes, like LayerDrop."""

    def __init__(self, active):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
        self.active, self.calls = active, 0

    def forward(self, x):
        self.calls += 1
        out = self.a(x)
        return out + self.b(x) if self.calls in self.active else out


@pytest.mark.parametrize("active", [(1,), (2,)], ids=["only-first", "only-second"])
def test_a_parameter_with_a_gradient_in_only_one_pass(active):
    torch.manual_seed(0)
    model = Conditional(active)
    before = model.b.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 2, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        return loss

    SharpnessAware(model, SAM()).step(optimizer, closure)
    moved = not torch.equal(before, model.b.weight)
    assert moved == (active == (2,))


class Rebinding(nn.Module):
    """Normalisation written by hand: new tensors take the place of old ones, one of them grows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("n", torch.tensor(0))
        self.register_buffer("queue", torch.zeros(0, 6, dtype=torch.float64))
        self.register_buffer("first", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.n = self.n + 1
        self.queue = torch.cat([self.queue, x[:1]])
        if self.first is None:
            self.first = x.mean(0)
        return self.layer(x - self.mean)


class TestModelState:
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    def test_statistics_are_updated_once_from_the_clean_pass(self):
        model, (x, y) = self.model(), data(dtype=torch.float32)
        twin = copy.deepcopy(model)
        twin(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        SharpnessAware(model, SAM()).step(optimizer, make_closure(model, optimizer, x, y))
        assert model[1].num_batches_tracked == 1
        assert torch.equal(model[1].running_mean, twin[1].running_mean)

    def test_with_a_fraction_they_come_from_the_whole_batch(self):
        model, batch = self.model(), data(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        SharpnessAware(model, SAM(rho=1e-7, fraction=0.2)).step(
            optimizer, make_closure(model, optimizer), batch=batch
        )
        assert model[1].num_batches_tracked == 1
        mean = model[0](batch[0]).mean(0)
        assert torch.allclose(model[1].running_mean, mean, atol=1e-6)

    @pytest.mark.parametrize(
        ("rule", "updates"),
        [(SAM(), 1), (SAM(fraction=0.5), 1), (SAM(microbatches=2), 2)],
        ids=["plain", "fraction", "microbatches"],
    )
    def test_buffers_that_are_bound_anew_are_updated_once(self, rule, updates):
        model, batch = Rebinding(), data()
        twin = copy.deepcopy(model)
        for part in (batch[0].tensor_split(updates)) if updates > 1 else [batch[0]]:
            twin(part)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sam = SharpnessAware(model, rule)
        sam.step(optimizer, make_closure(model, optimizer), batch=batch)
        for name, buffer in twin.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name

    def test_dropout_has_the_same_mask_in_both_passes_and_moves_on(self):
        model, (x, y) = self.model(), data(dtype=torch.float32)
        masks = []
        model[2].register_forward_hook(lambda _m, _i, out: masks.append(out == 0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, SAM())
        for _ in range(2):
            sam.step(optimizer, make_closure(model, optimizer, x, y))
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[1], masks[2])


def test_resume_equals_never_having_stopped():
    rule = SAM(rho=Schedule([(0, 0.2), (10, 0.05)]), every=3)

    def build():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return model, optimizer, scheduler, SharpnessAware(model, rule)

    def run(parts, steps):
        model, optimizer, scheduler, sam = parts
        x, y = data()
        for _ in range(steps):
            sam.step(optimizer, make_closure(model, optimizer, x, y))
            scheduler.step()

    whole = build()
    run(whole, 10)
    first = build()
    run(first, 5)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = build()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    run(second, 5)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert states[3] == {"version": 1, "count": 5}


def test_every_counts_passes():
    model, (x, y) = Net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    sam = SharpnessAware(model, SAM(every=3))
    for _ in range(6):
        sam.step(optimizer, make_closure(model, optimizer, x, y))
    assert len(calls) == 2 * 2 + 4


def test_whole_fraction_is_bit_equal_to_sam():
    one, two, batch = Net(), Net(), data()
    for model, rule in ((one, SAM()), (two, SAM(fraction=1.0))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        SharpnessAware(model, rule).step(optimizer, make_closure(model, optimizer), batch=batch)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_gradient_accumulation_in_the_closure():
    model, (x, y) = Net(), data()
    want = by_reference(model, (x, y), SAM())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def closure():
        optimizer.zero_grad()
        total = 0
        for part in range(4):
            rows = slice(5 * part, 5 * part + 5)
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) / 4
            loss.backward()
            total = total + loss.detach()
        return total

    SharpnessAware(model, SAM()).step(optimizer, closure)
    np.testing.assert_allclose(
        model.inner.weight.grad.numpy(), want.gradients["inner.weight"], rtol=1e-11
    )


def test_adaptive_norm_of_half_precision():
    # In float16 the product underflows in the first row, and overflows in the second.
    for w, g in ((0.01, 1e-6), (300.0, 300.0)):
        model = nn.Module()
        model.weight = nn.Parameter(torch.full((2, 2), w, dtype=torch.float16))
        seen = []

        def closure(model=model, g=g, seen=seen):
            seen.append(model.weight.detach().clone())
            model.weight.grad = torch.full((2, 2), g, dtype=torch.float16)
            return torch.tensor(1.0)

        sam = SharpnessAware(model, SAM(rho=0.5, adaptive=True))
        sam.step(torch.optim.SGD(model.parameters(), lr=0.0), closure)
        weight, gradient = seen[0].double(), model.weight.grad.double()
        norm = ((weight + 0.01) * gradient).norm()
        assert sam.stats().norm.item() == pytest.approx(norm.item(), rel=1e-12)
        moved = weight + 0.5 * (weight + 0.01) ** 2 * gradient / norm
        assert torch.allclose(seen[1].double(), moved, rtol=1e-3)


def copies_of(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]


class TestCopies:
    """A model under SAM is copied and saved like any other, and the copy is not under SAM."""

    def test_the_copy_is_free(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)
        sam = SharpnessAware(model, SAM())
        sam.step(optimizer, closure)
        copies = copies_of(model)
        closure()
        with sam.perturbed():
            with pytest.raises(OrderError, match="weights are perturbed: save after"):
                model.state_dict()
            for one in copies:
                assert torch.equal(one.state_dict()["inner.bias"], copies[0].inner.bias)
            closure()

    def test_a_copy_has_its_own_sam(self):
        model, (x, y) = Net(), data()
        SharpnessAware(model, SAM())
        for one in copies_of(model):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            closure = make_closure(one, optimizer, x, y)
            sam = SharpnessAware(one, SAM())
            sam.step(optimizer, closure)
            with sam.perturbed(), pytest.raises(OrderError, match="weights are perturbed"):
                one.state_dict()

    def test_perturbed_weights_are_not_saved_with_the_model(self):
        model, (x, y) = Net(), data()
        sam = SharpnessAware(model, SAM())
        make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)()
        with sam.perturbed(), pytest.raises(OrderError, match="weights are perturbed: save after"):
            torch.save(model, io.BytesIO())


class TestPerturbedBlock:
    def gradients(self, rule):
        model, (x, y) = Net(), data()
        sam = SharpnessAware(model, rule)
        closure = make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
        closure()
        model.inner.weight.grad[0, 0] = torch.inf
        with sam.perturbed():
            closure()
        return [p.grad for p in model.parameters()]

    def test_skip_step_leaves_nan(self):
        assert all(g.isnan().all() for g in self.gradients(SAM()))

    def test_skip_perturb_leaves_the_plain_gradient(self):
        assert all(g.isfinite().all() for g in self.gradients(SAM(nonfinite="skip_perturb")))

    def test_raise(self):
        with pytest.raises(NonFiniteError, match="norm of the ascent gradient is inf"):
            self.gradients(SAM(nonfinite="raise"))


class TestScaler:
    @pytest.mark.parametrize("poison", [False, True])
    def test_sparse_gradients(self, poison):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        rows, y = torch.tensor([[0, 1], [1, 1], [5, 0]]), torch.tensor([0, 1, 2])

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(rows), y)
            scaler.scale(loss).backward()
            if poison and not sam.is_perturbed:
                model[2].bias.grad[0] = torch.inf
            return loss

        before = copy.deepcopy(model)
        sam = SharpnessAware(model, SAM())
        sam.step(optimizer, closure, scaler=scaler)
        assert model[0].weight.grad.is_sparse
        assert poison == bool(model[0].weight.grad.to_dense()[[0, 1, 5]].isnan().all())
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b) == poison
        assert scaler.get_scale() == (512.0 if poison else 1024.0)

    def step(self, init_scale, poison=False):
        model, (x, y) = Net(dtype=torch.float32), data(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if poison and not sam.is_perturbed:
                model.inner.weight.grad[0, 0] = torch.inf
            return loss

        before = model.inner.weight.detach().clone()
        sam = SharpnessAware(model, SAM())
        loss = sam.step(optimizer, closure, scaler=scaler)
        return model, before, loss, scaler

    def test_the_scale_does_not_matter(self):
        one, *_, loss = self.step(1.0)[:3]
        other = self.step(1024.0)[0]
        assert torch.allclose(one.inner.weight, other.inner.weight, atol=1e-4)
        assert 0 < loss < 10

    def test_a_poisoned_ascent_is_skipped_and_lowers_the_scale(self):
        model, before, _, scaler = self.step(1024.0, poison=True)
        assert torch.equal(model.inner.weight, before)
        assert scaler.get_scale() == 512.0


def test_bfloat16_autocast():
    batch = data(dtype=torch.float32)
    rule, gradients = SAM(rho=0.5), []
    for enabled in (True, False):
        model = Net(dtype=torch.float32)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        inner = make_closure(model, optimizer, *batch)

        def closure(inner=inner, enabled=enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return inner()

        SharpnessAware(model, rule).step(optimizer, closure)
        assert all(map(torch.equal, before, model.parameters()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    low, full = gradients
    plain = by_reference(Net(dtype=torch.float32), batch, SAM(rho=1e-9)).gradients
    plain = torch.cat([torch.tensor(g).flatten() for g in plain.values()])
    error = (low - full).norm()
    assert 0 < error < 0.02 * full.norm()
    assert error < 0.2 * (plain - full).norm()  # far closer than a step without SAM


class TestErrors:
    def test_fraction_needs_a_batch(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, SAM(fraction=0.2))
        with pytest.raises(ConfigError, match=r"fraction=0.2 .* step\(optimizer, closure, batch="):
            sam.step(optimizer, make_closure(model, optimizer, x, y))
        with pytest.raises(ConfigError, match="the closure ignores the batch"):
            sam.step(optimizer, lambda: None, batch=(x, y))
        with pytest.raises(ConfigError, match="perturbed"), sam.perturbed():
            pass

    def test_batches(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer)
        with pytest.raises(ConfigError, match=r"share their first axis, got \[20, 19\]"):
            SharpnessAware(model, SAM()).step(optimizer, closure, batch=(x, y[1:]))
        with pytest.raises(ConfigError, match="microbatches=21 is more than the 20 examples"):
            SharpnessAware(model, SAM(microbatches=21)).step(optimizer, closure, batch=(x, y))

    def test_empty_set(self):
        with pytest.raises(SelectorError, match="no parameter is left to perturb"):
            SharpnessAware(Net(), SAM(exclude=["*"]))

    def test_closure_without_backward(self):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(MissingGradientError, match="the closure must call backward"):
            SharpnessAware(model, SAM()).step(optimizer, lambda: torch.tensor(0.0))

    def test_order(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)
        sam = SharpnessAware(model, SAM())
        with pytest.raises(MissingGradientError), sam.perturbed():
            pass
        closure()
        with sam.perturbed():
            with pytest.raises(OrderError, match="weights are perturbed: save after"):
                model.state_dict()
            with pytest.raises(OrderError, match="weights are perturbed: save after"):
                sam.state_dict()
            with pytest.raises(OrderError, match=r"step\(\) inside perturbed"):
                sam.step(optimizer, closure)
            with pytest.raises(OrderError, match="already perturbed"), sam.perturbed():
                pass
        assert model.state_dict()

    def test_a_second_thread(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plain = make_closure(model, optimizer, x, y)
        sam = SharpnessAware(model, SAM())
        caught = []

        def second():
            try:
                sam.step(optimizer, plain)
            except OrderError as error:
                caught.append(str(error))

        def closure():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            return plain()

        sam.step(optimizer, closure)
        assert caught == ["a step of this SharpnessAware is already under way"] * 2

    def test_optimizer_of_another_model(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
        calls = []
        with pytest.raises(ParameterError, match="SGD holds none of the model's parameters"):
            SharpnessAware(model, SAM()).step(optimizer, lambda: calls.append(1))
        assert not calls
        part = torch.optim.SGD(model.outer.parameters(), lr=0.1)  # some of them are enough
        SharpnessAware(model, SAM()).step(part, make_closure(model, part, x, y))

    @pytest.mark.parametrize("rule", [None, 0.05, {"rho": 0.05}, AGC(), SAM], ids=str)
    def test_rule(self, rule):
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got "):
            SharpnessAware(Net(), rule)

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
        assert sam.count == 3


class TestVerify:
    def verify(self, step, model, optimizer):
        x, y = data()
        return verify_sam(step, model, optimizer, make_closure(model, optimizer, x, y))

    def test_ours(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, SAM(rho=0.05))
        found = self.verify(
            lambda: sam.step(optimizer, make_closure(model, optimizer, x, y)), model, optimizer
        )
        assert found.ok
        assert found.perturbation == pytest.approx(0.05, rel=1e-12)
        assert found.cosine == pytest.approx(1, rel=1e-12)
        assert found.gradient_error < 1e-12

    def test_a_plain_step_is_not_sam(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)
        found = self.verify(lambda: (closure(), optimizer.step()), model, optimizer)
        assert not found.ok
        assert found.passes == 1

    def test_the_first_gradient_used_twice(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)

        def step():
            closure()
            stale = [p.grad.clone() for p in model.parameters()]
            with SharpnessAware(model, SAM()).perturbed():
                model(x)
            for p, g in zip(model.parameters(), stale, strict=True):
                p.grad = g
            optimizer.step()

        found = self.verify(step, model, optimizer)
        assert not found.ok
        assert found.gradient_error > 1e-3

    def test_weights_left_perturbed(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)

        def step():
            closure()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01 * p.grad)
            closure()
            optimizer.step()

        found = self.verify(step, model, optimizer)
        assert not found.ok
        assert not found.restored


def test_a_subnormal_norm_moves_weights_no_further_than_rho():
    weight = nn.Parameter(torch.ones(4))
    model = nn.ParameterList([weight])
    seen = []

    def closure():
        weight.grad = None
        seen.append(weight.detach().clone())
        loss = (weight * 1e-41).sum()
        loss.backward()
        return loss

    SharpnessAware(model, SAM(rho=0.05)).step(torch.optim.SGD([weight], lr=0.0), closure)
    moved = (seen[1] - seen[0]).norm()
    assert 0 < moved <= 0.05 * (1 + 1e-5)


class Trainer:
    """A float32 network with a loss that depends on the weights, and what trains it."""

    def __init__(self, rule=None, wrap=lambda model: model, of=lambda model: model):
        self.model = wrap(Net(dtype=torch.float32))
        self.x, self.y = data(64, dtype=torch.float32)
        self.optimizer = torch.optim.SGD(of(self.model).parameters(), lr=0.1)
        self.sam = SharpnessAware(self.model, rule or SAM(rho=1.0))

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self):
        loss = self.sam.step(self.optimizer, self.closure)
        return loss.item(), self.sam.stats().perturbed_loss.item()

    def by_hand(self):
        first = self.closure()
        with self.sam.perturbed():
            second = self.loss()
            second.backward()
        return first.item(), second.item()

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def spectral(model):
    torch.nn.utils.parametrizations.spectral_norm(model.inner)
    return model


class TestNothingOutlivesTheWeights:
    """SAM-15: what PyTorch has computed from the weights is not used at other weights."""

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    @pytest.mark.parametrize("outer", [True, False], ids=["around", "disabled-around"])
    def test_autocast_around_the_step(self, how, outer):
        right, wrong = Trainer(), Trainer()
        inner = right.loss

        def loss():
            with autocast():
                return inner()

        right.loss = loss
        want = getattr(right, how)()
        if not outer:
            wrong.loss = Trainer.loss.__get__(wrong)
            plain = wrong.loss

            def mixed():
                with autocast():
                    return plain()

            wrong.loss = mixed
        with autocast(outer):
            got = getattr(wrong, how)()
        assert want[1] > want[0] + 0.1
        assert got == pytest.approx(want, abs=0.01)
        assert torch.allclose(wrong.gradient(), right.gradient(), atol=0.02 * want[1])

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    def test_the_weights_seen_after_the_step_are_clean(self, how):
        train = Trainer()
        train.optimizer.param_groups[0]["lr"] = 0.0
        with autocast():
            clean, perturbed = getattr(train, how)()
            assert perturbed > clean + 0.1
            assert train.loss().item() == pytest.approx(clean, abs=1e-6)

    def test_plain_steps_between_move_the_weights_too(self):
        train = Trainer(SAM(rho=1e-6, every=2))
        train.optimizer.param_groups[0]["lr"] = 5.0
        with autocast():
            losses = [train.sam.step(train.optimizer, train.closure).item() for _ in range(4)]
        assert len({round(loss, 4) for loss in losses}) == 4

    def test_every_evaluation_of_lbfgs_sees_the_weights_of_its_own(self):
        weights = []
        for outside in (nullcontext(), autocast(), autocast(enabled=False)):
            train = Trainer(SAM(rho=0.05, every=2))
            train.optimizer = torch.optim.LBFGS(train.model.parameters(), lr=0.5, max_iter=4)
            plain = train.loss

            def loss(plain=plain):
                with autocast():
                    return plain()

            train.loss = loss
            with outside:
                train.step(), train.step()
            weights.append([p.detach() for p in train.model.parameters()])
        for other in weights[1:]:
            assert all(map(torch.equal, weights[0], other))

    @pytest.mark.parametrize("how", ["step", "by_hand"])
    def test_cached_parametrizations(self, how):
        def wrap(model):
            torch.nn.utils.parametrizations.weight_norm(model.inner)
            return model

        want = getattr(Trainer(wrap=wrap), how)()
        train = Trainer(wrap=wrap)
        with torch.nn.utils.parametrize.cached():
            assert getattr(train, how)() == want
        assert want[1] > want[0] + 0.1

    def test_old_style_hooks_compute_the_weight_anew(self):
        with pytest.warns(FutureWarning, match="weight_norm"):
            train = Trainer(wrap=lambda model: (nn.utils.weight_norm(model.inner), model)[1])
        clean, perturbed = train.step()
        assert perturbed > clean + 0.1

    def test_verify_inside_autocast_sees_stale_weights(self):
        train = Trainer()

        def broken():
            train.closure()
            before = [p.detach().clone() for p in train.model.parameters()]
            norm = train.gradient().norm()
            with torch.no_grad():
                for p in train.model.parameters():
                    p.add_(p.grad / norm)
            train.closure()  # autocast still has the clean weights
            with torch.no_grad():
                for p, kept in zip(train.model.parameters(), before, strict=True):
                    p.copy_(kept)
            train.optimizer.step()

        with autocast():
            found = verify_sam(broken, train.model, train.optimizer, train.closure)
            assert found.gradient_error > 0.1
            assert not found.ok
            again = Trainer()
            ours = verify_sam(again.step, again.model, again.optimizer, again.closure)
        assert ours.gradient_error == 0
        assert ours.ok


class Recurrent(nn.Module):
    """A state that the output depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3, dtype=torch.float64)
        self.register_buffer("state", torch.zeros(6, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(self.state.clone())
        self.state += x.mean(0)
        return self.layer(x + self.state)


class TestBothPassesComputeTheSameFunction:
    @pytest.mark.parametrize("rule", [SAM(), SAM(fraction=0.5)], ids=["plain", "fraction"])
    def test_both_passes_start_from_the_same_buffers(self, rule):
        model, batch = Recurrent(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, rule)
        for _ in range(2):
            sam.step(optimizer, make_closure(model, optimizer), batch=batch)
        assert torch.equal(model.seen[0], model.seen[1])
        assert torch.equal(model.seen[2], model.seen[3])
        assert torch.allclose(model.seen[2], batch[0].mean(0))
        assert torch.allclose(model.state, 2 * batch[0].mean(0))

    def test_power_iterations(self):
        train = Trainer(wrap=spectral)
        twin = copy.deepcopy(train.model)
        twin(train.x)
        train.step()
        for name, buffer in twin.named_buffers():
            assert torch.equal(train.model.get_buffer(name), buffer), name

    def test_by_hand_the_clean_pass_is_the_one_that_counts(self):
        model, (x, y) = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), data(dtype=torch.float32)
        nn.functional.cross_entropy(model(x), y).backward()
        mean = model[1].running_mean.clone()
        with SharpnessAware(model, SAM(rho=1.0)).perturbed():
            nn.functional.cross_entropy(model(x), y).backward()
        assert torch.equal(model[1].running_mean, mean)
        assert model[1].num_batches_tracked == 1

    def test_layers_without_shapes_yet(self):
        model, (x, y) = (
            nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
            data(dtype=torch.float32),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sam = SharpnessAware(model, SAM(rho=1.0))
        for step in (1, 2):
            sam.step(optimizer, make_closure(model, optimizer, x, y))
            assert model[1].num_batches_tracked == step
        assert sam.stats().perturbed_loss > sam.stats().loss

    def test_a_failed_pass_leaves_the_buffers(self):
        model, (x, _) = Recurrent(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ConfigError):
            SharpnessAware(model, SAM()).step(optimizer, lambda: model(x).unbind())
        assert not model.state.any()


class Taught(nn.Module):
    """A model inside whose forward pass a teacher follows the weights."""

    def __init__(self, rebinds):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3, dtype=torch.float64)
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
    model, batch = Taught(rebinds), data()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SharpnessAware(model, rule)
    for _ in range(3):
        twin.layer.load_state_dict(model.layer.state_dict())
        twin(batch[0])
        sam.step(optimizer, make_closure(model, optimizer), batch=batch)
        torch.testing.assert_close(model.teacher.weight, twin.teacher.weight, rtol=1e-14, atol=0)


class TestPerturbedSet:
    """SAM-4: selected, trainable, held by the optimizer, with a gradient of this step."""

    def moves(self, train, step):
        """Distance of every parameter in the second pass from where it was."""
        before = {n: p.detach().clone() for n, p in train.model.named_parameters()}
        moved = {}

        def look(*_):
            for name, p in train.model.named_parameters():
                moved[name] = (p.detach() - before[name]).norm().item()

        handle = train.model.register_forward_pre_hook(look)
        step()
        handle.remove()
        return moved

    def test_only_what_the_optimizer_holds(self):
        train = Trainer(SAM(rho=0.5), of=lambda model: model.outer)
        norms = []
        for _ in range(5):
            moved = self.moves(train, train.step)
            norms.append(train.sam.stats().norm.item())
            assert moved["inner.weight"] == moved["inner.bias"] == 0
            assert math.hypot(moved["outer.weight"], moved["outer.bias"]) == pytest.approx(0.5)
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
        moved = self.moves(train, train.step)
        assert moved["inner.weight"] == moved["inner.bias"] == 0
        assert math.hypot(moved["outer.weight"], moved["outer.bias"]) == pytest.approx(0.5)
        assert train.model.inner.weight.grad is None

    @pytest.mark.parametrize("told", [False, True], ids=["", "told"])
    def test_a_frozen_layer_by_hand(self, told):
        train = Trainer(SAM(rho=0.5))
        train.closure()
        train.model.inner.requires_grad_(False)
        with_optimizer = (train.optimizer,) if told else ()

        def block():
            with train.sam.perturbed(*with_optimizer):
                train.closure()

        moved = self.moves(train, block)
        assert moved["inner.weight"] == 0
        assert moved["outer.weight"] > 0

    def test_the_optimizer_of_a_block(self):
        by_step = Trainer(SAM(rho=0.5), of=lambda model: model.outer)
        by_step.step()
        train = Trainer(SAM(rho=0.5), of=lambda model: model.outer)
        for _ in range(2):  # the second time, the rest of the model has gradients from before
            train.closure()
            with train.sam.perturbed(train.optimizer):
                train.closure()
        for one, other in zip(train.model.parameters(), by_step.model.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        other = Trainer()
        with pytest.raises(ParameterError, match="none of the model's parameters"):
            train.sam.perturbed(other.optimizer).__enter__()
        wrapper = Wrapper(train.optimizer, sync=False)
        with pytest.raises(OrderError, match="accumulates"):
            train.sam.perturbed(wrapper).__enter__()

    def test_two_optimizers(self):
        train = Trainer(SAM(rho=0.5))
        first = torch.optim.SGD(train.model.inner.parameters(), lr=0.1)
        second = torch.optim.SGD(train.model.outer.parameters(), lr=0.1)
        moved = self.moves(train, lambda: train.sam.step(first, train.closure))
        assert moved["outer.weight"] == moved["outer.bias"] == 0
        # The other one can act on the gradient of the same pass.
        assert train.model.outer.weight.grad is not None
        one, other = Trainer(SAM(rho=0.5)), Trainer(SAM(rho=0.5))
        one.step()
        first = torch.optim.SGD(other.model.inner.parameters(), lr=0.1)
        second = torch.optim.SGD(other.model.outer.parameters(), lr=0.1)
        other.sam.step([first, second], other.closure)
        assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))

    @pytest.mark.parametrize(
        "rule", [SAM(), SAM(fraction=0.5), SAM(microbatches=2), SAM(every=2)], ids=str
    )
    @pytest.mark.parametrize("forgets", ["zero_grad", "nothing"])
    def test_a_closure_that_clears_nothing(self, rule, forgets):
        batch, results = data(), []
        for clears in (True, False):
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sam = SharpnessAware(model, rule)

            def closure(x, y, clears=clears, model=model, optimizer=optimizer):
                if clears:
                    optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            for _ in range(3):
                sam.step(optimizer, closure, batch=batch)
                if forgets == "zero_grad":
                    optimizer.zero_grad()
            results.append([p.detach().clone() for p in model.parameters()])
        assert all(map(torch.equal, *results))

    def test_parameters_outside_the_model(self):
        train = Trainer()
        scale = nn.Parameter(torch.ones(()))
        train.optimizer.add_param_group({"params": [scale]})

        def closure():
            loss = scale * train.loss()
            loss.backward()
            return loss

        train.sam.step(train.optimizer, closure)
        assert scale.grad.item() == pytest.approx(train.sam.stats().perturbed_loss.item())

    def test_a_layer_replaced_later(self):
        train = Trainer(SAM(rho=0.5, exclude=["inner.*"]))
        train.model.outer = nn.Linear(8, 3)
        train.optimizer = torch.optim.SGD(train.model.parameters(), lr=0.1)
        moved = self.moves(train, train.step)
        assert moved["inner.weight"] == 0
        assert math.hypot(moved["outer.weight"], moved["outer.bias"]) == pytest.approx(0.5)

    def test_an_optimizer_of_what_is_not_perturbed(self):
        train = Trainer(SAM(only=["inner.*"]), of=lambda model: model.outer)
        with pytest.raises(ParameterError, match=r"SGD holds none .* only=\['inner.\*'\]"):
            train.step()

    def test_no_optimizer(self):
        train = Trainer()
        with pytest.raises(ParameterError, match="empty list of optimizers"):
            train.sam.step([], train.closure)

    def test_all_frozen(self):
        train = Trainer(SAM(only=["inner.*"]))
        train.model.inner.requires_grad_(False)
        with pytest.raises(MissingGradientError, match="not frozen"):
            train.step()


class Wrapper:
    """An optimizer inside another object, as Accelerate's: it may do nothing, or step through a
    scaler.
    """

    def __init__(self, optimizer, sync=True, scaler=None, tells=True):
        self.optimizer, self.scaler = optimizer, scaler
        self.gradient_state = SimpleNamespace(sync_gradients=sync)
        if tells:
            self.param_groups = optimizer.param_groups

    def zero_grad(self):
        if self.gradient_state.sync_gradients:
            self.optimizer.zero_grad()

    def step(self, closure=None):
        if not self.gradient_state.sync_gradients:
            return
        if self.scaler is None:
            self.optimizer.step(closure) if closure else self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class TestWrappedOptimizers:
    def test_accumulating_is_refused(self):
        train = Trainer()
        train.optimizer = Wrapper(train.optimizer, sync=False)
        before = copy.deepcopy(train.model.state_dict())
        calls = []
        with pytest.raises(OrderError, match="Wrapper accumulates gradients at present"):
            train.sam.step(train.optimizer, lambda: calls.append(1))
        assert not calls
        assert train.sam.count == 0
        assert all(torch.equal(p, before[n]) for n, p in train.model.named_parameters())
        train.optimizer.gradient_state.sync_gradients = True
        train.step()
        assert train.sam.count == 1

    def test_accumulating_at_the_end_of_the_closure(self):
        train = Trainer()
        train.optimizer = Wrapper(train.optimizer)
        plain = train.closure

        def closure():
            loss = plain()
            train.optimizer.gradient_state.sync_gradients = False
            return loss

        train.closure = closure
        with pytest.raises(OrderError, match="accumulates"):
            train.step()
        assert train.sam.count == 0

    @pytest.mark.parametrize("tells", [True, False])
    def test_it_is_looked_through(self, tells):
        train = Trainer(of=lambda model: model.outer)
        inner = train.model.inner.weight.detach().clone()
        train.optimizer = Wrapper(train.optimizer, tells=tells)
        seen = []
        train.model.register_forward_pre_hook(
            lambda *_: seen.append(train.model.inner.weight.detach().clone())
        )
        train.step()
        assert all(torch.equal(weight, inner) for weight in seen)
        other = Trainer()
        train.optimizer = Wrapper(other.optimizer, tells=tells)
        with pytest.raises(ParameterError, match="Wrapper holds none of the model's parameters"):
            train.step()

    def test_lbfgs_inside(self):
        train, twin = Trainer(SAM()), Trainer(SAM())
        for one in (train, twin):
            one.optimizer = torch.optim.LBFGS(one.model.parameters(), lr=0.1, max_iter=3)
        train.optimizer = Wrapper(train.optimizer)
        train.step(), twin.step()
        assert all(map(torch.equal, train.model.parameters(), twin.model.parameters()))

    def test_a_scaler_of_its_own_sees_a_poisoned_ascent(self):
        train = Trainer()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        train.optimizer = Wrapper(train.optimizer, scaler=scaler)
        before = copy.deepcopy(train.model.state_dict())

        def closure():
            train.optimizer.zero_grad()
            loss = train.loss()
            scaler.scale(loss).backward()
            if not train.sam.is_perturbed:
                train.model.inner.weight.grad[0, 0] = torch.inf
            return loss

        train.sam.step(train.optimizer, closure)
        assert all(torch.equal(p, before[n]) for n, p in train.model.named_parameters())
        assert scaler.get_scale() == 512.0


class TestNames:
    """Patterns mean the names of AGC's plan, whatever is wrapped around the model."""

    def perturbs(self, model, pattern):
        sam = SharpnessAware(model, SAM(only=[pattern]))
        named = named_parameters(model)
        return [
            name for name, p in named.items() if any(p is selected for selected in sam._selected)
        ]

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    def test_wrappers(self):
        compiled = torch.compile(Net())
        wrapped = nn.DataParallel(torch.compile(Net()))
        for model in (Net(), compiled, wrapped):
            assert self.perturbs(model, "outer.*") == ["outer.weight", "outer.bias"]

    def test_a_child_called_module(self):
        model = nn.Module()
        model.module = nn.Linear(2, 2)
        assert self.perturbs(model, "module.bias") == ["module.bias"]


class KeepsItsOwn(nn.Module):
    def __init__(self, rule=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 3, dtype=torch.float64)
        self.sam = SharpnessAware(self, rule or SAM(rho=0.5))

    def forward(self, x):
        return self.inner(x)


class TestAModelThatKeepsItsSharpnessAware:
    def test_the_copy_goes_on_by_itself(self):
        model, (x, y) = KeepsItsOwn(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.sam.step(optimizer, make_closure(model, optimizer, x, y))
        for one in copies_of(model):
            kept = one.inner.weight.detach().clone()
            assert one.sam.model is one
            assert (one.sam.count, one.sam.rule) == (1, model.sam.rule)
            other = torch.optim.SGD(one.parameters(), lr=0.0)
            clean = one.sam.step(other, make_closure(one, other, x, y))
            assert one.sam.stats().perturbed_loss > clean
            assert one.sam.count == 2
            assert torch.equal(one.inner.weight, kept)
            with one.sam.perturbed():
                assert not torch.equal(one.inner.weight, kept)
                with pytest.raises(OrderError, match="weights are perturbed"):
                    one.state_dict()
                assert model.state_dict()
        assert model.sam.count == 1

    def test_the_object_alone(self):
        model = KeepsItsOwn()
        one = pickle.loads(pickle.dumps(model.sam))
        assert one.model.sam is one

    @pytest.mark.parametrize("save", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
    def test_not_while_the_weights_are_perturbed(self, save):
        model, (x, y) = KeepsItsOwn(), data()
        make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)()
        with model.sam.perturbed():
            for one in (model, model.sam):
                with pytest.raises(OrderError, match="weights are perturbed: save after"):
                    save(one)
        assert save(model)

    def test_what_is_inside_a_wrapper_is_not_saved_either(self):
        model, (x, y) = Net(), data()
        wrapped = nn.DataParallel(model)
        make_closure(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)()
        with SharpnessAware(wrapped, SAM()).perturbed():
            for one in (wrapped, model):
                with pytest.raises(OrderError, match="weights are perturbed"):
                    one.state_dict()


RETURNS = {
    "none": (
        lambda loss: None,
        ConfigError,
        r"returned None; its last line must be 'return loss'",
    ),
    "pair": (
        lambda loss: (loss, 3),
        ConfigError,
        r"returned a tuple \(Tensor, int\); .*return loss",
    ),
    "dict": (lambda loss: {"loss": loss}, ConfigError, r"returned dict; .*return loss"),
    "unreduced": (
        lambda loss: loss.expand(16),
        ShapeError,
        r"loss of shape \(16,\); .*loss.mean",
    ),
}


class TestClosures:
    """A closure that does not return the loss is an error that says so; the weights stay."""

    @pytest.mark.parametrize("which", RETURNS)
    @pytest.mark.parametrize("every", [1, 2], ids=["sam", "plain"])
    def test_it_says_what_is_wrong(self, which, every):
        returns, error, match = RETURNS[which]
        train = Trainer(SAM(every=every))
        for _ in range(every - 1):
            train.sam.step(train.optimizer, train.closure)
        before = copy.deepcopy(train.model.state_dict())
        with pytest.raises(error, match=match):
            train.sam.step(train.optimizer, lambda: returns(train.closure()))
        assert all(torch.equal(p, before[n]) for n, p in train.model.named_parameters())
        assert train.sam.count == every - 1

    def test_only_in_the_second_pass(self):
        train = Trainer()
        before = copy.deepcopy(train.model.state_dict())
        answers = [lambda loss: loss, lambda loss: None]
        with pytest.raises(ConfigError, match="return loss"):
            train.sam.step(train.optimizer, lambda: answers.pop(0)(train.closure()))
        assert all(torch.equal(p, before[n]) for n, p in train.model.named_parameters())

    @pytest.mark.parametrize("returns", [lambda loss: loss.item(), lambda loss: loss.view(1)])
    def test_one_number_is_enough(self, returns):
        train = Trainer()
        want = train.loss().item()
        loss = train.sam.step(train.optimizer, lambda: returns(train.closure()))
        assert loss.shape == ()
        assert loss.item() == pytest.approx(want)
