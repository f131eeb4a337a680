"""What the name of a leaf says of it in trees without layer types: Flax Linen, Haiku, ``nnx.State``.

A name tells what a leaf is, and the bias beside a kernel which axes of the kernel are outputs, since that is
the shape of a bias. Where the two leave doubt there are no units, and the plan asks to declare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from agc import Units
from agc.plan import WHOLE, Parameter
from agc_jax.layers import stacked

__all__ = ["by_name"]

Shape: TypeAlias = tuple[int, ...]

_KERNELS: Final = {"kernel": "bias", "w": "b"}
_VECTORS: Final = {"bias": "kernel", "b": "w", "scale": "", "offset": "", "gain": ""}
_FIXED: Final = {
    "embedding": Units("v d -> v"),
    "embeddings": Units("v d -> v"),
    "w_i": Units("i o -> o"),  # Haiku's GRU
    "w_h": Units("i o -> o"),
    "lora_a": Units("i r -> r"),
    "lora_b": Units("r o -> o"),
}
_PLAIN: Final = Units("... i o -> o")
_TRANSPOSED: Final = Units("... o i -> o")
_TO_HEADS: Final = Units("i h d -> h d")
_FROM_HEADS: Final = Units("h d o -> o")


def by_name(name: str, shapes: Mapping[str, Shape]) -> Parameter:
    """Return what a leaf's name, and the leaves beside it, say of it.

    Parameters
    ----------
    name : str
        Dotted name of the leaf.
    shapes : mapping of str to tuple of int
        Shapes of all leaves of the tree.
    """
    shape = shapes[name]
    owner, dot, leaf = name.rpartition(".")
    if leaf in _KERNELS:
        if (owner + dot + _KERNELS[leaf]) not in shapes and _attention(owner, shapes) is None:
            # Nothing beside it: the layout's convention for ranks 2, 4 and 5.
            swapped = leaf == "w" and "transpose" in owner.rpartition(".")[2]
            return Parameter(name, shape, _TRANSPOSED if swapped else None, "out-last")
        known = _kernel(owner, dot, leaf, shapes)
        return (
            Parameter(name, shape, stacked(*known), "out-last") if known else Parameter(name, shape)
        )
    if leaf in _VECTORS:
        kernel = _VECTORS[leaf]
        known = _kernel(owner, dot, kernel, shapes) if owner + dot + kernel in shapes else None
        if known is not None:
            return Parameter(name, shape, stacked(WHOLE, known[1]))
        vector = sum(size != 1 for size in shape) <= 1
        return Parameter(name, shape, WHOLE if vector else None)
    fixed = _FIXED.get(leaf) if len(shape) == 2 else None
    return Parameter(name, shape, fixed, None if fixed is None else "out-last")


def _kernel(
    owner: str, dot: str, leaf: str, shapes: Mapping[str, Shape]
) -> tuple[Units, int] | None:
    """Units of a layer's kernel when nothing stacks the layer, and the number of axes that stack it."""
    if (found := _attention(owner, shapes)) is not None:
        return found
    bias = shapes.get(owner + dot + _KERNELS[leaf])
    if bias is None:
        return None
    haiku_transposed = leaf == "w" and "transpose" in owner.rpartition(".")[2]
    return _explain(shapes[owner + dot + leaf], bias, haiku_transposed)


def _explain(kernel: Shape, bias: Shape, transposed: bool) -> tuple[Units, int] | None:
    """Find the one way in which a kernel's outputs have the shape of its bias; None if there are two."""
    ways: list[tuple[Units, int]] = []
    if len(bias) == 0 or len(kernel) <= len(bias):
        return None
    swapped = len(bias) == 1 and len(kernel) >= 3 and kernel[-2] == bias[0]
    if swapped and (transposed or kernel[-1] != bias[0]):
        return _TRANSPOSED, 0
    if kernel[-len(bias) :] == bias:
        outputs = " ".join(f"o{axis}" for axis in range(len(bias)))
        ways.append((_PLAIN if len(bias) == 1 else Units(f"... {outputs} -> {outputs}"), 0))
    if len(bias) >= 2 and kernel[0] == bias[0]:
        below = _explain(kernel[1:], bias[1:], transposed)
        if below is not None:
            ways.append((below[0], below[1] + 1))
    return ways[0] if len(ways) == 1 else None


def _attention(owner: str, shapes: Mapping[str, Shape]) -> tuple[Units, int] | None:
    """Recognise Linen's attention by its four projections and their shapes."""
    parent, dot, role = owner.rpartition(".")
    four = [shapes.get(f"{parent}{dot}{one}.kernel") for one in ("query", "key", "value", "out")]
    if role not in ("query", "key", "value", "out") or None in four:
        return None
    query, out = four[0] or (), four[3] or ()
    extra = len(query) - 3
    if extra < 0 or len(out) != len(query) or out[extra : extra + 2] != query[extra + 1 :]:
        return None
    return (_FROM_HEADS if role == "out" else _TO_HEADS), extra
