"""SAM in the settings of real training."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from agc_conformance.generate.optimizer import MOMENTUM, NFNET
from agc_conformance.generate.sam_build import sharpen_vector
from agc_conformance.generate.sam_case import sam_case
from agc_conformance.generate.sam_trajectory import sam_trajectory_vector

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: settings of real training"

_SIX: Final = sam_case(11, by_framework=True)
_TEN: Final = sam_case(12, 10, by_framework=True)
_NAN: Final = _SIX.poisoned(2, np.nan)
_scenario_vector = partial(sharpen_vector, full_dtypes=[])

VECTORS: Final = [
    _scenario_vector(
        "L3-sam-compiled",
        3,
        ["SamCompiled"],
        "Inside a compiled step.",
        _SIX,
        {"rho": 1.0},
        scenario="compiled",
    ),
    _scenario_vector(
        "L3-sam-compiled-nfnets",
        7,
        ["SamCompiled"],
        "Inside a compiled step, on a fraction of the batch, the head left out.",
        _TEN,
        {"profile": "nfnets", "rho": 1.0, "exclude": ["head.*"]},
        scenario="compiled",
    ),
    _scenario_vector(
        "L3-sam-compiled-microbatches",
        8,
        ["SamCompiled", "MicrobatchUnweighted"],
        "Inside a compiled step, with uneven micro-batches.",
        _TEN,
        {"rho": 1.0, "microbatches": 3, "adaptive": True},
        scenario="compiled",
    ),
    _scenario_vector(
        "L3-sam-compiled-nan",
        5,
        ["SamCompiled", "NonFiniteAscent"],
        "Inside a compiled step, with a poisoned ascent gradient.",
        _NAN,
        {"rho": 1.0},
        scenario="compiled",
    ),
    _scenario_vector(
        "L3-sam-scaled",
        6,
        ["SamLossScale"],
        "Under loss scaling: e does not change, and the optimizer sees gradients without the scale.",
        _SIX,
        {"rho": 1.0},
        scenario="scaled",
        settings={"scale": 1024},
    ),
    _scenario_vector(
        "L3-sam-scaled-nan",
        5,
        ["SamLossScale", "NonFiniteAscent"],
        "Under loss scaling, a poisoned step is skipped.",
        _NAN,
        {"rho": 1.0},
        scenario="scaled",
        settings={"scale": 1024},
    ),
    _scenario_vector(
        "L3-sam-replicas-local",
        9,
        ["ScopeIgnored"],
        "Every replica has its own e; the descent gradient is the mean.",
        _TEN,
        {"rho": 1.0},
        scenario="replicas",
        settings={"replicas": 2},
    ),
    _scenario_vector(
        "L3-sam-replicas-global",
        9,
        ["ScopeIgnored"],
        "The ascent gradient is the mean over replicas: as on one.",
        _TEN,
        {"rho": 1.0, "scope": "global"},
        scenario="replicas",
        settings={"replicas": 2},
    ),
    _scenario_vector(
        "L3-sam-replicas-fraction",
        9,
        ["ScopeIgnored", "SubsetIgnored"],
        "The first part of every replica's batch.",
        _TEN,
        {"rho": 1.0, "fraction": 0.4},
        scenario="replicas",
        settings={"replicas": 2},
    ),
    _scenario_vector(
        "L3-sam-stale",
        4,
        ["GradientsLeft"],
        "Gradients that an earlier step left are in neither pass, whoever forgot to clear them.",
        _SIX,
        {"rho": 1.0},
        scenario="stale",
    ),
    _scenario_vector(
        "L3-sam-fixed",
        4,
        ["FixedPerturbed"],
        "What is frozen, or not the optimizer's, is in the loss and is not perturbed.",
        _SIX,
        {"rho": 1.0},
        scenario="fixed",
        settings={"frozen": ["head.weight"], "absent": ["head.bias"]},
    ),
    _scenario_vector(
        "L3-sam-fixed-fraction",
        4,
        ["FixedPerturbed"],
        "The same, on a fraction of the batch.",
        _TEN,
        {"rho": 1.0, "fraction": 0.4},
        scenario="fixed",
        settings={"frozen": ["head.bias"], "absent": ["head.weight"]},
    ),
    _scenario_vector(
        "L3-sam-stateful",
        12,
        ["StatePerPass"],
        "What the forward pass keeps is the same in both passes, and is updated once a step.",
        _SIX,
        {"rho": 1.0},
        scenario="stateful",
    ),
    _scenario_vector(
        "L3-sam-stateful-fraction",
        12,
        ["StatePerPass"],
        "The same, on a fraction of the batch: the update is the second pass's.",
        _TEN,
        {"rho": 1.0, "fraction": 0.4},
        scenario="stateful",
    ),
    sam_trajectory_vector(
        "L3-sam-restart",
        13,
        ["RestartForgets"],
        "Saved and restored after 3 of 5 steps: momentum, schedule and period go on.",
        300,
        {"rho": {"@schedule": [[0, 0.25], [4, 1.25]]}, "every": 2},
        MOMENTUM,
        steps=5,
        restart=3,
    ),
    sam_trajectory_vector(
        "L3-sam-restart-agc",
        13,
        ["RestartForgets"],
        "The same with AGC behind SAM.",
        310,
        {"rho": 1.0},
        NFNET,
        clipping={"clipping": 0.25},
        restart=2,
    ),
]
