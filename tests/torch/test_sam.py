"""SAM in front of PyTorch optimizers, against the float64 reference and the failures of other code."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

from agc.config import AGC, SAM, Schedule
from agc.errors import (
    ConfigError,
    FormatError,
    MissingGradientError,
    NonFiniteError,
    OrderError,
    ParameterError,
    SelectorError,
)
from agc.reference import sharpness_aware_gradients
from agc_torch.sam import SharpnessAware, verify_sam


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


class TestCopies:
    """A model under SAM is copied and saved like any other, and the copy is not under SAM."""

    def copies(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            torch.optim.swa_utils.AveragedModel(model).module,
        ]

    def test_the_copy_is_free(self):
        model, (x, y) = Net(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        closure = make_closure(model, optimizer, x, y)
        sam = SharpnessAware(model, SAM())
        sam.step(optimizer, closure)
        copies = self.copies(model)
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
        for one in self.copies(model):
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
        with pytest.raises(FormatError, match="not a state of SharpnessAware"):
            SharpnessAware(Net(), SAM()).load_state_dict({"count": 3})


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
