"""What importing the adapter loads, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import agc_torch


def test_loads_torch_and_no_other_framework():
    code = "import sys, agc_torch; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "agc", "agc_torch"} <= loaded
    others = {"jax", "tensorflow", "keras", "flax", "optax", "transformers", "agc_conformance"}
    assert not loaded & others


@pytest.mark.parametrize("name", agc_torch.__all__)
def test_public_names_are_documented(name):
    assert getattr(agc_torch, name).__doc__
