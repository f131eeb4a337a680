"""Layers of Flax NNX, by the suite's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from flax import nnx

from agc import AGC, Plan
from agc_conformance.backend import Layer, Unsupported
from agc_conformance.backends.jax.device import Device
from agc_jax.units import plan

__all__ = ["Layers"]

Sizes = dict[str, int]


class Layers(Device):
    """Plans of single layers."""

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the Flax NNX layer and return its plan."""
        if layer.kind not in _LAYERS:
            raise Unsupported(_ABSENT.get(layer.kind, f"Flax has no layer {layer.kind!r}"))
        return plan(nnx.eval_shape(lambda: _LAYERS[layer.kind](dict(layer.sizes))), rule)


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def _conv(axes: str, *, transpose: bool = False) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in axes)
        if transpose:
            return nnx.ConvTranspose(s["i"], s["o"], kernel, rngs=_rngs())
        groups = s.get("g", 1)
        return nnx.Conv(s["i"], s["o"], kernel, feature_group_count=groups, rngs=_rngs())

    return build


def _stacked(s: Sizes) -> Any:
    @nnx.vmap  # type: ignore[untyped-decorator]
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(s["i"], s["o"], rngs=rngs)

    return make(_rngs().split(s["l"]))


class _Unknown(nnx.Module):  # type: ignore[misc]
    """A layer of a type that the table does not know, with one parameter."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        setattr(self, name, nnx.Param(jnp.ones(shape)))


_LAYERS: Final[dict[str, Callable[[Sizes], Any]]] = {
    "dense": lambda s: nnx.Linear(s["i"], s["o"], rngs=_rngs()),
    "conv1d": _conv("w"),
    "conv2d": _conv("hw"),
    "conv3d": _conv("thw"),
    "grouped_conv2d": _conv("hw"),
    "depthwise_conv2d": lambda s: nnx.Conv(
        s["c"], s["c"] * s["m"], (s["h"], s["w"]), feature_group_count=s["c"], rngs=_rngs()
    ),
    "conv_transpose1d": _conv("w", transpose=True),
    "conv_transpose2d": _conv("hw", transpose=True),
    "embedding": lambda s: nnx.Embed(s["v"], s["d"], rngs=_rngs()),
    "attention": lambda s: nnx.MultiHeadAttention(
        num_heads=s["h"], in_features=s["i"], qkv_features=s["h"] * s["d"], rngs=_rngs()
    ),
    "einsum": lambda s: nnx.Einsum(
        "abi,ihd->abhd", (s["i"], s["h"], s["d"]), (s["h"], s["d"]), rngs=_rngs()
    ),
    "lstm": lambda s: nnx.OptimizedLSTMCell(s["i"], s["o"], rngs=_rngs()),
    "gru": lambda s: nnx.GRUCell(s["i"], s["o"], rngs=_rngs()),
    "rnn": lambda s: nnx.SimpleCell(s["i"], s["o"], rngs=_rngs()),
    "layer_norm": lambda s: nnx.LayerNorm(s["o"], rngs=_rngs()),
    "class_token": lambda s: _Unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _Unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _Unknown("table", (s["a"], s["b"], s["c"])),
    "stacked_dense": _stacked,
}
_ABSENT: Final = {
    "grouped_conv_transpose2d": "Flax has no grouped transposed convolution",
    "bilinear": "Flax has no bilinear layer",
    "hf_conv1d": "a layer of PyTorch models only",
}
