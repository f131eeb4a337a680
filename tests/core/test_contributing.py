"""CONTRIBUTING.md names files and sessions that exist."""

import re
from pathlib import Path

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
