"""The SAM reference against numbers worked by hand, and its errors; the suite has the rest."""

import numpy as np
import pytest

from agc.config import SAM
from agc.errors import ConfigError, SelectorError
from agc.reference import perturbation, sharpness_aware_gradients


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


def test_a_perturbation_by_hand():
    e, norm = perturbation({"w": np.array([3.0, 4.0])}, {"w": np.ones(2)}, SAM(rho=0.5))
    assert norm == pytest.approx(5, rel=1e-15)
    assert e["w"] == pytest.approx([0.3, 0.4], rel=1e-15)


@pytest.mark.parametrize("size", [1e-200, 1e-20, 1.0, 1e200])
def test_length_is_rho_whatever_the_scale(size):
    e, _ = perturbation({"w": size * np.array([1.0, -2.0])}, {"w": np.ones(2)}, SAM(rho=0.25))
    assert np.linalg.norm(e["w"]) == pytest.approx(0.25, rel=1e-15)


def test_a_gradient_by_hand():
    """L = w^2 / 2 at w = 1: e = rho, so the gradient is 1 + rho."""
    weights, batch = {"w": np.ones(1), "unused": np.ones(2)}, [np.ones((1, 1)), np.zeros((1, 1))]
    out = sharpness_aware_gradients(quadratic, weights, batch, SAM())
    assert out.gradients["w"].item() == pytest.approx(1.05)
    assert (out.loss, out.perturbed_loss) == (0.5, pytest.approx(1.05**2 / 2))
    assert out.gradients["unused"] is None


def test_weights_are_not_changed(problem):
    weights, batch = problem
    before = weights["w"].copy()
    sharpness_aware_gradients(quadratic, weights, batch, SAM())
    assert np.array_equal(weights["w"], before)


def test_every_microbatch_has_a_norm(problem):
    assert len(sharpness_aware_gradients(quadratic, *problem, SAM(microbatches=3)).norms) == 3


def test_a_pattern_that_matches_nothing_is_named(problem):
    weights, batch = problem
    with pytest.raises(SelectorError, match="only: the pattern 'c' matches no parameter"):
        perturbation(quadratic(weights, batch)[1], weights, SAM(only=["c"]))


@pytest.mark.parametrize("step", [-1, "a", 0.5])
def test_steps_are_integers_from_0_on(problem, step):
    weights, batch = problem
    with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
        sharpness_aware_gradients(quadratic, weights, batch, SAM(), step=step)
    with pytest.raises(ConfigError, match=f"step must be an integer >= 0, got {step!r}"):
        perturbation(quadratic(weights, batch)[1], weights, SAM(), step=step)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (0, "replicas must be an integer >= 1, got 0"),
        (3, "10 examples cannot be split over 3 replicas"),
    ],
)
def test_replicas_have_equal_parts(problem, replicas, message):
    with pytest.raises(ConfigError, match=message):
        sharpness_aware_gradients(quadratic, *problem, SAM(), replicas=replicas)
