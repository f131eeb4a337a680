"""The demo's training step: that it learns, that it clips, and that it stops when the loss is gone."""

from __future__ import annotations

import math

import numpy as np

from agc.demo import gratings, initial_values, learning_rates
from agc_torch.demo import train


def run(clipping, peak, steps=6):
    random = np.random.default_rng(0)
    batches = (gratings(random, 16) for _ in range(steps))
    rates = learning_rates(peak, steps)
    return list(train(initial_values(0), batches, rates, clipping, gratings(random, 32)))


def test_clipped_training():
    seen = run(0.01, 0.2)
    assert len(seen) == 7
    losses, shares = zip(*seen[:-1], strict=True)
    assert abs(losses[0] - math.log(10)) < 0.1
    assert all(0 < share < 1 for share in shares)
    assert 0 <= seen[-1][0] <= 1


def test_without_clipping_nothing_is_clipped():
    assert [share for _, share in run(None, 0.001)] == 7 * [0.0]


def test_it_stops_when_the_loss_is_not_finite():
    seen = run(None, 1e30)
    assert not math.isfinite(seen[-1][0])
    assert len(seen) < 6
