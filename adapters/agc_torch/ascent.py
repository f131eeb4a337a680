"""The way uphill: the norm of SAM's ascent gradients, and the move of the weights along them.

What depends on shapes, strides, dtypes and identities alone is found once, not in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from agc.config import SAM
from agc.errors import ParameterError
from agc.plan import WHOLE
from agc_torch import fused
from agc_torch.norms import Groups, all_norms, grouped, kind, on_host
from agc_torch.shards import is_dtensor, local, norm_over, shard_axes
from agc_torch.views import View, layout

__all__ = ["Direction", "Memory"]

Shards: TypeAlias = tuple[Any, tuple[int, ...]]
"""A mesh, and its axes that a parameter is cut along."""
_COPY_BLOCK: Final = 1 << 20
"""Elements that may be copied at a time."""


class Memory:
    """What was the same in the last step; gradients are not kept from one step to the next."""

    def __init__(self) -> None:
        self._known: list[list[Any]] | None = None
        self._parts = _Parts([], [], 0.0)

    def direction(self, parameters: Sequence[Tensor], rule: SAM) -> Direction:
        """Take the gradients of parameters, each of which has one, for the direction uphill.

        Raises
        ------
        ParameterError
            If of a parameter and its gradient one is a ``DTensor`` and the other is not.
        """
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        known = None if torch.compiler.is_compiling() else layout(list(parameters), gradients)
        if known is not None:
            known.append([rule.adaptive, rule.eta])
            if known == self._known:
                weights = [parameter.detach() for parameter in parameters]
                gradients = [gradient.detach() for gradient in gradients]
                if self._parts.fit(weights, gradients):
                    return Direction(weights, gradients, self._parts)
        self._known = None  # in case of an error
        moves = [
            fused.Move(local(p), local(_placed(g, p)), rule.adaptive and p.ndim >= 2)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        self._parts = _Parts(moves, list(map(_shards, parameters)), rule.eta)
        self._known = known
        weights, gradients = [m.weight for m in moves], [m.gradient for m in moves]
        return Direction(weights, gradients, self._parts)


class _Parts:
    """Which tensors are taken together and how, by their places in a direction.

    Attributes
    ----------
    eta : float
        What ASAM adds to the magnitude of a weight.
    adaptive : list of bool
        Whether ASAM scales the perturbation of a weight.
    launched : list of (Shards or None, list of int, fused.Moves)
        What SAM's kernels take.
    on_host : list of (Shards or None, list of int, list of View, Groups)
        Gradients on the CPU whose norm is taken as :mod:`agc_torch.norms` does.
    elsewhere : list of (Shards or None, list of int)
        Gradients whose norm an accelerator takes without a copy; of one device and dtype, else
        PyTorch takes one after the other.
    in_blocks : list of (Shards or None, int)
        Gradients whose norm is taken a block at a time.
    moved : list of int
        Weights that PyTorch's own operations move.
    straight : list of (device and dtype, list of int)
        Of these, what is moved without a copy, many at once.
    by_block : list of int
        Of these, what is moved a block at a time.
    """

    def __init__(
        self, moves: Sequence[fused.Move], shards: Sequence[Shards | None], eta: float
    ) -> None:
        self.eta = eta
        self.adaptive = [move.adaptive for move in moves]
        launched: dict[tuple[Shards | None, torch.device], list[int]] = {}
        on_cpu: dict[Shards | None, list[int]] = {}
        elsewhere: dict[tuple[Shards | None, torch.device, torch.dtype], list[int]] = {}
        self.in_blocks: list[tuple[Shards | None, int]] = []
        for place, (move, mine) in enumerate(zip(moves, shards, strict=True)):
            if move.fits:
                launched.setdefault((mine, move.weight.device), []).append(place)
            elif not _is_plain(move):
                self.in_blocks.append((mine, place))
            elif on_host(move.gradient.device):
                on_cpu.setdefault(mine, []).append(place)
            else:
                gradient = move.gradient
                elsewhere.setdefault((mine, gradient.device, gradient.dtype), []).append(place)
        self.launched = [
            (mine, places, fused.Moves([moves[place] for place in places], eta))
            for (mine, _), places in launched.items()
        ]
        self.on_host = [(mine, *_by_kind(places, moves)) for mine, places in on_cpu.items()]
        self.elsewhere = [(mine, places) for (mine, *_), places in elsewhere.items()]
        by_kernels = {place for _, places, _ in self.launched for place in places}
        self.moved = [place for place in range(len(moves)) if place not in by_kernels]
        straight: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place in self.moved:
            if _is_straight(moves[place]):
                weight = moves[place].weight
                straight.setdefault((weight.device, weight.dtype), []).append(place)
        self.straight = list(straight.items())
        at_once = {place for places in straight.values() for place in places}
        self.by_block = [place for place in self.moved if place not in at_once]

    def fit(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        """Tell whether the kernels' loads fit other tensors that are laid out alike."""
        return all(
            moves.fit(_at(weights, places), _at(gradients, places))
            for _, places, moves in self.launched
        )


def _by_kind(
    places: list[int], moves: Sequence[fused.Move]
) -> tuple[list[int], list[View], Groups]:
    """Return gradients on the CPU in an order that needs few operations, as views without tensors.

    Each of them is one unit.
    """
    made = [(p, View(g, WHOLE.bind(tuple(g.shape)))) for p in places for g in (moves[p].gradient,)]
    made.sort(key=lambda pair: kind(pair[1]))
    views = [view for _, view in made]
    groups = grouped(views)
    for view in views:
        view.release()
    return [place for place, _ in made], views, groups


class Direction:
    """Weights and the gradients to move them along, both as this process holds them.

    Parameters
    ----------
    weights, gradients : list of Tensor
        Detached, dense, and sharded alike.
    parts : _Parts
        Of tensors laid out like these.
    """

    def __init__(self, weights: list[Tensor], gradients: list[Tensor], parts: _Parts) -> None:
        self._weights, self._gradients, self._parts = weights, gradients, parts

    def __bool__(self) -> bool:
        """Whether there is a gradient here."""
        return bool(self._weights)

    def norm(self, candidates: Iterable[Tensor]) -> Tensor | None:
        """Global norm of ``T g``, without a copy of the gradients, in float64 (SAM-1, SAM-10).

        On a CPU float32 is added as :mod:`agc_torch.norms` does.

        Parameters
        ----------
        candidates : iterable of Tensor
            All that any process may have a gradient of: those of a mesh add up the same groups,
            whatever has a gradient here.

        Returns
        -------
        Tensor or None
            A scalar; None if there is no gradient, and no other process that could have one.
        """
        parts = self._parts
        held: dict[Shards | None, list[Tensor]] = {None: []}
        held |= {_shards(each): [] for each in candidates if is_dtensor(each)}
        with torch.no_grad():
            for shards, places, moves in parts.launched:
                held[shards].append(moves.norm(*self._of(places)))
            for shards, places, views, groups in parts.on_host:
                held[shards].append(all_norms(views, self._of(places)[1], 0.0, groups))
            for shards, places in parts.elsewhere:
                # In float64 without a copy, many tensors a launch.
                norms = torch._foreach_norm(self._of(places)[1], 2, torch.float64)
                held[shards].append(torch.stack(norms))
            for shards, place in parts.in_blocks:
                held[shards].append(_norm_of(self._scaled_blocks(place)))
            norms = held.pop(None)
            norms += [_norm_over(*shards, shares) for shards, shares in held.items() if shards]
        if not norms:
            return None
        if len(norms) == norms[0].numel() == 1:
            return norms[0].view(())
        flat = torch.cat([norm.to(norms[0].device).view(-1) for norm in norms])
        # Divided by the largest, so that squaring the norms of tensors cannot overflow.
        limits = torch.finfo(flat.dtype)
        safe = flat.max().clamp(limits.tiny, limits.max)
        return torch.linalg.vector_norm(flat / safe) * safe

    def move_(self, factor: Tensor, usable: Tensor, backup: list[tuple[Tensor, Tensor]]) -> None:
        """Add ``factor * T^2 g`` to the weights in place, unless that is of no use (SAM-1, SAM-10).

        Parameters
        ----------
        factor : scalar Tensor of float64
            0 if it is of no use.
        usable : scalar Tensor of bool
            Whether the gradients are finite, and not all 0.
        backup : list of (Tensor, Tensor)
            Where weights are put, each with a copy of what it was, before they are moved.
        """
        parts, known = self._parts, on_host(factor.device)
        # Detached tensors throughout, so autograd does not record this.
        backup += [(weight, weight.clone()) for weight in _at(self._weights, parts.moved)]
        for _, places, moves in parts.launched:
            weights, gradients = self._of(places)
            copies = moves.perturb(weights, gradients, factor.to(weights[0].device))
            backup += zip(weights, copies, strict=True)
        if not known:
            # 0 * inf is NaN: a gradient that is not finite must not reach the weights for one pass.
            for direction in _at(self._gradients, parts.moved):
                direction.masked_fill_(~usable.to(direction.device), 0)
        if not known or usable:
            for home, places in parts.straight:
                scales = [factor.to(*home)] * len(places)
                torch._foreach_addcmul_(*self._of(places), scales)
            for place in parts.by_block:
                self._move_by_block(place, factor)
        self._weights, self._gradients = [], []  # the second pass needs the memory

    def _move_by_block(self, place: int, factor: Tensor) -> None:
        weight, parts = self._weights[place], self._parts
        wide = _wide(weight.dtype)
        scale = factor.to(weight.device, wide)
        for w, g in _blocks(weight, self._gradients[place]):
            e = g.to(wide) * scale
            if parts.adaptive[place]:
                e = e * (w.abs().to(e.real.dtype) + parts.eta) ** 2
            w.copy_(w.to(wide) + e)

    def _of(self, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        return _at(self._weights, places), _at(self._gradients, places)

    def _scaled_blocks(self, place: int) -> Iterator[Tensor]:
        """Yield blocks of numbers that have the norm of ``T g``."""
        for w, g in _blocks(self._weights[place], self._gradients[place]):
            if self._parts.adaptive[place]:
                # As wide as the norm: in half precision the product would leave the range.
                size = g.abs() if g.is_complex() else g
                g = w.abs().double().add_(self._parts.eta).mul_(size.double())
            yield g


def _at(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    return [tensors[place] for place in places]


def _is_plain(move: fused.Move) -> bool:
    """Tell whether the norm of a gradient is taken as it is."""
    gradient = move.gradient
    if move.adaptive or gradient.is_complex() or type(gradient) is not Tensor:
        return False
    return bool(gradient.device.type != "mps" and gradient.numel())


def _is_straight(move: fused.Move) -> bool:
    """Tell whether a weight is moved without a copy of it or of its gradient."""
    alike = move.weight.dtype == move.gradient.dtype in (torch.float32, torch.float64)
    return alike and not move.adaptive


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype to compute the perturbation in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(weight: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape into blocks of rows, so that temporaries stay small."""
    if weight.dim() == 0 or weight.numel() <= _COPY_BLOCK:
        yield weight, gradient
        return
    rows = max(1, _COPY_BLOCK * len(weight) // weight.numel())
    yield from zip(weight.split(rows), gradient.split(rows), strict=True)


def _norm_of(blocks: Iterator[Tensor]) -> Tensor:
    """Norm of a tensor that comes in blocks, in float64."""
    norms = []
    for block in blocks:
        real = torch.view_as_real(block) if block.is_complex() else block
        norms.append(torch.linalg.vector_norm(real, dtype=torch.float64))
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def _shards(parameter: Any) -> Shards | None:
    """Return the mesh, and its axes, that a parameter is cut along; None if all of it is here."""
    axes = shard_axes(parameter) if is_dtensor(parameter) else ()
    return (parameter.device_mesh, axes) if axes else None


def _norm_over(mesh: Any, axes: Sequence[int], norms: Sequence[Tensor]) -> Tensor:
    """Norm of DTensors from those of this process's shards; replicas hold the same numbers."""
    squares = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    if norms:
        flat = torch.cat([norm.view(-1) for norm in norms])
        squares = torch.linalg.vector_norm(flat).square()
    return norm_over(mesh, squares.to(mesh.device_type), axes)


def _placed(gradient: Any, parameter: Any) -> Tensor:
    """Return a gradient dense, and sharded as its parameter; partial sums are added up."""
    if is_dtensor(gradient) != is_dtensor(parameter):
        raise ParameterError(
            f"of a parameter of shape {tuple(parameter.shape)} and its gradient one is a DTensor and the other "
            "is not; make both DTensors on the same mesh"
        )
    if gradient.is_sparse:
        return gradient.to_dense()
    if is_dtensor(gradient) and gradient.placements != parameter.placements:
        return gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient
