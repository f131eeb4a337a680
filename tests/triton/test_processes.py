"""The kernels on shards, in Triton's interpreter: two processes get what one gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agc import SAM
from agc_torch import SharpnessAware, fused, triton_kernels
from tests.torch import test_distributed
from tests.torch.test_distributed import (  # noqa: F401
    network,
    results_of,
    test_a_process_without_any_gradient,
    test_mixture_of_placements_and_meshes,
    test_parameters_that_only_one_process_has_a_gradient_of,
    test_placements,
)

PROCESSES = test_distributed.PROCESSES
COUNTED = ("norms", "share", "decide", "scale", "norm", "perturb")
runs = dict.fromkeys(COUNTED, 0)
"""How often each kernel was launched in this process."""


def count(name: str) -> None:
    kernel = getattr(triton_kernels, f"{name}_kernel")
    run = kernel.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs[name] += kwargs["grid"][0] > 0
        return run(*args, **kwargs)

    kernel.run = counted


def sharpness(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights after two steps of SAM."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sam = SharpnessAware(model, SAM(rho=0.5, scope="global"))
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

    def closure() -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        sam.step(optimizer, closure)
    return [test_distributed.full(p) for p in model.parameters()]


def case_fsdp2() -> Any:
    """Steps of AGC, of which all but the first remember, and of SAM."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, train in (("agc", test_distributed.train), ("sam", sharpness)):
        sharded = network()
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer)
        before = dict(runs)
        got = train(sharded)
        found[name] = {
            "got": got,
            "runs": {kernel: runs[kernel] - before[kernel] for kernel in runs},
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "available", lambda device: False)
            found[name]["expected"] = train(network())
    return found


CASES = {
    name: test_distributed.CASES[name]
    for name in (
        *test_distributed.PLACEMENTS,
        "mixture",
        "unused_experts",
        "no_gradient_in_one_process",
    )
} | {"fsdp2": case_fsdp2}


def worker(rank: int, folder: str) -> None:
    fused.available = lambda device: True  # type: ignore[assignment]
    fused._PIECES = 1  # type: ignore[misc]  # so that two pieces are many
    for name in COUNTED:
        count(name)
    added_up = {}

    def counted(name: str) -> Callable[[], Any]:
        def case() -> Any:
            before = runs["share"]
            found = CASES[name]()
            added_up[name] = runs["share"] - before
            return found

        return case

    cases = {name: counted(name) for name in CASES}
    test_distributed.worker(rank, folder, {**cases, "added_up": lambda: added_up})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(worker, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_the_kernels_take_shards(results: list[dict[str, Any]], rank: int) -> None:
    added_up = results[rank]["added_up"]
    assert added_up.keys() == CASES.keys()
    # Each step of a mixture has three meshes, one of which needs a launch more for long units.
    assert added_up["mixture"] == 2 * 2 * 4
    for name, launches in added_up.items():
        assert (launches == 0) == (name == "partial_gradients"), name


@pytest.mark.parametrize("rank", range(PROCESSES))
@pytest.mark.parametrize("what", ["agc", "sam"])
def test_fsdp2(results: list[dict[str, Any]], rank: int, what: str) -> None:
    found = results[rank]["fsdp2"]
    assert isinstance(found, dict), found
    for got, expected in zip(found[what]["got"], found[what]["expected"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    runs = found[what]["runs"]
    if what == "agc":  # three steps
        assert runs["share"] == runs["decide"] == 3
        assert 3 <= runs["scale"] <= runs["norms"] <= 6
    else:  # two steps, and a launch for each alignment
        assert runs["norm"] == runs["perturb"] >= 2
