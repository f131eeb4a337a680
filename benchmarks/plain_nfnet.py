"""NFNet-F0's forward pass in plain JAX, formula by formula as in DeepMind's released program."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["forward"]

_GAMMA = 1.7015043497085571
_STAGES = ((256, 1, 1), (512, 2, 2), (1536, 6, 2), (1536, 3, 2))  # width, blocks, stride
_ALPHA = 0.2

Params = Mapping[str, jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x) * _GAMMA


def _conv(params: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    weight = params[f"{name}.weight"]
    mean = jnp.mean(weight, (0, 1, 2), keepdims=True)
    variance = jnp.var(weight, (0, 1, 2), keepdims=True)
    fan_in = weight[..., 0].size
    scale = lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4)) * params[f"{name}.gain"]
    out = lax.conv_general_dilated(
        x,
        weight * scale - mean * scale,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // weight.shape[2],
    )
    return out + params[f"{name}.bias"]


def _pool(x: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    total = lax.reduce_window(x, 0.0, lax.add, window, window, "SAME")
    return total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, window, window, "SAME")


def _block(params: Params, name: str, x: jax.Array, stride: int, beta: float) -> jax.Array:
    out = _gelu(x) * beta
    shortcut = x
    if f"{name}.shortcut.weight" in params:
        shortcut = _conv(params, f"{name}.shortcut", _pool(out) if stride > 1 else out)
    out = _conv(params, f"{name}.conv0", out)
    out = _conv(params, f"{name}.conv1", _gelu(out), stride)
    out = _conv(params, f"{name}.conv1b", _gelu(out))
    out = _conv(params, f"{name}.conv2", _gelu(out))
    gate = jnp.mean(out, (1, 2))
    for layer, function in (("fc0", jax.nn.relu), ("fc1", jax.nn.sigmoid)):
        dense = f"{name}.se.{layer}"
        gate = function(gate @ params[f"{dense}.weight"] + params[f"{dense}.bias"])
    out = 2 * gate[:, None, None] * out
    return out * params[f"{name}.skip_gain"] * _ALPHA + shortcut


def forward(params: Params, images: jax.Array) -> jax.Array:
    """Return the logits of images of shape (n, h, w, 3), in evaluation mode."""
    x = images
    for index, stride in enumerate((2, 1, 1, 2)):
        x = _conv(params, f"stem.conv{index}", _gelu(x) if index else x, stride)
    variance = 1.0
    for stage, (_, depth, first) in enumerate(_STAGES):
        for index in range(depth):
            stride = 1 if index else first
            x = _block(params, f"stages.{stage}.{index}", x, stride, variance**-0.5)
            variance = (variance if index else 1.0) + _ALPHA**2
    x = jnp.mean(_gelu(_conv(params, "final_conv", x)), (1, 2))
    return x @ params["head.weight"] + params["head.bias"]
