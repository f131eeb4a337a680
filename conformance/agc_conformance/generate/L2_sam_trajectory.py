"""Every step of SAM in front of AGC and an optimizer."""

from __future__ import annotations

from typing import Final

from agc_conformance.generate.optimizer import MOMENTUM, NFNET
from agc_conformance.generate.sam_trajectory import sam_trajectory_vector

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: every step in front of AGC"

VECTORS: Final = [
    sam_trajectory_vector(
        "L2-sam-sgd",
        3,
        ["NotRestored", "StaleGradient", "AscentSign"],
        "Plain SGD: the update starts from the restored weights.",
        100,
        {"rho": 1.0},
        {"lr": 0.5},
    ),
    sam_trajectory_vector(
        "L2-sam-momentum",
        3,
        ["NotRestored"],
        "The momentum buffer sees one gradient a step.",
        110,
        {"rho": 1.0},
        MOMENTUM,
    ),
    sam_trajectory_vector(
        "L2-sam-weight-decay",
        6,
        ["DecayInGradient"],
        "Coupled weight decay is in neither gradient, and of the weights at w.",
        120,
        {"rho": 1.0},
        {**MOMENTUM, "weight_decay": 0.125},
    ),
    sam_trajectory_vector(
        "L2-sam-weight-decay-decoupled",
        6,
        ["DecayInGradient"],
        "Decoupled weight decay.",
        130,
        {"rho": 1.0},
        {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "decoupled": True},
    ),
    sam_trajectory_vector(
        "L2-sam-agc",
        6,
        ["AgcOnAscent", "AgcAgainstPerturbedWeights"],
        "AGC clips the final gradient only, against the restored weights.",
        140,
        {"rho": 1.0},
        {"lr": 0.5},
        clipping={"clipping": 0.25},
    ),
    sam_trajectory_vector(
        "L2-sam-nfnets",
        7,
        ["AgcOnAscent", "AgcAgainstPerturbedWeights", "SubsetFromEnd", "SubsetOfOtherBatch"],
        "The NFNet recipe: SAM on a fraction of the batch, AGC without the head, Nesterov, decay.",
        150,
        {"profile": "nfnets", "rho": 1.0},
        NFNET,
        clipping={"clipping": 0.25, "exclude": ["@head"], "head": "head"},
    ),
    sam_trajectory_vector(
        "L2-sam-microbatches-agc",
        8,
        ["AgcOnAscent", "MicrobatchSum", "MicrobatchShared"],
        "m-SAM: the mean over micro-batches is clipped, once.",
        160,
        {"rho": 1.0, "microbatches": 2},
        MOMENTUM,
        clipping={"clipping": 0.25},
    ),
    sam_trajectory_vector(
        "L2-sam-samsung",
        10,
        ["AsamBias", "AsamEta", "AsamSquare"],
        "ASAM follows the weights of every step.",
        170,
        {"profile": "samsung", "rho": 1.0},
        MOMENTUM,
    ),
    sam_trajectory_vector(
        "L2-sam-every",
        11,
        ["EveryOffByOne"],
        "Steps 0, 2 and 4 perturb, the others are plain.",
        180,
        {"rho": 1.0, "every": 2},
        MOMENTUM,
        steps=5,
    ),
    sam_trajectory_vector(
        "L2-sam-schedule",
        11,
        ["RhoScheduleStep"],
        "The radius follows the step of the optimizer.",
        190,
        {"rho": {"@schedule": [[0, 0.25], [2, 1.25], [4, 0.5]]}},
        {"lr": 0.5, "momentum": 0.5},
        steps=5,
    ),
    sam_trajectory_vector(
        "L2-sam-skip-step",
        5,
        ["NonFiniteAscent"],
        "A poisoned step is skipped: weights and momentum stay, and training goes on.",
        200,
        {"rho": 1.0},
        MOMENTUM,
        poisoned=2,
    ),
    sam_trajectory_vector(
        "L2-sam-only",
        11,
        ["ExcludedInNorm", "ExcludedPerturbed"],
        "What is not perturbed is trained all the same.",
        210,
        {"rho": 1.0, "only": ["*.weight"]},
        MOMENTUM,
    ),
]
