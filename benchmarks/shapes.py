"""The tensors that are clipped: two real models, as names and shapes.

Shapes are given out-first (``o i h w``, PyTorch's order); :func:`out_last` turns one into the order
of Flax and Keras (``h w i o``). Every tensor of rank 2 and 4 is a matrix or convolution, or an
embedding table; rank 0 and 1 are gains, biases and scalars.
"""

from __future__ import annotations

from math import prod

__all__ = [
    "MODELS",
    "REHEARSAL",
    "declared",
    "few",
    "gpt2_small",
    "nfnet_f0",
    "out_last",
    "parameters",
    "shapes_of",
]

Shapes = dict[str, tuple[int, ...]]


def nfnet_f0() -> Shapes:
    """NFNet-F0 (arXiv:2102.06171): 233 tensors, 71,489,284 parameters."""
    shapes: Shapes = {}

    def conv(name: str, kernel: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.gain"] = (outputs,)
        shapes[f"{name}.bias"] = (outputs,)

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    stem = (3, 16, 32, 64, 128)
    for k in range(4):
        conv(f"stem.conv{k}", 3, stem[k], stem[k + 1])
    width, group = 128, 128
    for stage, (out, depth) in enumerate(zip((256, 512, 1536, 1536), (1, 2, 6, 3), strict=True)):
        for block in range(depth):
            name, middle = f"stages.{stage}.{block}", out // 2
            shapes[f"{name}.skip_gain"] = ()
            if block == 0:
                conv(f"{name}.shortcut", 1, width, out)
            conv(f"{name}.conv0", 1, width, middle)
            conv(f"{name}.conv1", 3, group, middle)
            conv(f"{name}.conv1b", 3, group, middle)
            conv(f"{name}.conv2", 1, middle, out)
            dense(f"{name}.se.fc0", out, out // 2)
            dense(f"{name}.se.fc1", out // 2, out)
            width = out
    conv("final_conv", 1, width, 2 * width)
    dense("head", 2 * width, 1000)
    return shapes


def gpt2_small() -> Shapes:
    """GPT-2 small, its output tied to the token embedding: 148 tensors, 124,439,808 parameters."""
    width = 768
    shapes: Shapes = {"wte.embedding": (50257, width), "wpe.embedding": (1024, width)}

    def norm(name: str) -> None:
        shapes[f"{name}.scale"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    for block in range(12):
        norm(f"h.{block}.ln_1")
        dense(f"h.{block}.attn.qkv", width, 3 * width)
        dense(f"h.{block}.attn.proj", width, width)
        norm(f"h.{block}.ln_2")
        dense(f"h.{block}.mlp.fc", width, 4 * width)
        dense(f"h.{block}.mlp.proj", 4 * width, width)
    norm("ln_f")
    return shapes


def few() -> Shapes:
    """Return a tensor of every kind that the models have, all of them small."""
    return {
        "conv.weight": (8, 4, 3, 3),
        "conv.gain": (8,),
        "skip_gain": (),
        "wte.embedding": (16, 8),
        "head.weight": (10, 8),
        "head.bias": (10,),
    }


REHEARSAL = "few"
"""What stands for the models where the benchmarks are tried out."""
MODELS = {"nfnet-f0": nfnet_f0, "gpt2-small": gpt2_small}


def shapes_of(model: str) -> Shapes:
    """Return the shapes of a model, or of :data:`REHEARSAL`."""
    return few() if model == REHEARSAL else MODELS[model]()


def out_last(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape in the order of Flax and Keras; embedding tables are ``(v, d)`` everywhere."""
    if len(shape) < 2 or name.endswith("embedding"):
        return shape
    return (*shape[2:], shape[1], shape[0])


def declared(shapes: Shapes, kernel: str, leaf: str = "weight") -> dict[str, str]:
    """Return the units of bare arrays, which have no layer type to tell them.

    ``kernel`` is the pattern of matrices and convolutions, ``leaf`` the last part of their names.
    """
    units = {f"*.{leaf}": kernel}
    if any(name.endswith(".embedding") for name in shapes):
        units["*.embedding"] = "v d -> v"
    return units


def parameters(shapes: Shapes) -> int:
    """Return the number of parameters."""
    return sum(prod(shape) for shape in shapes.values())
