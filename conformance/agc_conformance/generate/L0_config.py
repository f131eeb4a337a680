"""Configurations of AGC: defaults, round trips and refusals."""

from __future__ import annotations

from typing import Final

from agc.config import AGC
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Configuration: defaults, round trips, refusals"


def _accepted(name: str, clause: int, flags: list[str], comment: str, rule: Data) -> Data:
    return vector(
        f"L0-config-{name}",
        clause,
        "config",
        flags,
        comment,
        rule=rule,
        expect={"rule": AGC.from_dict(rule).to_dict()},
    )


def _refused(name: str, clause: int, comment: str, rule: Data, message: list[str]) -> Data:
    return vector(
        f"L0-config-{name}",
        clause,
        "config",
        ["AcceptsBadConfig"],
        comment,
        rule=rule,
        expect={"error": "ConfigError", "message": message},
    )


VECTORS: Final = [
    _accepted("defaults", 1, ["WrongDefault"], "clipping 0.01, eps 0.001, nothing excluded.", {}),
    _accepted(
        "everything",
        10,
        ["RoundTrip"],
        "Every field survives a round trip through a dict.",
        {
            "clipping": {
                "stem.*": 0.02,
                "*.bias": None,
                "*": {"@schedule": [[0, 0.04], [9, 0.01]]},
            },
            "eps": 0.0001,
            "exclude": ["@head", "norm.*"],
            "units": {"pos_embed": "n d -> n", "up": "(g=2 i) o ... -> g o"},
            "nonfinite": "zero",
            "granularity": "unit",
            "head": "fc",
            "unit_rule": "timm",
            "div_eps": 1e-6,
        },
    ),
    _accepted("off", 10, ["RoundTrip"], "clipping=None switches AGC off.", {"clipping": None}),
    _accepted(
        "schedule",
        10,
        ["RoundTrip"],
        "A schedule is data.",
        {"clipping": {"@schedule": [[0, 0.04], [1000, 0.01]]}},
    ),
    _accepted("eps-zero", 1, ["RoundTrip"], "eps = 0 is allowed.", {"eps": 0}),
    _accepted(
        "tensor",
        12,
        ["RoundTrip"],
        "A separate, named mode.",
        {"granularity": "tensor", "clipping": 0.3},
    ),
    _refused(
        "clipping-zero",
        10,
        "clipping = 0 is an error; None switches off.",
        {"clipping": 0},
        ["None"],
    ),
    _refused("clipping-negative", 10, "A negative threshold.", {"clipping": -0.01}, ["clipping"]),
    _refused(
        "clipping-nan", 10, "A threshold that is not a number.", {"clipping": "NaN"}, ["clipping"]
    ),
    _refused(
        "clipping-inf",
        10,
        "An infinite threshold; None says it.",
        {"clipping": "Infinity"},
        ["None"],
    ),
    _refused("clipping-boolean", 10, "True is not a threshold.", {"clipping": True}, ["clipping"]),
    _refused("clipping-text", 10, "Text is not a threshold.", {"clipping": "0.01"}, ["clipping"]),
    _refused("clipping-empty", 10, "A mapping without patterns.", {"clipping": {}}, ["clipping"]),
    _refused(
        "clipping-pattern-negative",
        10,
        "A bad threshold behind a pattern; the message names the pattern.",
        {"clipping": {"stem.*": -1, "*": 0.01}},
        ["stem.*"],
    ),
    _refused("eps-negative", 1, "A negative floor.", {"eps": -1e-3}, ["eps"]),
    _refused("eps-nan", 1, "A floor that is not a number.", {"eps": "NaN"}, ["eps"]),
    _refused("exclude-number", 6, "Patterns are strings.", {"exclude": [3]}, ["exclude"]),
    _refused("exclude-empty", 6, "An empty pattern.", {"exclude": [""]}, ["exclude"]),
    _refused(
        "nonfinite-unknown", 4, "An unknown policy.", {"nonfinite": "skip"}, ["nonfinite", "zero"]
    ),
    _refused(
        "granularity-unknown", 12, "An unknown mode.", {"granularity": "row"}, ["granularity"]
    ),
    _refused("field-unknown", 1, "A misspelt field.", {"clip": 0.01}, ["clip", "clipping"]),
    _refused(
        "schedule-empty",
        10,
        "A schedule without points.",
        {"clipping": {"@schedule": []}},
        ["Schedule"],
    ),
    _refused(
        "schedule-not-ascending",
        10,
        "Steps must ascend.",
        {"clipping": {"@schedule": [[5, 0.1], [5, 0.2]]}},
        ["ascending"],
    ),
    _refused(
        "schedule-zero",
        10,
        "A schedule that reaches 0.",
        {"clipping": {"@schedule": [[0, 0.1], [5, 0]]}},
        ["Schedule"],
    ),
    vector(
        "L0-config-units-syntax",
        5,
        "config",
        ["AcceptsBadConfig", "PatternParser"],
        "A units pattern that cannot be parsed is refused at once, not when it is used.",
        rule={"units": {"pos_embed": "n d"}},
        expect={"error": "UnitsError", "message": ["->", "n d"]},
    ),
]
