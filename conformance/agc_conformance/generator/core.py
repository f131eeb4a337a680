"""Level 0: what is settled before any number is touched. These ask the core, not a framework."""

from __future__ import annotations

import warnings
from typing import Any, Final

from agc.config import AGC
from agc.errors import UnitsWarning
from agc.plan import Parameter, make_plan
from agc.units import Units
from agc_conformance.generator.build import vector

__all__ = ["config_vectors", "plan_vectors", "units_vectors"]


def config_vectors() -> list[dict[str, Any]]:
    """Return defaults, round trips and refusals of configurations."""
    good: list[tuple[str, int, list[str], str, dict[str, Any]]] = [
        ("defaults", 1, ["WrongDefault"], "clipping 0.01, eps 0.001, nothing excluded.", {}),
        (
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
        ("off", 10, ["RoundTrip"], "clipping=None switches AGC off.", {"clipping": None}),
        (
            "schedule",
            10,
            ["RoundTrip"],
            "A schedule is data.",
            {"clipping": {"@schedule": [[0, 0.04], [1000, 0.01]]}},
        ),
        ("eps-zero", 1, ["RoundTrip"], "eps = 0 is allowed.", {"eps": 0}),
        (
            "tensor",
            12,
            ["RoundTrip"],
            "A separate, named mode.",
            {"granularity": "tensor", "clipping": 0.3},
        ),
    ]
    bad: list[tuple[str, int, str, dict[str, Any], list[str]]] = [
        (
            "clipping-zero",
            10,
            "clipping = 0 is an error; None switches off.",
            {"clipping": 0},
            ["None"],
        ),
        ("clipping-negative", 10, "A negative threshold.", {"clipping": -0.01}, ["clipping"]),
        (
            "clipping-nan",
            10,
            "A threshold that is not a number.",
            {"clipping": "NaN"},
            ["clipping"],
        ),
        (
            "clipping-inf",
            10,
            "An infinite threshold; None says it.",
            {"clipping": "Infinity"},
            ["None"],
        ),
        ("clipping-boolean", 10, "True is not a threshold.", {"clipping": True}, ["clipping"]),
        ("clipping-text", 10, "Text is not a threshold.", {"clipping": "0.01"}, ["clipping"]),
        ("clipping-empty", 10, "A mapping without patterns.", {"clipping": {}}, ["clipping"]),
        (
            "clipping-pattern-negative",
            10,
            "A bad threshold behind a pattern; the message names the pattern.",
            {"clipping": {"stem.*": -1, "*": 0.01}},
            ["stem.*"],
        ),
        ("eps-negative", 1, "A negative floor.", {"eps": -1e-3}, ["eps"]),
        ("eps-nan", 1, "A floor that is not a number.", {"eps": "NaN"}, ["eps"]),
        ("exclude-number", 6, "Patterns are strings.", {"exclude": [3]}, ["exclude"]),
        ("exclude-empty", 6, "An empty pattern.", {"exclude": [""]}, ["exclude"]),
        (
            "nonfinite-unknown",
            4,
            "An unknown policy.",
            {"nonfinite": "skip"},
            ["nonfinite", "zero"],
        ),
        ("granularity-unknown", 12, "An unknown mode.", {"granularity": "row"}, ["granularity"]),
        ("field-unknown", 1, "A misspelt field.", {"clip": 0.01}, ["clip", "clipping"]),
        (
            "schedule-empty",
            10,
            "A schedule without points.",
            {"clipping": {"@schedule": []}},
            ["Schedule"],
        ),
        (
            "schedule-not-ascending",
            10,
            "Steps must ascend.",
            {"clipping": {"@schedule": [[5, 0.1], [5, 0.2]]}},
            ["ascending"],
        ),
        (
            "schedule-zero",
            10,
            "A schedule that reaches 0.",
            {"clipping": {"@schedule": [[0, 0.1], [5, 0]]}},
            ["Schedule"],
        ),
    ]
    out = [
        vector(
            f"L0-config-{name}",
            clause,
            "config",
            flags,
            comment,
            rule=rule,
            expect={"rule": AGC.from_dict(rule).to_dict()},
        )
        for name, clause, flags, comment, rule in good
    ]
    out += [
        vector(
            f"L0-config-{name}",
            clause,
            "config",
            ["AcceptsBadConfig"],
            comment,
            rule=rule,
            expect={"error": "ConfigError", "message": message},
        )
        for name, clause, comment, rule, message in bad
    ]
    out.append(
        vector(
            "L0-config-units-syntax",
            5,
            "config",
            ["AcceptsBadConfig", "PatternParser"],
            "A units pattern that cannot be parsed is refused at once, not when it is used.",
            rule={"units": {"pos_embed": "n d"}},
            expect={"error": "UnitsError", "message": ["->", "n d"]},
        )
    )
    return out


def units_vectors() -> list[dict[str, Any]]:
    """Return patterns, what they mean for a shape, and patterns that are refused."""
    good: list[tuple[str, str, dict[str, int], list[int]]] = [
        ("dense", "o i -> o", {}, [5, 6]),
        ("dense-out-last", "i o -> o", {}, [6, 5]),
        ("conv", "o i ... -> o", {}, [5, 4, 3, 2]),
        ("conv-no-spatial-axis", "o i ... -> o", {}, [5, 4]),
        ("conv-out-last", "... i o -> o", {}, [3, 2, 4, 5]),
        ("depthwise", "... c m -> c m", {}, [3, 3, 5, 2]),
        ("whole", "... ->", {}, [1, 2, 3]),
        ("whole-scalar", "... ->", {}, []),
        ("ellipsis-kept", "... i -> ...", {}, [2, 3, 4]),
        ("split", "(g=2 i) o ... -> g o", {}, [6, 5, 3, 3]),
        ("split-by-size", "(g i) o ... -> g o", {"g": 3}, [6, 5, 3]),
        ("split-three", "(a=2 b c=3) d -> a c", {}, [12, 5]),
        ("split-inferred-one", "(g=6 i) -> g", {}, [6]),
        ("fixed-size", "a=3 b -> b", {}, [3, 4]),
        ("every-axis", "a b -> b a", {}, [2, 3]),
        ("empty-array", "o i -> o", {}, [0, 3]),
        ("empty-fan-in", "o i -> o", {}, [3, 0]),
        ("size-one", "o i -> o", {}, [5, 1]),
        ("no-spaces", "o i...->o", {}, [5, 4, 3]),
    ]
    bad: list[tuple[str, str, dict[str, int], list[int], list[str]]] = [
        ("no-arrow", "o i", {}, [2, 3], ["->", "^"]),
        ("two-arrows", "o i -> o -> i", {}, [2, 2], ["second", "^"]),
        ("twice-left", "o o -> o", {}, [2, 2], ["twice", "^"]),
        ("twice-right", "o i -> o o", {}, [2, 2], ["twice", "^"]),
        ("unknown-right", "o i -> k", {}, [2, 2], ["'k'", "^"]),
        ("open-parenthesis", "(g i -> g", {}, [4], ["closed", "^"]),
        ("close-parenthesis", "g i) -> g", {}, [4, 2], ["opened", "^"]),
        ("nested", "((g i) o) -> g", {}, [4], ["inside", "^"]),
        ("empty-parentheses", "() o -> o", {}, [1, 4], ["empty", "^"]),
        ("parentheses-right", "g i -> (g i)", {}, [4, 2], ["right", "^"]),
        ("ellipsis-in-parentheses", "(... i) -> i", {}, [4], ["...", "^"]),
        ("two-ellipses", "... i ... -> i", {}, [4], ["twice", "^"]),
        ("size-zero", "o=0 i -> o", {}, [4, 2], ["positive", "^"]),
        ("size-right", "o i -> o=2", {}, [2, 2], ["left", "^"]),
        ("character", "o, i -> o", {}, [2, 2], ["','", "^"]),
        ("rank", "o i -> o", {}, [2, 3, 4], ["(2, 3, 4)"]),
        ("rank-ellipsis", "o i k ... -> o", {}, [2, 3], ["at least 3"]),
        ("not-divisible", "(g=4 i) o -> g o", {}, [6, 5], ["divisible"]),
        ("open-split", "(g i) o -> g o", {}, [6, 5], ["g=2"]),
        ("fixed-size-differs", "a=3 b -> b", {}, [4, 4], ["3"]),
        ("size-unknown-axis", "o i -> o", {"g": 2}, [4, 4], ["g=2"]),
        ("size-contradicts", "(g=2 i) -> g", {"g": 3}, [6], ["contradicts"]),
    ]
    out = []
    for name, pattern, sizes, shape in good:
        axes = Units(pattern, **sizes).bind(tuple(shape))
        out.append(
            vector(
                f"L0-units-{name}",
                5 if Units(pattern, **sizes).whole else 2,
                "units",
                ["PatternParser"],
                f"{pattern!r} on {tuple(shape)}.",
                pattern=pattern,
                sizes=sizes,
                shape=shape,
                expect={
                    "view": list(axes.view),
                    "reduce": list(axes.reduce),
                    "keep": list(axes.keep),
                    "count": axes.count,
                },
            )
        )
    for name, pattern, sizes, shape, message in bad:
        out.append(
            vector(
                f"L0-units-error-{name}",
                2,
                "units",
                ["PatternParser"],
                f"{pattern!r} on {tuple(shape)} is refused.",
                pattern=pattern,
                sizes=sizes,
                shape=shape,
                expect={"error": "UnitsError", "message": message},
            )
        )
    return out


_MODEL: Final[list[dict[str, Any]]] = [
    {"name": "stem.weight", "shape": [4, 3, 3, 3], "units": "o i ... -> o"},
    {"name": "stem.bias", "shape": [4]},
    {"name": "head.weight", "shape": [5, 4], "units": "o i -> o"},
    {"name": "head.bias", "shape": [5]},
    {"name": "tail/kernel", "shape": [4, 6], "units": "i o -> o"},
    {"name": "gain", "shape": []},
]


def plan_vectors() -> list[dict[str, Any]]:
    """Return how names, thresholds and exclusions become a plan."""
    attention: dict[str, Any] = {"name": "mix.weight", "shape": [2, 3, 4], "layout": "out-first"}
    kernel: dict[str, Any] = {"name": "deep.kernel", "shape": [3, 3, 4, 5], "layout": "out-last"}
    vectors: list[dict[str, Any]] = [
        {"name": "class_token", "shape": [1, 1, 8], "layout": "out-first"},
        {"name": "temperature", "shape": [4, 1, 1], "layout": "out-last"},
        {"name": "scale", "shape": [1, 6, 1, 1]},
        {"name": "row", "shape": [1, 8], "layout": "out-first"},
        {"name": "column", "shape": [8, 1], "layout": "out-first"},
        {"name": "one", "shape": [1, 1, 1, 1]},
        {"name": "empty", "shape": [0, 3, 4]},
        {"name": "dense", "shape": [1, 7], "units": "i o -> o"},
    ]
    by_layout: list[dict[str, Any]] = [
        {"name": "a", "shape": [5, 4], "layout": "out-first"},
        {"name": "b", "shape": [5, 4, 3, 3], "layout": "out-first"},
        {"name": "c", "shape": [5, 4, 3, 3, 3], "layout": "out-first"},
        {"name": "d", "shape": [5, 4], "layout": "out-last"},
    ]
    good: list[
        tuple[str, int, list[str], str, list[dict[str, Any]], dict[str, Any], str | None]
    ] = [
        ("defaults", 5, ["PatternParser"], "Layer types and vectors.", _MODEL, {}, None),
        (
            "vectors",
            5,
            ["VectorRefused", "Squeeze"],
            "At most one axis longer than 1: one unit at any rank, unless a layer's type says more.",
            [*_MODEL, *vectors],
            {},
            None,
        ),
        (
            "vector-declared",
            5,
            ["VectorRefused"],
            "A declaration may make a vector more than one unit.",
            [*_MODEL, *vectors],
            {"units": {"class_token": "a b c -> c"}},
            None,
        ),
        (
            "layout",
            5,
            ["UnitsGuessed"],
            "What no type settles follows the layout where it has a convention, with a warning.",
            [*_MODEL, *by_layout],
            {},
            None,
        ),
        (
            "exclude",
            6,
            ["ExcludeIgnored", "ExcludeByOrder"],
            "By name, wherever it stands.",
            _MODEL,
            {"exclude": ["head.*", "gain"]},
            None,
        ),
        (
            "slash-is-dot",
            6,
            ["ExcludeIgnored"],
            "Slashes and dots are the same in names and patterns.",
            _MODEL,
            {"exclude": ["tail.kernel", "head/bias"]},
            None,
        ),
        (
            "head-of-the-model",
            6,
            ["ExcludeHeadBias", "ExcludeByOrder"],
            "'@head' is what the model declares.",
            _MODEL,
            {"exclude": ["@head"]},
            "head",
        ),
        (
            "head-of-the-rule",
            6,
            ["ExcludeHeadBias"],
            "The rule's head wins over the model's; '@head.weight' is its matrix.",
            _MODEL,
            {"exclude": ["@head.weight"], "head": "head"},
            "tail",
        ),
        (
            "clipping-patterns",
            10,
            ["IgnoresClipping"],
            "The first pattern that matches decides.",
            _MODEL,
            {"clipping": {"stem.*": 0.02, "*.bias": None, "*": 0.01}},
            None,
        ),
        (
            "units-pattern",
            5,
            ["PatternParser"],
            "An explicit pattern wins over the layer's type.",
            [*_MODEL, attention],
            {"units": {"mix.*": "a b c -> a b", "stem.weight": "... ->"}},
            None,
        ),
        (
            "tensor",
            12,
            ["TensorGranularity"],
            "granularity='tensor' needs no layout.",
            [*_MODEL, attention],
            {"granularity": "tensor"},
            None,
        ),
        (
            "ambiguous-but-excluded",
            6,
            ["ExcludeIgnored"],
            "What is not clipped need not be settled.",
            [*_MODEL, attention],
            {"exclude": ["mix.*"]},
            None,
        ),
    ]
    bad: list[
        tuple[
            str,
            int,
            list[str],
            str,
            list[dict[str, Any]],
            dict[str, Any],
            str | None,
            str,
            list[str],
        ]
    ] = [
        (
            "exclude-nothing",
            6,
            ["UnverifiedPattern"],
            "A pattern that matches nothing.",
            _MODEL,
            {"exclude": ["haed.*"]},
            None,
            "SelectorError",
            ["haed.*", "head.weight"],
        ),
        (
            "exclude-case",
            6,
            ["UnverifiedPattern"],
            "Patterns are case-sensitive.",
            _MODEL,
            {"exclude": ["Head.*"]},
            None,
            "SelectorError",
            ["Head.*"],
        ),
        (
            "units-nothing",
            6,
            ["UnverifiedPattern"],
            "A units pattern for no parameter.",
            _MODEL,
            {"units": {"pos_embed": "n d -> n"}},
            None,
            "SelectorError",
            ["pos_embed"],
        ),
        (
            "clipping-nothing",
            10,
            ["UnverifiedPattern"],
            "A threshold for no parameter.",
            _MODEL,
            {"clipping": {"stam.*": 0.1, "*": 0.01}},
            None,
            "SelectorError",
            ["stam.*"],
        ),
        (
            "clipping-unmatched",
            10,
            ["UnverifiedPattern"],
            "A parameter without threshold.",
            _MODEL,
            {"clipping": {"stem.*": 0.1}},
            None,
            "SelectorError",
            ["head.weight", "'*'"],
        ),
        (
            "head-unknown",
            6,
            ["UnverifiedPattern", "ExcludeByOrder"],
            "'@head' of a model that declares none: never guessed.",
            _MODEL,
            {"exclude": ["@head"]},
            None,
            "SelectorError",
            ["head="],
        ),
        (
            "selector-unknown",
            6,
            ["UnverifiedPattern"],
            "There are two selectors.",
            _MODEL,
            {"exclude": ["@body"]},
            "head",
            "SelectorError",
            ["@body", "@head"],
        ),
        (
            "ambiguous",
            5,
            ["WrongAxisConv", "WrongAxisStacked", "UnitsGuessed"],
            "Rank 3 of an unknown layer: an error that says how to declare it, never a guess.",
            [*_MODEL, attention],
            {},
            None,
            "AmbiguousUnitsError",
            ["mix.weight", "(2, 3, 4)", "units"],
        ),
        (
            "ambiguous-all",
            5,
            ["UnitsGuessed"],
            "All parameters that nothing settles in one error, each with a declaration to paste.",
            [attention, kernel, {"name": "positions", "shape": [1, 9, 4]}, *_MODEL],
            {},
            None,
            "AmbiguousUnitsError",
            [
                "(2, 3, 4)",
                "'mix.weight': 'a b c -> a'",
                "'deep.kernel': 'a b c d -> d'",
                "'positions': 'one n d -> n'",
            ],
        ),
        (
            "units-misfit",
            5,
            ["PatternParser"],
            "A pattern for another rank names the parameter.",
            _MODEL,
            {"units": {"stem.weight": "o i -> o"}},
            None,
            "UnitsError",
            ["stem.weight"],
        ),
        (
            "same-name",
            5,
            ["AcceptsBadInput"],
            "Two parameters of one name; tied parameters are given once.",
            [*_MODEL, {"name": "tail.kernel", "shape": [2, 2], "layout": "out-first"}],
            {},
            None,
            "ParameterError",
            ["tail.kernel"],
        ),
    ]
    out = []
    for name, clause, flags, comment, parameters, rule, head in good:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnitsWarning)
            plan = make_plan(
                [
                    Parameter(
                        p["name"],
                        tuple(p["shape"]),
                        Units(p["units"]) if "units" in p else None,
                        p.get("layout"),
                    )
                    for p in parameters
                ],
                AGC.from_dict(rule),
                head=head,
            )
        entries = {
            entry.name: [entry.count, entry.clipping, entry.excluded, entry.source]
            for entry in plan.entries
        }
        warned = [entry.name for entry in plan if entry.source == "layout" and entry.clipped]
        out.append(
            vector(
                f"L0-select-{name}",
                clause,
                "plan",
                flags,
                comment,
                parameters=parameters,
                rule=rule,
                head=head,
                expect={"entries": entries, "warned": warned},
            )
        )
    for name, clause, flags, comment, parameters, rule, head, error, message in bad:
        out.append(
            vector(
                f"L0-select-error-{name}",
                clause,
                "plan",
                flags,
                comment,
                parameters=parameters,
                rule=rule,
                head=head,
                expect={"error": error, "message": message},
            )
        )
    return out
