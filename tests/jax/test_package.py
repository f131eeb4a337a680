"""What importing the adapter loads, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import agc_jax


def test_loads_jax_and_no_other_framework():
    code = "import sys, agc_jax; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"jax", "flax", "optax", "agc", "agc_jax"} <= loaded
    others = {"torch", "tensorflow", "keras", "haiku", "equinox", "agc_conformance"}
    assert not loaded & others


def test_public_names():
    assert {"NFNet", "from_neutral", "nfnet", "sgd_nfnet", "to_neutral"} <= set(agc_jax.__all__)


@pytest.mark.parametrize("name", agc_jax.__all__)
def test_public_names_are_documented(name):
    assert getattr(agc_jax, name).__doc__
