"""DTensor placements, FSDP2, DDP and FSDP1, with two processes: the sharded result is the unsharded
one.

One pair of processes works off every case and writes down what it got; the tests read that.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import agc_torch
from agc import AGC, AGCError
from agc_conformance.backends.torch.processes import leave
from agc_torch import attach
from agc_torch.shards import held_rows, shard_axes
from agc_torch.views import views

PROCESSES = 2
RULE = AGC(clipping={"0.*": 0.02, "*": 0.01}, exclude=["3.bias"])
TENSOR = AGC(granularity="tensor")
ZERO = AGC(nonfinite="zero")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),  # 5 rows for 2 processes: uneven
        nn.ConvTranspose2d(6, 3, 2, groups=3, bias=False),  # the boundary cuts a group
        nn.Linear(7, 1),  # one process has no row
        nn.Linear(8, 6),
        nn.LayerNorm([3, 4]),
        nn.Embedding(9, 4),
    )


def gradients(of: nn.Module, *, poison: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn(p.shape, generator=generator)
        * torch.exp(torch.randn(p.shape, generator=generator))
        for name, p in of.named_parameters()
    }
    if poison:
        drawn["3.weight"][2, 0] = torch.nan
    return drawn


def unsharded(rule: AGC, *, poison: bool = False) -> dict[str, Any]:
    plain = model()
    for name, gradient in gradients(plain, poison=poison).items():
        plain.get_parameter(name).grad = gradient
    stats = agc_torch.adaptive_clip_grad_(plain, rule)
    return {name: p.grad for name, p in plain.named_parameters()} | {"stats": stats.total()}


def placed(
    placements_of: Any, rule: AGC, *, partial: bool = False, poison: bool = False
) -> dict[str, Any]:
    """Clip a model whose parameters are DTensors with given placements."""
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    spread = {}
    plain = model()
    for name, gradient in gradients(plain, poison=poison).items():
        weight = plain.get_parameter(name)
        placements = [placements_of(weight)]
        spread[name] = nn.Parameter(distribute_tensor(weight.detach(), mesh, placements))
        if partial:
            share = gradient * (0.25 if dist.get_rank() == 0 else 0.75)
            spread[name].grad = DTensor.from_local(share, mesh, [Partial()])
        else:
            spread[name].grad = distribute_tensor(gradient, mesh, placements)
    # Without a module the layer types are unknown: take them from the plain one.
    plan = agc_torch.plan(plain, rule)
    stats = agc_torch.adaptive_clip_grad_(spread, rule, plan=plan)
    return {name: p.grad.full_tensor() for name, p in spread.items()} | {"stats": stats.total()}


def _axis(which: int) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return lambda weight: Shard(which) if weight.dim() > which else Replicate()


def case_shard_0() -> Any:
    return placed(_axis(0), RULE)


def case_shard_1() -> Any:
    return placed(_axis(1), RULE)


def case_replicate() -> Any:
    return placed(_axis(9), RULE)


def case_partial_gradients() -> Any:
    return placed(_axis(9), RULE, partial=True)


def case_whole_tensors() -> Any:
    return placed(_axis(0), TENSOR)


def case_zero_policy() -> Any:
    return placed(_axis(1), ZERO, poison=True)


def train(wrapped: nn.Module, steps: int = 3, optimizer: Any = None) -> list[torch.Tensor]:
    optimizer = optimizer or torch.optim.SGD(
        wrapped.parameters(), 0.1, momentum=0.9, weight_decay=1e-3
    )
    handle = attach(optimizer, wrapped, AGC(clipping=0.02))
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        batch = torch.randn(4, 6, generator=generator)
        mine = batch[dist.get_rank() :: PROCESSES] if wrapped_is_parallel(wrapped) else batch
        optimizer.zero_grad()
        wrapped(mine).square().mean().backward()
        optimizer.step()
    assert int(handle.stats().clipped) > 0
    assert handle.steps == steps
    return [full(p) for p in wrapped.parameters()]


def wrapped_is_parallel(wrapped: nn.Module) -> bool:
    return type(wrapped).__name__ != "Sequential"


def full(parameter: Any) -> torch.Tensor:
    tensor = parameter.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def case_ddp() -> Any:
    return {
        "got": train(nn.parallel.DistributedDataParallel(network())),
        "expected": train(network()),
        "names": [
            e.name for e in agc_torch.plan(nn.parallel.DistributedDataParallel(network()), AGC())
        ],
    }


def case_fsdp2() -> Any:
    from torch.distributed.fsdp import fully_shard

    sharded = network()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    return {"got": train(sharded), "expected": train(network())}


def case_fsdp1() -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    messages = []
    for originals in (False, True):
        flat = FullyShardedDataParallel(
            network(), use_orig_params=originals, device_id=torch.device("cpu")
        )
        try:
            agc_torch.plan(flat, AGC())
        except AGCError as error:
            messages.append(str(error))
    return messages


def case_mixed_kinds() -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    entry = agc_torch.plan({"w": torch.ones(4, 2)}, AGC(units={"w": "o i -> o"}))["w"]
    try:
        views(entry, weight, torch.ones(4, 2))
    except AGCError as error:
        return str(error)


def here(parameter: Any) -> torch.Tensor | None:
    """Return what this process holds of a gradient."""
    return None if parameter.grad is None else parameter.grad.to_local()


def case_unused_experts() -> Any:
    """Each process has a gradient of one of two sharded parameters only, of different sizes."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh, rank = init_device_mesh("cpu", (PROCESSES,)), dist.get_rank()
    rule = AGC(units={"*": "o i -> o"})
    found = {}
    for axis in (0, 1):
        weights = {"a": torch.ones(4, 4), "b": torch.ones(10, 4)}
        spread = {
            name: nn.Parameter(distribute_tensor(weight, mesh, [Shard(axis)]))
            for name, weight in weights.items()
        }
        name = "ab"[rank]
        local = torch.full_like(spread[name].to_local(), (0.005, 50.0)[rank])
        spread[name].grad = DTensor.from_local(local, mesh, [Shard(axis)], run_check=False)
        stats = agc_torch.adaptive_clip_grad_(spread, rule)
        found[axis] = (
            {name: here(p) for name, p in spread.items()},
            stats.total(),
        )
    return found


def case_no_gradient_in_one_process() -> Any:
    """By hand and attached, and where no process has any."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh, rank = init_device_mesh("cpu", (PROCESSES,)), dist.get_rank()
    model = nn.Linear(4, 6, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(1)]))

    def gradient(*ranks: int) -> None:
        model.weight.grad = None
        if rank in ranks:
            local = torch.full((6, 2), 3.0)
            model.weight.grad = DTensor.from_local(local, mesh, [Shard(1)], run_check=False)

    gradient(1)
    by_hand = agc_torch.adaptive_clip_grad_(model, AGC()).total()
    mine = here(model.weight)
    norms = None if mine is None else mine.norm(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = attach(optimizer, model, AGC())
    gradient(0)
    optimizer.step()
    attached = handle.stats().total()
    gradient()
    optimizer.step()  # neither has one: no error
    nobody = handle.stats().total()
    try:
        agc_torch.adaptive_clip_grad_(model, AGC())
    except AGCError as error:
        message = str(error)
    model.weight.requires_grad_(False)
    optimizer.step()
    return {
        "by_hand": by_hand,
        "norms": norms,
        "attached": attached,
        "nobody": nobody,
        "message": message,
        "frozen": handle.stats().total(),
        "steps": handle.steps,
    }


def case_global_norm() -> Any:
    """The norm of all gradients of a model that is partly sharded, one of which a process lacks."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh, rank = init_device_mesh("cpu", (PROCESSES,)), dist.get_rank()
    placements = {"a": [Shard(0)], "b": [Shard(1)], "c": [Replicate()]}
    spread: dict[str, Any] = {"d": nn.Parameter(torch.ones(6, 4))}
    spread["d"].grad = torch.full((6, 4), 2.0)
    for name, placement in placements.items():
        weight = distribute_tensor(torch.ones(6, 4), mesh, placement)
        spread[name] = nn.Parameter(weight)
        if name != "a" or rank == 1:
            local = torch.full_like(weight.to_local(), 2.0)
            spread[name].grad = DTensor.from_local(local, mesh, placement, run_check=False)
    optimizer = torch.optim.SGD(spread.values(), 0.1)
    with attach(optimizer, spread, AGC(clipping=None, units={"*": "o i -> o"}), max_norm=1.0):
        optimizer.step()
    return [
        float((here(p) if name != "d" else p.grad)[0, 0])
        for name, p in spread.items()
        if p.grad is not None
    ]


class Placed(NamedTuple):
    """A parameter of a model that is sharded in many ways."""

    shape: tuple[int, ...]
    units: str
    mesh: str = ""  # none: a plain tensor
    placements: tuple[Any, ...] = ()  # axes that are sharded; None for a repetition
    partial: bool = False


MIXTURE = {
    "plain": Placed((6, 8), "o i -> o"),
    "rows": Placed((5, 40), "o i -> o", "one", (0,)),  # uneven
    "columns": Placed((6, 40), "o i -> o", "one", (1,)),  # every unit is split
    "convolution": Placed((4, 3, 3, 3), "o i h w -> o", "one", (0,)),
    "experts": Placed((3, 4, 6), "l i o -> l o", "one", (2,)),  # units that lie apart
    "groups": Placed((6, 3, 2, 2), "(g=3 i) o h w -> g o", "one", (0,)),  # the cut is in a group
    "whole": Placed((7, 5), "... ->", "one", (0,)),
    "short": Placed((1, 9), "o i -> o", "one", (0,)),  # one process has no row
    "repeated": Placed((3, 70), "o i -> o", "one", (None,)),
    "long": Placed((2, 40_000), "... ->", "one", (1,)),  # in two pieces
    "hybrid": Placed((6, 8), "o i -> o", "hybrid", (None, 0)),
    "two axes": Placed((6, 8), "o i -> o", "square", (0, 1)),
    "repeated and cut": Placed((5, 8), "o i -> o", "square", (None, 0)),
    "twice": Placed((5, 8), "o i -> o", "square", (0, 0)),
    "partial": Placed((4, 6), "o i -> o", "one", (None,), partial=True),
}


def mixed_rule(names: Iterable[str]) -> AGC:
    return AGC(
        clipping={"columns": 0.3, "two axes": 0.2, "*": 0.1},
        units={name: MIXTURE[name].units for name in names},
    )


def mixture(step: int) -> dict[str, nn.Parameter]:
    """Return plain parameters with gradients of which some units are clipped."""
    generator = torch.Generator().manual_seed(step)
    made = {}
    for name, it in MIXTURE.items():
        weight, gradient, sizes = (torch.randn(it.shape, generator=generator) for _ in range(3))
        weight[0] = 0  # whose limit does not grow with what is counted twice
        made[name] = nn.Parameter(weight)
        made[name].grad = gradient * 0.1 * sizes.exp()
    return made


class Collectives(TorchDispatchMode):  # type: ignore[misc]
    """Counts collectives but those by which DTensors are placed anew."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def case_mixture() -> Any:
    """Sharded in many ways, on several meshes, in two steps of which the second remembers."""
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    meshes = {
        "one": init_device_mesh("cpu", (2,)),
        "hybrid": init_device_mesh("cpu", (2, 1)),
        "square": init_device_mesh("cpu", (1, 2)),
    }

    def spread(tensor: torch.Tensor, it: Placed, *, gradient: bool) -> torch.Tensor:
        if not it.mesh:
            return tensor.clone()
        mesh = meshes[it.mesh]
        if gradient and it.partial:
            share = tensor * (0.25 if dist.get_rank() == 0 else 0.75)
            return DTensor.from_local(share, mesh, [Partial()])
        placements = [Replicate() if axis is None else Shard(axis) for axis in it.placements]
        return distribute_tensor(tensor.detach(), mesh, placements)

    parameters: dict[str, Any] = {}
    found = []
    for chosen in (MIXTURE, MIXTURE.keys() - {"partial"}):
        parameters = {
            name: nn.Parameter(spread(p.detach(), MIXTURE[name], gradient=False))
            for name, p in mixture(0).items()
            if name in chosen
        }
        rule = mixed_rule(parameters)
        handle = attach(torch.optim.SGD(parameters.values(), 0.0), parameters, rule)
        for step in range(2):
            plain = mixture(step)
            for name, p in parameters.items():
                p.data.copy_(spread(plain[name].detach(), MIXTURE[name], gradient=False))
                p.grad = spread(plain[name].grad, MIXTURE[name], gradient=True)
            with Collectives() as collectives:
                handle.optimizer.step()
            got = {name: full(p.grad) for name, p in parameters.items()}
            found.append((step, got, handle.stats().parameters(), collectives.count))
    return found


def case_zero_redundancy() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script
        from torch.distributed.optim import ZeroRedundancyOptimizer

        wrapped = nn.parallel.DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(
            wrapped.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3
        )
    return {"got": train(wrapped, optimizer=optimizer), "expected": train(network())}


CASES = {
    name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")
}


def worker(rank: int, folder: str, cases: Mapping[str, Callable[[], Any]] = CASES) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(
            seconds=60
        ),  # a collective that one process leaves out fails, and is read
    )
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(worker, tmp_path_factory.mktemp("processes"))


def results_of(worker: Callable[[int, str], None], folder: Path) -> list[dict[str, Any]]:
    """Return what both processes found, by the case."""
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(PROCESSES)]


PLACEMENTS = {
    "shard_0": RULE,
    "shard_1": RULE,
    "replicate": RULE,
    "partial_gradients": RULE,
    "whole_tensors": TENSOR,
    "zero_policy": ZERO,
}


@pytest.mark.parametrize("case", PLACEMENTS)
@pytest.mark.parametrize("rank", range(PROCESSES))
def test_placements(results, case, rank):
    found = results[rank][case]
    assert isinstance(found, dict), found
    expected = unsharded(PLACEMENTS[case], poison=case == "zero_policy")
    stats, wanted = found.pop("stats"), expected.pop("stats")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=4e-7, atol=0, msg=f"{case} {name}")
    assert (stats.units, stats.clipped) == (wanted.units, wanted.clipped)
    assert stats.nonfinite == wanted.nonfinite == (1 if case == "zero_policy" else 0)
    assert stats.max_ratio == pytest.approx(wanted.max_ratio)
    assert stats.min_scale == pytest.approx(wanted.min_scale)


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "zero_redundancy"])
def test_training_in_parallel(results, case):
    for result in results:
        found = result[case]
        assert isinstance(found, dict), found
        for got, expected in zip(found["got"], found["expected"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, results[0][case]["got"], results[1][case]["got"]))


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_mixture_of_placements_and_meshes(results, rank):
    found = results[rank]["mixture"]
    assert isinstance(found, list), found
    for step, got, stats, collectives in found:
        plain = mixture(step)
        expected = agc_torch.adaptive_clip_grad_(plain, mixed_rule(plain)).parameters()
        assert (
            0
            < sum(it.clipped for it in expected.values())
            < sum(it.units for it in expected.values())
        )
        for name, gradient in got.items():
            limit = {"rtol": 4e-7, "atol": 0, "msg": f"{step} {name}"}
            torch.testing.assert_close(gradient, plain[name].grad, **limit)
            assert (stats[name].units, stats[name].clipped) == (
                expected[name].units,
                expected[name].clipped,
            )
            assert stats[name].max_ratio == pytest.approx(expected[name].max_ratio, rel=1e-6)
        assert collectives == 3  # one a mesh


def test_names_without_the_wrapper(results):
    assert results[0]["ddp"]["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_fsdp1_is_refused(results):
    messages = results[0]["fsdp1"]
    assert len(messages) == 2, messages
    for message in messages:
        assert "FSDP1" in message
        assert "fully_shard" in message


def test_dtensor_and_tensor_do_not_mix(results):
    assert "'w': either the parameter or its gradient is a DTensor" in results[0]["mixed_kinds"]


def test_parameters_that_only_one_process_has_a_gradient_of(results):
    for rank, (mine, other) in enumerate(("ab", "ba")):
        found = results[rank]["unused_experts"]
        assert isinstance(found, dict), found
        for axis, (gradients, total) in found.items():
            assert gradients[other] is None
            columns = 4 if axis == 0 else 2
            if mine == "a":  # its norm is below the limit of 0.02: its bits stay
                assert torch.equal(
                    gradients["a"], torch.full((2 if axis == 0 else 4, columns), 0.005)
                )
            else:
                norm = gradients["b"].norm(dim=1)
                torch.testing.assert_close(norm, torch.full_like(norm, 0.02))
            # With axis 0, each process has half the rows, and a gradient of one tensor's.
            assert (total.units, total.clipped) == (14, 5 if axis == 0 else 10)


def test_global_norm_over_processes(results):
    elements = 3 * 24 + 12  # one process has no gradient of its half of "a"
    for rank in range(PROCESSES):
        found = results[rank]["global_norm"]
        assert isinstance(found, list), found
        assert len(found) == 3 + rank
        assert found == pytest.approx([1 / elements**0.5] * len(found), rel=1e-5)


def test_a_process_without_any_gradient(results):
    for rank in range(PROCESSES):
        found = results[rank]["no_gradient_in_one_process"]
        assert isinstance(found, dict), found
        for how in ("by_hand", "attached"):
            assert (found[how].units, found[how].clipped) == (6, 6)
        assert found["nobody"].clipped == 0
        assert "no parameter has a gradient" in found["message"]
        assert found["frozen"].units == 0
        assert found["steps"] == 3
    assert results[0]["no_gradient_in_one_process"]["norms"] is None
    norms = results[1]["no_gradient_in_one_process"]["norms"]
    torch.testing.assert_close(norms, torch.full((6,), 0.02))


# Older placements put rows of an uneven split elsewhere than FSDP2 itself does.
PLACEMENTS_SPLIT_UNEVENLY = TorchVersion(torch.__version__) >= (2, 13)


@pytest.mark.parametrize("coordinate", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("size", [3, 8, 9])
def test_rows_of_fsdp2_over_tensor_parallelism(coordinate, size):
    """One axis sharded twice: first by tensor parallelism, then each part by FSDP2, as PyTorch does
    it.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = (_StridedShard(0, split_factor=2), Shard(0))
    mesh = SimpleNamespace(shape=(2, 2), get_coordinate=lambda: coordinate)
    tensor = SimpleNamespace(shape=(size, 4), device_mesh=mesh, placements=placements)
    expected = torch.arange(size)
    for mine in reversed(coordinate):
        expected = [*expected.chunk(2), expected[:0]][mine]
    assert torch.equal(held_rows(tensor, 0, torch.device("cpu")), expected)
    if size == 8 or PLACEMENTS_SPLIT_UNEVENLY:
        rows = torch.arange(size)
        for placement, mine in zip(placements, coordinate, strict=True):
            rows = placement._split_tensor(rows, 2, with_padding=False)[0][mine]
        assert torch.equal(rows, expected)
    assert held_rows(tensor, 1, torch.device("cpu")) is None
    assert shard_axes(tensor) == (0, 1)  # a strided shard is one, too
