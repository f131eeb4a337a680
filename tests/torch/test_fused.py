"""The path of a GPU, as far as the host decides: limits, addresses, CUDA graphs, threads."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agc import Units
from agc.errors import OrderError
from agc_torch import fused
from tests.torch.test_launches import Kernel, kernels  # noqa: F401

CPU = torch.device("cpu")
INT32 = torch.iinfo(torch.int32).max


def make_table(count: int = 3) -> tuple[fused.Table, list[Tensor]]:
    """Return the table of a parameter and its gradient, and the two."""
    tensors = [torch.ones(count, 8) for _ in range(2)]
    axes = Units("o i -> o").bind((count, 8))
    weight, gradient = (fused.part_of(tensor, axes) for tensor in tensors)
    assert weight is not None
    assert gradient is not None
    made = fused.table(((weight, gradient),), (0,), CPU)
    assert made is not None
    return made, tensors


def addresses_of(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("reduce", [(0,), ()])
def test_int32_counts_to_the_end_of_the_last_piece(reduce: tuple[int, ...]) -> None:
    """In the largest tensor that the kernels take, and one more element is too many."""
    most = fused._LARGEST
    order = fused.memory_order((most,), reduce, (1,))
    assert order is not None
    assert fused.memory_order((most + 1,), reduce, (1,)) is None
    tile = fused.Part(order, torch.float32, True, False).tile
    for size, step in ((most, tile.piece), (most, tile.elements), (most, tile.units)):
        last = (size - 1) // step * step
        assert last + step <= INT32


@pytest.mark.parametrize(
    ("order", "fits"),
    [
        ((1 << 28, 1, 1, 1), True),
        ((1 << 29, 1, 1, 1), False),  # four numbers of each unit
        ((1 << 20, 1 << 10, 1, 1), True),
    ],
)
def test_int32_counts_units(
    order: tuple[int, int, int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = fused.Part(order, torch.float32, True, False)
    monkeypatch.setattr(fused, "Table", lambda *_: SimpleNamespace(compile=None))
    monkeypatch.setattr(fused, "_compiles", lambda *_: True)
    fused.table.cache_clear()
    assert (fused.table(((part, part),), (0,), CPU) is not None) == fits
    fused.table.cache_clear()


@pytest.mark.usefixtures("kernels")
def test_addresses_under_another_default_device() -> None:
    """They are written on the host, wherever new tensors are made by default."""
    made, tensors = make_table()
    with torch.device("meta"):
        sent = made.upload(addresses_of(tensors))
    assert sent.tolist() == addresses_of(tensors)


@pytest.mark.usefixtures("kernels")
def test_threads_share_a_table() -> None:
    """Each gets its own addresses, whatever another one uploads at that moment."""
    made, mine = make_table()
    other, theirs = make_table()
    assert other is made

    class Interrupted(list[int]):
        """Addresses at whose comparison another thread has its turn."""

        def __eq__(self, known: object) -> bool:
            same = super().__eq__(known)
            made.upload(addresses_of(theirs))
            return same

        __hash__ = None  # type: ignore[assignment]

    made.upload(addresses_of(mine))
    sent = made.upload(Interrupted(addresses_of(mine)))
    assert sent.tolist() == addresses_of(mine)


class Operations(TorchDispatchMode):  # type: ignore[misc]
    """Notes what is run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels")
def test_a_graph_has_addresses_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays copy nothing from the host, and nobody else writes what they read."""
    made, tensors = make_table()
    before = made.upload(addresses_of(tensors))
    with monkeypatch.context() as patch, Operations() as operations:
        patch.setattr(fused, "_is_recorded", lambda device: True)
        sent = made.upload(addresses_of(tensors))
    assert operations.names <= {"zeros", "unbind", "_foreach_add_"}
    assert sent.tolist() == addresses_of(tensors)
    assert sent is not before
    assert made.upload(addresses_of(tensors)) is before


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.usefixtures("kernels")
def test_what_a_graph_reads_stays(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, thresholds, and the tiles of SAM, though no cache has them any more."""
    monkeypatch.setattr(fused, "_recorded", {})
    made, tensors = make_table()
    move = fused.Move(*tensors, adaptive=True)
    factor = torch.ones((), dtype=torch.float64)

    def step(table: fused.Table) -> None:
        table.decide(table.upload(addresses_of(tensors)), [0.1], eps=1e-3)
        way = fused.Moves([move], 0.01)
        way.norm([move.weight], [move.gradient])
        way.perturb([move.weight], [move.gradient], factor, [])

    step(made)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_is_recorded", lambda device: recorded)
        step(made)
    read = [made, fused._numbers((0.1,), CPU), fused._numbers((0.01,), CPU)]
    read += fused._pieces((24,), CPU)
    references = [weakref.ref(one) for one in read]
    del made, read
    for cached in (fused.table, fused._made, fused._pieces):
        cached.cache_clear()
    gc.collect()
    assert [reference() is not None for reference in references] == [recorded] * 5


@pytest.mark.parametrize("what", ["agc", "sam", "standardisation", "numbers"])
@pytest.mark.usefixtures("kernels")
def test_a_graph_cannot_record_the_first_time(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do, and the kernels stay on."""
    monkeypatch.setenv("AGC_TORCH_TRITON", "1")
    weight = torch.ones(5, 3, 3, 3)
    fused._made.cache_clear()
    calls: dict[str, Callable[[], object]] = {
        "agc": lambda: make_table(7),
        "sam": lambda: fused.Move(weight, weight.clone(), adaptive=True).fits,
        "standardisation": lambda: fused.standardises(weight, torch.ones(5), "timm", "float32"),
        "numbers": lambda: fused._numbers((0.125,), CPU),
    }
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_is_recorded", lambda device: True)
        with pytest.raises(OrderError, match="take a few steps before"):
            calls[what]()
    assert calls[what]() is not False
    assert os.environ["AGC_TORCH_TRITON"] == "1"


def test_a_folder_of_triton_s_name_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    fused._triton_is_installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    folder = ModuleType("triton")
    folder.__path__ = []
    monkeypatch.setitem(sys.modules, "triton", folder)
    assert not fused._triton_is_installed()
    fused._triton_is_installed.cache_clear()
