"""Configurations of SAM: defaults, profiles, round trips and refusals."""

from __future__ import annotations

from typing import Final

from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data
from agc_conformance.sharpness.problems import sam_rule

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: configuration"

_EVERY_FIELD: Final[Data] = {
    "rho": {"@schedule": [[0, 0.1], [9, 0.5]]},
    "adaptive": True,
    "eta": 0.1,
    "fraction": 0.25,
    "microbatches": 4,
    "every": 2,
    "scope": "global",
    "only": ["*.weight"],
    "exclude": ["head.*"],
    "nonfinite": "skip_perturb",
    "eps": 1e-12,
}


def _accepted(name: str, clause: int, flags: list[str], comment: str, rule: Data) -> Data:
    return vector(
        f"L0-sam-config-{name}",
        f"SAM-{clause}",
        "sam-config",
        flags,
        comment,
        rule=rule,
        expect={"rule": sam_rule(rule).to_dict()},
    )


def _refused(name: str, clause: int, comment: str, rule: Data, message: list[str]) -> Data:
    return vector(
        f"L0-sam-config-{name}",
        f"SAM-{clause}",
        "sam-config",
        ["SamAcceptsBadConfig"],
        comment,
        rule=rule,
        expect={"error": "ConfigError", "message": message},
    )


VECTORS: Final = [
    _accepted("defaults", 1, ["SamDefault"], "rho 0.05, no epsilon, the whole batch.", {}),
    _accepted(
        "everything", 11, ["SamRoundTrip"], "Every field survives a round trip.", _EVERY_FIELD
    ),
    _accepted("foret", 9, ["SamDefault"], "The paper.", {"profile": "foret"}),
    _accepted("davda54", 2, ["SamDefault"], "The common PyTorch code.", {"profile": "davda54"}),
    _accepted("samsung", 10, ["SamDefault"], "The code of ASAM's authors.", {"profile": "samsung"}),
    _accepted(
        "nfnets", 7, ["SamDefault"], "Ascent on a fifth of the batch.", {"profile": "nfnets"}
    ),
    _refused("rho-zero", 1, "A radius of 0.", {"rho": 0}, ["rho"]),
    _refused("rho-negative", 1, "A negative radius.", {"rho": -0.05}, ["rho"]),
    _refused("rho-nan", 1, "A radius that is not a number.", {"rho": "NaN"}, ["rho"]),
    _refused("rho-text", 1, "Text is not a radius.", {"rho": "0.05"}, ["rho"]),
    _refused("eps-negative", 2, "A negative epsilon.", {"eps": -1e-12}, ["eps"]),
    _refused(
        "nonfinite-unknown", 5, "AGC's policy.", {"nonfinite": "zero"}, ["nonfinite", "skip_step"]
    ),
    _refused("fraction-zero", 7, "No examples.", {"fraction": 0}, ["fraction"]),
    _refused("fraction-above-one", 7, "More than the batch.", {"fraction": 1.5}, ["fraction"]),
    _refused("fraction-percent", 7, "20 is not 20 %.", {"fraction": 20}, ["fraction"]),
    _refused("microbatches-zero", 8, "No micro-batches.", {"microbatches": 0}, ["microbatches"]),
    _refused(
        "microbatches-half", 8, "Half a micro-batch.", {"microbatches": 1.5}, ["microbatches"]
    ),
    _refused(
        "scope-unknown", 9, "An unknown scope.", {"scope": "node"}, ["scope", "local", "global"]
    ),
    _refused("eta-negative", 10, "A negative eta.", {"eta": -0.01}, ["eta"]),
    _refused("adaptive-text", 10, "Text is not a switch.", {"adaptive": "yes"}, ["adaptive"]),
    _refused("every-zero", 11, "Every 0th step.", {"every": 0}, ["every"]),
    _refused("only-number", 11, "Patterns are strings.", {"only": [3]}, ["only"]),
    _refused(
        "schedule-zero", 11, "A schedule that reaches 0.", {"rho": {"@schedule": [[0, 0]]}}, ["0"]
    ),
    _refused("field-unknown", 1, "A misspelt field.", {"radius": 0.05}, ["radius", "rho"]),
]
