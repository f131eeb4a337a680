"""Every step of an optimizer behind AGC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from agc.config import AGC
from agc_conformance.backend import Optimizer
from agc_conformance.data import decode_numbers
from agc_conformance.generate.build import expectation, vector
from agc_conformance.generate.optimizer import MOMENTUM, NFNET, optimizer_step, weights_to_json
from agc_conformance.generate.parameters import (
    Data,
    VectorParameter,
    generated,
    inline,
    small_model,
)

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Every step of an optimizer"


def _trajectory(
    name: str,
    clause: int,
    flags: Sequence[str],
    comment: str,
    seed: int,
    optimizer: Mapping[str, Any],
    *,
    rule: Mapping[str, Any] | None = None,
    steps: int = 5,
    head_at_zero: bool = False,
) -> Data:
    """Return a vector that expects the weights after every step.

    Raises
    ------
    AssertionError
        If, for all seeds tried, rounding may decide which units are clipped.
    """
    agc_rule, parameters = AGC.from_dict(rule or {}), small_model(seed)
    if head_at_zero:
        parameters = [
            replace(p, weight=inline(np.zeros(p.shape))) if p.name == "head.weight" else p
            for p in parameters
        ]
    for attempt in range(400):
        gradients = _gradients(parameters, seed + attempt // 8, -8 - attempt % 8, steps)
        weights, share_clipped, distance = _follow(
            parameters, gradients, agc_rule, Optimizer(**optimizer)
        )
        if agc_rule.clipping is None or (0.3 <= share_clipped <= 0.8 and distance > 1e-3):
            break
    else:
        raise AssertionError(f"{name}: no gradients that clip some units, all far from the limit")
    return vector(
        name,
        clause,
        "trajectory",
        flags,
        comment,
        dtypes=["float32"],
        full_dtypes=["float64"],
        rule=dict(rule or {}),
        optimizer=dict(optimizer),
        parameters=[replace(p, gradient=None).to_json() for p in parameters],
        gradients=gradients,
        expect={"weights": weights},
    )


def _gradients(
    parameters: Sequence[VectorParameter], seed: int, exponent: int, steps: int
) -> list[dict[str, Data]]:
    """Return the raw gradients of every step."""
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
    parameters: Sequence[VectorParameter],
    gradients: Sequence[Mapping[str, Data]],
    rule: AGC,
    optimizer: Optimizer,
) -> tuple[list[Data], float, float]:
    """Return weights after every step, the share of clipped units, the distance to the limit."""
    weights = {p.name: p.weight_array for p in parameters}
    momenta = {name: np.zeros_like(value) for name, value in weights.items()}
    expected: list[Data] = []
    actions: list[str] = []
    distance = np.inf
    for step, raw in enumerate(gradients):
        present = [
            replace(p, weight=inline(weights[p.name]), gradient=raw[p.name]) for p in parameters
        ]
        units_of = expectation(present, rule, step=step)["gradients"]
        clipped = {}
        for p in present:
            units, gradient = units_of[p.name], p.gradient_array
            if units != "untouched":
                actions += units["action"]
                ratio = decode_numbers(units["gradient_norm"]) / decode_numbers(units["limit"])
                distance = min(distance, float(np.abs(ratio - 1).min()))
                scale = decode_numbers(units["scale"])
                gradient = (gradient.reshape(len(scale), -1) * scale[:, None]).reshape(p.shape)
            clipped[p.name] = gradient
        optimizer_step(optimizer, weights, momenta, clipped)
        expected.append(weights_to_json(weights))
    return expected, actions.count("clip") / max(len(actions), 1), distance


VECTORS: Final = [
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
        MOMENTUM,
    ),
    _trajectory(
        "L2-sgd-nesterov",
        7,
        ["ClipAfterMomentum", "StaleWeights"],
        "Nesterov momentum.",
        220,
        {**MOMENTUM, "nesterov": True},
    ),
    _trajectory(
        "L2-weight-decay-coupled",
        7,
        ["DecayBeforeClip", "DecayBeforeNorm"],
        "Coupled decay is added to the clipped gradient.",
        230,
        {**MOMENTUM, "weight_decay": 0.125},
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
        NFNET,
    ),
    _trajectory(
        "L2-schedule",
        10,
        ["IgnoresSchedule", "StaleWeights"],
        "The threshold of step k is the schedule at k, counted from 0.",
        260,
        {"lr": 0.25, "momentum": 0.5},
        rule={"clipping": {"@schedule": [[0, 0.05], [2, 0.01], [4, 0.0025]]}},
        steps=6,
    ),
    _trajectory(
        "L2-exclude-head",
        6,
        ["ExcludeIgnored", "ExcludeHeadBias", "ThroughOptimizer"],
        "The head is optimized but not clipped.",
        270,
        MOMENTUM,
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
        head_at_zero=True,
    ),
    _trajectory(
        "L2-clipping-none",
        10,
        ["IgnoresClipping"],
        "With clipping=None the optimizer is what it was.",
        290,
        MOMENTUM,
        rule={"clipping": None},
        steps=3,
    ),
]
