"""The demo's training."""

from agc_jax.commands import train


def test_demo(try_demo):
    try_demo(train)
