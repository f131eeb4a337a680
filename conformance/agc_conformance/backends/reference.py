"""The float64 reference as a backend, rounded to the gradient's dtype.

It tests the suite itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from agc.config import AGC
from agc.plan import Parameter, Plan, make_plan
from agc.recipe import Recipe
from agc.reference import RowSparse, SharpnessAware, adaptive_clip, sharpness_aware_gradients
from agc.training import Launch, Trainer
from agc.units import Units
from agc_conformance.backend import (
    Backend,
    Gradient,
    Layer,
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
    Optimizer,
    Outcome,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    TrainingTask,
    TrainStep,
)
from agc_conformance.core.functions import Core
from agc_conformance.nfnets.reference import ReferenceModels
from agc_conformance.sharpness.problems import as_batch, gradient_function
from agc_conformance.training.ask import reference_run
from agc_conformance.training.reference import ReferenceTrainer
from agc_conformance.verdict import round_to

__all__ = ["ReferenceBackend", "Step", "layer_parameters", "to_dtype"]

Array = npt.NDArray[Any]


def to_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    """Round float64 or complex128 values to a dtype; unlike a cast, correctly for bfloat16 too."""
    if dtype.name == "bfloat16":
        values = round_to(values, "bfloat16")
    return np.asarray(values).astype(dtype)


_LAYERS: Final[
    dict[str, Callable[[Mapping[str, int]], list[tuple[str, tuple[int, ...], str | None]]]]
] = {
    "dense": lambda n: [("weight", (n["o"], n["i"]), "o i -> o")],
    "conv1d": lambda n: [("weight", (n["o"], n["i"], n["w"]), "o i ... -> o")],
    "conv2d": lambda n: [("weight", (n["o"], n["i"], n["h"], n["w"]), "o i ... -> o")],
    "conv3d": lambda n: [("weight", (n["o"], n["i"], n["t"], n["h"], n["w"]), "o i ... -> o")],
    "grouped_conv2d": lambda n: [
        ("weight", (n["o"], n["i"] // n["g"], n["h"], n["w"]), "o i ... -> o")
    ],
    "depthwise_conv2d": lambda n: [
        ("weight", (n["c"] * n["m"], 1, n["h"], n["w"]), "o i ... -> o")
    ],
    "conv_transpose1d": lambda n: [("weight", (n["i"], n["o"], n["w"]), "i o ... -> o")],
    "conv_transpose2d": lambda n: [("weight", (n["i"], n["o"], n["h"], n["w"]), "i o ... -> o")],
    "grouped_conv_transpose2d": lambda n: [
        (
            "weight",
            (n["i"], n["o"] // n["g"], n["h"], n["w"]),
            f"(g={n['g']} i) o ... -> g o",
        )
    ],
    "embedding": lambda n: [("weight", (n["v"], n["d"]), "v d -> v")],
    "attention": lambda n: [
        ("in.weight", (3 * n["h"] * n["d"], n["i"]), "o i -> o"),
        ("out.weight", (n["o"], n["h"] * n["d"]), "o i -> o"),
    ],
    "einsum": lambda n: [("weight", (n["i"], n["h"], n["d"]), "i h d -> h d")],
    "lstm": lambda n: _recurrent(n, 4),
    "gru": lambda n: _recurrent(n, 3),
    "rnn": lambda n: _recurrent(n, 1),
    "bilinear": lambda n: [("weight", (n["o"], n["i"], n["j"]), "o i j -> o")],
    "hf_conv1d": lambda n: [("weight", (n["i"], n["o"]), "i o -> o")],
    "layer_norm": lambda n: [("weight", (n["o"],), "... ->")],
    "class_token": lambda n: [("token", (1, 1, n["d"]), None)],
    "temperature": lambda n: [("temperature", (n["h"], 1, 1), None)],
    "unknown": lambda n: [("table", (n["a"], n["b"], n["c"]), None)],
    "stacked_dense": lambda n: [("weight", (n["l"], n["o"], n["i"]), "l o i -> l o")],
}


def _recurrent(n: Mapping[str, int], gates: int) -> list[tuple[str, tuple[int, ...], str | None]]:
    return [
        ("input.weight", (gates * n["o"], n["i"]), "o i -> o"),
        ("state.weight", (gates * n["o"], n["o"]), "o i -> o"),
    ]


def layer_parameters(layer: Layer) -> list[Parameter]:
    """Return the parameters of a layer type as PyTorch would store them, with a bias."""
    weights = [
        Parameter(name, shape, Units(pattern) if pattern else None, "out-first", layer.kind)
        for name, shape, pattern in _LAYERS[layer.kind](layer.sizes)
    ]
    return [*weights, Parameter("bias", (layer.sizes.get("o", 3),))]


def _rounded(
    gradients: Mapping[str, Array | None], problem: SharpnessProblem
) -> dict[str, Array | None]:
    return {
        name: None if value is None else to_dtype(value, problem.parameters[name].dtype)
        for name, value in gradients.items()
    }


@dataclass(frozen=True)
class Step:
    """One step of training, in float64.

    Attributes
    ----------
    problem : Problem
        Rule and units.
    optimizer : Optimizer
        The optimizer behind AGC.
    weights, momenta, gradients : mapping of name to array
        Before the step.
    index : int
        Number of earlier steps.
    """

    problem: Problem
    optimizer: Optimizer
    weights: Mapping[str, Array]
    momenta: Mapping[str, Array]
    gradients: Mapping[str, Array]
    index: int


class ReferenceBackend(Backend):
    """:mod:`agc.reference` behind the protocol of backends."""

    name: ClassVar[str] = "reference"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    core: ClassVar[Core] = Core()
    models: ClassVar[ReferenceModels] = ReferenceModels()
    training: ClassVar[type[ReferenceTrainer]] = ReferenceTrainer

    def versions(self) -> dict[str, str]:
        """Return NumPy's version."""
        return {"numpy": np.__version__}

    def plan(self, problem: Problem) -> Plan:
        """Make the plan of a problem."""
        return make_plan(
            [
                Parameter(name, tuple(value.shape), None, "out-first")
                for name, value in problem.parameters.items()
            ],
            problem.declared_rule,
        )

    def clip(self, problem: Problem) -> Outcome:
        """Clip in float64 and round."""
        result = adaptive_clip(
            problem.parameters,
            problem.gradients,
            self.plan(problem),
            problem.rule,
            step=problem.step,
        )
        gradients: dict[str, Gradient] = {}
        for name, clipped in result.gradients.items():
            raw = problem.gradients[name]
            if clipped is None or raw is None:
                gradients[name] = None
            elif isinstance(clipped, RowSparse):
                assert isinstance(raw, RowSparse)
                values = to_dtype(clipped.values, raw.values.dtype)
                gradients[name] = replace(clipped, values=values)
            else:
                assert not isinstance(raw, RowSparse)
                gradients[name] = to_dtype(clipped, raw.dtype)
        return Outcome(gradients, result.stats)

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Plan a layer as PyTorch stores it."""
        return make_plan(layer_parameters(layer), rule)

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Gradient]]
    ) -> list[Mapping[str, Array]]:
        """Follow the optimizer in float64; only the returned weights are rounded."""
        dtypes = {name: value.dtype for name, value in problem.parameters.items()}
        weights = {name: value.astype(np.float64) for name, value in problem.parameters.items()}
        momenta = {name: np.zeros_like(value) for name, value in weights.items()}
        out: list[Mapping[str, Array]] = []
        for step, raw in enumerate(gradients):
            wide = {
                name: value.astype(np.float64)
                for name, value in raw.items()
                if value is not None and not isinstance(value, RowSparse)
            }
            now = Step(problem, optimizer, weights, momenta, wide, step)
            weights, momenta = self.update(now)
            out.append({name: to_dtype(value, dtypes[name]) for name, value in weights.items()})
        return out

    def update(self, step: Step) -> tuple[dict[str, Array], dict[str, Array]]:
        """Clip, decay, momentum, move (AGC-7); return weights and momenta."""
        problem, optimizer = step.problem, step.optimizer
        clipped = self.clip(
            replace(problem, parameters=step.weights, gradients=step.gradients, step=step.index)
        ).gradients
        after, momenta = {}, {}
        for name, w in step.weights.items():
            g = clipped[name]
            assert g is not None
            assert not isinstance(g, RowSparse)
            decay = optimizer.weight_decay * w
            u = g if optimizer.decoupled else g + decay
            momenta[name] = m = optimizer.momentum * step.momenta[name] + u
            move = u + optimizer.momentum * m if optimizer.nesterov else m
            after[name] = w - optimizer.lr * (move + decay if optimizer.decoupled else move)
        return after, momenta

    def scenario_optimizer(self, problem: Problem) -> Outcome:
        """Clip."""
        return self.clip(problem)

    def scenario_idle(self, problem: Problem) -> Outcome:
        """Clip."""
        return self.clip(problem)

    def scenario_accumulate(
        self,
        problem: Problem,
        micro: Sequence[Mapping[str, Gradient]],
    ) -> Outcome:
        """Clip the mean."""
        return self.clip(problem)

    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        """Divide by the scale, then clip."""
        unscaled = {
            name: None if value is None or isinstance(value, RowSparse) else value / scale
            for name, value in problem.gradients.items()
        }
        return self.clip(replace(problem, gradients=unscaled))

    def scenario_compiled(self, problem: Problem) -> Outcome:
        """Clip."""
        return self.clip(problem)

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        """Clip without splitting anything."""
        return self.clip(problem)

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute in float64 and round."""
        result = self.sharpness(problem)
        return SharpnessOutcome(
            _rounded(result.gradients, problem),
            problem.parameters,
            result.loss,
            result.perturbed_loss,
            max(result.norms, default=None),
            result.skipped,
        )

    def sharpness(self, problem: SharpnessProblem, replicas: int = 1) -> SharpnessAware:
        """Return the reference's result in float64."""
        examples = problem.examples
        return sharpness_aware_gradients(
            gradient_function(list(problem.parameters), list(examples.curvatures)),
            problem.parameters,
            as_batch(examples),
            problem.rule,
            step=problem.step,
            replicas=replicas,
        )

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Follow SAM, AGC and the optimizer in float64."""
        problem = task.problem
        dtypes = {name: value.dtype for name, value in problem.parameters.items()}
        weights = {name: value.astype(np.float64) for name, value in problem.parameters.items()}
        momenta = {name: np.zeros_like(value) for name, value in weights.items()}
        behind = Problem(problem.clipping or AGC(clipping=None), weights, {})
        out: list[Mapping[str, Array]] = []
        for step, examples in enumerate(task.batches):
            now = replace(problem, parameters=weights, examples=examples, step=step)
            result = self.sharpness(now)
            if not result.skipped:
                gradients = {name: g for name, g in result.gradients.items() if g is not None}
                weights, momenta = self.update(
                    Step(behind, task.optimizer, weights, momenta, gradients, step)
                )
            out.append({name: to_dtype(value, dtypes[name]) for name, value in weights.items()})
        return out

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute."""
        return self.sharpen(problem)

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Compute without the scale."""
        return self.sharpen(problem)

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Compute the result of all replicas together."""
        result = self.sharpness(problem, replicas)
        gradients = _rounded(result.gradients, problem)
        return SharpnessOutcome(gradients, problem.parameters, result.loss, skipped=result.skipped)

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute without the old gradients."""
        return self.sharpen(problem)

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Compute without the fixed parameters."""
        fixed = [*frozen, *absent]
        rule = replace(problem.rule, exclude=[*problem.rule.exclude, *fixed])
        outcome = self.sharpen(replace(problem, rule=rule))
        return replace(outcome, gradients={**outcome.gradients, **dict.fromkeys(fixed)})

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute with the loss of the second step, which is twice as large."""
        examples = problem.examples
        doubled = {name: 2 * value for name, value in examples.curvatures.items()}
        return self.sharpen(replace(problem, examples=replace(examples, curvatures=doubled)))

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        """Train by the suite's own float64 trajectory."""
        for step, _ in reference_run(task):
            yield step

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run an NFNet forward in float64."""
        return self.models.forward(problem)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run an NFNet forward and backward in float64, and clip."""
        return self.models.gradients(problem)

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train an NFNet in float64."""
        return self.models.training(problem, recipe)

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Train in float64, with a state in the recipe's dtype."""
        return _stored(self.training, recipe, launch)

    def processes(self, count: int) -> AbstractContextManager[Callable[[Recipe, Launch], Trainer]]:
        """Give trainers that take the batches of several processes."""
        return nullcontext(partial(_stored, self.training, processes=count))

    def elsewhere(self) -> Callable[[Recipe, Launch], Trainer]:
        """Make the same there."""
        return partial(_stored, self.training)


def _stored(
    kind: type[ReferenceTrainer], recipe: Recipe, launch: Launch, **options: Any
) -> Trainer:
    return kind(recipe, launch, dtype=recipe.precision.state, **options)
