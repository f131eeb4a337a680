"""Parameters selected by ``only`` and ``exclude`` of SAM."""

from __future__ import annotations

from typing import Final

from agc.config import SAM
from agc.selectors import perturbed_names
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "SAM: what is perturbed"

_NAMES: Final = ["conv.weight", "conv.bias", "norm/scale", "head.weight", "head.bias"]


def _accepted(name: str, comment: str, rule: Data) -> Data:
    return vector(
        f"L0-sam-select-{name}",
        "SAM-11",
        "sam-select",
        ["SamSelection"],
        comment,
        names=_NAMES,
        rule=rule,
        expect={"names": list(perturbed_names(_NAMES, SAM.from_dict(rule)))},
    )


def _refused(name: str, comment: str, rule: Data, message: list[str]) -> Data:
    return vector(
        f"L0-sam-select-{name}",
        "SAM-11",
        "sam-select",
        ["SamUnverifiedPattern"],
        comment,
        names=_NAMES,
        rule=rule,
        expect={"error": "SelectorError", "message": message},
    )


VECTORS: Final = [
    _accepted("all", "Everything, by default.", {}),
    _accepted("only", "Normalisation only.", {"only": ["norm.*"]}),
    _accepted("exclude", "Everything but biases.", {"exclude": ["*.bias"]}),
    _accepted(
        "both", "Exclusion comes last.", {"only": ["*.weight", "norm.*"], "exclude": ["head.*"]}
    ),
    _refused("unmatched-only", "A pattern without a match.", {"only": ["bn.*"]}, ["only", "bn.*"]),
    _refused("unmatched-exclude", "The same.", {"exclude": ["*.beta"]}, ["exclude", "*.beta"]),
    _refused("nothing", "Nothing is left.", {"exclude": ["*"]}, ["exclude"]),
]
