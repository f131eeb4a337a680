"""AGC in the settings of real training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from agc_conformance.data import decode_values
from agc_conformance.generate.build import FLOAT32_AND_FLOAT64, clip_vector
from agc_conformance.generate.parameters import (
    CONV2D,
    DENSE,
    Data,
    VectorParameter,
    conv_transpose,
    generated,
    inline,
    mixed,
    mixed_bias,
    mixed_dense,
    overwritten,
    small_model,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Settings of real training"

_MODEL: Final = small_model(300)
_WITHOUT_HEAD: Final = {"exclude": ["head.*"]}
# Parameters whose first axis is even, and others, in every layout.
_TO_SHARD: Final = [
    mixed("conv.weight", {"o": 4, "i": 2, "h": 2, "w": 2}, 1, CONV2D, 310),
    mixed("up.weight", {"o": 6, "i": 4, "h": 2, "w": 2}, 1, conv_transpose("h w"), 311),
    mixed("dense.weight", {"o": 6, "i": 8}, 1, DENSE, 312),
    mixed_bias(313, "dense.bias", 6),
    mixed_dense(314, "odd.weight", 3, 5),
    mixed("embedding.weight", {"v": 8, "d": 3}, 1, {"any": ("v d", "v d -> v")}, 315),
]


def _poisoned_model() -> list[VectorParameter]:
    """Return a model with a NaN in a gradient of its convolution."""
    conv, *others = small_model(330)
    gradient = overwritten(inline(conv.gradient_array), {9: np.nan})
    return [replace(conv, gradient=gradient), *others]


def _micro_batches(parameters: Sequence[VectorParameter], count: int) -> list[Data]:
    """Return gradients of micro-batches whose mean is exactly the gradient of each parameter."""
    micro_batches: list[Data] = [{} for _ in range(count)]
    for number, p in enumerate(parameters):
        ones = [1] * len(p.shape)
        noise = [
            decode_values(generated(p.shape, 320 + 10 * number + k, -10, ones), p.shape)
            for k in range(count - 1)
        ]
        for micro_batch, away in zip(micro_batches, [*noise, -sum(noise)], strict=True):
            micro_batch[p.name] = inline(p.gradient_array + away)
    return micro_batches


_POISONED: Final = _poisoned_model()

VECTORS: Final = [
    clip_vector(
        "L3-accumulate",
        7,
        ["ClipEachMicroBatch"],
        "Four micro-batches: their mean is clipped, once.",
        _MODEL,
        rule=_WITHOUT_HEAD,
        scenario="accumulate",
        settings={"micro": _micro_batches(_MODEL, 4)},
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L3-unscale",
        7,
        ["ClipBeforeUnscale"],
        "Gradients times a loss scale of 2**16 are unscaled before they are clipped.",
        [replace(p, gradient=inline(p.gradient_array * 2.0**16)) for p in _MODEL],
        scenario="unscale",
        settings={"scale": 65536},
        expect_from=_MODEL,
        dtypes=["float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L3-compiled",
        7,
        ["Compiled"],
        "Inside a compiled step.",
        [*_MODEL, *(p for p in _TO_SHARD if p.name != "conv.weight")],
        rule=_WITHOUT_HEAD,
        scenario="compiled",
        dtypes=["float32", "bfloat16"],
        full_dtypes=["float64", "float16"],
    ),
    clip_vector(
        "L3-compiled-nan",
        4,
        ["Compiled", "NaNPasses"],
        "Inside a compiled step, with a poisoned unit.",
        _POISONED,
        scenario="compiled",
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L3-sharded",
        8,
        ["PerShardNorm"],
        "Every parameter whose first axis two divides is split; the answer is the unsharded one.",
        _TO_SHARD,
        scenario="sharded",
        settings={"shards": 2},
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L3-sharded-nan",
        8,
        ["PerShardNorm", "NaNPasses"],
        "A NaN on one shard poisons the whole unit, on all of them.",
        _POISONED,
        scenario="sharded",
        settings={"shards": 2},
        dtypes=["float32"],
        full_dtypes=[],
    ),
    clip_vector(
        "L3-optimizer",
        7,
        ["ThroughOptimizer"],
        "Through the wrapped optimizer's own step.",
        _MODEL,
        rule=_WITHOUT_HEAD,
        scenario="optimizer",
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L3-idle-step",
        5,
        ["IdleStep"],
        "A step in which no parameter has a gradient does nothing; the next one clips.",
        _MODEL,
        rule=_WITHOUT_HEAD,
        scenario="idle",
        **FLOAT32_AND_FLOAT64,
    ),
    clip_vector(
        "L3-optimizer-per-parameter",
        10,
        ["ThroughOptimizer", "IgnoresClipping"],
        "Through the optimizer, with thresholds per parameter.",
        _MODEL,
        rule={"clipping": {"*.bias": None, "conv.*": 0.002, "*": 0.01}},
        scenario="optimizer",
        **FLOAT32_AND_FLOAT64,
    ),
]
