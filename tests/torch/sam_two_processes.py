"""Run by test_sam_distributed.py in two processes: DDP with both scopes, and a fully sharded model."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from test_sam import Net, by_reference, data, make_closure

from agc.config import SAM
from agc.errors import ConfigError, NonFiniteError
from agc_torch.backend import leave
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


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = data(20)
    mine = (x[10 * rank : 10 * rank + 10], y[10 * rank : 10 * rank + 10])

    for scope in ("local", "global"):
        rule = SAM(rho=0.3, scope=scope)
        want = by_reference(Net(), (x, y), rule, replicas=2)
        model = DistributedDataParallel(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        SharpnessAware(model, rule).step(optimizer, make_closure(model, optimizer, *mine))
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
        print(f"ddp {scope}", flush=True)

    poisoned = mine[0].float().clone()
    poisoned[0, 0] = torch.inf if rank == 0 else 0
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
                assert torch.equal(p, kept), f"rank {rank} took a step that the other skipped"
    print("one bad replica", flush=True)

    single = Net()
    sharded = copy.deepcopy(single)
    for layer in (sharded.inner, sharded.outer, sharded):
        fully_shard(layer)
    with pytest.raises(ConfigError, match=r"use SAM\(scope='global'\)"):
        SharpnessAware(sharded, SAM())
    for adaptive in (False, True):
        rule = SAM(rho=0.3, scope="global", adaptive=adaptive)
        parts = []
        for model, batch in ((single, (x, y)), (sharded, mine)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            sam = SharpnessAware(model, rule)
            for _ in range(4):
                sam.step(optimizer, make_closure(model, optimizer, *batch))
            parts.append([full(p.detach()) for p in model.parameters()])
        for a, b in zip(*parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    print("fsdp2", flush=True)
    leave()


if __name__ == "__main__":
    main()
