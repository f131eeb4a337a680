"""Run by test_sam_distributed.py in two processes: DDP in both scopes, fully sharded and tensor
parallel.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from agc.config import SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError
from agc_conformance.backends.torch.processes import leave
from agc_torch.sam import SharpnessAware
from tests.torch.test_sam import Net, Trainer, backward, same, snapshot


def agree(model):
    """Tell whether all processes hold the same bits."""
    for parameter in model.parameters():
        other = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(other, parameter.detach().contiguous())
        if not all(torch.equal(parameter, one) for one in other):
            return False
    return True


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replica(rule, model, given=None):
    """Return a trainer of this process's half of the batch, with SAM of what is given for it."""
    train = Trainer(rule, model)
    if given is not None:
        train.sam = SharpnessAware(given, rule)
    train.x, train.y = (tensor.chunk(2)[dist.get_rank()] for tensor in (train.x, train.y))
    return train


def expected_gradient(scope):
    """Return what one process has: replicas with their own perturbations are micro-batches."""
    alone = Trainer(SAM(rho=0.3, microbatches=2 if scope == "local" else 1), Net())
    alone.step()
    return alone.gradient()


GIVEN = (
    lambda model: model,
    lambda model: model.module,
    lambda model: torch.nn.ModuleDict({"of": model}),
    lambda model: torch.nn.ModuleDict({"of": model.module}),
)
"""What somebody may give SharpnessAware for a parallel model."""


def scopes():
    for scope in ("local", "global"):
        rule, expected = SAM(rho=0.3, scope=scope), expected_gradient(scope)
        for give in GIVEN:
            model = DistributedDataParallel(Net())
            train = replica(rule, model, give(model))
            train.step()
            assert_close(train.gradient(), expected, rtol=1e-11, atol=1e-14)

        train = replica(rule, DistributedDataParallel(Net(torch.float32)))
        train.optimizer = torch.optim.SGD(train.model.parameters(), lr=0.1, momentum=0.9)
        first, *_, last = (train.step()[0] for _ in range(200))
        assert last < first
        assert agree(train.model), f"replicas differ after 200 steps, scope={scope}"


def by_hand():
    """The first backward pass is the user's own: where it was reduced, it is not the replica's."""
    for bare in (False, True):
        model = DistributedDataParallel(Net())
        train = replica(SAM(rho=0.3), model, model.module if bare else model)
        train.closure()
        with pytest.raises(ConfigError, match=r"with model\.no_sync\(\)"), train.sam.perturbed():
            pass
        with model.no_sync():
            train.closure()
        with train.sam.perturbed():
            train.closure()
        assert_close(train.gradient(), expected_gradient("local"), rtol=1e-11, atol=1e-14)


def static_graph():
    model = DistributedDataParallel(Net(), static_graph=True)
    refusal = r"static_graph=True\) cannot; use static_graph=False"
    train = replica(SAM(rho=0.3, scope="global"), model)
    with pytest.raises(ConfigError, match=refusal):
        SharpnessAware(model, SAM())
    with pytest.raises(ConfigError, match=refusal):
        SharpnessAware(model.module, SAM()).step(train.optimizer, train.closure)
    for _ in range(3):
        clean, perturbed = train.step()
        assert perturbed > clean
    assert agree(model)


def one_bad_replica():
    for scope in ("local", "global"):
        for policy in ("skip_step", "raise"):
            rule = SAM(scope=scope, nonfinite=policy)
            train = replica(rule, DistributedDataParallel(Net(torch.float32)))
            before = snapshot(train.model)
            train.x[0, 0] = torch.inf if dist.get_rank() == 0 else 0
            with pytest.raises(NonFiniteError) if policy == "raise" else nullcontext():
                train.step()
            assert same(train.model, before), "one replica took a step that the other skipped"


class Branches(torch.nn.Module):
    """Two layers, of which a batch takes one."""

    def __init__(self, takes_a):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
        self.takes_a = takes_a

    def forward(self, x):
        return (self.a if self.takes_a else self.b)(x)


def a_replica_without_gradient():
    """All replicas raise, and none waits for another, whatever else would look at the gradients.

    Only a replica that may have a plain gradient needs no perturbation of its own.
    """
    policies = ("skip_step", False), ("skip_step", True), ("raise", False), ("skip_perturb", False)
    for takes in ([True, False], [False, False]):
        for policy, scaled in policies:
            model = Branches(takes[dist.get_rank()])
            model = DistributedDataParallel(model, find_unused_parameters=True)
            train, before = replica(SAM(only=["a.*"], nonfinite=policy), model), snapshot(model)
            train.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
            if policy == "skip_perturb" and any(takes):
                train.sam.step(train.optimizer, train.closure)
                assert agree(model)
                continue
            with pytest.raises(MissingGradientError, match="no perturbed parameter has a gradient"):
                train.step()
            assert same(model, before)
            assert train.sam.count == 0


def fully_sharded():
    for adaptive in (False, True):
        for reshard in (True, False):
            single = Net()
            sharded = copy.deepcopy(single)
            for layer in (sharded.inner, sharded.outer, sharded):
                fully_shard(layer)
            sharded.set_reshard_after_backward(reshard)
            rule = SAM(rho=0.3, scope="global", adaptive=adaptive)
            trainers = Trainer(rule, single), replica(rule, sharded)
            if not reshard:
                sharded(trainers[1].x)  # what is gathered now hides the parameters
            with pytest.raises(ConfigError, match=r"use SAM\(scope='global'\)"):
                SharpnessAware(sharded, SAM())
            parts = []
            for train in trainers:
                model = train.model
                train.optimizer = torch.optim.SGD(sharded_parameters(model), lr=0.1, momentum=0.9)
                train.sam = SharpnessAware(model, rule)
                with counted_reductions() as calls:
                    for _ in range(4):
                        train.step()
                        model(train.x)
                assert len(calls) == (4 if model is sharded else 0)  # one a step
                train.by_hand()
                parts.append([full(p.detach()) for p in sharded_parameters(model)])
                parts[-1] += [full(p.grad) for p in sharded_parameters(model)]
            assert_close(*parts, rtol=1e-10, atol=1e-13)


@contextmanager
def counted_reductions():
    calls, reduce = [], dist.all_reduce

    def counting(*args, **kwargs):
        calls.append(args)
        return reduce(*args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        yield calls


def sharded_parameters(model):
    if hasattr(model, "reshard"):
        for module in model.modules():
            module.reshard()
    return list(model.parameters())


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(4, dtype=torch.float64)
        self.up = torch.nn.Linear(4, 8, dtype=torch.float64)
        self.down = torch.nn.Linear(8, 4, dtype=torch.float64)
        self.gate = torch.nn.Parameter(torch.rand(4, 4, dtype=torch.float64))

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


def tensor_parallel():
    """Gradients that are shares of a sum, or whole where the parameter is cut, give the unsharded
    result.
    """
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    whole = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for adaptive in (False, True):
        results = []
        for parallel in (False, True):
            model = Block()
            model.gate.requires_grad_(False)
            h = whole.chunk(2, 1)[rank] if parallel else whole
            if parallel:
                parallelize_module(model, mesh, plan)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sam = SharpnessAware(model, SAM(rho=0.5, scope="global", adaptive=adaptive))
            seen = []

            def closure(x, model=model):
                return backward(model(x).pow(2).mean())

            for _ in range(3):
                loss = sam.step(optimizer, closure, batch=[h])
                seen += [full(loss), sam.stats().norm, full(sam.stats().perturbed_loss)]
            if parallel:
                assert any(p.is_partial() for p in model.norm.weight.grad.placements)
            results.append(seen + [full(p.detach()) for p in model.parameters()])
        assert_close(*results, rtol=1e-10, atol=1e-13)

    # One process has no gradient of what is cut, none has one of anything, and one is whole.
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    model = torch.nn.ParameterDict({"w": weight})
    for has, distance in (((True, False), 0.5**0.5), ((True, True), 0.5), ((False, False), None)):
        seen = []

        def closure(here=has[rank], seen=seen):
            seen.append(weight.detach().to_local().clone())
            if here:
                weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
            return torch.tensor(1.0)

        sam = SharpnessAware(model, SAM(rho=3**0.5, scope="global"))
        with nullcontext() if any(has) else pytest.raises(MissingGradientError):
            sam.step(torch.optim.SGD([weight], lr=0.0), closure)
        if any(has):
            moved = 1 + (distance if has[rank] else 0.0)
            assert_close(seen[1], torch.full((2, 3), moved))
    weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    with SharpnessAware(model, SAM(rho=0.5, scope="global")).perturbed():
        moved = weight.detach().to_local() - 1
    assert torch.allclose(moved, torch.full((2, 3), 0.5 / 12**0.5))


def main() -> None:
    dist.init_process_group("gloo")
    for check in (
        scopes,
        by_hand,
        static_graph,
        one_bad_replica,
        a_replica_without_gradient,
        fully_sharded,
        tensor_parallel,
    ):
        check()
        print(check.__name__, flush=True)
    leave()


if __name__ == "__main__":
    main()
