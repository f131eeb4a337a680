"""Levels 2 and 3: every step of an optimizer, and the settings of real training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from agc.config import AGC
from agc_conformance.backend import Optimizer
from agc_conformance.data import decode_numbers, decode_values, encode_numbers
from agc_conformance.generator.build import (
    P,
    clip_vector,
    expectation,
    generated,
    inline,
    mixed,
    vector,
)

__all__ = ["scenario_vectors", "trajectory_vectors"]

_OI: Final = {
    "torch": ("o i", "o i -> o"),
    "flax": ("i o", "i o -> o"),
    "keras": ("i o", "i o -> o"),
}
_OIHW: Final = {
    "torch": ("o i h w", "o i ... -> o"),
    "flax": ("h w i o", "... i o -> o"),
    "keras": ("h w i o", "... i o -> o"),
}
_TRANSPOSED: Final = {
    "torch": ("i o h w", "i o ... -> o"),
    "flax": ("h w i o", "... i o -> o"),
    "keras": ("h w o i", "... o i -> o"),
}
_B: Final = {"any": ("o", "... ->")}
_WIDE: Final[dict[str, Any]] = {"dtypes": ["float32"], "full": ["float64"]}


def _model(seed: int) -> list[P]:
    return [
        mixed("conv.weight", {"o": 4, "i": 2, "h": 2, "w": 2}, 1, _OIHW, seed),
        mixed("conv.bias", {"o": 4}, 0, _B, seed + 1),
        mixed("head.weight", {"o": 3, "i": 4}, 1, _OI, seed + 2),
        mixed("head.bias", {"o": 3}, 0, _B, seed + 3),
    ]


def _gradients(
    parameters: Sequence[P], seed: int, exponent: int, steps: int
) -> list[dict[str, Any]]:
    """Raw gradients of every step."""
    return [
        {
            p.name: generated(
                p.shape,
                7919 * seed + 97 * step + number,
                exponent,
                [3 if axis < p.units else 2 for axis in range(len(p.shape))],
            )
            for number, p in enumerate(parameters)
        }
        for step in range(steps)
    ]


def _follow(
    parameters: Sequence[P],
    gradients: Sequence[Mapping[str, Any]],
    rule: AGC,
    settings: Optimizer,
) -> tuple[list[dict[str, Any]], float, float]:
    """Weights after every step, the share of clipped units, and the smallest distance from a limit."""
    weights = {p.name: decode_values(p.weight, p.shape) for p in parameters}
    momenta = {name: np.zeros_like(value) for name, value in weights.items()}
    expected: list[dict[str, Any]] = []
    actions: list[str] = []
    distance = np.inf
    for step, raw in enumerate(gradients):
        now = [
            P(p.name, p.axes, p.units, inline(weights[p.name]), raw[p.name], p.layouts)
            for p in parameters
        ]
        found = expectation(now, rule, step=step)["gradients"]
        weights = dict(weights)
        for p in parameters:
            w, g = weights[p.name], decode_values(raw[p.name], p.shape)
            units = found[p.name]
            if units != "untouched":
                actions += units["action"]
                ratio = decode_numbers(units["gradient_norm"]) / decode_numbers(units["limit"])
                distance = min(distance, float(np.abs(ratio - 1).min()))
                scale = decode_numbers(units["scale"])
                g = (g.reshape(len(scale), -1) * scale[:, None]).reshape(g.shape)
            decay = settings.weight_decay * w
            u = g if settings.decoupled else g + decay
            momenta[p.name] = m = settings.momentum * momenta[p.name] + u
            move = u + settings.momentum * m if settings.nesterov else m
            weights[p.name] = w - settings.lr * (move + decay if settings.decoupled else move)
        expected.append({name: {"values": encode_numbers(w)} for name, w in weights.items()})
    return expected, actions.count("clip") / max(len(actions), 1), distance


def _trajectory(
    id: str,  # noqa: A002
    clause: int,
    flags: Sequence[str],
    comment: str,
    seed: int,
    optimizer: Mapping[str, Any],
    *,
    rule: Mapping[str, Any] | None = None,
    steps: int = 5,
    zero: bool = False,
) -> dict[str, Any]:
    """Follow the optimizer in float64 for some steps, clipping the gradient of each."""
    agc_rule = AGC.from_dict(rule or {})
    parameters = _model(seed)
    if zero:
        parameters = [
            P(p.name, p.axes, p.units, inline(np.zeros(p.shape)), p.gradient, p.layouts)
            if p.name == "head.weight"
            else p
            for p in parameters
        ]
    for attempt in range(400):
        gradients = _gradients(parameters, seed + attempt // 8, -8 - attempt % 8, steps)
        weights, share, distance = _follow(parameters, gradients, agc_rule, Optimizer(**optimizer))
        # Both kinds of units, none so near its limit that rounding decides.
        if agc_rule.clipping is None or (0.3 <= share <= 0.8 and distance > 1e-3):
            break
    else:
        raise AssertionError(f"{id}: no gradients found")
    return vector(
        id,
        clause,
        "trajectory",
        flags,
        comment,
        dtypes=["float32"],
        full_dtypes=["float64"],
        rule=dict(rule or {}),
        optimizer=dict(optimizer),
        parameters=[{**p.json(), "gradient": None} for p in parameters],
        gradients=gradients,
        expect={"weights": weights},
    )


def trajectory_vectors() -> list[dict[str, Any]]:
    """Return the vectors of level 2. Rates are powers of two, exact in float32."""
    momentum = {"lr": 0.25, "momentum": 0.875}
    schedule = {"@schedule": [[0, 0.05], [2, 0.01], [4, 0.0025]]}
    return [
        _trajectory(
            "L2-sgd",
            7,
            ["StaleWeights", "ThroughOptimizer"],
            "Plain SGD: the limit follows the weights of every step.",
            200,
            {"lr": 0.5},
        ),
        _trajectory(
            "L2-sgd-momentum",
            7,
            ["ClipAfterMomentum", "StaleWeights", "ThroughOptimizer"],
            "The gradient is clipped, not the momentum buffer.",
            210,
            momentum,
        ),
        _trajectory(
            "L2-sgd-nesterov",
            7,
            ["ClipAfterMomentum", "StaleWeights"],
            "Nesterov momentum.",
            220,
            {**momentum, "nesterov": True},
        ),
        _trajectory(
            "L2-weight-decay-coupled",
            7,
            ["DecayBeforeClip", "DecayBeforeNorm"],
            "Coupled decay is added to the clipped gradient.",
            230,
            {**momentum, "weight_decay": 0.125},
        ),
        _trajectory(
            "L2-weight-decay-decoupled",
            7,
            ["DecayBeforeClip", "DecayBeforeNorm"],
            "Decoupled decay: norms are taken of the weights before this step's decay.",
            240,
            {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "decoupled": True},
        ),
        _trajectory(
            "L2-weight-decay-nesterov-coupled",
            7,
            ["DecayBeforeClip", "DecayBeforeNorm"],
            "Nesterov momentum and coupled decay, as in the NFNet recipe.",
            250,
            {**momentum, "nesterov": True, "weight_decay": 0.0625},
        ),
        _trajectory(
            "L2-schedule",
            10,
            ["IgnoresSchedule", "StaleWeights"],
            "The threshold of step k is the schedule at k, counted from 0.",
            260,
            {"lr": 0.25, "momentum": 0.5},
            rule={"clipping": schedule},
            steps=6,
        ),
        _trajectory(
            "L2-exclude-head",
            6,
            ["ExcludeIgnored", "ExcludeHeadBias", "ThroughOptimizer"],
            "The head is optimized but not clipped.",
            270,
            momentum,
            rule={"exclude": ["@head"], "head": "head"},
        ),
        _trajectory(
            "L2-zero-weights",
            1,
            ["MissingEps", "StaleWeights"],
            "A layer of zero weights leaves zero: its limit is clipping * eps, then grows with it.",
            280,
            {"lr": 2.0},
            rule={"clipping": 0.5, "eps": 0.0078125},
            zero=True,
        ),
        _trajectory(
            "L2-clipping-none",
            10,
            ["IgnoresClipping"],
            "With clipping=None the optimizer is what it was.",
            290,
            momentum,
            rule={"clipping": None},
            steps=3,
        ),
    ]


def _parts(p: P, seed: int, count: int) -> list[Any]:
    """Micro-batch gradients whose mean is the gradient of ``p``, exactly."""
    assert p.gradient is not None
    total = decode_values(p.gradient, p.shape)
    noise = [
        decode_values(generated(p.shape, seed + k, -10, [1] * len(p.shape)), p.shape)
        for k in range(count - 1)
    ]
    return [*(total + n for n in noise), total - sum(noise)]


def scenario_vectors() -> list[dict[str, Any]]:
    """Return the vectors of level 3."""
    model = _model(300)
    wide = [
        mixed("conv.weight", {"o": 4, "i": 2, "h": 2, "w": 2}, 1, _OIHW, 310),
        mixed("up.weight", {"o": 6, "i": 4, "h": 2, "w": 2}, 1, _TRANSPOSED, 311),
        mixed("dense.weight", {"o": 6, "i": 8}, 1, _OI, 312),
        mixed("dense.bias", {"o": 6}, 0, _B, 313),
        mixed("odd.weight", {"o": 3, "i": 5}, 1, _OI, 314),
        mixed("embedding.weight", {"v": 8, "d": 3}, 1, {"any": ("v d", "v d -> v")}, 315),
    ]
    micro_parts = {p.name: _parts(p, 320 + 10 * number, 4) for number, p in enumerate(model)}
    micro = [{name: inline(parts[k]) for name, parts in micro_parts.items()} for k in range(4)]
    poisoned = _model(330)
    conv = poisoned[0]
    data = {"values": [*inline(decode_values(conv.gradient or {}, conv.shape))["values"]]}
    data["values"][9] = "NaN"
    poisoned[0] = P(conv.name, conv.axes, conv.units, conv.weight, data, conv.layouts)
    huge = [
        P(
            p.name,
            p.axes,
            p.units,
            p.weight,
            inline(decode_values(p.gradient or {}, p.shape) * 2.0**16),
            p.layouts,
        )
        for p in model
    ]
    rule = {"exclude": ["head.*"]}
    return [
        clip_vector(
            "L3-accumulate",
            7,
            ["ClipEachMicroBatch"],
            "Four micro-batches: their mean is clipped, once.",
            model,
            rule=rule,
            scenario="accumulate",
            settings={"micro": micro},
            **_WIDE,
        ),
        clip_vector(
            "L3-unscale",
            7,
            ["ClipBeforeUnscale"],
            "Gradients times a loss scale of 2**16 are unscaled before they are clipped.",
            huge,
            scenario="unscale",
            settings={"scale": 65536},
            expect_from=model,
            dtypes=["float32"],
            full=[],
        ),
        clip_vector(
            "L3-compiled",
            7,
            ["Compiled"],
            "Inside a compiled step.",
            [*model, *(p for p in wide if p.name != "conv.weight")],
            rule=rule,
            scenario="compiled",
            settings={},
            dtypes=["float32", "bfloat16"],
            full=["float64", "float16"],
        ),
        clip_vector(
            "L3-compiled-nan",
            4,
            ["Compiled", "NaNPasses"],
            "Inside a compiled step, with a poisoned unit.",
            poisoned,
            scenario="compiled",
            settings={},
            **_WIDE,
        ),
        clip_vector(
            "L3-sharded",
            8,
            ["PerShardNorm"],
            "Every parameter whose first axis two divides is split; the answer is the unsharded one.",
            wide,
            scenario="sharded",
            settings={"shards": 2},
            **_WIDE,
        ),
        clip_vector(
            "L3-sharded-nan",
            8,
            ["PerShardNorm", "NaNPasses"],
            "A NaN on one shard poisons the whole unit, on all of them.",
            poisoned,
            scenario="sharded",
            settings={"shards": 2},
            dtypes=["float32"],
            full=[],
        ),
        clip_vector(
            "L3-optimizer",
            7,
            ["ThroughOptimizer"],
            "Through the wrapped optimizer's own step.",
            model,
            rule=rule,
            scenario="optimizer",
            settings={},
            **_WIDE,
        ),
        clip_vector(
            "L3-idle-step",
            5,
            ["IdleStep"],
            "A step in which no parameter has a gradient does nothing; the next one clips.",
            model,
            rule=rule,
            scenario="idle",
            settings={},
            **_WIDE,
        ),
        clip_vector(
            "L3-optimizer-per-parameter",
            10,
            ["ThroughOptimizer", "IgnoresClipping"],
            "Through the optimizer, with thresholds per parameter.",
            model,
            rule={"clipping": {"*.bias": None, "conv.*": 0.002, "*": 0.01}},
            scenario="optimizer",
            settings={},
            **_WIDE,
        ),
    ]
