"""SAM: its gradient on a network, the probe of it, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from agc import AGC, SAM
from agc.errors import ConfigError, SelectorError
from agc.reference import sharpness_aware_gradients
from agc.schedule import Schedule
from tests.contract import Contract
from tests.contract.driver import SamProblem
from tests.helpers import Array, close

RULES = {
    "plain": SAM(rho=0.1),
    "adaptive": SAM(rho=0.5, adaptive=True, microbatches=2),
    "everything": SAM(
        rho=Schedule([(0, 0.3), (6, 0.1)]),
        every=2,
        microbatches=3,
        fraction=0.5,
        exclude=["*_bias"],
    ),
}

NONSENSE = [-1.0, 0.0, np.nan, np.inf]


def network(xp: Any, weights: Mapping[str, Any], x: Any, targets: Any) -> Any:
    """Return the cross-entropy of two layers, computed by NumPy or whatever is called like it."""
    hidden = xp.tanh(x @ weights["inner_weight"] + weights["inner_bias"])
    logits = hidden @ weights["outer_weight"] + weights["outer_bias"]
    return xp.mean(xp.log(xp.sum(xp.exp(logits), -1)) - xp.sum(targets * logits, -1))


def squares(xp: Any, weights: Mapping[str, Any]) -> Any:
    """Return the sum of squared magnitudes."""
    return sum(xp.sum(xp.square(xp.abs(array))) for array in weights.values())


def total(xp: Any, weights: Mapping[str, Any]) -> Any:
    """Return the sum."""
    return sum(xp.sum(array) for array in weights.values())


def network_weights() -> dict[str, Array]:
    random = np.random.default_rng(0)
    shapes = {"inner_weight": (6, 8), "inner_bias": 8, "outer_weight": (8, 3), "outer_bias": 3}
    return {name: 0.5 * random.standard_normal(shape) for name, shape in shapes.items()}


def network_problem(
    rule: SAM | None = None, step: int | None = None, examples: int = 20
) -> SamProblem:
    random = np.random.default_rng(7)
    targets = np.eye(3)[random.integers(0, 3, examples)]
    batch = random.standard_normal((examples, 6)), targets
    return SamProblem(rule, network, network_weights(), batch, step)


def value_and_gradients(
    weights: Mapping[str, Array], batch: Iterable[Array]
) -> tuple[float, dict[str, Array]]:
    """Return the network's loss and its derivatives, by imaginary steps: exact up to rounding."""
    gradients = {name: np.empty_like(value) for name, value in weights.items()}
    for name, value in weights.items():
        for index in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[index] += 1e-30j
            gradients[name][index] = network(np, {**weights, name: moved}, *batch).imag / 1e-30
    return float(network(np, weights, *batch)), gradients


class SamContract(Contract):
    """SAM of any framework.

    Attributes
    ----------
    batch_cure : str
        Pattern of what the framework is told to do when a rule needs a batch.
    """

    batch_cure: str

    def choices(self) -> Mapping[str, Iterable[Any]]:
        return {"sam_mode": self.driver.sam_modes}

    @pytest.mark.parametrize("step", [2, 3])
    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    def test_gradients_equal_the_reference(self, rule, step, sam_mode):
        problem = network_problem(rule, step)
        expected = sharpness_aware_gradients(
            value_and_gradients, problem.weights, problem.batch, rule, step=step
        )
        answer = self.driver.sharpen(problem, sam_mode)
        assert answer.loss == pytest.approx(expected.loss, rel=1e-12)
        assert answer.perturbed_loss == pytest.approx(expected.perturbed_loss, rel=1e-12)
        assert answer.norm == pytest.approx(max(expected.norms, default=0), rel=1e-12)
        for name, gradient in expected.gradients.items():
            close(answer.gradients[name], gradient, 1e-12)

    @pytest.mark.parametrize("step", [0, 1])
    def test_the_norm_is_wide(self, step):
        """Gradients fit float16, their norm does not; a plain step has none."""
        weights = {name: np.zeros(1, "float16") for name in ("a", "b")}

        def loss(xp, w):
            return xp.sum(60000.0 * w["a"] - 60000.0 * w["b"])

        problem = SamProblem(SAM(every=2), loss, weights, step=step)
        for mode in {"eager", *self.driver.sam_modes}:  # a compiler may compute wider
            norm = self.driver.sharpen(problem, mode).norm
            assert norm == pytest.approx(0 if step else 60000 * math.sqrt(2), rel=1e-3)

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    def test_complex_weights_move_uphill(self, dtype, adaptive):
        weights = {"a": np.array([[2j, 2j]], dtype), "b": np.array([3 - 4j], dtype)}
        rule = SAM(rho=0.5, adaptive=adaptive, eta=0.0)
        answer = self.driver.sharpen(SamProblem(rule, squares, weights))
        # Scales are magnitudes of the weights, of matrices only; the gradient is twice the weight.
        scale = {"a": 2 if adaptive else 1, "b": 1}
        norm = np.linalg.norm([*2 * [scale["a"] * 4], 10])
        assert answer.norm == pytest.approx(norm, rel=1e-6)
        moved = {name: w * (1 + scale[name] ** 2 / norm) for name, w in weights.items()}
        assert answer.loss == pytest.approx(33)
        assert answer.perturbed_loss == pytest.approx(squares(np, moved), rel=1e-6)
        for name, value in moved.items():
            assert answer.gradients[name].dtype == dtype
            np.testing.assert_allclose(answer.gradients[name], 2 * value, rtol=1e-6)

    @pytest.mark.parametrize("rho", NONSENSE)
    def test_nonsense_of_a_schedule(self, rho):
        rule = SAM(rho=lambda step: step / step * rho, every=2)
        with pytest.raises(ConfigError, match=r"rho: the schedule returned .* a finite number > 0"):
            self.sharpen_ones(rule, step=4)
        assert self.sharpen_ones(rule, step=5).loss == 3  # not perturbed

    @pytest.mark.parametrize("rule", [None, 0.05, {"rho": 0.05}, AGC(), SAM], ids=str)
    def test_what_is_no_rule(self, rule):
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got "):
            self.sharpen_ones(rule)

    def test_nothing_to_perturb(self):
        with pytest.raises(SelectorError, match="no parameter is left to perturb"):
            self.sharpen_ones(SAM(exclude=["*"]))
        with pytest.raises(SelectorError, match="matches no parameter; the names are: w"):
            self.sharpen_ones(SAM(only=["head.*"]))

    def test_parts_of_no_batch(self):
        with pytest.raises(ConfigError, match=rf"fraction=0.2 .* {self.batch_cure}"):
            self.sharpen_ones(SAM(fraction=0.2))

    def sharpen_ones(self, rule, mode="eager", **step):
        return self.driver.sharpen(SamProblem(rule, squares, {"w": np.ones(3)}, **step), mode)


class SamFunctionContract(SamContract):
    """SAM as a function of the loss, which is given the step and can be traced.

    Attributes
    ----------
    step_cure : str
        Pattern of what the framework is told to do when a rule needs the step.
    """

    step_cure: str

    @pytest.mark.parametrize("nonfinite", ["skip_step", "skip_perturb"])
    @pytest.mark.parametrize("rho", NONSENSE)
    @pytest.mark.parametrize("loss", [squares, total])
    def test_nonsense_of_a_traced_schedule(self, loss, rho, nonfinite):
        """It cannot raise, so the gradient is NaN, even one that is the same everywhere."""
        rule = SAM(rho=lambda step: step / step * rho, nonfinite=nonfinite)
        problem = SamProblem(rule, loss, {"w": np.ones(3)}, step=4)
        assert np.isnan(self.driver.sharpen(problem, "traced").gradients["w"]).all()

    @pytest.mark.parametrize("rule", [SAM(every=2), SAM(rho=lambda _: 0.1)], ids=["every", "rho"])
    def test_a_step_is_needed(self, rule):
        with pytest.raises(ConfigError, match=self.step_cure):
            self.sharpen_ones(rule)


class VerifyContract(Contract):
    """The probe sees SAM, and what is none."""

    def test_ours(self):
        seen = self.driver.verify_sam(network_problem(SAM(rho=0.05)))
        assert seen.ok
        assert seen.perturbation == pytest.approx(0.05, rel=1e-9)
        assert seen.cosine == pytest.approx(1, rel=1e-9)
        assert seen.gradient_error < 1e-12

    def test_a_plain_gradient_is_not_sam(self):
        seen = self.driver.verify_sam(network_problem(None))
        assert not seen.ok
        assert seen.passes == 1
