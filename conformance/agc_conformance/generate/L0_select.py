"""Plans: how names, thresholds and exclusions become decisions about every parameter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

from agc.config import AGC
from agc.errors import UnitsWarning
from agc.plan import Parameter, make_plan
from agc.units import Units
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Plans: selection, thresholds, exclusion"

_MODEL: Final[list[Data]] = [
    {"name": "stem.weight", "shape": [4, 3, 3, 3], "units": "o i ... -> o"},
    {"name": "stem.bias", "shape": [4]},
    {"name": "head.weight", "shape": [5, 4], "units": "o i -> o"},
    {"name": "head.bias", "shape": [5]},
    {"name": "tail/kernel", "shape": [4, 6], "units": "i o -> o"},
    {"name": "gain", "shape": []},
]
# Unknown layers of rank 3 and 4, for which there is no convention.
_ATTENTION: Final[Data] = {"name": "mix.weight", "shape": [2, 3, 4], "layout": "out-first"}
_KERNEL: Final[Data] = {"name": "deep.kernel", "shape": [3, 3, 4, 5], "layout": "out-last"}
_VECTORS_OF_ANY_RANK: Final[list[Data]] = [
    {"name": "class_token", "shape": [1, 1, 8], "layout": "out-first"},
    {"name": "temperature", "shape": [4, 1, 1], "layout": "out-last"},
    {"name": "scale", "shape": [1, 6, 1, 1]},
    {"name": "row", "shape": [1, 8], "layout": "out-first"},
    {"name": "column", "shape": [8, 1], "layout": "out-first"},
    {"name": "one", "shape": [1, 1, 1, 1]},
    {"name": "empty", "shape": [0, 3, 4]},
    {"name": "dense", "shape": [1, 7], "units": "i o -> o"},
]
_BY_LAYOUT: Final[list[Data]] = [
    {"name": "a", "shape": [5, 4], "layout": "out-first"},
    {"name": "b", "shape": [5, 4, 3, 3], "layout": "out-first"},
    {"name": "c", "shape": [5, 4, 3, 3, 3], "layout": "out-first"},
    {"name": "d", "shape": [5, 4], "layout": "out-last"},
]


def _accepted(
    name: str,
    clause: int,
    flags: list[str],
    comment: str,
    parameters: list[Data],
    *,
    rule: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> Data:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnitsWarning)
        plan = make_plan(map(_parameter, parameters), AGC.from_dict(rule or {}), head=head)
    return vector(
        f"L0-select-{name}",
        clause,
        "plan",
        flags,
        comment,
        parameters=parameters,
        rule=dict(rule or {}),
        head=head,
        expect={
            "entries": {
                entry.name: [entry.count, entry.clipping, entry.excluded, entry.source]
                for entry in plan
            },
            "warned": [entry.name for entry in plan if entry.source == "layout" and entry.clipped],
        },
    )


def _parameter(data: Mapping[str, Any]) -> Parameter:
    units = Units(data["units"]) if "units" in data else None
    return Parameter(data["name"], tuple(data["shape"]), units, data.get("layout"))


def _refused(
    name: str,
    clause: int,
    flags: list[str],
    comment: str,
    error: str,
    message: list[str],
    parameters: list[Data],
    *,
    rule: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> Data:
    return vector(
        f"L0-select-error-{name}",
        clause,
        "plan",
        flags,
        comment,
        parameters=parameters,
        rule=dict(rule or {}),
        head=head,
        expect={"error": error, "message": message},
    )


VECTORS: Final = [
    _accepted("defaults", 5, ["PatternParser"], "Layer types and vectors.", _MODEL),
    _accepted(
        "vectors",
        5,
        ["VectorRefused", "Squeeze"],
        "At most one axis longer than 1: one unit at any rank, unless a layer's type says more.",
        [*_MODEL, *_VECTORS_OF_ANY_RANK],
    ),
    _accepted(
        "vector-declared",
        5,
        ["VectorRefused"],
        "A declaration may make a vector more than one unit.",
        [*_MODEL, *_VECTORS_OF_ANY_RANK],
        rule={"units": {"class_token": "a b c -> c"}},
    ),
    _accepted(
        "layout",
        5,
        ["UnitsGuessed"],
        "What no type settles follows the layout where it has a convention, with a warning.",
        [*_MODEL, *_BY_LAYOUT],
    ),
    _accepted(
        "exclude",
        6,
        ["ExcludeIgnored", "ExcludeByOrder"],
        "By name, wherever it stands.",
        _MODEL,
        rule={"exclude": ["head.*", "gain"]},
    ),
    _accepted(
        "slash-is-dot",
        6,
        ["ExcludeIgnored"],
        "Slashes and dots are the same in names and patterns.",
        _MODEL,
        rule={"exclude": ["tail.kernel", "head/bias"]},
    ),
    _accepted(
        "head-of-the-model",
        6,
        ["ExcludeHeadBias", "ExcludeByOrder"],
        "'@head' is what the model declares.",
        _MODEL,
        rule={"exclude": ["@head"]},
        head="head",
    ),
    _accepted(
        "head-of-the-rule",
        6,
        ["ExcludeHeadBias"],
        "The rule's head wins over the model's; '@head.weight' is its matrix.",
        _MODEL,
        rule={"exclude": ["@head.weight"], "head": "head"},
        head="tail",
    ),
    _accepted(
        "clipping-patterns",
        10,
        ["IgnoresClipping"],
        "The first pattern that matches decides.",
        _MODEL,
        rule={"clipping": {"stem.*": 0.02, "*.bias": None, "*": 0.01}},
    ),
    _accepted(
        "units-pattern",
        5,
        ["PatternParser"],
        "An explicit pattern wins over the layer's type.",
        [*_MODEL, _ATTENTION],
        rule={"units": {"mix.*": "a b c -> a b", "stem.weight": "... ->"}},
    ),
    _accepted(
        "tensor",
        12,
        ["TensorGranularity"],
        "granularity='tensor' needs no layout.",
        [*_MODEL, _ATTENTION],
        rule={"granularity": "tensor"},
    ),
    _accepted(
        "ambiguous-but-excluded",
        6,
        ["ExcludeIgnored"],
        "What is not clipped need not be settled.",
        [*_MODEL, _ATTENTION],
        rule={"exclude": ["mix.*"]},
    ),
    _refused(
        "exclude-nothing",
        6,
        ["UnverifiedPattern"],
        "A pattern that matches nothing.",
        "SelectorError",
        ["haed.*", "head.weight"],
        _MODEL,
        rule={"exclude": ["haed.*"]},
    ),
    _refused(
        "exclude-case",
        6,
        ["UnverifiedPattern"],
        "Patterns are case-sensitive.",
        "SelectorError",
        ["Head.*"],
        _MODEL,
        rule={"exclude": ["Head.*"]},
    ),
    _refused(
        "units-nothing",
        6,
        ["UnverifiedPattern"],
        "A units pattern for no parameter.",
        "SelectorError",
        ["pos_embed"],
        _MODEL,
        rule={"units": {"pos_embed": "n d -> n"}},
    ),
    _refused(
        "clipping-nothing",
        10,
        ["UnverifiedPattern"],
        "A threshold for no parameter.",
        "SelectorError",
        ["stam.*"],
        _MODEL,
        rule={"clipping": {"stam.*": 0.1, "*": 0.01}},
    ),
    _refused(
        "clipping-unmatched",
        10,
        ["UnverifiedPattern"],
        "A parameter without threshold.",
        "SelectorError",
        ["head.weight", "'*'"],
        _MODEL,
        rule={"clipping": {"stem.*": 0.1}},
    ),
    _refused(
        "head-unknown",
        6,
        ["UnverifiedPattern", "ExcludeByOrder"],
        "'@head' of a model that declares none: never guessed.",
        "SelectorError",
        ["head="],
        _MODEL,
        rule={"exclude": ["@head"]},
    ),
    _refused(
        "selector-unknown",
        6,
        ["UnverifiedPattern"],
        "There are two selectors.",
        "SelectorError",
        ["@body", "@head"],
        _MODEL,
        rule={"exclude": ["@body"]},
        head="head",
    ),
    _refused(
        "ambiguous",
        5,
        ["WrongAxisConv", "WrongAxisStacked", "UnitsGuessed"],
        "Rank 3 of an unknown layer: an error that says how to declare it, never a guess.",
        "AmbiguousUnitsError",
        ["mix.weight", "(2, 3, 4)", "units"],
        [*_MODEL, _ATTENTION],
    ),
    _refused(
        "ambiguous-all",
        5,
        ["UnitsGuessed"],
        "All parameters that nothing settles in one error, each with a declaration to paste.",
        "AmbiguousUnitsError",
        [
            "(2, 3, 4)",
            "'mix.weight': 'a b c -> a'",
            "'deep.kernel': 'a b c d -> d'",
            "'positions': 'one n d -> n'",
        ],
        [_ATTENTION, _KERNEL, {"name": "positions", "shape": [1, 9, 4]}, *_MODEL],
    ),
    _refused(
        "units-misfit",
        5,
        ["PatternParser"],
        "A pattern for another rank names the parameter.",
        "UnitsError",
        ["stem.weight"],
        _MODEL,
        rule={"units": {"stem.weight": "o i -> o"}},
    ),
    _refused(
        "same-name",
        5,
        ["AcceptsBadInput"],
        "Two parameters of one name; tied parameters are given once.",
        "ParameterError",
        ["tail.kernel"],
        [*_MODEL, {"name": "tail.kernel", "shape": [2, 2], "layout": "out-first"}],
    ),
]
