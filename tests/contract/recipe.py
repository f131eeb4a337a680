"""DeepMind's optimizer, made from the framework's own parts."""

from __future__ import annotations

import numpy as np
import pytest

from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, SelectorError
from agc_conformance.nfnets.golden import LIMITS, OPTIMIZER
from tests.contract import Contract
from tests.contract.nfnet import SHALLOW
from tests.helpers import norm


class RecipeContract(Contract):
    @pytest.mark.long
    def test_golden_steps(self, way):
        model, batch = self.driver.seeded(), core.seeded_batch(2, 32)
        start = self.driver.adapter.to_neutral(model)
        optimizer = self.driver.optimizer(model, 0.1, way)
        totals = []
        for golden in OPTIMIZER:
            loss = optimizer.step(*batch)
            totals.append(optimizer.total())
            found = self.driver.adapter.to_neutral(model)
            assert abs(loss - golden.loss) <= LIMITS["float64"].loss
            assert norm(found.values()) == pytest.approx(golden.parameter_norm, abs=1e-11)
            assert found["stages.0.0.skip_gain"] == pytest.approx(golden.skip_gain, abs=1e-12)
            assert norm([found["head.bias"]]) == pytest.approx(golden.head_bias_norm, rel=1e-12)
            moved = [value - start[name] for name, value in found.items()]
            assert norm(moved) == pytest.approx(golden.distance, rel=1e-12)
        assert (totals[0].clipped, totals[0].units) == (254, 4855)

    def test_weight_decay(self):
        """Coupled, on weights only, and after clipping: with gradients of 0 nothing else is
        left.
        """
        model = self.driver.seeded(SHALLOW)
        before = self.driver.adapter.to_neutral(model)
        self.driver.optimizer(model, 0.5, weight_decay=0.25).update(0.0)
        after = self.driver.adapter.to_neutral(model)
        for spec in core.parameters(SHALLOW):
            # Nesterov's first step is 1 + 0.9 times the gradient.
            factor = 1 - 0.5 * 0.25 * 1.9 if spec.decays else 1
            np.testing.assert_allclose(after[spec.name], factor * before[spec.name], rtol=1e-14)

    def test_other_rules_and_models(self):
        model = self.driver.two_layers()
        with pytest.raises(SelectorError, match="does not declare one"):
            self.driver.optimizer(model, 0.1)
        optimizer = self.driver.optimizer(model, 0.1, momentum=0.0, rule=AGC(clipping=100.0))
        before = {
            name: np.asarray(value).copy() for name, value in self.driver.parameters(model).items()
        }
        optimizer.update(0.01)
        total = optimizer.total()
        assert (total.clipped, total.units) == (0, 4 + 2 + 1 + 1)
        assert not optimizer.has_momentum()
        for name, value in self.driver.parameters(model).items():
            decay = 2e-5 * before[name] if before[name].ndim > 1 else 0.0
            np.testing.assert_allclose(value, before[name] - 0.1 * (0.01 + decay), rtol=1e-5)

    @pytest.mark.parametrize(
        "options", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}]
    )
    def test_bad_options(self, options):
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name} must be a number"):
            self.driver.optimizer(self.driver.blank(SHALLOW), 0.1, **options)
