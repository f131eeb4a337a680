"""Published guesses of the unit axes by rank, for the profiles that continue an old run.

Each guess is wrong for several common layers, and reproduced as it is. A rank rule reads an array
in the layout that its own framework has. When the adapter's layout is the other one, the weights of
dense layers and ordinary convolutions are read as if permuted, so that a run can be ported between
stacks; every other array is read as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agc.errors import UnitsError
from agc.layouts import Layout, out_first_axes, out_last_axes
from agc.units import Units

__all__ = ["RANK_RULES", "RankRule", "rank_units"]


@dataclass(frozen=True)
class RankRule:
    """A published guess of the reduced axes from an array's shape.

    Attributes
    ----------
    layout : {"out-first", "out-last"}
        How the framework it was written for stores dense and convolution weights.
    reduce : callable
        Shape to the axes that are reduced, or None where that code raises.
    """

    layout: Layout
    reduce: Callable[[tuple[int, ...]], tuple[int, ...] | None]


def _all(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _deepmind(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """``nfnets/optim.py:446``: squeezes to find vectors, then looks at the unsqueezed rank."""
    if sum(size != 1 for size in shape) <= 1:
        return _all(shape)
    return {2: (0,), 3: (0,), 4: (0, 1, 2)}.get(len(shape))


def _optax(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """``optax/transforms/_clipping.py``: DeepMind's, and rank 5 since 0.2.7."""
    if len(shape) == 5 and sum(size != 1 for size in shape) > 1:
        return (0, 1, 2, 3)
    return _deepmind(shape)


def _timm(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``timm/utils/agc.py``: everything but the first axis."""
    return _all(shape) if len(shape) <= 1 else tuple(range(1, len(shape)))


def _pytorch_optimizer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``pytorch_optimizer/optimizer/agc.py``: like timm, but rank 3 reduces only axis 1."""
    return (1,) if len(shape) == 3 else _timm(shape)


RANK_RULES: Final[dict[str, RankRule]] = {
    "deepmind": RankRule("out-last", _deepmind),
    "optax": RankRule("out-last", _optax),
    "timm": RankRule("out-first", _timm),
    "pytorch_optimizer": RankRule("out-first", _pytorch_optimizer),
}
"""Name of a unit rule other than "declared" to what it reduces."""

_PLAIN: Final[dict[Layout, Units]] = {
    "out-first": Units("o i ... -> o"),
    "out-last": Units("... i o -> o"),
}


def rank_units(
    rule: str, shape: tuple[int, ...], layout: Layout | None, declared: Units | None
) -> Units:
    """Units that a published rank rule gives an array.

    Parameters
    ----------
    rule : str
        A name in :data:`RANK_RULES`.
    shape : tuple of int
        Shape of the parameter as stored.
    layout : {"out-first", "out-last"} or None
        How the framework at hand stores dense and convolution weights, if there is one convention.
    declared : Units or None
        What the layer type says, used only to tell whether this is a dense or convolution weight.

    Raises
    ------
    UnitsError
        If the published code raises for this rank.
    """
    guess = RANK_RULES[rule]
    rank = len(shape)
    # order[k]: the stored axis that is axis k in the rule's own layout
    order = tuple(range(rank))
    if layout not in (None, guess.layout) and _is_plain(declared, rank, layout):
        order = out_last_axes(rank) if layout == "out-first" else out_first_axes(rank)
    reduced = guess.reduce(tuple(shape[axis] for axis in order))
    if reduced is None:
        raise UnitsError(
            f"the unit rule {rule!r} is not defined for the shape {shape}; "
            "declare units for this parameter, or use unit_rule='declared'"
        )
    stored = {order[axis] for axis in reduced}
    names = [f"a{axis}" for axis in range(rank)]
    kept = [name for axis, name in enumerate(names) if axis not in stored]
    return Units(f"{' '.join(names) if kept else '...'} -> {' '.join(kept)}")


def _is_plain(declared: Units | None, rank: int, layout: Layout | None) -> bool:
    """Tell whether a parameter is the weight of a dense layer or ordinary convolution."""
    if layout is None:
        return False
    if declared is None:
        return rank in (2, 4, 5)
    probe = tuple(range(2, rank + 2))
    try:
        return declared.bind(probe).reduce == _PLAIN[layout].bind(probe).reduce
    except UnitsError:
        return False
