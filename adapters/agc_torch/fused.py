"""AGC and SAM's perturbation of all parameters in a handful of launches, whatever their number.

Weight standardisation is here too, a launch for each weight and one for its gradients.

What depends on shapes, strides and dtypes alone stands in a :class:`Table`, which is made once; a
step writes nothing but the addresses of tensors, if they changed. :mod:`agc_torch.triton_kernels`
has the kernels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agc.nfnet import WS_EPS, WsDtype, WsEps
from agc.units import UnitAxes
from agc_torch.views import ShardUnits

__all__ = [
    "DO_NOT_COMPILE",
    "Decision",
    "Member",
    "Move",
    "MoveKind",
    "Moves",
    "Part",
    "SharedTable",
    "Table",
    "aligned",
    "available",
    "has_memory",
    "memory_order",
    "order_of",
    "part_of",
    "shared_table",
    "standardise",
    "standardise_back",
    "standardises",
    "table",
]

Array = npt.NDArray[Any]
Way: TypeAlias = Literal["rows", "columns", "gather"]

DO_NOT_COMPILE: Final = "the Triton kernels of AGC, SAM and NFNets do not compile here"
"""How the warning begins."""
_SWITCH: Final = "AGC_TORCH_TRITON"
"""Environment variable that turns the kernels off, if it is 0."""
_PLAIN: Final = (Tensor, torch.nn.Parameter)
"""Types of tensors that have memory of their own; a subclass may not."""
_WIDE_LOAD: Final = 16
"""Bytes of the widest load."""
_SUMS: Final = 256
"""Units that a program decides on."""
_PIECES: Final = 32
"""Pieces of a unit that are added up one after the other; more are added up side by side."""
_MANY: Final = 1024
"""Pieces added up side by side."""


class Tile(NamedTuple):
    """What one program does: some units, and a piece of each.

    Attributes
    ----------
    way : {"rows", "columns", "gather"}
        How it walks through memory.
    units, elements : int
        Size of the block that it holds at a time.
    piece : int
        Elements of each unit that it takes.
    """

    way: Way
    units: int
    elements: int
    piece: int


_TILES: Final = (
    (128, Tile("rows", 32, 64, 128)),
    (4096, Tile("rows", 4, 512, 4096)),
    (1 << 31, Tile("rows", 1, 2048, 1 << 15)),
)
"""Tiles of rows by the longest row that they are for."""
_COLUMNS: Final = Tile("columns", 128, 16, 256)
_GATHER: Final = Tile("gather", 16, 128, 4096)


class Part(NamedTuple):
    """What a table knows of one tensor: nothing that changes from step to step.

    Attributes
    ----------
    order : (int, int, int, int)
        Sizes ``G, I, O, K`` of the tensor in memory order; units are ``(G, O)``.
    dtype : torch.dtype
    aligned : bool
        Whether the tensor starts at a multiple of 16 bytes.
    exact : bool
        Whether squares are added in float64 on every device.
    """

    order: tuple[int, int, int, int]
    dtype: torch.dtype
    aligned: bool
    exact: bool

    @property
    def tile(self) -> Tile:
        """How programs go through the tensor."""
        g, _, outputs, window = self.order
        if outputs == 1:
            tile = next(tile for most, tile in _TILES if self.length <= most)
        else:
            tile = _COLUMNS if g == window == 1 else _GATHER
        if self.dtype.itemsize < 8:
            return tile
        return tile._replace(elements=tile.elements // 2)  # which fill as many registers

    @property
    def units(self) -> int:
        """Number of units."""
        return self.order[0] * self.order[2]

    @property
    def length(self) -> int:
        """Elements of a unit."""
        return self.order[1] * self.order[3]

    @property
    def lanes(self) -> int:
        """Elements in the widest load that every access to the tensor allows; 1 for no such."""
        lanes = _WIDE_LOAD // self.dtype.itemsize
        run = {"rows": self.length, "columns": self.units, "gather": 1}[self.tile.way]
        return lanes if self.aligned and run % lanes == 0 else 1

    @property
    def kind(self) -> Part:
        """A part that stands for all those that one launch covers."""
        way = self.tile.way
        rows, columns, gather = (1, self.tile.piece, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1)
        order = {"rows": rows, "columns": columns, "gather": gather}[way]
        return self._replace(order=order, aligned=self.lanes > 1)


def part_of(tensor: Tensor, axes: UnitAxes, *, exact: bool = False) -> Part | None:
    """Return what a table needs to know of a tensor, or None if the kernels do not take it.

    Parameters
    ----------
    tensor : Tensor
        Real numbers, shaped like ``axes.view``.
    axes : UnitAxes
        Which axes are reduced.
    exact : bool
        Whether squares are added in float64 on every device.
    """
    if type(tensor) not in _PLAIN:
        return None
    order = memory_order(axes.view, axes.reduce, tensor.stride())
    if order is None:
        return None
    (wide,) = aligned([tensor.data_ptr()])
    return Part(order, tensor.dtype, wide, exact or tensor.dtype == torch.float64)


def aligned(addresses: Iterable[int]) -> list[bool]:
    """Tell which addresses allow the widest loads."""
    return [address % _WIDE_LOAD == 0 for address in addresses]


@lru_cache(maxsize=8192)
def memory_order(
    shape: tuple[int, ...], reduce: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[int, int, int, int] | None:
    """Return the sizes ``G, I, O, K`` of a tensor in memory order, whose units are ``(G, O)``.

    None for a tensor that is empty, has 2**31 elements or more, has holes or overlaps, or whose
    units are spread further or lie in another order.

    Examples
    --------
    >>> memory_order((64, 3, 7, 7), (1, 2, 3), (147, 49, 7, 1))
    (64, 147, 1, 1)
    >>> memory_order((768, 2304), (0,), (2304, 1))
    (1, 768, 2304, 1)
    """
    axes = sorted((axis for axis, size in enumerate(shape) if size != 1), key=lambda a: -strides[a])
    distance = 1
    for axis in reversed(axes):
        if strides[axis] != distance:
            return None
        distance *= shape[axis]
    if not 0 < distance < 1 << 31:
        return None
    kept = [axis for axis in axes if axis not in reduce]
    if kept != sorted(kept):
        return None
    runs: list[tuple[bool, int]] = [(True, 1)]
    for axis in axes:
        named = axis not in reduce
        if runs[-1][0] == named:
            runs[-1] = (named, runs[-1][1] * shape[axis])
        else:
            runs.append((named, shape[axis]))
    if len(runs) > 4:
        return None
    sizes = [size for _, size in runs] + [1] * (4 - len(runs))
    return sizes[0], sizes[1], sizes[2], sizes[3]


class _Launch(NamedTuple):
    """Tiles of one kind: all, and those of gradients; and what its kernels are compiled for."""

    tiles: Tensor
    gradients: Tensor
    constants: dict[str, Any]
    exact: bool


class Decision(NamedTuple):
    """What happens to every unit.

    Attributes
    ----------
    addresses : Tensor of int64, shape (tensors,)
        Where the tensors start that it was made for.
    numbers : Tensor of float64, shape (4, units)
        Floor, limit, gradient norm, and factor: NaN for a unit that is not finite.
    """

    addresses: Tensor
    numbers: Tensor


class _Walk:
    """Which program goes through which tile of the weights and the gradients of some parameters.

    Parameters
    ----------
    parts : sequence of (Part, Part)
        Weight and gradient of each parameter.
    device : torch.device
        Where the tensors are.

    Attributes
    ----------
    places : int64, shape (tensors, 3)
        First sum, pieces and units of every tensor; weights stand before gradients.
    sums : int
        Units and pieces of all tensors.
    firsts : Tensor of int64, shape (parameters,)
        The first unit of each gradient.
    launches : list of _Launch
    """

    def __init__(self, parts: Sequence[tuple[Part, Part]], device: torch.device) -> None:
        self._device, self._pairs = device, len(parts)
        if _float64_is_fast(device):
            parts = [(w._replace(exact=True), g._replace(exact=True)) for w, g in parts]
        tensors = [weight for weight, _ in parts] + [gradient for _, gradient in parts]
        pieces = np.array([-(-part.length // part.tile.piece) for part in tensors])
        units = np.array([part.units for part in tensors])
        starts = np.cumsum(units * pieces) - units * pieces
        self.places = np.stack([starts, pieces, units], -1)
        self.sums = int(np.sum(units * pieces))
        counts = units[self._pairs :]
        self.firsts = _put(np.cumsum(counts) - counts, device, np.int64)
        tiles: dict[Part, tuple[list[Array], list[Array]]] = {}
        for index, (part, start) in enumerate(zip(tensors, starts.tolist(), strict=True)):
            weights, gradients = tiles.setdefault(part.kind, ([], []))
            (weights if index < self._pairs else gradients).append(_tiles(part, index, start))
        self.launches = []
        for kind, (weights, gradients) in tiles.items():
            both = _put(np.concatenate(weights + gradients), device)
            mine = both[sum(map(len, weights)) :]
            self.launches.append(_Launch(both, mine, constants(kind), kind.exact))
        self._sizes = _put([(p.units, p.length, *p.order[1:]) for p in tensors], device, np.int64)
        self.uploaded: tuple[object, Tensor] = (None, _put([0] * len(tensors), device, np.int64))

    def upload(self, addresses: list[int]) -> Tensor:
        """Return the addresses of all tensors on the device; they are written if they changed."""
        gpu = self._device.type == "cuda"
        known = addresses, torch.cuda.current_stream(self._device) if gpu else None
        if self.uploaded[0] != known:
            sent = _sent(addresses, self._device)
            if gpu and torch.cuda.is_current_stream_capturing():
                return sent
            self.uploaded = known, sent
        return self.uploaded[1]

    def squares(self, addresses: Tensor, *, warmup: bool = False) -> Tensor:
        """Return the sums of squares of all units, or of each of their pieces."""
        from agc_torch.triton_kernels import norms_kernel

        sums = torch.empty(self.sums, dtype=torch.float64, device=self._device)
        for launch in self.launches:
            norms_kernel.run(
                addresses,
                self._sizes,
                launch.tiles,
                sums,
                **launch.constants,
                EXACT=launch.exact,
                grid=(len(launch.tiles),),
                warmup=warmup,
            )
        return sums

    def scale(
        self, addresses: Tensor, factors: Tensor, *, zero: bool, warmup: bool = False
    ) -> None:
        """Multiply all gradients by their units' factors."""
        from agc_torch.triton_kernels import scale_kernel

        for launch in self.launches:
            if tiles := len(launch.gradients):
                scale_kernel.run(
                    addresses,
                    self._sizes,
                    launch.gradients,
                    self.firsts,
                    factors,
                    self._pairs,
                    **launch.constants,
                    ZERO=zero,
                    grid=(tiles,),
                    warmup=warmup,
                )


class _Judge:
    """Decides on units, from the sums of their squares (AGC-1, AGC-2).

    Parameters
    ----------
    places : int64, shape (2 * parameters, 3)
        First sum, pieces and units of every tensor; weights stand before gradients.
    rules : sequence of int
        Which threshold each parameter has.
    device : torch.device
    """

    def __init__(self, places: Array, rules: Sequence[int], device: torch.device) -> None:
        self._pairs = len(places) // 2
        pieces, counts = places[:, 1].reshape(2, -1).max(0), places[self._pairs :, 2]
        self.units = int(counts.sum())
        self._places = _put(places, device, np.int64)
        self._pair_U = _put(np.repeat(np.arange(self._pairs), counts), device)
        self._firsts = _put(np.cumsum(counts) - counts, device, np.int64)
        self._rules = _put(rules, device)
        self.launches = _additions(np.repeat(pieces, counts), device)

    def decide(
        self,
        sums: Tensor,
        thresholds: Tensor,
        grad_scale: Tensor,
        eps: float,
        div_eps: float,
        *,
        warmup: bool = False,
    ) -> Tensor:
        """Return floor, limit, gradient norm and factor of every unit."""
        from agc_torch.triton_kernels import decide_kernel

        numbers = sums.new_empty(4, self.units)
        for chosen, units, pieces in self.launches:
            decide_kernel.run(
                sums,
                self._places,
                chosen,
                len(chosen),
                self._pair_U,
                self._firsts,
                self._rules,
                thresholds,
                grad_scale,
                self._pairs,
                self.units,
                eps,
                div_eps,
                numbers,
                SUMS=units,
                PIECES=pieces,
                grid=(-(-len(chosen) // units),),
                warmup=warmup,
            )
        return numbers


class _AnyTable:
    """What a table of whole tensors and one of shards have in common."""

    _walk: _Walk
    _judge: _Judge

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def upload(self, addresses: list[int]) -> Tensor:
        """Return the addresses of tensors on the device.

        Parameters
        ----------
        addresses : list of int
            Of all weights, then of all gradients, in the order of the table's parts and laid out
            like them.
        """
        return self._walk.upload(addresses)

    def scale(self, decision: Decision, *, zero: bool) -> None:
        """Scale gradients in place (AGC-2 to AGC-4).

        Parameters
        ----------
        decision : Decision
            From ``decide``.
        zero : bool
            Whether the gradient of a unit that is not finite becomes 0; else it becomes NaN.
        """
        factors = self._factors(decision.numbers[3])
        with _on(self._device):
            self._walk.scale(decision.addresses, factors, zero=zero)

    def compile(self) -> None:
        """Compile all kernels and launch nothing, so that a failure leaves all gradients alone."""
        one, addresses = _numbers((1.0,), self._device), self._walk.uploaded[1]
        with _on(self._device):
            sums = self._add(self._walk.squares(addresses, warmup=True), warmup=True)
            numbers = self._judge.decide(sums, one, one, 0.0, 0.0, warmup=True)
            for zero in (False, True):
                self._walk.scale(addresses, numbers[3], zero=zero, warmup=True)

    def _factors(self, factors: Tensor) -> Tensor:
        """Return the factors of what the gradients here consist of, from those of all units."""
        return factors

    def _add(self, sums: Tensor, *, warmup: bool = False) -> Tensor:  # noqa: ARG002
        """Return what is decided on, from the sums of squares of tiles."""
        return sums

    def _decided(
        self,
        addresses: Tensor,
        sums: Tensor,
        thresholds: Sequence[float | Tensor],
        eps: float,
        div_eps: float,
        grad_scale: Tensor | None,
    ) -> Decision:
        one = _numbers((1.0,), self._device)
        if any(isinstance(threshold, Tensor) for threshold in thresholds):
            limits = torch.stack([_scalar(value, one) for value in thresholds])
        else:
            limits = _numbers(tuple(map(float, thresholds)), self._device)
        scale = one if grad_scale is None else grad_scale.to(one)
        with _on(self._device):
            return Decision(addresses, self._judge.decide(sums, limits, scale, eps, div_eps))


class Table(_AnyTable):
    """Which program does what, for the weights and the gradients of some parameters.

    Parameters
    ----------
    parts : sequence of (Part, Part)
        Weight and gradient of each parameter, with equally many units.
    rules : sequence of int
        Which threshold each parameter has.
    device : torch.device
        Where the tensors are.

    Attributes
    ----------
    units : int
        Units of all parameters.
    launches : int
        Kernels that one clipping launches.
    """

    def __init__(
        self, parts: Sequence[tuple[Part, Part]], rules: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(device)
        self._walk = _Walk(parts, device)
        self._judge = _Judge(self._walk.places, rules, device)
        self.units = self._judge.units
        scaled = sum(len(launch.gradients) > 0 for launch in self._walk.launches)
        self.launches = len(self._walk.launches) + len(self._judge.launches) + scaled

    def decide(
        self,
        addresses: Tensor,
        thresholds: Sequence[float | Tensor],
        *,
        eps: float,
        div_eps: float = 0.0,
        grad_scale: Tensor | None = None,
    ) -> Decision:
        """Compute what happens to every unit (AGC-1, AGC-2).

        Parameters
        ----------
        addresses : Tensor
            From :meth:`upload`.
        thresholds : sequence of float or scalar Tensor
            Clipping thresholds, by the index in ``rules``.
        eps, div_eps : float
            Floors of the weights' norm, and of the gradients' in the division.
        grad_scale : scalar Tensor, optional
            What the gradients are still multiplied by.
        """
        with _on(self._device):
            sums = self._walk.squares(addresses)
        return self._decided(addresses, sums, thresholds, eps, div_eps, grad_scale)


class Member(NamedTuple):
    """A parameter of which this process holds a shard.

    Attributes
    ----------
    weight, gradient : Part
        The shards; their units are local ones.
    weight_units, gradient_units : ShardUnits
        Which unit each local unit belongs to.
    first : int
        The parameter's first unit among those of all parameters of the mesh.
    """

    weight: Part
    gradient: Part
    weight_units: ShardUnits
    gradient_units: ShardUnits
    first: int


class SharedTable(_AnyTable):
    """Which program does what, for shards of parameters that processes decide on together.

    Parameters
    ----------
    members : sequence of Member
        Not empty. There may be units of parameters that are no members.
    counts : sequence of int
        Units that have the first threshold, those after them that have the second, and so on.
    device : torch.device
        Where the shards are.
    """

    def __init__(
        self, members: Sequence[Member], counts: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(device)
        self._walk = walk = _Walk([(member.weight, member.gradient) for member in members], device)
        units = sum(counts)
        weights = [(member.weight_units, member.first) for member in members]
        gradients = [(member.gradient_units, units + member.first) for member in members]
        # Whose share each sum of squares goes to.
        owner_S = np.full(walk.sums, -1)
        local = []
        for (shard, first), (start, pieces, count) in zip(
            weights + gradients, walk.places.tolist(), strict=True
        ):
            local.append(first + shard.numbers().numpy())
            if shard.held.first:
                owner_S[start : start + pieces * count] = np.tile(local[-1], pieces)
        owned = np.flatnonzero(owner_S >= 0)
        owner_S = owner_S[owned]
        counts_U = np.bincount(owner_S, minlength=2 * units)
        self._order = _put(owned[np.argsort(owner_S, kind="stable")], device)
        self._starts = _put(np.concatenate([[0], np.cumsum(counts_U)]), device)
        self._additions = _additions(counts_U, device)
        self._shares = 2 * units
        self._of_local = _put(np.concatenate(local[len(members) :]) - units, device, np.int64)
        starts = np.cumsum(counts) - counts
        places = [(start, 1, count) for start, count in zip(starts, counts, strict=True)]
        places += [(units + start, 1, count) for start, _, count in places]
        self._judge = _Judge(np.array(places), range(len(counts)), device)

    def shares(self, addresses: Tensor) -> Tensor:
        """Return this process's shares of the squared norms of all units.

        Parameters
        ----------
        addresses : Tensor
            From :meth:`upload`.

        Returns
        -------
        Tensor of float64, shape (2 * units,)
            Of weights, then of gradients; 0 for what no member has here.
        """
        with _on(self._device):
            return self._add(self._walk.squares(addresses))

    def decide(
        self,
        addresses: Tensor,
        squares: Tensor,
        thresholds: Sequence[float | Tensor],
        *,
        eps: float,
        div_eps: float = 0.0,
        grad_scale: Tensor | None = None,
    ) -> Decision:
        """Compute what happens to every unit (AGC-1, AGC-2).

        Parameters
        ----------
        squares : Tensor of float64, shape (2 * units,)
            What the shares of all processes add up to.
        addresses, thresholds, eps, div_eps, grad_scale
            As for :meth:`Table.decide`.
        """
        return self._decided(addresses, squares, thresholds, eps, div_eps, grad_scale)

    def _factors(self, factors: Tensor) -> Tensor:
        return factors.index_select(0, self._of_local)

    def _add(self, sums: Tensor, *, warmup: bool = False) -> Tensor:
        from agc_torch.triton_kernels import share_kernel

        shares = sums.new_empty(self._shares)
        for chosen, units, pieces in self._additions:
            share_kernel.run(
                sums,
                self._order,
                self._starts,
                chosen,
                len(chosen),
                shares,
                SUMS=units,
                PIECES=pieces,
                grid=(-(-len(chosen) // units),),
                warmup=warmup,
            )
        return shares


def _additions(pieces: Array, device: torch.device) -> list[tuple[Tensor, int, int]]:
    """Return units of each launch, how many a program takes, and pieces added up at a time.

    ``pieces`` says of each unit how many it has.
    """
    long = pieces > _PIECES
    return [
        (_put(np.flatnonzero(chosen), device), *shape)
        for chosen, shape in ((~long, (_SUMS, 1)), (long, (1, _MANY)))
        if chosen.any()
    ]


def _put(values: Any, device: torch.device, dtype: npt.DTypeLike = np.int32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)


@lru_cache(maxsize=64)
def table(
    parts: tuple[tuple[Part, Part], ...], rules: tuple[int, ...], device: torch.device
) -> Table | None:
    """Return the table of some parameters, whose kernels compile; None if they do not.

    Then a warning says why, once, and :func:`available` is False from now on.
    """
    made = Table(parts, rules, device)
    return made if _compiles(made.compile) else None


@lru_cache(maxsize=64)
def shared_table(
    members: tuple[Member, ...], counts: tuple[int, ...], device: torch.device
) -> SharedTable | None:
    """Return the table of some shards, whose kernels compile; None as for :func:`table`."""
    made = SharedTable(members, counts, device)
    return made if _compiles(made.compile) else None


def _compiles(compile_kernels: Callable[[], None]) -> bool:
    """Tell whether kernels compile; if not, say why, and turn all of them off."""
    try:
        compile_kernels()
    except Exception as error:  # whatever the compiler, the driver or the disk has to say
        warnings.warn(
            f"{DO_NOT_COMPILE}, so a step takes many launches "
            f"({type(error).__name__}: {error}); {_SWITCH}=0 turns them off",
            RuntimeWarning,
            stacklevel=3,
        )
        os.environ[_SWITCH] = "0"
        return False
    return True


_captured: list[Tensor] = []
"""Memory that CUDA graphs copy from in every replay."""


def _sent(addresses: list[int], device: torch.device) -> Tensor:
    """Return numbers on the device, without waiting for it."""
    pinned = device.type == "cuda"
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=pinned)
    if pinned and torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a scalar on the device of another, without a copy from the host."""
    return value.to(like.view(())) if isinstance(value, Tensor) else like.new_full((), value)


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _tiles(part: Part, index: int, start: int) -> Array:
    """Return the tiles of a tensor: its index, first unit, piece, and place of the sum."""
    tile = part.tile
    pieces = -(-part.length // tile.piece)
    first = np.arange(0, part.units, tile.units)
    unit, piece = np.repeat(first, pieces), np.tile(np.arange(pieces), len(first))
    return np.stack([np.full_like(unit, index), unit, piece, start + piece * part.units + unit], -1)


def constants(part: Part) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    tile = part.tile
    return {
        "DTYPE": _triton_dtypes()[part.dtype],
        "WAY": tile.way,
        "LANES": _WIDE_LOAD // part.dtype.itemsize if part.aligned else 1,
        "UNITS": tile.units,
        "ELEMENTS": tile.elements,
        "PIECE": tile.piece,
    }


@cache
def _triton_dtypes() -> dict[torch.dtype, Any]:
    import triton.language as tl

    names = ("float16", "bfloat16", "float32", "float64")
    return {getattr(torch, name): getattr(tl, name) for name in names}


@cache
def _float64_is_fast(device: torch.device) -> bool:
    """Tell whether float64 runs at half the rate of float32: else it would be the bottleneck."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) in {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


_MOVED: Final = (1024, 1 << 14)
"""Elements that a program of SAM holds at a time, and that it takes."""


class MoveKind(NamedTuple):
    """What a kernel of SAM is compiled for; one launch covers all moves of a kind."""

    weight: torch.dtype
    gradient: torch.dtype
    lanes: int
    adaptive: bool

    @property
    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        names = _triton_dtypes()
        return {
            "DTYPE": names[self.weight],
            "GRADIENT": names[self.gradient],
            "LANES": self.lanes,
            "ADAPTIVE": self.adaptive,
            "ELEMENTS": _MOVED[0],
            "PIECE": _MOVED[1],
        }


@dataclass(frozen=True, eq=False)
class Move:
    """A weight that SAM perturbs, its gradient, and whether ASAM scales it."""

    weight: Tensor
    gradient: Tensor
    adaptive: bool

    @cached_property
    def fits(self) -> bool:
        """Whether the kernels take it."""
        weight, gradient = self.weight, self.gradient
        return (
            available(weight.device)
            and type(weight) in _PLAIN
            and type(gradient) in _PLAIN
            and weight.dtype in _triton_dtypes()
            and gradient.dtype in _triton_dtypes()
            and weight.stride() == gradient.stride()
            and memory_order(weight.shape, tuple(range(weight.dim())), weight.stride()) is not None
            and _moving_compiles(self.kind, weight.device)
        )

    @property
    def aligned(self) -> bool:
        """Whether its addresses allow the widest loads."""
        return bool((self.weight.data_ptr() | self.gradient.data_ptr()) % _WIDE_LOAD == 0)

    @cached_property
    def kind(self) -> MoveKind:
        """What a launch that takes it is compiled for."""
        weight, gradient = self.weight, self.gradient
        lanes = _WIDE_LOAD // min(weight.itemsize, gradient.itemsize)
        wide = self.aligned and weight.numel() % lanes == 0
        return MoveKind(weight.dtype, gradient.dtype, lanes if wide else 1, self.adaptive)


@lru_cache(maxsize=64)
def _moving_compiles(kind: MoveKind, device: torch.device) -> bool:
    """Tell whether SAM's kernels compile for a kind of moves."""
    from agc_torch.triton_kernels import norm_kernel, perturb_kernel

    def compile_kernels() -> None:
        number = _numbers((0.0,), device)
        counts = torch.zeros(1, dtype=torch.int64, device=device)
        places = counts, counts, counts.int(), 1
        with _on(device):
            for kernel in (norm_kernel, perturb_kernel):
                kernel.run(*places, number, number, **kind.constants, **warmup)

    warmup: dict[str, Any] = {"grid": (1,), "warmup": True}
    return _compiles(compile_kernels)


class _Group(NamedTuple):
    """Moves that one launch takes: their places, and the tiles and elements of their tensors."""

    kind: MoveKind
    places: list[int]
    tiles: Tensor
    counts: Tensor


class Moves:
    """Weights of one GPU and their gradients for SAM's kernels, one launch for each kind.

    Parameters
    ----------
    moves : sequence of Move
        Of one GPU, not empty; all of them fit. No tensor of theirs is kept.
    eta : float
        What ASAM adds to the magnitude of a weight.
    """

    def __init__(self, moves: Sequence[Move], eta: float) -> None:
        self._device = device = moves[0].weight.device
        self._eta = _numbers((eta,), device)
        self._aligned = [move.aligned for move in moves]
        by_kind: dict[MoveKind, list[int]] = {}
        for place, move in enumerate(moves):
            by_kind.setdefault(move.kind, []).append(place)
        self._groups = [
            _Group(kind, places, *_pieces(tuple(moves[i].weight.numel() for i in places), device))
            for kind, places in by_kind.items()
        ]
        self._totals: dict[torch.dtype, int] = {}
        self._copies: list[tuple[torch.dtype, torch.Size, tuple[int, ...], int]] = []
        for weight in (move.weight for move in moves):
            start = self._totals.get(weight.dtype, 0)
            self._copies.append((weight.dtype, weight.shape, weight.stride(), start))
            size = -(-weight.numel() * weight.itemsize // _WIDE_LOAD) * _WIDE_LOAD
            self._totals[weight.dtype] = start + size // weight.itemsize

    def fit(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Tell whether the kernels' loads fit other tensors that are laid out alike."""
        return self._aligned == aligned(
            w.data_ptr() | g.data_ptr() for w, g in zip(weights, gradients, strict=True)
        )

    def norm(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of gradients, those of ASAM times ``|w| + eta``: a scalar in float64."""
        from agc_torch.triton_kernels import norm_kernel

        sums = []
        for kind, places, tiles, counts in self._groups:
            sums.append(torch.empty(len(tiles), dtype=torch.float64, device=self._device))
            addresses = _addresses(places, weights, gradients)
            with _on(self._device):
                norm_kernel[(len(tiles),)](
                    _sent(addresses, self._device),
                    counts,
                    tiles,
                    len(places),
                    self._eta,
                    sums[-1],
                    **kind.constants,
                )
        return torch.cat(sums).sum().sqrt()

    def perturb(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor
    ) -> list[Tensor]:
        """Move weights to ``w + e``, and return copies of what they were (SAM-1, SAM-10).

        Parameters
        ----------
        weights, gradients : sequence of Tensor
            Laid out and aligned like the moves.
        factor : scalar Tensor of float64
            What gradients are multiplied by; 0 leaves the weights alone, whatever the gradients
            are.

        Returns
        -------
        list of Tensor
            Each laid out like its weight; in one stretch of memory for each dtype.
        """
        from agc_torch.triton_kernels import perturb_kernel

        flat = {
            dtype: torch.empty(count, dtype=dtype, device=self._device)
            for dtype, count in self._totals.items()
        }
        copies = [
            flat[dtype].as_strided(shape, stride, start)
            for dtype, shape, stride, start in self._copies
        ]
        for kind, places, tiles, counts in self._groups:
            addresses = _addresses(places, weights, gradients, copies)
            with _on(self._device):
                perturb_kernel[(len(tiles),)](
                    _sent(addresses, self._device),
                    counts,
                    tiles,
                    len(places),
                    factor,
                    self._eta,
                    **kind.constants,
                )
        return copies


def _addresses(places: Sequence[int], *columns: Sequence[Tensor]) -> list[int]:
    """Return where the tensors at some places start, column after column."""
    return [column[place].data_ptr() for column in columns for place in places]


@lru_cache(maxsize=64)
def _pieces(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tiles of tensors with so many elements: tensor and piece; and the elements."""
    pieces = [-(-count // _MOVED[1]) for count in counts]
    tensor = np.repeat(np.arange(len(counts)), pieces)
    piece = np.concatenate([np.arange(n) for n in pieces])
    tiles = np.stack([tensor, piece], -1).astype(np.int32)
    return torch.from_numpy(tiles).to(device), torch.tensor(counts, device=device)


_MOST: Final = 8192
"""Elements of the longest filter that a program holds."""
_HELD: Final = 1024
"""Elements that a program holds if filters are shorter than that."""


class Filters(NamedTuple):
    """How a weight is standardised: what does not depend on its numbers."""

    dtype: torch.dtype
    length: int
    ws_eps: WsEps
    ws_dtype: WsDtype

    @property
    def out(self) -> torch.dtype:
        """The dtype of what is standardised."""
        return torch.bfloat16 if self.ws_dtype == "bfloat16" else self.dtype

    @property
    def kernels(self) -> tuple[Any, Any]:
        """The kernels forward and backward."""
        from agc_torch.triton_kernels import (
            standardise_back_kernel,
            standardise_kernel,
            standardise_low_back_kernel,
            standardise_low_kernel,
        )

        if self.ws_dtype == "bfloat16":
            return standardise_low_kernel, standardise_low_back_kernel
        return standardise_kernel, standardise_back_kernel

    @property
    def constants(self) -> dict[str, Any]:
        """The kernels' constants, and how many warps run a program."""
        elements = 1 << (self.length - 1).bit_length()
        constants = {
            "FLOOR": self.ws_eps == "deepmind",
            "UNITS": max(1, _HELD // elements),
            "ELEMENTS": elements,
            "num_warps": min(16, max(4, elements // 512)),
        }
        if self.ws_dtype == "float32":
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            constants["WIDE"] = _triton_dtypes()[wide]
        return constants


def standardises(weight: Tensor, gain: Tensor, ws_eps: WsEps, ws_dtype: WsDtype) -> bool:
    """Tell whether the kernels take a weight, and compile for it.

    Parameters
    ----------
    weight : Tensor, shape (outputs, inputs, kernel, kernel)
    gain : Tensor, shape (outputs,)
    ws_eps : {"deepmind", "timm"}
    ws_dtype : {"float32", "bfloat16"}
    """
    length = math.prod(weight.shape[1:])
    return (
        available(weight.device)
        and all(map(has_memory, (weight, gain)))
        and weight.dtype == gain.dtype
        and weight.dtype in _triton_dtypes()
        and not (ws_dtype == "bfloat16" and weight.dtype == torch.float64)
        and 0 < length <= _MOST
        and weight.numel() < 1 << 31
        and gain.is_contiguous()
        and weight.is_contiguous(memory_format=order_of(weight))
        and _standardising_compiles(Filters(weight.dtype, length, ws_eps, ws_dtype), weight.device)
    )


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory: not a subclass's, and not that of a transformation."""
    if type(tensor) not in _PLAIN:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # of torch.func, or one that stands for a batch of gradients
        return False
    return True


def order_of(weight: Tensor) -> torch.memory_format:
    """Return ``channels_last`` for a weight in that memory order, else ``contiguous_format``."""
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def standardise(weight: Tensor, gain: Tensor, ws_eps: WsEps, ws_dtype: WsDtype) -> Tensor:
    """Standardise a weight that :func:`standardises` takes; the result is laid out like it."""
    kind = Filters(weight.dtype, weight[0].numel(), ws_eps, ws_dtype)
    out = torch.empty_like(weight, dtype=kind.out)
    _launch_filters(kind.kernels[0], kind, weight, gain, out)
    return out


def standardise_back(
    weight: Tensor, gain: Tensor, gradient: Tensor, ws_eps: WsEps, ws_dtype: WsDtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a weight and its gain, from that of what is standardised."""
    kind = Filters(weight.dtype, weight[0].numel(), ws_eps, ws_dtype)
    gradient = gradient.contiguous(memory_format=order_of(weight))
    backs = torch.empty_like(weight), torch.empty_like(gain)
    _launch_filters(kind.kernels[1], kind, weight, gain, gradient, *backs)
    return backs


def _launch_filters(
    kernel: Any, kind: Filters, weight: Tensor, *others: Tensor, warmup: bool = False
) -> None:
    filters, constants = len(weight), kind.constants
    grid = (-(-filters // constants["UNITS"]),)
    with _on(weight.device):
        kernel.run(
            weight,
            *others,
            filters,
            kind.length,
            WS_EPS[kind.ws_eps],
            **constants,
            grid=grid,
            warmup=warmup,
        )


@lru_cache(maxsize=256)
def _standardising_compiles(kind: Filters, device: torch.device) -> bool:
    """Tell whether the kernels of weight standardisation compile for a kind of weights."""

    def compile_kernels() -> None:
        weight = torch.empty(16, kind.length, dtype=kind.dtype, device=device)
        gain, out = weight.new_empty(16), torch.empty_like(weight, dtype=kind.out)
        forward, backward = kind.kernels
        _launch_filters(forward, kind, weight, gain, out, warmup=True)
        _launch_filters(backward, kind, weight, gain, out, weight, gain, warmup=True)

    return _compiles(compile_kernels)


def available(device: torch.device) -> bool:
    """Tell whether the kernels run on a device: it is a GPU, and PyTorch came with Triton.

    The environment variable ``AGC_TORCH_TRITON=0`` turns them off.
    """
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and os.environ.get(_SWITCH) != "0"
        and _triton_is_installed()
    )


@cache
def _triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
