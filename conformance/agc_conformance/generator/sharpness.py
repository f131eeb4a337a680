"""SAM, levels 0 to 3. Every number comes from :mod:`agc.reference`, on sums that are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from agc.config import AGC, SAM
from agc.plan import perturbed_names
from agc.reference import SharpnessAware, adaptive_clip, sharpness_aware_gradients
from agc_conformance.backend import Examples, Optimizer
from agc_conformance.data import decode_values, encode_numbers, splitmix_values
from agc_conformance.generator.build import Array, P, inline, plan_of, vector
from agc_conformance.sharpness.problems import as_batch, exact_sum, gradient_function, sam_rule

__all__ = [
    "sam_config_vectors",
    "sam_scenario_vectors",
    "sam_select_vectors",
    "sam_trajectory_vectors",
    "sharpen_vectors",
]

Data = dict[str, Any]
_OI: Final = {
    "torch": ("o i", "o i -> o"),
    "flax": ("i o", "i o -> o"),
    "keras": ("i o", "i o -> o"),
}
_OIHW: Final = {
    "torch": ("o i h w", "o i ... -> o"),
    "flax": ("h w i o", "... i o -> o"),
    "keras": ("h w i o", "... i o -> o"),
}
_B: Final = {"any": ("o", "... ->")}

QUICK: Final = ["float32"]
FULL: Final = ["float64"]
LOW: Final = ["float32", "bfloat16", "float16"]


# -- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Weights and one batch, in canonical axes."""

    parameters: Sequence[P]
    curvatures: Mapping[str, Array]
    centers: Mapping[str, Array]

    @property
    def weights(self) -> dict[str, Array]:
        """Weights by name."""
        return {p.name: decode_values(p.weight, p.shape) for p in self.parameters}

    @property
    def examples(self) -> Examples:
        """The batch."""
        return Examples(self.curvatures, self.centers)

    def changed(self, kind: str, name: str, change: Callable[[Array], None]) -> Case:
        """Return the same with one array changed in place."""
        arrays = {key: value.copy() for key, value in getattr(self, kind).items()}
        change(arrays[name])
        if kind == "curvatures":
            return replace(self, curvatures=arrays)
        return replace(self, centers=arrays)

    def scaled(self, power: int) -> Case:
        """Return the same with the loss times a power of two."""
        arrays = {name: np.ldexp(value, power) for name, value in self.curvatures.items()}
        return replace(self, curvatures=arrays)


_SIZES: Final[list[tuple[str, dict[str, int], int, Mapping[str, Sequence[str]], int]]] = [
    ("conv.weight", {"o": 2, "i": 2, "h": 1, "w": 2}, 1, _OIHW, -4),
    ("conv.bias", {"o": 2}, 0, _B, -6),
    ("head.weight", {"o": 3, "i": 2}, 1, _OI, -3),
    ("head.bias", {"o": 3}, 0, _B, -5),
]


def _case(seed: int, examples: int = 6, *, power: int = 4, stored: bool = False) -> Case:
    """Return a model of 19 weights and a batch, different in every element.

    ``power`` is the loss's, a power of two; ``stored`` says whether frameworks store the weights in
    different ways, which only AGC's units can tell.
    """
    parameters, curvatures, centers = [], {}, {}
    for number, (name, axes, units, layouts, exponent) in enumerate(_SIZES):
        s = 1000 * seed + 100 * number
        shape = tuple(axes.values())
        weight = splitmix_values(shape, seed=s, exponent=exponent, spread=[1] * len(shape))
        laid = layouts if stored else {}
        parameters.append(P(name, axes, units, inline(weight), None, laid))
        curvatures[name], centers[name] = _examples(s + 20, (examples, *shape), exponent, power)
    return Case(parameters, curvatures, centers)


def _examples(seed: int, shape: tuple[int, ...], exponent: int, power: int) -> tuple[Array, Array]:
    """Curvatures from 1 to 64, steeper in some examples, times 2**(power - 4); centers a little larger than the weights."""
    spread = [2, *(0 for _ in shape[1:])]
    a = splitmix_values(shape, seed=seed, exponent=power - 4, spread=spread)
    c = splitmix_values(shape, seed=seed + 30, exponent=exponent + 1, spread=[1] * len(shape))
    return np.abs(a), c


def _unused(case: Case, name: str = "spare.weight") -> Case:
    """Return the same with one more parameter, which takes part in no loss."""
    axes = {"o": 2, "i": 2}
    weight = inline(splitmix_values((2, 2), seed=77, exponent=-3, spread=[1, 1]))
    return replace(case, parameters=[*case.parameters, P(name, axes, 1, weight, None, _OI)])


def _batch_json(case: Case) -> Data:
    return {
        "count": len(case.examples),
        "curvatures": {name: inline(value) for name, value in case.curvatures.items()},
        "centers": {name: inline(value) for name, value in case.centers.items()},
    }


# -- expectations --------------------------------------------------------------------------------


class _Watched:
    """The gradient function, and the magnitudes of the terms of every gradient it computed."""

    def __init__(self, case: Case) -> None:
        used = list(case.curvatures)
        self.compute = gradient_function([p.name for p in case.parameters], used)
        self.used = used
        self.calls: list[tuple[int, dict[str, Array], dict[str, Array], float]] = []

    def __call__(
        self, weights: Mapping[str, Array], batch: Sequence[Array]
    ) -> tuple[float, Mapping[str, Array | None]]:
        count = len(batch[0])
        slopes, sizes, losses = {}, {}, []
        with np.errstate(invalid="ignore", over="ignore"):
            for name, a, c in zip(self.used, batch, batch[len(self.used) :], strict=False):
                reach = np.abs(weights[name]) + np.abs(c)
                slopes[name] = exact_sum(a) / count
                sizes[name] = exact_sum(a * reach) / count
                losses.append(float(exact_sum((0.5 * a * reach**2).ravel())) / count)
        self.calls.append((count, slopes, sizes, math.fsum(losses)))
        return self.compute(weights, batch)


def _expectation(case: Case, rule: SAM, step: int, replicas: int) -> dict[str, Any]:
    """Return what is expected: values of the reference, and what their rounding is relative to."""
    watched, weights = _Watched(case), case.weights
    found = sharpness_aware_gradients(
        watched, weights, as_batch(case.examples), rule, step=step, replicas=replicas
    )
    if found.skipped:
        return {"skipped": True}
    sizes, loss_sizes, norm_size = _magnitudes(watched, weights, rule, step, replicas, found)
    gradients: dict[str, Any] = {}
    for name, value in found.gradients.items():
        gradients[name] = (
            "absent"
            if value is None
            else {"values": encode_numbers(value), "magnitudes": _rough(sizes[name])}
        )
    out: dict[str, Any] = {"skipped": False, "gradients": gradients}
    if math.isfinite(found.loss):
        out["loss"] = _number(found.loss, loss_sizes[0])
    if found.norms and math.isfinite(found.perturbed_loss):
        out["perturbed_loss"] = _number(found.perturbed_loss, loss_sizes[1])
    if replicas == 1 and found.norms and all(map(math.isfinite, found.norms)):
        out["norm"] = _number(max(found.norms), norm_size)
    return out


def _number(value: float, magnitude: float) -> Data:
    return {
        "value": encode_numbers([value])[0],
        "magnitude": _rough(np.array([magnitude]))[0],
    }


def _rough(magnitudes: Array) -> list[Any]:
    """Write magnitudes with three digits, which is enough to measure errors by."""
    return encode_numbers([float(f"{value:.3g}") for value in magnitudes.ravel()])


def _magnitudes(
    watched: _Watched,
    weights: Mapping[str, Array],
    rule: SAM,
    step: int,
    replicas: int,
    found: SharpnessAware,
) -> tuple[dict[str, Array], tuple[float, float], float]:
    """Magnitudes of the gradients, of both losses and of the norm."""
    calls = watched.calls
    if not found.norms:
        (count, _, sizes, loss) = calls[0]
        return sizes, (loss, loss), 0.0
    examples = 0
    total = {name: np.zeros_like(size) for name, size in calls[0][2].items()}
    losses = [[0.0, 0.0], [0.0, 0.0]]
    norm_sizes = []
    chosen = set(perturbed_names(weights, rule))
    for micro in range(rule.microbatches):
        part = calls[2 * replicas * micro : 2 * replicas * (micro + 1)]
        for replica, (count, slopes, sizes, loss) in enumerate(part[replicas:]):
            ascents = part[:replicas] if rule.scope == "global" else [part[replica]]
            norm = found.norms[micro * replicas + replica]
            usable = math.isfinite(norm) and norm > 0
            examples += count
            squares = 0.0
            for name, size in sizes.items():
                first = sum(one[2][name] for one in ascents) / len(ascents)
                if name in chosen and usable:
                    t = _scale(weights[name], rule)
                    squares += float(np.sum((t * first) ** 2))
                    size = size + slopes[name] * rule.radius(step) * t * t * first / norm
                total[name] = total[name] + count * size
            norm_sizes.append(math.sqrt(squares))
            for kind, (n, amount) in enumerate(
                ((part[replica][0], part[replica][3]), (count, loss))
            ):
                losses[kind][0] += n * amount
                losses[kind][1] += n
    sizes = {name: size / examples for name, size in total.items()}
    clean, perturbed = (amount / n for amount, n in losses)
    return sizes, (clean, perturbed), max(norm_sizes)


def _scale(weight: Array, rule: SAM) -> Array:
    if rule.adaptive and weight.ndim >= 2:
        return np.asarray(np.abs(weight) + rule.eta)
    return np.ones(weight.shape)


def _sharpen(
    id: str,  # noqa: A002
    clause: int,
    flags: Sequence[str],
    comment: str,
    case: Case,
    rule: Mapping[str, Any],
    *,
    step: int = 0,
    dtypes: Sequence[str] = QUICK,
    full: Sequence[str] = FULL,
    error: tuple[str, Sequence[str]] | None = None,
    scenario: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a vector that asks for one sharpness-aware gradient."""
    more: dict[str, Any] = {}
    if scenario is not None:
        more = {"scenario": scenario, "settings": dict(settings or {})}
    expect: dict[str, Any]
    if error is not None:
        expect = {"error": error[0], "message": list(error[1])}
    else:
        settings = settings or {}
        fixed = [*settings.get("frozen", ()), *settings.get("absent", ())]
        chosen = sam_rule(rule)
        chosen = replace(chosen, exclude=[*chosen.exclude, *fixed])
        seen = case.scaled(1) if scenario == "stateful" else case
        expect = _expectation(seen, chosen, step, settings.get("replicas", 1))
        expect.get("gradients", {}).update(dict.fromkeys(fixed, "absent"))
    return vector(
        id,
        f"SAM-{clause}",
        "sharpness-scenario" if scenario else "sharpen",
        flags,
        comment,
        dtypes=list(dtypes),
        full_dtypes=list(full),
        **more,
        rule=dict(rule),
        step=step,
        parameters=[p.json() for p in case.parameters],
        examples=_batch_json(case),
        expect=expect,
    )


# -- level 0 -------------------------------------------------------------------------------------


def sam_config_vectors() -> list[dict[str, Any]]:
    """Return defaults, profiles, round trips and refusals of configurations."""
    everything = {
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
    good: list[tuple[str, int, list[str], str, dict[str, Any]]] = [
        ("defaults", 1, ["SamDefault"], "rho 0.05, no epsilon, the whole batch.", {}),
        ("everything", 11, ["SamRoundTrip"], "Every field survives a round trip.", everything),
        ("foret", 9, ["SamDefault"], "The paper.", {"profile": "foret"}),
        ("davda54", 2, ["SamDefault"], "The common PyTorch code.", {"profile": "davda54"}),
        ("samsung", 10, ["SamDefault"], "The code of ASAM's authors.", {"profile": "samsung"}),
        ("nfnets", 7, ["SamDefault"], "Ascent on a fifth of the batch.", {"profile": "nfnets"}),
    ]
    bad: list[tuple[str, int, str, dict[str, Any], list[str]]] = [
        ("rho-zero", 1, "A radius of 0.", {"rho": 0}, ["rho"]),
        ("rho-negative", 1, "A negative radius.", {"rho": -0.05}, ["rho"]),
        ("rho-nan", 1, "A radius that is not a number.", {"rho": "NaN"}, ["rho"]),
        ("rho-text", 1, "Text is not a radius.", {"rho": "0.05"}, ["rho"]),
        ("eps-negative", 2, "A negative epsilon.", {"eps": -1e-12}, ["eps"]),
        ("nonfinite-unknown", 5, "AGC's policy.", {"nonfinite": "zero"}, ["nonfinite", "skip_step"]),
        ("fraction-zero", 7, "No examples.", {"fraction": 0}, ["fraction"]),
        ("fraction-above-one", 7, "More than the batch.", {"fraction": 1.5}, ["fraction"]),
        ("fraction-percent", 7, "20 is not 20 %.", {"fraction": 20}, ["fraction"]),
        ("microbatches-zero", 8, "No micro-batches.", {"microbatches": 0}, ["microbatches"]),
        ("microbatches-half", 8, "Half a micro-batch.", {"microbatches": 1.5}, ["microbatches"]),
        ("scope-unknown", 9, "An unknown scope.", {"scope": "node"}, ["scope", "local", "global"]),
        ("eta-negative", 10, "A negative eta.", {"eta": -0.01}, ["eta"]),
        ("adaptive-text", 10, "Text is not a switch.", {"adaptive": "yes"}, ["adaptive"]),
        ("every-zero", 11, "Every 0th step.", {"every": 0}, ["every"]),
        ("only-number", 11, "Patterns are strings.", {"only": [3]}, ["only"]),
        ("schedule-zero", 11, "A schedule that reaches 0.", {"rho": {"@schedule": [[0, 0]]}}, ["0"]),
        ("field-unknown", 1, "A misspelt field.", {"radius": 0.05}, ["radius", "rho"]),
    ]  # fmt: skip
    return [
        *(
            vector(
                f"L0-sam-config-{name}",
                f"SAM-{clause}",
                "sam-config",
                flags,
                comment,
                rule=rule,
                expect={"rule": sam_rule(rule).to_dict()},
            )
            for name, clause, flags, comment, rule in good
        ),
        *(
            vector(
                f"L0-sam-config-{name}",
                f"SAM-{clause}",
                "sam-config",
                ["SamAcceptsBadConfig"],
                comment,
                rule=rule,
                expect={"error": "ConfigError", "message": message},
            )
            for name, clause, comment, rule, message in bad
        ),
    ]


_NAMES: Final = ["conv.weight", "conv.bias", "norm/scale", "head.weight", "head.bias"]


def sam_select_vectors() -> list[dict[str, Any]]:
    """Return what ``only`` and ``exclude`` select."""
    good: list[tuple[str, str, dict[str, Any]]] = [
        ("all", "Everything, by default.", {}),
        ("only", "Normalisation only.", {"only": ["norm.*"]}),
        ("exclude", "Everything but biases.", {"exclude": ["*.bias"]}),
        ("both", "Exclusion comes last.", {"only": ["*.weight", "norm.*"], "exclude": ["head.*"]}),
    ]
    bad: list[tuple[str, str, dict[str, Any], list[str]]] = [
        ("unmatched-only", "A pattern without a match.", {"only": ["bn.*"]}, ["only", "bn.*"]),
        ("unmatched-exclude", "The same.", {"exclude": ["*.beta"]}, ["exclude", "*.beta"]),
        ("nothing", "Nothing is left.", {"exclude": ["*"]}, ["exclude"]),
    ]
    return [
        *(
            vector(
                f"L0-sam-select-{name}",
                "SAM-11",
                "sam-select",
                ["SamSelection"],
                comment,
                names=_NAMES,
                rule=rule,
                expect={"names": list(perturbed_names(_NAMES, SAM.from_dict(rule)))},
            )
            for name, comment, rule in good
        ),
        *(
            vector(
                f"L0-sam-select-{name}",
                "SAM-11",
                "sam-select",
                ["SamUnverifiedPattern"],
                comment,
                names=_NAMES,
                rule=rule,
                expect={"error": "SelectorError", "message": message},
            )
            for name, comment, rule, message in bad
        ),
    ]


# -- level 1 -------------------------------------------------------------------------------------


def _set(place: Any, value: float) -> Callable[[Array], None]:
    def change(array: Array) -> None:
        array[place] = value

    return change


def _at_rest(case: Case, names: Sequence[str], examples: slice = slice(None)) -> Case:
    """Return the same with the weights at the centers of some examples: no gradient there."""
    for name, weight in case.weights.items():
        if name in names:

            def rest(array: Array, weight: Array = weight) -> None:
                array[examples] = weight

            case = case.changed("centers", name, rest)
    return case


def _steep(case: Case) -> Case:
    """Return the same with gradients that fit float16 and a norm that does not."""
    parameters, curvatures, centers = [], {}, {}
    for p, (name, weight) in zip(case.parameters, case.weights.items(), strict=True):
        shape = (len(case.examples), *weight.shape)
        w = np.copysign(0.25 + np.abs(weight) / 32, weight)
        away = np.where(np.arange(w.size) % 3, 0.5, -0.625).reshape(w.shape)
        parameters.append(replace(p, weight=inline(w)))
        curvatures[name] = np.full(shape, 2.0**16)
        centers[name] = np.broadcast_to(w - away, shape)
    return Case(parameters, curvatures, centers)


def sharpen_vectors() -> dict[str, list[dict[str, Any]]]:
    """Return the vectors of level 1, by file."""
    everything = [name for name, *_ in _SIZES]
    plain, eight = _case(1), _case(2, 8)
    ten = _case(3, 10)
    awkward = _case(4)
    # Weights that (w + e) - e does not give back, and a zero with a sign.
    small = [0.0001220703125, -3.0517578125e-05, 5.9604644775390625e-08, -0.0, 0.25, -7, 1.5, 2]
    awkward = replace(
        awkward,
        parameters=[
            replace(p, weight=inline(np.array(small).reshape(p.shape)))
            if p.name == "conv.weight"
            else p
            for p in awkward.parameters
        ],
    )
    still = _at_rest(plain, everything)
    large = {"rho": 1.0}
    twins = {
        kind: {name: np.concatenate([value, value]) for name, value in getattr(plain, kind).items()}
        for kind in ("curvatures", "centers")
    }
    nan = plain.changed("centers", "head.weight", _set((2, 1, 1), math.nan))
    inf = plain.changed("centers", "head.weight", _set((2, 1, 1), -math.inf))
    late = ten.changed("centers", "head.weight", _set((9, 1, 1), math.nan))
    early = eight.changed("centers", "head.weight", _set((1, 1, 1), math.nan))
    steep = _steep(_case(5, 2))
    perturbation = [
        _sharpen(
            "L1-sam-global-norm",
            1,
            ["PerLayerNorm", "AscentSign", "RhoMisused", "StaleGradient", "NotNormalised"],
            "One norm over all parameters; the gradient is taken at w + e.",
            plain,
            {"rho": 0.5},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-default-rho",
            1,
            ["RhoMisused", "StaleGradient"],
            "The default radius.",
            eight,
            {},
        ),
        _sharpen(
            "L1-sam-large-rho",
            1,
            ["RhoMisused", "PerLayerNorm", "AscentSign"],
            "A radius above 1, larger than the weights.",
            ten,
            {"rho": 2.0},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-squares-overflow",
            1,
            ["PerturbationOverflow"],
            "Gradients near 2**70: their squares overflow float32, their norm does not.",
            plain.scaled(68),
            large,
            dtypes=["float32", "bfloat16"],
        ),
        _sharpen(
            "L1-sam-squares-underflow",
            1,
            ["PerturbationOverflow", "PerturbationEps"],
            "Gradients near 2**-80: their squares underflow float32, their direction is right.",
            plain.scaled(-82),
            large,
            dtypes=["float32", "bfloat16"],
        ),
        _sharpen(
            "L1-sam-half-overflow",
            1,
            ["PerturbationNormDtype"],
            "Every gradient fits float16, their norm does not: SAM must not switch itself off.",
            steep,
            {"rho": 0.5},
            dtypes=["float16"],
            full=["bfloat16", "float32"],
        ),
        _sharpen(
            "L1-sam-half-underflow",
            1,
            ["PerturbationNormDtype"],
            "Squares below the smallest number of float16.",
            plain.scaled(-16),
            large,
            dtypes=["float16", "bfloat16"],
            full=["float32"],
        ),
        _sharpen(
            "L1-sam-zero-gradient",
            2,
            ["ZeroGradientNaN"],
            "No gradient anywhere: e = 0, and no NaN.",
            still,
            large,
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-zero-ascent",
            2,
            ["ZeroGradientNaN"],
            "The ascent examples are at rest, the others are not: the plain gradient.",
            _at_rest(ten, everything, slice(0, 2)),
            {"rho": 1.0, "fraction": 0.2},
        ),
        _sharpen(
            "L1-sam-zero-layer",
            2,
            ["ZeroGradientNaN", "PerLayerNorm"],
            "One layer at rest does not move; the others do.",
            _at_rest(plain, ["conv.weight", "conv.bias"]),
            large,
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-tiny-gradient",
            2,
            ["PerturbationEps"],
            "A norm near 1e-12: an epsilon of 1e-12 halves the radius.",
            plain.scaled(-43),
            large,
        ),
        _sharpen(
            "L1-sam-tiny-gradient-eps",
            2,
            ["ProfileEps"],
            "The profile davda54 adds 1e-12 to the norm.",
            plain.scaled(-43),
            {"profile": "davda54", "rho": 1.0},
        ),
        _sharpen(
            "L1-sam-restore",
            3,
            ["RestoreBySubtraction", "NotRestored"],
            "Weights that subtraction does not give back, a negative zero among them.",
            awkward,
            {"rho": 2.0},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-restore-adaptive",
            3,
            ["RestoreBySubtraction", "NotRestored"],
            "The same with ASAM.",
            awkward,
            {"rho": 2.0, "adaptive": True},
        ),
        _sharpen(
            "L1-sam-unused",
            4,
            ["UnusedParameter"],
            "A parameter in no loss has no gradient and does not move.",
            _unused(plain),
            large,
        ),
        _sharpen(
            "L1-sam-unused-adaptive",
            4,
            ["UnusedParameter"],
            "Nor in ASAM.",
            _unused(plain),
            {"rho": 1.0, "adaptive": True},
        ),
        _sharpen(
            "L1-sam-no-gradient",
            4,
            ["SamAcceptsBadInput"],
            "Nothing that is to be perturbed takes part in the loss: an error, not silent SGD.",
            _unused(plain),
            {"only": ["spare.*"]},
            error=("MissingGradientError", ["only"]),
        ),
    ]
    nonfinite = [
        _sharpen(
            "L1-sam-nan",
            5,
            ["NonFiniteAscent"],
            "A NaN in the ascent gradient: no step, and the weights are intact.",
            nan,
            large,
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-inf",
            5,
            ["NonFiniteAscent"],
            "An infinity in the ascent gradient.",
            inf,
            large,
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-nan-raise",
            5,
            ["NonFiniteAscent"],
            "The policy 'raise'.",
            nan,
            {"nonfinite": "raise"},
            error=("NonFiniteError", ["norm"]),
        ),
        _sharpen(
            "L1-sam-nan-skip-perturb",
            5,
            ["NonFiniteAscent"],
            "The policy 'skip_perturb': the plain gradient, poisoned where it is.",
            nan,
            {"rho": 1.0, "nonfinite": "skip_perturb"},
        ),
        _sharpen(
            "L1-sam-inf-skip-perturb",
            5,
            ["NonFiniteAscent"],
            "The same with an infinity.",
            inf,
            {"rho": 1.0, "nonfinite": "skip_perturb"},
        ),
        _sharpen(
            "L1-sam-nan-descent",
            5,
            ["NonFiniteAscent"],
            "A NaN behind the ascent examples: the step is taken, one element is NaN.",
            late,
            {"rho": 1.0, "fraction": 0.5},
        ),
        _sharpen(
            "L1-sam-nan-microbatch",
            5,
            ["NonFiniteAscent"],
            "One poisoned micro-batch is not perturbed, the other is.",
            early,
            {"rho": 1.0, "microbatches": 2, "nonfinite": "skip_perturb"},
        ),
        _sharpen(
            "L1-sam-nan-microbatch-skip",
            5,
            ["NonFiniteAscent"],
            "One poisoned micro-batch is enough to skip the step.",
            early,
            {"rho": 1.0, "microbatches": 2},
        ),
        _sharpen(
            "L1-sam-nan-excluded",
            5,
            ["NonFiniteAscent", "ExcludedInNorm"],
            "A NaN in a parameter that is not perturbed is not in the norm.",
            nan,
            {"rho": 1.0, "exclude": ["head.weight"]},
        ),
    ]
    batch = [
        _sharpen(
            "L1-sam-fraction",
            7,
            ["SubsetFromEnd", "SubsetIgnored", "DescentOnSubset"],
            "The ascent pass sees the first fifth of the batch, the descent pass all of it.",
            ten,
            {"profile": "nfnets", "rho": 1.0},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-fraction-ceil",
            7,
            ["SubsetFloor", "SubsetFromEnd"],
            "ceil(0.25 * 10) = 3 examples.",
            ten,
            {"rho": 1.0, "fraction": 0.25},
        ),
        _sharpen(
            "L1-sam-fraction-one-example",
            7,
            ["SubsetFloor", "SubsetIgnored"],
            "At least one example.",
            plain,
            {"rho": 1.0, "fraction": 0.01},
        ),
        _sharpen(
            "L1-sam-fraction-all",
            7,
            ["SubsetFloor"],
            "ceil(0.95 * 6) is the whole batch.",
            plain,
            {"rho": 1.0, "fraction": 0.95},
        ),
        _sharpen(
            "L1-sam-microbatches",
            8,
            ["MicrobatchSum", "MicrobatchShared"],
            "Two micro-batches, each with its own e; the mean of the gradients.",
            eight,
            {"rho": 1.0, "microbatches": 2},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-microbatches-uneven",
            8,
            ["MicrobatchUnweighted", "MicrobatchSum", "MicrobatchShared"],
            "Three of 4, 3 and 3 examples, weighted by their numbers.",
            ten,
            {"rho": 1.0, "microbatches": 3},
        ),
        _sharpen(
            "L1-sam-microbatches-identical",
            8,
            ["MicrobatchSum"],
            "Two identical micro-batches give what one gives.",
            replace(plain, **twins),  # type: ignore[arg-type]
            {"rho": 1.0, "microbatches": 2},
        ),
        _sharpen(
            "L1-sam-microbatches-single",
            8,
            ["MicrobatchShared"],
            "As many micro-batches as examples.",
            plain,
            {"rho": 1.0, "microbatches": 6},
        ),
        _sharpen(
            "L1-sam-microbatches-fraction",
            8,
            ["MicrobatchShared", "SubsetIgnored", "SubsetFloor"],
            "The first ceil(0.3 * n) examples of each micro-batch.",
            ten,
            {"rho": 1.0, "microbatches": 3, "fraction": 0.3},
        ),
        _sharpen(
            "L1-sam-microbatches-too-many",
            8,
            ["SamAcceptsBadInput"],
            "More micro-batches than examples.",
            plain,
            {"microbatches": 7},
            error=("ConfigError", ["microbatches=7", "6 examples"]),
        ),
        _sharpen(
            "L1-sam-global-scope-alone",
            9,
            ["ScopeIgnored"],
            "On a single replica both scopes are the same.",
            plain,
            {"rho": 1.0, "scope": "global"},
        ),
        _sharpen(
            "L1-sam-loss",
            12,
            ["WrongLoss"],
            "The loss that is reported is the clean one.",
            eight,
            {"rho": 1.0},
        ),
        _sharpen(
            "L1-sam-loss-fraction",
            12,
            ["WrongLoss"],
            "The clean loss is that of the ascent examples.",
            ten,
            {"rho": 1.0, "fraction": 0.2},
        ),
        _sharpen(
            "L1-sam-loss-microbatches",
            12,
            ["WrongLoss"],
            "Losses are averaged by the numbers of examples.",
            ten,
            {"rho": 1.0, "microbatches": 3, "fraction": 0.3},
        ),
    ]
    variants = [
        _sharpen(
            "L1-sam-adaptive",
            10,
            ["AsamBias", "AsamEta", "AsamSquare", "AsamNorm"],
            "ASAM with its authors' values: T = |w| + 0.01 for matrices, 1 for vectors.",
            plain,
            {"profile": "samsung"},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-adaptive-eta",
            10,
            ["AsamEta", "AsamSquare", "AsamNorm"],
            "A large eta.",
            eight,
            {"rho": 1.0, "adaptive": True, "eta": 0.5},
        ),
        _sharpen(
            "L1-sam-adaptive-eta-zero",
            10,
            ["AsamSquare", "AsamBias"],
            "eta = 0: a zero weight does not move.",
            awkward,
            {"rho": 1.0, "adaptive": True, "eta": 0},
        ),
        _sharpen(
            "L1-sam-adaptive-microbatches",
            10,
            ["AsamSquare", "AsamNorm"],
            "ASAM with micro-batches and a fraction.",
            ten,
            {"rho": 1.0, "adaptive": True, "microbatches": 2, "fraction": 0.5},
        ),
        _sharpen(
            "L1-sam-only",
            11,
            ["ExcludedInNorm", "ExcludedPerturbed"],
            "Only weights are perturbed; biases are neither moved nor in the norm.",
            plain,
            {"rho": 1.0, "only": ["*.weight"]},
        ),
        _sharpen(
            "L1-sam-exclude",
            11,
            ["ExcludedInNorm", "ExcludedPerturbed"],
            "The head is left out.",
            eight,
            {"rho": 1.0, "exclude": ["head.*"]},
            dtypes=LOW,
        ),
        _sharpen(
            "L1-sam-unmatched",
            11,
            ["SamUnverifiedPattern"],
            "A pattern that matches nothing.",
            plain,
            {"exclude": ["haed.*"]},
            error=("SelectorError", ["haed.*"]),
        ),
        *(
            _sharpen(
                f"L1-sam-every-step-{step}",
                11,
                ["EveryOffByOne"],
                f"every=3: step {step} {'perturbs' if step % 3 == 0 else 'is plain'}.",
                plain,
                {"rho": 1.0, "every": 3},
                step=step,
            )
            for step in (0, 1, 2, 3)
        ),
        *(
            _sharpen(
                f"L1-sam-schedule-step-{step}",
                11,
                ["RhoScheduleStep"],
                "The radius of step k is the schedule at k, counted from 0.",
                plain,
                {"rho": {"@schedule": [[0, 0.5], [4, 2.5]]}},
                step=step,
            )
            for step in (0, 1, 3, 9)
        ),
    ]
    return {
        "perturbation": perturbation,
        "nonfinite": nonfinite,
        "batch": batch,
        "variants": variants,
    }


# -- level 2 -------------------------------------------------------------------------------------


def _follow(
    case: Case,
    batches: Sequence[Case],
    rule: SAM,
    clipping: AGC | None,
    optimizer: Optimizer,
) -> tuple[list[dict[str, Any]], float, float]:
    """Weights after every step, the share of clipped units, and the smallest distance from a limit."""
    weights = case.weights
    momenta = {name: np.zeros_like(value) for name, value in weights.items()}
    expected: list[dict[str, Any]] = []
    clipped, total, distance = 0, 0, math.inf
    for step, one in enumerate(batches):
        compute = gradient_function(list(weights), list(one.curvatures))
        found = sharpness_aware_gradients(compute, weights, as_batch(one.examples), rule, step=step)
        if not found.skipped:
            gradients: dict[str, Any] = dict(found.gradients)
            if clipping is not None:
                plan = plan_of(case.parameters, clipping)
                result = adaptive_clip(weights, gradients, plan, clipping, step=step)
                gradients = dict(result.gradients)
                clipped += result.total.clipped
                total += result.total.units
                for unit in result.clipped.values():
                    near = np.abs(unit.gradient_norm / unit.limit - 1)
                    distance = min(distance, float(near.min()))
            for name, w in list(weights.items()):
                decay = optimizer.weight_decay * w
                u = gradients[name] if optimizer.decoupled else gradients[name] + decay
                momenta[name] = m = optimizer.momentum * momenta[name] + u
                move = u + optimizer.momentum * m if optimizer.nesterov else m
                weights[name] = w - optimizer.lr * (move + decay if optimizer.decoupled else move)
        expected.append({name: {"values": encode_numbers(w)} for name, w in weights.items()})
    return expected, clipped / max(total, 1), distance


def _trajectory(
    id: str,  # noqa: A002
    clause: int,
    flags: Sequence[str],
    comment: str,
    seed: int,
    rule: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    *,
    clipping: Mapping[str, Any] | None = None,
    steps: int = 4,
    examples: int = 4,
    restart: int | None = None,
    poisoned: int | None = None,
) -> dict[str, Any]:
    """Follow SAM, AGC and the optimizer in float64."""
    agc = None if clipping is None else AGC.from_dict(clipping)
    for attempt in range(40):
        cases = [
            _case(seed + 50 * attempt + step, examples, power=-3, stored=True)
            for step in range(steps)
        ]
        if poisoned is not None:
            change = _set((0, 1, 1), math.nan)
            cases[poisoned] = cases[poisoned].changed("centers", "head.weight", change)
        weights, share, distance = _follow(
            cases[0], cases, sam_rule(rule), agc, Optimizer(**optimizer)
        )
        # Units of both kinds, none so near its limit that rounding decides.
        if agc is None or (0.2 <= share <= 0.8 and distance > 1e-3):
            break
    else:
        raise AssertionError(f"{id}: no batches found")
    return vector(
        id,
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
        parameters=[p.json() for p in cases[0].parameters],
        batches=[_batch_json(one) for one in cases],
        expect={"weights": weights},
    )


_MOMENTUM: Final = {"lr": 0.25, "momentum": 0.875}
_NFNET: Final = {"lr": 0.25, "momentum": 0.875, "nesterov": True, "weight_decay": 0.0625}


def sam_trajectory_vectors() -> list[dict[str, Any]]:
    """Return the vectors of level 2. Rates are powers of two, exact in float32."""
    return [
        _trajectory(
            "L2-sam-sgd",
            3,
            ["NotRestored", "StaleGradient", "AscentSign"],
            "Plain SGD: the update starts from the restored weights.",
            100,
            {"rho": 1.0},
            {"lr": 0.5},
        ),
        _trajectory(
            "L2-sam-momentum",
            3,
            ["NotRestored"],
            "The momentum buffer sees one gradient a step.",
            110,
            {"rho": 1.0},
            _MOMENTUM,
        ),
        _trajectory(
            "L2-sam-weight-decay",
            6,
            ["DecayInGradient"],
            "Coupled weight decay is in neither gradient, and of the weights at w.",
            120,
            {"rho": 1.0},
            {**_MOMENTUM, "weight_decay": 0.125},
        ),
        _trajectory(
            "L2-sam-weight-decay-decoupled",
            6,
            ["DecayInGradient"],
            "Decoupled weight decay.",
            130,
            {"rho": 1.0},
            {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "decoupled": True},
        ),
        _trajectory(
            "L2-sam-agc",
            6,
            ["AgcOnAscent", "AgcAgainstPerturbedWeights"],
            "AGC clips the final gradient only, against the restored weights.",
            140,
            {"rho": 1.0},
            {"lr": 0.5},
            clipping={"clipping": 0.25},
        ),
        _trajectory(
            "L2-sam-nfnets",
            7,
            ["AgcOnAscent", "AgcAgainstPerturbedWeights", "SubsetFromEnd", "SubsetOfOtherBatch"],
            "The NFNet recipe: SAM on a fraction of the batch, AGC without the head, Nesterov, decay.",
            150,
            {"profile": "nfnets", "rho": 1.0},
            _NFNET,
            clipping={"clipping": 0.25, "exclude": ["@head"], "head": "head"},
        ),
        _trajectory(
            "L2-sam-microbatches-agc",
            8,
            ["AgcOnAscent", "MicrobatchSum", "MicrobatchShared"],
            "m-SAM: the mean over micro-batches is clipped, once.",
            160,
            {"rho": 1.0, "microbatches": 2},
            _MOMENTUM,
            clipping={"clipping": 0.25},
        ),
        _trajectory(
            "L2-sam-samsung",
            10,
            ["AsamBias", "AsamEta", "AsamSquare"],
            "ASAM follows the weights of every step.",
            170,
            {"profile": "samsung", "rho": 1.0},
            _MOMENTUM,
        ),
        _trajectory(
            "L2-sam-every",
            11,
            ["EveryOffByOne"],
            "Steps 0, 2 and 4 perturb, the others are plain.",
            180,
            {"rho": 1.0, "every": 2},
            _MOMENTUM,
            steps=5,
        ),
        _trajectory(
            "L2-sam-schedule",
            11,
            ["RhoScheduleStep"],
            "The radius follows the step of the optimizer.",
            190,
            {"rho": {"@schedule": [[0, 0.25], [2, 1.25], [4, 0.5]]}},
            {"lr": 0.5, "momentum": 0.5},
            steps=5,
        ),
        _trajectory(
            "L2-sam-skip-step",
            5,
            ["NonFiniteAscent"],
            "A poisoned step is skipped: weights and momentum stay, and training goes on.",
            200,
            {"rho": 1.0},
            _MOMENTUM,
            poisoned=2,
        ),
        _trajectory(
            "L2-sam-only",
            11,
            ["ExcludedInNorm", "ExcludedPerturbed"],
            "What is not perturbed is trained all the same.",
            210,
            {"rho": 1.0, "only": ["*.weight"]},
            _MOMENTUM,
        ),
    ]


# -- level 3 -------------------------------------------------------------------------------------


def sam_scenario_vectors() -> list[dict[str, Any]]:
    """Return the vectors of level 3."""
    plain, ten = _case(11, stored=True), _case(12, 10, stored=True)
    nan = plain.changed("centers", "head.weight", _set((2, 1, 1), math.nan))
    two: dict[str, Any] = {"scenario": "replicas", "settings": {"replicas": 2}, "full": []}
    return [
        _sharpen(
            "L3-sam-compiled",
            3,
            ["SamCompiled"],
            "Inside a compiled step.",
            plain,
            {"rho": 1.0},
            scenario="compiled",
            full=[],
        ),
        _sharpen(
            "L3-sam-compiled-nfnets",
            7,
            ["SamCompiled"],
            "Inside a compiled step, on a fraction of the batch, the head left out.",
            ten,
            {"profile": "nfnets", "rho": 1.0, "exclude": ["head.*"]},
            scenario="compiled",
            full=[],
        ),
        _sharpen(
            "L3-sam-compiled-microbatches",
            8,
            ["SamCompiled", "MicrobatchUnweighted"],
            "Inside a compiled step, with uneven micro-batches.",
            ten,
            {"rho": 1.0, "microbatches": 3, "adaptive": True},
            scenario="compiled",
            full=[],
        ),
        _sharpen(
            "L3-sam-compiled-nan",
            5,
            ["SamCompiled", "NonFiniteAscent"],
            "Inside a compiled step, with a poisoned ascent gradient.",
            nan,
            {"rho": 1.0},
            scenario="compiled",
            full=[],
        ),
        _sharpen(
            "L3-sam-scaled",
            6,
            ["SamLossScale"],
            "Under loss scaling: e does not change, and the optimizer sees gradients without the scale.",
            plain,
            {"rho": 1.0},
            scenario="scaled",
            full=[],
            settings={"scale": 1024},
        ),
        _sharpen(
            "L3-sam-scaled-nan",
            5,
            ["SamLossScale", "NonFiniteAscent"],
            "Under loss scaling, a poisoned step is skipped.",
            nan,
            {"rho": 1.0},
            scenario="scaled",
            full=[],
            settings={"scale": 1024},
        ),
        _sharpen(
            "L3-sam-replicas-local",
            9,
            ["ScopeIgnored"],
            "Every replica has its own e; the descent gradient is the mean.",
            ten,
            {"rho": 1.0},
            **two,
        ),
        _sharpen(
            "L3-sam-replicas-global",
            9,
            ["ScopeIgnored"],
            "The ascent gradient is the mean over replicas: as on one.",
            ten,
            {"rho": 1.0, "scope": "global"},
            **two,
        ),
        _sharpen(
            "L3-sam-replicas-fraction",
            9,
            ["ScopeIgnored", "SubsetIgnored"],
            "The first part of every replica's batch.",
            ten,
            {"rho": 1.0, "fraction": 0.4},
            **two,
        ),
        _sharpen(
            "L3-sam-stale",
            4,
            ["GradientsLeft"],
            "Gradients that an earlier step left are in neither pass, whoever forgot to clear them.",
            plain,
            {"rho": 1.0},
            scenario="stale",
            full=[],
        ),
        _sharpen(
            "L3-sam-fixed",
            4,
            ["FixedPerturbed"],
            "What is frozen, or not the optimizer's, is in the loss and is not perturbed.",
            plain,
            {"rho": 1.0},
            scenario="fixed",
            full=[],
            settings={"frozen": ["head.weight"], "absent": ["head.bias"]},
        ),
        _sharpen(
            "L3-sam-fixed-fraction",
            4,
            ["FixedPerturbed"],
            "The same, on a fraction of the batch.",
            ten,
            {"rho": 1.0, "fraction": 0.4},
            scenario="fixed",
            full=[],
            settings={"frozen": ["head.bias"], "absent": ["head.weight"]},
        ),
        _sharpen(
            "L3-sam-stateful",
            12,
            ["StatePerPass"],
            "What the forward pass keeps is the same in both passes, and is updated once a step.",
            plain,
            {"rho": 1.0},
            scenario="stateful",
            full=[],
        ),
        _sharpen(
            "L3-sam-stateful-fraction",
            12,
            ["StatePerPass"],
            "The same, on a fraction of the batch: the update is the second pass's.",
            ten,
            {"rho": 1.0, "fraction": 0.4},
            scenario="stateful",
            full=[],
        ),
        _trajectory(
            "L3-sam-restart",
            13,
            ["RestartForgets"],
            "Saved and restored after 3 of 5 steps: momentum, schedule and period go on.",
            300,
            {"rho": {"@schedule": [[0, 0.25], [4, 1.25]]}, "every": 2},
            _MOMENTUM,
            steps=5,
            restart=3,
        ),
        _trajectory(
            "L3-sam-restart-agc",
            13,
            ["RestartForgets"],
            "The same with AGC behind SAM.",
            310,
            {"rho": 1.0},
            _NFNET,
            clipping={"clipping": 0.25},
            restart=2,
        ),
    ]
