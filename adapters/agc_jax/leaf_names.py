"""What leaf names say in trees without layer types: Flax Linen, Haiku, ``nnx.State``.

JAX has no layout convention, and ``vmap`` and ``scan`` put further axes in front of a layer's own,
or second. So every meaning that a kernel of some rank can have is written as one letter an axis:

    ``i`` an input, ``o`` an output, ``l`` an axis that stacks layers

The layer's name leaves some of them out, and so does the bias beside the kernel, whose shape is
that of the outputs. What all that are left agree on is settled; where they differ there are no
units, and the plan asks to declare them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from typing import Final, Literal, TypeAlias

from agc import Units
from agc.layouts import Layout
from agc.plan import WHOLE, Parameter

__all__ = ["LeafNames"]

Shape: TypeAlias = tuple[int, ...]
Kind: TypeAlias = Literal["any", "dense", "conv", "transposed", "either", "einsum", "gpt2"]

_BIAS_OF: Final = {"kernel": "bias", "w": "b", "w_i": "b", "w_h": "b"}
_KERNELS_OF: Final = {"bias": ("kernel",), "b": ("w", "w_i")}
_VECTORS: Final = frozenset({"bias", "b", "scale", "offset", "gain"})
_TABLES: Final = frozenset({"embedding", "input_embedding"})
_ROWS: Final = Units("v d -> v")
_COLUMNS: Final = Units("d v -> v")
_LORA: Final = re.compile(r"(?P<base>(?:.+_)?lora)_(?P<side>[ab])")
_STACKING: Final = re.compile("scan|vmap|layer_stack", re.IGNORECASE)
_UPWARDS: Final = re.compile("[Tt]ransp|[Dd]econv|(?<![A-Za-z])up|Up")
_ATTENTION: Final = (
    ("query", "key", "value", "out"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)
_PROJECTIONS: Final = (("ihd", "hdo"), ("ie", "eo"))
"""Axes of an attention's projections to heads and from them, the heads apart or in one axis."""


class LeafNames:
    """The leaves of a tree by name, and what their names say.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Shapes of all leaves of the tree by dotted name.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._wide = [
            (name, shape)
            for name, shape in shapes.items()
            if name.rpartition(".")[2] in _VECTORS and sum(size > 1 for size in shape) > 1
        ]

    def parameter(self, name: str) -> Parameter:
        """Return what a leaf's name, and the leaves beside it, say of it."""
        shape = self._shapes[name]
        owner, dot, leaf = name.rpartition(".")
        if leaf in _BIAS_OF:
            units = self._kernel(owner + dot, leaf)[0]
            # Published rank rules need the layout. Where nothing settles two axes it would count as
            # settling.
            layout: Layout | None = "out-last" if units is not None or len(shape) > 2 else None
            return Parameter(name, shape, units, layout, source="name")
        if leaf in _KERNELS_OF:
            return Parameter(name, shape, self._bias(owner + dot, leaf), source="name")
        table = self._table(owner, owner + dot, leaf, shape)
        return Parameter(name, shape, table, None if table is None else "out-last", source="name")

    def _kernel(self, prefix: str, leaf: str) -> tuple[Units | None, Units | None]:
        """Return the units of a kernel and of the bias beside it."""
        kernel = self._shapes[prefix + leaf]
        bias = self._shapes.get(prefix + _BIAS_OF[leaf])
        if leaf in ("w_i", "w_h") and (len(kernel) < 2 or bias is None):
            return None, None  # Haiku's GRU has both
        if (meanings := self._attention(prefix, leaf, bias)) is None:
            kind = _kind(prefix, leaf)
            stackable = self._may_be_stacked(prefix, kind, kernel, bias)
            meanings = _fitting(_meanings(len(kernel), kind, stackable), kernel, bias)
        of_bias = None if bias is None else _agreed(map(_of_bias, meanings), bias)
        return _agreed(meanings, kernel), of_bias

    def _bias(self, prefix: str, leaf: str) -> Units | None:
        for kernel in _KERNELS_OF[leaf]:
            if prefix + kernel in self._shapes:
                return self._kernel(prefix, kernel)[1]
        return None

    def _may_be_stacked(self, prefix: str, kind: Kind, kernel: Shape, bias: Shape | None) -> bool:
        """Tell whether a kernel may be of stacked layers, which only a convolution's name denies.

        Without a bias a kernel of a convolution over one axis, or over two that are equally long,
        is one layer's, unless something around it speaks of stacked layers.
        """
        if kind not in ("conv", "transposed") or bias is not None or len(kernel) > 4:
            return True
        if len(kernel) == 4 and kernel[0] != kernel[1]:
            return True
        parent = prefix[:-1].rpartition(".")[0]
        around = f"{parent}." if parent else ""
        return bool(_STACKING.search(prefix)) or any(
            name.startswith(around) and not {*shape}.isdisjoint(kernel[:2])
            for name, shape in self._wide
        )

    def _attention(self, prefix: str, leaf: str, bias: Shape | None) -> list[str] | None:
        """Return the meanings of a projection that fit the others of its attention, or None."""
        parent, dot, role = prefix[:-1].rpartition(".")
        for roles in _ATTENTION:
            if leaf != "kernel" or role not in roles:
                continue
            four = [self._shapes.get(f"{parent}{dot}{name}.kernel") for name in roles]
            if None not in four:
                place = roles.index(role)
                pairs = _projections(roles[0] == "query", *(shape or () for shape in four))
                meant = [outward if role == roles[-1] else inward for inward, outward in pairs]
                fitting = _fitting([_as_meaning(axes) for axes in meant], four[place] or (), bias)
                return fitting or None
        return None

    def _table(self, owner: str, prefix: str, leaf: str, shape: Shape) -> Units | None:
        """Return the units of what is no kernel, bias or gain."""
        if len(shape) != 2:
            return None
        layer = owner.rpartition(".")[2]
        if leaf in _TABLES or (leaf == "embeddings" and "emb" in layer.lower()):
            return _ROWS
        if leaf == "embeddings" and layer.startswith("vector_quantizer"):
            return _COLUMNS
        if (lora := _LORA.fullmatch(leaf)) is not None:
            first, second = (self._shapes.get(f"{prefix}{lora['base']}_{side}") for side in "ab")
            if first is None or second is None or first[-1:] == second[:1]:
                return Units("i r -> r") if lora["side"] == "a" else Units("r o -> o")
        return None


def _kind(prefix: str, leaf: str) -> Kind:
    """Return what the name of a kernel's owner says of the layer."""
    name = prefix[:-1].rpartition(".")[2]
    layer = name.lower()
    if "einsum" in layer or ("conv" in layer and "local" in layer):
        # Any axis may be an output; without shared weights the pixels are.
        return "einsum"
    if leaf == "w" and "transpose" in layer:
        return "transposed"  # Haiku swaps the last two axes
    if "conv" in layer:
        return "either" if _UPWARDS.search(name) else "conv"
    if re.fullmatch(r"c_(attn|proj|fc)|q_attn", layer):
        return "gpt2"  # a dense layer, or the transposed one of transformers' GPT-2
    return "dense" if re.search("dense|linear", layer) else "any"


@lru_cache(maxsize=256)
def _meanings(rank: int, kind: Kind, stackable: bool) -> tuple[str, ...]:
    """Return every meaning of a kernel's axes, stacked ones last; none for more than 8 axes."""
    if rank > 8:
        return ()
    meanings = list(_layers(rank, kind))
    if stackable:
        for count in range(1, rank - 1):
            meanings += ["l" * count + layer for layer in _layers(rank - count, kind)]
        meanings += [f"{layer[0]}l{layer[1:]}" for layer in _layers(rank - 1, kind)]
    return tuple(dict.fromkeys(meanings))


def _layers(rank: int, kind: Kind) -> Iterator[str]:
    """Yield the meanings of the axes of one layer's kernel."""
    if rank < 2:
        return
    if kind != "transposed":
        most = 1 if kind in ("conv", "either") else rank - 1
        yield from ("i" * (rank - outputs) + "o" * outputs for outputs in range(1, most + 1))
    if (rank > 2 and kind not in ("conv", "dense")) or kind == "gpt2":
        yield "i" * (rank - 2) + "oi"
    if kind == "einsum":
        yield from (
            letters for letters in map("".join, product("io", repeat=rank)) if len({*letters}) == 2
        )


@lru_cache(maxsize=256)
def _projections(
    apart: bool, query: Shape, key: Shape, value: Shape, out: Shape
) -> tuple[tuple[str, str], ...]:
    """Return the meanings of the projections to heads and from them that fit each other.

    With ``apart`` heads are an axis of their own. Keys and values may have fewer heads and other
    inputs.
    """
    rank, pairs = len(query), []
    for inward, outward in _PROJECTIONS[: 1 if apart else 2]:
        extra = rank - len(inward)
        stacks = [("lmnp"[:extra], "")] if 0 <= extra <= 4 else []
        stacks += [("", "l")] if extra == 1 else []
        for front, second in stacks:
            to, back = (f"{front}{axes[0]}{second}{axes[1:]}" for axes in (inward, outward))
            sizes = dict(zip(to, query, strict=True))
            if all(
                len(shape) == rank
                and all(
                    axis in free or sizes.get(axis, size) == size
                    for axis, size in zip(axes, shape, strict=True)
                )
                for axes, shape, free in ((to, key, "ihe"), (to, value, "ihe"), (back, out, "o"))
            ):
                pairs.append((to, back))
    return tuple(pairs)


def _as_meaning(axes: str) -> str:
    """Spell the axes of a projection like those of any kernel."""
    inputs = "hde" if "o" in axes else "i"
    return "".join("l" if a in "lmnp" else "i" if a in inputs else "o" for a in axes)


def _outputs(meaning: str) -> list[int]:
    """Return the axes of a kernel that its bias has, in the bias's order."""
    outputs = [axis for axis, letter in enumerate(meaning) if letter == "o"]
    stacks = [axis for axis, letter in enumerate(meaning) if letter == "l"]
    return [outputs[0], *stacks, *outputs[1:]] if 0 not in stacks else [*stacks, *outputs]


def _fitting(meanings: Iterable[str], kernel: Shape, bias: Shape | None) -> list[str]:
    """Return the meanings whose outputs have the shape of the bias, if there is one."""
    return [
        meaning
        for meaning in meanings
        if bias is None or tuple(kernel[axis] for axis in _outputs(meaning)) == bias
    ]


def _of_bias(meaning: str) -> str:
    """Return what a kernel's meaning says of its bias: each stacked layer's is one unit."""
    return "".join(meaning[axis] if meaning[axis] == "l" else "i" for axis in _outputs(meaning))


def _agreed(meanings: Iterable[str], shape: Shape) -> Units | None:
    """Return the units that all meanings give a shape; None if they differ, or if there are none.

    An axis of length 1 makes no difference.
    """
    given = list(meanings)
    kept = {
        tuple(axis for axis, letter in enumerate(meaning) if letter != "i" and shape[axis] != 1)
        for meaning in given
    }
    return _pattern(given[0]) if len(kept) == 1 else None


@lru_cache(maxsize=256)
def _pattern(meaning: str) -> Units:
    """Write a meaning as a pattern: "iiio" is ``... i o -> o``, "lio" is ``l i o -> l o``."""
    if set(meaning) == {"i"}:
        return WHOLE
    parts = re.fullmatch("(l*)(i*)(io|oi)", meaning)
    letters = meaning if parts is None or not parts[2] else f"{parts[1]}.{parts[3]}"
    names = [
        "..."
        if letter == "."
        else letter
        if letters.count(letter) == 1
        else f"{letter}{letters[:axis].count(letter)}"
        for axis, letter in enumerate(letters)
    ]
    kept = [name for name, letter in zip(names, letters, strict=True) if letter in "lo"]
    return Units(f"{' '.join(names)} -> {' '.join(kept)}")
