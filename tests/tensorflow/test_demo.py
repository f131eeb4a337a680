"""The demo's training."""

from agc_tensorflow.commands import train


def test_demo(try_demo):
    try_demo(train)
