"""Vectors that follow SAM, AGC and an optimizer step by step, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agc.config import AGC, SAM
from agc.reference import adaptive_clip, sharpness_aware_gradients
from agc_conformance.backend import Optimizer
from agc_conformance.generate.build import plan_of, vector
from agc_conformance.generate.optimizer import optimizer_step, weights_to_json
from agc_conformance.generate.parameters import Data
from agc_conformance.generate.sam_case import SamCase, sam_case
from agc_conformance.sharpness.problems import as_batch, gradient_function, sam_rule

__all__ = ["sam_trajectory_vector"]


def sam_trajectory_vector(
    name: str,
    clause: int,
    flags: Sequence[str],
    comment: str,
    seed: int,
    rule: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    *,
    clipping: Mapping[str, Any] | None = None,
    steps: int = 4,
    restart: int | None = None,
    poisoned: int | None = None,
) -> Data:
    """Return a vector that expects the weights after every step.

    Parameters
    ----------
    name, flags, comment
        See :func:`~agc_conformance.generate.build.vector`.
    clause : int
        Clause of SAM.
    seed : int
        Seed of the weights and batches.
    rule, clipping : mapping
        Rules of SAM and, optionally, AGC.
    optimizer : mapping
        Arguments of :class:`~agc_conformance.backend.Optimizer`.
    steps : int
        Number of batches.
    restart : int, optional
        Step before which training is saved and restored.
    poisoned : int, optional
        Step whose batch has a NaN.

    Raises
    ------
    AssertionError
        If, for all seeds tried, rounding may decide which units AGC clips.
    """
    agc = None if clipping is None else AGC.from_dict(clipping)
    for attempt in range(40):
        batches = [
            sam_case(seed + 50 * attempt + step, 4, loss_exponent=-3, by_framework=True)
            for step in range(steps)
        ]
        if poisoned is not None:
            batches[poisoned] = batches[poisoned].poisoned(0, math.nan)
        weights, share_clipped, distance = _follow(
            batches, sam_rule(rule), agc, Optimizer(**optimizer)
        )
        if agc is None or (0.2 <= share_clipped <= 0.8 and distance > 1e-3):
            break
    else:
        raise AssertionError(f"{name}: no batches that clip some units, all far from the limit")
    return vector(
        name,
        f"SAM-{clause}",
        "sharpness-trajectory",
        flags,
        comment,
        dtypes=["float32"],
        full_dtypes=["float64"],
        rule=dict(rule),
        clipping=None if clipping is None else dict(clipping),
        optimizer=dict(optimizer),
        restart=restart,
        parameters=[p.to_json() for p in batches[0].parameters],
        batches=[case.batch_to_json() for case in batches],
        expect={"weights": weights},
    )


def _follow(
    batches: Sequence[SamCase], rule: SAM, clipping: AGC | None, optimizer: Optimizer
) -> tuple[list[Data], float, float]:
    """Return weights after every step, the share of clipped units, the distance to the limit."""
    parameters, weights = batches[0].parameters, batches[0].weights
    momenta = {name: np.zeros_like(value) for name, value in weights.items()}
    expected: list[Data] = []
    clipped, units, distance = 0, 0, math.inf
    for step, case in enumerate(batches):
        answer = sharpness_aware_gradients(
            gradient_function(list(weights), list(case.curvatures)),
            weights,
            as_batch(case.examples),
            rule,
            step=step,
        )
        if not answer.skipped:
            gradients: Mapping[str, Any] = answer.gradients
            if clipping is not None:
                plan = plan_of(parameters, clipping)
                result = adaptive_clip(weights, answer.gradients, plan, clipping, step=step)
                gradients = result.gradients
                clipped += result.total.clipped
                units += result.total.units
                for unit in result.clipped.values():
                    distances = np.abs(unit.gradient_norm / unit.limit - 1)
                    distance = min(distance, float(distances.min()))
            optimizer_step(optimizer, weights, momenta, gradients)
        expected.append(weights_to_json(weights))
    return expected, clipped / max(units, 1), distance
