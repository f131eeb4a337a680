"""The step of ``agc train`` in JAX."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from agc.errors import ConfigError
from agc.nfnet import Masks
from agc.recipe import numbers
from agc.reference import sharpness_aware_gradients
from agc.training import Launch
from agc_conformance.training.recipes import KINDS, seeded_state
from agc_jax.devices import Devices, mesh
from agc_jax.train import (
    _Examples,
    _gradient,
    _mean_gradient,
    trainer,
)
from tests.contract.training import TrainingContract, batches_of, recipe_of
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")


class TestTraining(TrainingContract):
    """On two devices or eight: as many as divide the batch, or the groups of SAM in it.

    To compile a step takes longer than all else, so there are few different ones.
    """

    driver = JaxDriver()

    @pytest.mark.long
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("processes", "sam")])
    def test_level_5(self, kind):
        """The ascent on a spread fraction is in :func:`test_sharpness`."""
        super().test_level_5(kind)

    @pytest.mark.long
    def test_a_killed_process(self, monkeypatch):
        """It compiles as fast as this one."""
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        super().test_a_killed_process()

    def test_float64(self, tmp_path):
        """Enabled in the trainer alone."""
        super().test_float64(tmp_path)
        assert not jax.config.jax_enable_x64
        assert jax.numpy.ones(1, float).dtype == np.float32

    def test_part_of_the_model(self):
        super().test_steps("part", 4)

    @pytest.mark.parametrize("compute", ["bfloat16"])
    def test_resume_is_bit_equal(self, tmp_path, compute):
        super().test_resume_is_bit_equal(tmp_path, compute)

    def recipe_to_resume(self, compute):
        """Without SAM, which counts nothing here: the numbers of a step say whether it perturbs."""
        return replace(super().recipe_to_resume(compute), sam=None)


def test_processes_that_cannot_be_joined(monkeypatch):
    """Not where JAX was used before; nobody trains alone who was meant to have company."""
    recipe = recipe_of("plain")
    jax.devices()
    told = Launch(coordinator="127.0.0.1:1", processes=2, process=0)
    with pytest.raises(
        ConfigError, match=r"called before .* \(--processes 1\) trains without them"
    ):
        trainer(recipe, told)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match="JAX cannot join the other processes"):
        trainer(recipe, Launch())
    assert trainer(recipe, Launch(processes=1)).hosts.count == 1
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert trainer(recipe, Launch()).facts["devices"] == 8


def test_nothing_is_compiled_again(monkeypatch):
    """Not for other rates, thresholds and radii, nor after a state was loaded."""
    recipe = recipe_of("part")
    batches, table = batches_of(recipe), numbers(recipe)
    made = trainer(recipe, Launch(microbatch=4))
    made.load(seeded_state(recipe))
    for step in range(2):  # one perturbs, one does not
        made.step(batches[step], table.at(step))
    monkeypatch.delattr("agc_jax.train._gradient")
    made.load(made.state())
    made.step(batches[2], table.at(2))


def test_frozen_parameters_cost_no_gradient():
    """Of a classifier alone there are the convolutions of the forward pass."""
    recipe = recipe_of("plain")
    frozen = dict(seeded_state(recipe).parameters)
    trained = {name: frozen.pop(name) for name in ("head.weight", "head.bias")}
    batch = batches_of(recipe)[0]
    examples = _Examples(batch.images, np.ones((16, 10), np.float32), batch.masks)
    program = jax.make_jaxpr(partial(_gradient, recipe, 16, frozen))(trained, examples)
    convolutions = [name for name in frozen if "conv" in name and name.endswith(".gain")]
    shortcuts = [name for name in frozen if name.endswith("shortcut.gain")]
    found = str(program).count(" = conv_general_dilated[")
    assert found == len(convolutions) + len(shortcuts)


@pytest.mark.parametrize(
    ("case", "microbatch", "count", "sharded"),
    [
        ("group", 3, 1, False),
        ("batch", 16, 1, False),
        ("group", 4, 2, True),
        ("batch", 3, 8, True),
        ("batch", 1, 8, False),
    ],
)
def test_sharpness(monkeypatch, case, microbatch, count, sharded):
    """Of a linear model on one device and on several, of which some have no part in the ascent.

    The last micro-batch may be smaller than the others.
    """
    monkeypatch.setattr("agc_jax.train._model", lambda *_: lambda w, x, masks: x @ w["w"])
    recipe = recipe_of("group")
    assert recipe.sam
    if case == "batch":  # the ascent's examples are spread over the batch
        recipe = replace(recipe, sam=replace(recipe.sam, group="batch"))
    assert recipe.sam
    rng = np.random.default_rng(0)
    images, targets = (rng.random((16, size), np.float32) for size in (8, 3))
    weights = {"w": rng.random((8, 3), np.float32)}

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
    place = mesh("cpu" if count == 1 else None, count)
    devices = Devices(place, sharded=sharded, dtype="float32")
    assert devices.count == count
    split = devices.spec((8, 3))
    assert (split == PartitionSpec("data")) == sharded
    run = devices.mapped(
        partial(_mean_gradient, recipe, microbatch, devices),
        (PartitionSpec(), PartitionSpec(), PartitionSpec("data"), PartitionSpec()),
        (PartitionSpec(), {"w": split}, PartitionSpec()),
    )
    examples = _Examples(images, targets, Masks(None, None))
    loss, found, stats = jax.jit(run)(weights, {}, examples, np.float32(rule.rho))
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    assert float(stats.perturbed_loss) == pytest.approx(expected.perturbed_loss, rel=1e-5)
    np.testing.assert_allclose(found["w"], expected.gradients["w"], rtol=1e-4, atol=1e-6)
