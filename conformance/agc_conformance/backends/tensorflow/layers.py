"""Layers of Keras, by the suite's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import keras
import tensorflow as tf

from agc import AGC, Plan
from agc_conformance.backend import Layer, Unsupported
from agc_conformance.backends.tensorflow.device import Device
from agc_tensorflow.units import plan

__all__ = ["Layers"]

Sizes = dict[str, int]


class Layers(Device):
    """Plans of single layers."""

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the Keras layer and return its plan."""
        build = _LAYERS.get(layer.kind)
        if build is None:
            raise Unsupported(_ABSENT.get(layer.kind, f"Keras has no layer {layer.kind!r}"))
        with tf.device(self._place):
            return plan(build(dict(layer.sizes)), rule)


def _built(layer: Any, *shape: int) -> Any:
    layer.build((None, *shape))
    return layer


def _unknown(name: str, shape: tuple[int, ...]) -> Any:
    """Return a layer of a type that the table does not know, with one variable."""
    layer = keras.layers.Layer()
    layer.add_weight(shape=shape, name=name)
    layer.built = True
    return layer


def _conv(rank: int) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in "thw"[3 - rank :]) if rank > 1 else (s["w"],)
        make = getattr(keras.layers, f"Conv{rank}D")
        return _built(make(s["o"], kernel, groups=s.get("g", 1)), *kernel, s["i"])

    return build


def _conv_transpose(rank: int) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        kernel = tuple(s[axis] for axis in "hw") if rank > 1 else (s["w"],)
        make = getattr(keras.layers, f"Conv{rank}DTranspose")
        return _built(make(s["o"], kernel), *kernel, s["i"])

    return build


def _depthwise(s: Sizes) -> Any:
    layer = keras.layers.DepthwiseConv2D((s["h"], s["w"]), depth_multiplier=s["m"])
    return _built(layer, s["h"], s["w"], s["c"])


def _attention(s: Sizes) -> Any:
    layer = keras.layers.MultiHeadAttention(s["h"], s["d"], output_shape=s["o"])
    layer.build((None, 2, s["i"]), (None, 2, s["i"]))
    return layer


def _recurrent(name: str) -> Callable[[Sizes], Any]:
    def build(s: Sizes) -> Any:
        # Without bias: Keras stacks the two bias vectors of a GRU in one array, of two units.
        return _built(getattr(keras.layers, name)(s["o"], use_bias=False), 2, s["i"])

    return build


_LAYERS: Final[dict[str, Callable[[Sizes], Any]]] = {
    "dense": lambda s: _built(keras.layers.Dense(s["o"]), s["i"]),
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "conv3d": _conv(3),
    "grouped_conv2d": _conv(2),
    "depthwise_conv2d": _depthwise,
    "conv_transpose1d": _conv_transpose(1),
    "conv_transpose2d": _conv_transpose(2),
    "embedding": lambda s: _built(keras.layers.Embedding(s["v"], s["d"])),
    "attention": _attention,
    "einsum": lambda s: _built(
        keras.layers.EinsumDense("abi,ihd->abhd", (None, s["h"], s["d"]), bias_axes="hd"), 2, s["i"]
    ),
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "rnn": _recurrent("SimpleRNN"),
    "layer_norm": lambda s: _built(keras.layers.LayerNormalization(), s["o"]),
    "class_token": lambda s: _unknown("token", (1, 1, s["d"])),
    "temperature": lambda s: _unknown("temperature", (s["h"], 1, 1)),
    "unknown": lambda s: _unknown("table", (s["a"], s["b"], s["c"])),
}
_ABSENT: Final = {
    "grouped_conv_transpose2d": "Keras has no grouped transposed convolution",
    "bilinear": "Keras has no bilinear layer",
    "hf_conv1d": "a layer of PyTorch models only",
    "stacked_dense": "Keras stacks no layers in one array",
}
