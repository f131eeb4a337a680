"""CONTRIBUTING.md names files and sessions that exist, and those of every adapter."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_paths_exist():
    paths = [path for path in re.findall(r"`([\w./-]+)`", TEXT) if "/" in path or "." in path]
    assert len(paths) > 10
    missing = [
        path
        for path in paths
        if not (ROOT / path).exists() and not list((ROOT / "conformance").rglob(path))
    ]
    assert not missing


def test_sessions_exist():
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = {
        name for command in re.findall(r"nox -s ([\w ]+)", TEXT) for name in command.split()
    }
    assert sessions >= {"lint", "typing", "tests", "conformance"}
    assert not {name for name in sessions if f"def {name}(" not in noxfile}


EXTRAS = {  # what only one framework needs
    "torch": {"ascent", "fused", "passes", "processes", "shards", "triton_kernels"},
    "jax": {"devices", "leaf_names"},
    "tensorflow": {"devices"},
}


@pytest.mark.parametrize("framework", EXTRAS)
def test_adapters_have_the_files_that_it_names(framework):
    (order,) = re.findall(r"`(units layers [\w ]+)`, in this order", TEXT)
    others = {"__init__", "commands"} | EXTRAS[framework]
    files = {path.stem for path in (ROOT / "adapters" / f"agc_{framework}").glob("*.py")}
    assert files - others == set(order.split())
