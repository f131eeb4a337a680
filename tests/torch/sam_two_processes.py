"""Run by test_sam_distributed.py in two processes: DDP in both scopes, fully sharded and tensor
parallel.
"""

from __future__ import annotations

import copy
import sys
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

sys.path.insert(0, sys.argv[1])
from test_sam import Net, by_reference, data, make_closure

from agc.config import SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError
from agc_conformance.backends.torch.processes import leave
from agc_torch.sam import SharpnessAware


def agree(tensors):
    """Tell whether all processes hold the same bits."""
    for tensor in tensors:
        other = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(other, tensor.detach().contiguous())
        if not all(torch.equal(tensor, one) for one in other):
            return False
    return True


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scopes(x, y, mine):
    for scope in ("local", "global"):
        rule = SAM(rho=0.3, scope=scope)
        want = by_reference(Net(), (x, y), rule, replicas=2)
        for model, given in objects():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            sam = SharpnessAware(given, rule)
            sam.step(optimizer, make_closure(model, optimizer, *mine))
            for name, p in model.module.named_parameters():
                torch.testing.assert_close(
                    p.grad, torch.from_numpy(want.gradients[name]), rtol=1e-11, atol=1e-14
                )

        model = DistributedDataParallel(Net(dtype=torch.float32))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sam = SharpnessAware(model, rule)
        closure = make_closure(model, optimizer, mine[0].float(), mine[1])
        first = sam.step(optimizer, closure)
        for _ in range(199):
            last = sam.step(optimizer, closure)
        assert last < first
        assert agree(list(model.parameters())), f"replicas differ after 200 steps, scope={scope}"


def objects():
    """Yield a parallel model, and what somebody may give SharpnessAware for it."""
    model = DistributedDataParallel(Net())
    yield model, model
    model = DistributedDataParallel(Net())
    yield model, model.module
    model = DistributedDataParallel(Net())
    yield model, torch.nn.ModuleDict({"of": model})
    bare = Net()
    given = torch.nn.ModuleDict({"of": bare})
    yield DistributedDataParallel(bare), given


def by_hand(x, y, mine):
    """The first backward pass is the user's own: where it was reduced, it is not the replica's."""
    rule = SAM(rho=0.3)
    want = by_reference(Net(), (x, y), rule, replicas=2)
    for bare in (False, True):
        model = DistributedDataParallel(Net())
        closure = make_closure(model, torch.optim.SGD(model.parameters(), lr=0.0), *mine)
        sam = SharpnessAware(model.module if bare else model, rule)
        closure()
        with pytest.raises(ConfigError, match=r"with model\.no_sync\(\)"), sam.perturbed():
            pass
        with model.no_sync():
            closure()
        with sam.perturbed():
            closure()
        for name, p in model.module.named_parameters():
            torch.testing.assert_close(
                p.grad, torch.from_numpy(want.gradients[name]), rtol=1e-11, atol=1e-14
            )


def static_graph(mine):
    model = DistributedDataParallel(Net(), static_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closure = make_closure(model, optimizer, *mine)
    with pytest.raises(ConfigError, match=r"static_graph=True\) cannot; use static_graph=False"):
        SharpnessAware(model, SAM())
    with pytest.raises(ConfigError, match=r"static_graph=True\) cannot; use static_graph=False"):
        SharpnessAware(model.module, SAM()).step(optimizer, closure)
    sam = SharpnessAware(model, SAM(rho=0.3, scope="global"))
    for _ in range(3):
        sam.step(optimizer, closure)
        assert sam.stats().perturbed_loss > sam.stats().loss
    assert agree(list(model.parameters()))


def one_bad_replica(mine):
    poisoned = mine[0].float().clone()
    poisoned[0, 0] = torch.inf if dist.get_rank() == 0 else 0
    for scope in ("local", "global"):
        for policy in ("skip_step", "raise"):
            model = DistributedDataParallel(Net(dtype=torch.float32))
            before = [p.detach().clone() for p in model.parameters()]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sam = SharpnessAware(model, SAM(scope=scope, nonfinite=policy))
            closure = make_closure(model, optimizer, poisoned, mine[1])
            with pytest.raises(NonFiniteError) if policy == "raise" else nullcontext():
                sam.step(optimizer, closure)
            for p, kept in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, kept), "one replica took a step that the other skipped"


class Branches(torch.nn.Module):
    """Two layers, of which a batch takes one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x, which):
        return (self.a if which else self.b)(x)


def a_replica_without_gradient(mine):
    """All replicas raise, and none waits for another, whatever else would look at the gradients."""
    x, y = mine[0].float(), mine[1]
    for policy, scaled in (("skip_step", False), ("skip_step", True), ("raise", False)):
        for takes in ([True, False], [False, False]):
            model = DistributedDataParallel(Branches(), find_unused_parameters=True)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
            which = takes[dist.get_rank()]

            def closure(model=model, scaler=scaler, which=which):
                loss = torch.nn.functional.cross_entropy(model(x, which), y)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            sam = SharpnessAware(model, SAM(only=["a.*"], nonfinite=policy))
            with pytest.raises(MissingGradientError, match="no perturbed parameter has a gradient"):
                sam.step(optimizer, closure, scaler=scaler)
            assert all(map(torch.equal, model.parameters(), before))
            assert sam.count == 0
    # Without a perturbation of its own, this replica has a plain gradient; without any, it is an
    # error.
    for takes in ([True, False], [False, False]):
        model = DistributedDataParallel(Branches(), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        which = takes[dist.get_rank()]

        def closure(model=model, which=which):
            loss = torch.nn.functional.cross_entropy(model(x, which), y)
            loss.backward()
            return loss

        sam = SharpnessAware(model, SAM(only=["a.*"], nonfinite="skip_perturb"))
        with nullcontext() if any(takes) else pytest.raises(MissingGradientError):
            sam.step(optimizer, closure)
        assert agree(list(model.parameters()))


def fully_sharded(x, y, mine):
    for adaptive in (False, True):
        for reshard in (True, False):
            single = Net()
            sharded = copy.deepcopy(single)
            for layer in (sharded.inner, sharded.outer, sharded):
                fully_shard(layer)
            sharded.set_reshard_after_backward(reshard)
            if not reshard:
                sharded(mine[0])  # what is gathered now hides the parameters
            with pytest.raises(ConfigError, match=r"use SAM\(scope='global'\)"):
                SharpnessAware(sharded, SAM())
            rule = SAM(rho=0.3, scope="global", adaptive=adaptive)
            parts = []
            for model, batch in ((single, (x, y)), (sharded, mine)):
                optimizer = torch.optim.SGD(sharded_parameters(model), lr=0.1, momentum=0.9)
                sam = SharpnessAware(model, rule)
                closure = make_closure(model, optimizer, *batch)
                with counted_reductions() as calls:
                    for _ in range(4):
                        sam.step(optimizer, closure)
                        model(batch[0])
                assert len(calls) == (4 if model is sharded else 0)  # one a step
                closure()
                with sam.perturbed():
                    closure()
                parts.append([full(p.detach()) for p in sharded_parameters(model)])
                parts[-1] += [full(p.grad) for p in sharded_parameters(model)]
            for a, b in zip(*parts, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


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
    for adaptive in (False, True):
        results = []
        for parallel in (False, True):
            model = Block()
            model.gate.requires_grad_(False)
            h = torch.randn(
                2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            )
            if parallel:
                plan = {
                    "norm": SequenceParallel(),
                    "up": ColwiseParallel(input_layouts=Shard(1)),
                    "down": RowwiseParallel(output_layouts=Replicate()),
                }
                parallelize_module(model, mesh, plan)
                h = h.chunk(2, 1)[rank]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

            def closure(model=model, h=h):
                loss = model(h).pow(2).mean()
                loss.backward()
                return loss

            sam = SharpnessAware(model, SAM(rho=0.5, scope="global", adaptive=adaptive))
            seen = []
            for _ in range(3):
                loss = sam.step(optimizer, closure)
                seen += [full(loss), sam.stats().norm, full(sam.stats().perturbed_loss)]
            if parallel:
                assert any(p.is_partial() for p in model.norm.weight.grad.placements)
            results.append(seen + [full(p.detach()) for p in model.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)

    # One process has no gradient of what is cut, none has one of anything, and one is whole.
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    model = torch.nn.ParameterDict({"w": weight})
    for has, moved in (((True, False), 0.5**0.5), ((True, True), 0.5), ((False, False), None)):
        here = has[rank]
        seen = []

        def closure(here=here, seen=seen):
            seen.append(weight.detach().to_local().clone())
            if here:
                weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
            return torch.tensor(1.0)

        sam = SharpnessAware(model, SAM(rho=3**0.5, scope="global"))
        with nullcontext() if any(has) else pytest.raises(MissingGradientError):
            sam.step(torch.optim.SGD([weight], lr=0.0), closure)
        if any(has):
            want = 1 + (moved if here else 0.0)
            torch.testing.assert_close(seen[1], torch.full((2, 3), want))
    weight.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    with SharpnessAware(model, SAM(rho=0.5, scope="global")).perturbed():
        moved = weight.detach().to_local() - 1
    assert torch.allclose(moved, torch.full((2, 3), 0.5 / 12**0.5))


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = data(20)
    mine = (x[10 * rank : 10 * rank + 10], y[10 * rank : 10 * rank + 10])
    scopes(x, y, mine)
    print("scopes", flush=True)
    by_hand(x, y, mine)
    static_graph(mine)
    print("by hand, static graph", flush=True)
    one_bad_replica(mine)
    a_replica_without_gradient(mine)
    print("one bad replica", flush=True)
    fully_sharded(x, y, mine)
    print("fsdp2", flush=True)
    tensor_parallel()
    print("tensor parallel", flush=True)
    leave()


if __name__ == "__main__":
    main()
