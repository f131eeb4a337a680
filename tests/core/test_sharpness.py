"""The SAM reference against hand-worked numbers and properties."""

import math

import numpy as np
import pytest

from agc import AGC
from agc.config import SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, SelectorError
from agc.plan import Parameter, make_plan
from agc.reference import adaptive_clip, perturbation, sharpness_aware_gradients
from agc.schedule import Schedule


def quadratic(weights, batch):
    """Mean of ``0.5 * a * (w - b)^2`` over examples (a, b), with an unused parameter."""
    a, b = batch
    w = weights["w"]
    loss = float(np.mean(np.sum(0.5 * a * (w - b) ** 2, axis=-1)))
    return loss, {"w": np.mean(a * (w - b), axis=0), "unused": None}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=3), "unused": np.ones(2)}
    return weights, [rng.lognormal(size=(10, 3)), rng.normal(size=(10, 3))]


class TestPerturbation:
    def test_by_hand(self):
        e, norm = perturbation({"w": np.array([3.0, 4.0])}, {"w": np.ones(2)}, SAM(rho=0.5))
        assert norm == pytest.approx(5, rel=1e-15)
        assert e["w"] == pytest.approx([0.3, 0.4], rel=1e-15)

    def test_one_norm_over_all_parameters(self):
        ones = {"a": np.ones(1), "b": np.ones(1)}
        e, norm = perturbation({"a": np.array([3.0]), "b": np.array([4.0])}, ones, SAM(rho=1))
        assert (norm, e["a"].item(), e["b"].item()) == pytest.approx((5, 0.6, 0.8), rel=1e-15)

    def test_adaptive_by_hand(self):
        """T is |w| + eta for the matrix and 1 for the vector."""
        weights = {"m": np.array([[2.0]]), "v": np.array([7.0])}
        rule = SAM(rho=1.0, adaptive=True, eta=1.0)
        e, norm = perturbation({"m": np.array([[1.0]]), "v": np.array([4.0])}, weights, rule)
        assert norm == pytest.approx(5, rel=1e-15)  # sqrt((3 * 1)^2 + 4^2)
        assert (e["m"].item(), e["v"].item()) == pytest.approx((9 / 5, 4 / 5), rel=1e-15)

    @pytest.mark.parametrize("size", [1e-200, 1e-20, 1.0, 1e200])
    def test_length_is_rho_whatever_the_scale(self, size):
        e, _ = perturbation({"w": size * np.array([1.0, -2.0])}, {"w": np.ones(2)}, SAM(rho=0.25))
        assert np.linalg.norm(e["w"]) == pytest.approx(0.25, rel=1e-15)

    def test_zero_gradient_does_not_move(self):
        e, norm = perturbation({"w": np.zeros(2)}, {"w": np.ones(2)}, SAM())
        assert norm == 0
        assert e["w"].tolist() == [0, 0]

    def test_eps_of_a_profile_shrinks_it(self):
        e, _ = perturbation({"w": np.array([1e-12])}, {"w": np.ones(1)}, SAM.profile("davda54"))
        assert e["w"].item() == pytest.approx(0.05 / 2)

    def test_excluded_is_not_in_the_norm(self):
        gradients = {"a": np.array([3.0]), "b": np.array([4.0])}
        ones = {"a": np.ones(1), "b": np.ones(1)}
        for rule in (SAM(rho=1, only=["a"]), SAM(rho=1, exclude=["b"])):
            e, norm = perturbation(gradients, ones, rule)
            assert (norm, list(e), e["a"].item()) == (3, ["a"], 1)

    def test_errors(self):
        ones = {"a": np.ones(1), "b": np.ones(1)}
        with pytest.raises(SelectorError, match="only: the pattern 'c' matches no parameter"):
            perturbation(ones, ones, SAM(only=["c"]))
        with pytest.raises(SelectorError, match="no parameter is left to perturb"):
            perturbation(ones, ones, SAM(exclude=["*"]))
        with pytest.raises(MissingGradientError, match="no perturbed parameter has a gradient"):
            perturbation({"a": None, "b": np.ones(1)}, ones, SAM(only=["a"]))


class TestGradients:
    def test_by_hand(self):
        """L = w^2 / 2 at w = 1: e = rho, so the gradient is 1 + rho."""
        batch = [np.ones((1, 1)), np.zeros((1, 1))]
        out = sharpness_aware_gradients(
            quadratic, {"w": np.ones(1), "unused": np.ones(2)}, batch, SAM()
        )
        assert out.gradients["w"].item() == pytest.approx(1.05)
        assert (out.loss, out.perturbed_loss) == (0.5, pytest.approx(1.05**2 / 2))
        assert out.gradients["unused"] is None

    def test_weights_are_not_changed(self, problem):
        weights, batch = problem
        before = weights["w"].copy()
        sharpness_aware_gradients(quadratic, weights, batch, SAM())
        assert np.array_equal(weights["w"], before)

    def test_fraction_takes_the_first_examples_of_the_same_batch(self, problem):
        weights, batch = problem
        out = sharpness_aware_gradients(quadratic, weights, batch, SAM(fraction=0.25))
        e, _ = perturbation(quadratic(weights, [array[:3] for array in batch])[1], weights, SAM())
        _, want = quadratic({**weights, "w": weights["w"] + e["w"]}, batch)
        assert np.allclose(out.gradients["w"], want["w"], rtol=1e-15)

    def test_micro_batches_are_averaged_by_example_count(self, problem):
        weights, batch = problem
        out = sharpness_aware_gradients(quadratic, weights, batch, SAM(microbatches=3))
        parts = [slice(0, 4), slice(4, 7), slice(7, 10)]
        want = 0
        for part in parts:
            piece = [array[part] for array in batch]
            inner = sharpness_aware_gradients(quadratic, weights, piece, SAM())
            want = want + len(piece[0]) / 10 * inner.gradients["w"]
        assert np.allclose(out.gradients["w"], want, rtol=1e-14)
        assert len(out.norms) == 3

    def test_equal_micro_batches_are_sam(self, problem):
        """A mean; a peer's sum doubles the learning rate here."""
        weights, batch = problem
        twice = [np.concatenate([array, array]) for array in batch]
        plain = sharpness_aware_gradients(quadratic, weights, batch, SAM()).gradients["w"]
        split = sharpness_aware_gradients(quadratic, weights, twice, SAM(microbatches=2))
        assert np.allclose(plain, split.gradients["w"], rtol=1e-15)

    def test_local_replicas_are_micro_batches_and_global_is_one(self, problem):
        weights, batch = problem
        local = sharpness_aware_gradients(quadratic, weights, batch, SAM(), replicas=2)
        micro = sharpness_aware_gradients(quadratic, weights, batch, SAM(microbatches=2))
        assert np.allclose(local.gradients["w"], micro.gradients["w"], rtol=1e-15)
        shared = sharpness_aware_gradients(
            quadratic, weights, batch, SAM(scope="global"), replicas=2
        )
        one = sharpness_aware_gradients(quadratic, weights, batch, SAM())
        assert np.allclose(shared.gradients["w"], one.gradients["w"], rtol=1e-14)
        assert not np.allclose(local.gradients["w"], one.gradients["w"], rtol=1e-6)

    def test_every(self, problem):
        weights, batch = problem
        plain = quadratic(weights, batch)[1]["w"]
        same = [
            np.array_equal(
                sharpness_aware_gradients(
                    quadratic, weights, batch, SAM(every=3), step=step
                ).gradients["w"],
                plain,
            )
            for step in range(6)
        ]
        assert same == [False, True, True, False, True, True]

    def test_schedule_of_rho(self):
        batch = [np.ones((1, 1)), np.zeros((1, 1))]
        rule = SAM(rho=Schedule([(0, 0.1), (10, 0.2)]))
        weights = {"w": np.ones(1), "unused": np.ones(2)}
        out = sharpness_aware_gradients(quadratic, weights, batch, rule, step=5)
        assert out.gradients["w"].item() == pytest.approx(1.15)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_nonfinite(self, problem, poison):
        weights, batch = problem
        batch[1][0, 0] = poison
        out = sharpness_aware_gradients(quadratic, weights, batch, SAM())
        assert out.skipped
        assert out.gradients == {}
        with pytest.raises(NonFiniteError, match="norm of the ascent gradient"):
            sharpness_aware_gradients(quadratic, weights, batch, SAM(nonfinite="raise"))

    def test_skip_perturb_takes_the_plain_gradient(self, problem):
        weights, batch = problem

        def poisoned(point, part):
            loss, gradients = quadratic(point, part)
            if np.array_equal(point["w"], weights["w"]) and len(part[0]) < 10:
                gradients["w"] = gradients["w"] * math.inf
            return loss, gradients

        rule = SAM(fraction=0.5, nonfinite="skip_perturb")
        out = sharpness_aware_gradients(poisoned, weights, batch, rule)
        assert np.array_equal(out.gradients["w"], quadratic(weights, batch)[1]["w"])

    @pytest.mark.parametrize("step", [-1, "a", 0.5])
    def test_steps_are_integers_from_0_on(self, problem, step):
        weights, batch = problem
        with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
            sharpness_aware_gradients(quadratic, weights, batch, SAM(), step=step)
        with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
            perturbation(quadratic(weights, batch)[1], weights, SAM(), step=step)

    def test_batch_errors(self, problem):
        weights, batch = problem
        with pytest.raises(ConfigError, match="replicas must be an integer >= 1, got 0"):
            sharpness_aware_gradients(quadratic, weights, batch, SAM(), replicas=0)
        with pytest.raises(ConfigError, match="10 examples cannot be split over 3 replicas"):
            sharpness_aware_gradients(quadratic, weights, batch, SAM(), replicas=3)
        with pytest.raises(ConfigError, match="microbatches=11 is more than the 10 examples"):
            sharpness_aware_gradients(quadratic, weights, batch, SAM(microbatches=11))

    def test_agc_clips_the_final_gradient_against_the_restored_weights(self, problem):
        """SAM-6: neither the ascent gradient nor the perturbed weights meet AGC."""
        weights, batch = problem
        rule = AGC(clipping=0.1)
        plan = make_plan([Parameter(name, w.shape) for name, w in weights.items()], rule)
        out = sharpness_aware_gradients(quadratic, weights, batch, SAM(rho=0.5))
        clipped = adaptive_clip(weights, out.gradients, plan, rule).gradients["w"]
        assert np.linalg.norm(clipped) == pytest.approx(0.1 * np.linalg.norm(weights["w"]))
