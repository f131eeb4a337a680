"""Rate, thresholds, radius and decay of every step."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np

from agc_conformance.core.functions import Core
from agc_conformance.core.recipes import number_tables
from agc_conformance.data import encode_numbers
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Schedules: float32 tables of every step"


def _schedule(name: str, flags: list[str], comment: str, toml: str, steps: list[int]) -> Data:
    core = Core()
    tables: dict[str, Any] = number_tables(core, core.recipe(toml))
    expect = {
        "values": {key: encode_numbers(table[steps]) for key, table in tables.items()},
        "sha256": {
            key: hashlib.sha256(np.asarray(table, "<f4").tobytes()).hexdigest()
            for key, table in tables.items()
        },
    }
    return vector(
        f"L5-schedule-{name}",
        "RECIPE-3",
        "schedule",
        flags,
        comment,
        toml=toml,
        steps=steps,
        expect=expect,
    )


VECTORS: Final = [
    _schedule(
        "all",
        ["RateStep", "WarmupRounded", "EmaWarmup"],
        "A warm-up of 7.5 steps, a threshold that changes, SAM every second step.",
        'base = "conformance"\n',
        [0, 1, 7, 8, 9, 39, 40, 49],
    ),
    _schedule(
        "patterns",
        ["EmaWarmup"],
        "Thresholds by pattern, a radius that changes, an average without warm-up.",
        'base = "conformance"\nema.warmup = false\nsam.rho = { "@schedule" = [[0, 0.05], [30, 0.1]] }\n'
        'agc.clipping = { "stem.*" = 0.02, "*" = { "@schedule" = [[0, 0.04], [9, 0.01]] } }\n',
        [8, 9, 29, 30],
    ),
    _schedule(
        "f0",
        ["RateStep", "WarmupRounded", "EmaWarmup"],
        "NFNet-F0's 112,602 steps, with the published warm-up of 1563.92 steps.",
        'base = "nfnet-f0"\n',
        [0, 1, 1563, 1564, 1565, 56_300, 112_600, 112_601],
    ),
]
