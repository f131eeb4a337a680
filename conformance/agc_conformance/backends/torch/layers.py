"""Layers of PyTorch, by the suite's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from agc import AGC, Plan
from agc_conformance.backend import Layer, Unsupported
from agc_conformance.backends.torch.device import Device
from agc_torch.units import plan

__all__ = ["Layers"]

Sizes = dict[str, int]


class Layers(Device):
    """Plans of single layers."""

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the PyTorch layer and return its plan."""
        if layer.kind not in _LAYERS:
            raise Unsupported(_ABSENT.get(layer.kind, f"PyTorch has no layer {layer.kind!r}"))
        return plan(_LAYERS[layer.kind](dict(layer.sizes)), rule)


def _conv(make: Callable[..., nn.Module], axes: str) -> Callable[[Sizes], nn.Module]:
    def build(s: Sizes) -> nn.Module:
        return make(s["i"], s["o"], tuple(s[axis] for axis in axes), groups=s.get("g", 1))

    return build


def _hf_conv1d(s: Sizes) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        raise Unsupported("transformers, which has this layer, is not installed") from None
    return Conv1D(s["o"], s["i"])


def _unknown(name: str, shape: tuple[int, ...]) -> nn.Module:
    """Return a layer of a type that the table does not know, with one parameter."""
    layer = nn.Module()
    layer.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return layer


_LAYERS: Final[dict[str, Callable[[Sizes], nn.Module]]] = {
    "dense": lambda s: nn.Linear(s["i"], s["o"]),
    "conv1d": _conv(nn.Conv1d, "w"),
    "conv2d": _conv(nn.Conv2d, "hw"),
    "conv3d": _conv(nn.Conv3d, "thw"),
    "grouped_conv2d": _conv(nn.Conv2d, "hw"),
    "depthwise_conv2d": lambda s: nn.Conv2d(
        s["c"], s["c"] * s["m"], (s["h"], s["w"]), groups=s["c"]
    ),
    "conv_transpose1d": _conv(nn.ConvTranspose1d, "w"),
    "conv_transpose2d": _conv(nn.ConvTranspose2d, "hw"),
    "grouped_conv_transpose2d": _conv(nn.ConvTranspose2d, "hw"),
    "embedding": lambda s: nn.Embedding(s["v"], s["d"]),
    "attention": lambda s: nn.MultiheadAttention(s["i"], s["h"]),
    "lstm": lambda s: nn.LSTM(s["i"], s["o"]),
    "gru": lambda s: nn.GRU(s["i"], s["o"]),
    "rnn": lambda s: nn.RNN(s["i"], s["o"]),
    "bilinear": lambda s: nn.Bilinear(s["i"], s["j"], s["o"]),
    "hf_conv1d": _hf_conv1d,
    "layer_norm": lambda s: nn.LayerNorm(s["o"]),
    "class_token": lambda s: _unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _unknown("table", (s["a"], s["b"], s["c"])),
}
_ABSENT: Final = {
    "einsum": "PyTorch has no einsum layer",
    "stacked_dense": "PyTorch stacks no layers in one module; declare the units of stacked arrays",
}
