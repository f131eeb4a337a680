"""The step of ``agc train`` in JAX."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from agc.errors import ConfigError
from agc.nfnet import Masks
from agc.recipe import load_recipe, numbers
from agc.reference import sharpness_aware_gradients
from agc.training import Launch
from agc_conformance.training.recipes import KINDS, SHORT, seeded_state
from agc_jax.train import _Examples, _gradient, _sharpness_aware, trainer
from tests.contract.training import TrainingContract, batches_of, recipe_of
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestTraining(TrainingContract):
    """To compile a step takes longer than all else, so there are few different ones."""

    driver = JaxDriver()

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sam"])
    def test_level_5(self, kind):
        """The ascent on a spread fraction is in :func:`test_sharpness`."""
        super().test_level_5(kind)

    @pytest.mark.parametrize("compute", ["bfloat16"])
    def test_resume_is_bit_equal(self, tmp_path, compute):
        super().test_resume_is_bit_equal(tmp_path, compute)

    def recipe_to_resume(self, compute):
        """Without SAM, which counts nothing here: the numbers of a step say whether it perturbs."""
        return replace(super().recipe_to_resume(compute), sam=None)


def test_recipes_that_are_not_offered():
    low = ["precision.compute=bfloat16", "precision.standardise=bfloat16"]
    with pytest.raises(ConfigError, match=r"set precision\.standardise=float32"):
        trainer(load_recipe("conformance", low), Launch())


def test_nothing_is_compiled_again(monkeypatch):
    """Not for other rates, thresholds and radii, nor after a state was loaded."""
    recipe = SHORT.recipe  # as level 5 has compiled it
    batches, table = batches_of(recipe), numbers(recipe)
    made = trainer(recipe, Launch(microbatch=SHORT.microbatches[0]))
    made.load(seeded_state(recipe))
    for step in range(2):  # one perturbs, one does not
        made.step(batches[step], table.at(step))
    monkeypatch.delattr("agc_jax.train._gradient")
    made.load(made.state())
    made.step(batches[2], table.at(2))


@pytest.mark.parametrize("microbatch", [16, 3])
@pytest.mark.parametrize("case", ["group", "batch"])
def test_sharpness(monkeypatch, case, microbatch):
    """Of a linear model, in groups or not; the last micro-batch may be smaller than the others."""
    monkeypatch.setattr("agc_jax.train._model", lambda *_: lambda w, x, masks: x @ w["w"])
    recipe = recipe_of("group")
    assert recipe.sam
    if case == "batch":  # the ascent's examples are spread over the batch
        recipe = replace(recipe, sam=replace(recipe.sam, group="batch"))
    assert recipe.sam
    rng = np.random.default_rng(0)
    images, targets = (rng.random((16, size), np.float32) for size in (5, 3))
    weights = {"w": rng.random((5, 3), np.float32)}

    def gradients(weights, batch):
        x, targets = batch
        exponentials = np.exp(x @ weights["w"])
        shares = exponentials / exponentials.sum(1, keepdims=True)
        wide = targets.sum(1, keepdims=True) * shares - targets
        return -np.mean(np.sum(targets * np.log(shares), 1)), {"w": x.T @ wide / len(x)}

    first = list(recipe.sam.ascent(16)) if case == "batch" else []
    order = first + [n for n in range(16) if n not in first]
    rule = replace(recipe.sam.rule, microbatches=1 if case == "batch" else 2)
    batch = [array[order].astype(np.float64) for array in (images, targets)]
    expected = sharpness_aware_gradients(gradients, weights, batch, rule, step=0)
    run = jax.jit(partial(_sharpness_aware, recipe, partial(_gradient, recipe, microbatch)))
    examples = _Examples(images, targets, Masks(None, None))
    loss, found, stats = run(np.float32(rule.rho), weights, examples)
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    assert float(stats.perturbed_loss) == pytest.approx(expected.perturbed_loss, rel=1e-5)
    np.testing.assert_allclose(found["w"], expected.gradients["w"], rtol=1e-4, atol=1e-6)
