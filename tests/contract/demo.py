"""The demo's training: it learns, clips, and stops when it must."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from agc.cli.demo import gratings, initial_values, learning_rates


class DemoContract:
    """``train`` is the framework's own training, as a static method."""

    train: Callable[..., Any]

    def run(self, clipping: float | None, peak: float, steps: int = 6) -> list[Any]:
        random = np.random.default_rng(0)
        batches = (gratings(random, 16) for _ in range(steps))
        test = gratings(np.random.default_rng(1), 32)
        rates = learning_rates(peak, steps)
        return list(self.train(initial_values(0), batches, rates, clipping, test))

    def test_demo(self):
        seen = self.run(0.01, 0.2)
        assert len(seen) == 7
        losses, shares = zip(*seen[:-1], strict=True)
        assert abs(losses[0] - math.log(10)) < 0.1
        assert all(0 < share < 0.1 for share in shares)
        assert 0 <= seen[-1][0] <= 1
        assert [share for _, share in self.run(None, 0.001)] == 7 * [0.0]
        lost = self.run(None, 1e30)
        assert not math.isfinite(lost[-1][0])
        assert len(lost) < 6
        again = self.run(0.01, 0.2)  # nothing is left of the others
        np.testing.assert_allclose(again, seen, rtol=1e-3)
