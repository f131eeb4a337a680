"""conformance/README.md says what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from agc.cli import main
from agc_conformance.diagnosis import diagnose, killers
from agc_conformance.flags import FLAGS
from agc_conformance.mutants import MUTANTS, checks
from agc_conformance.records import make_result
from agc_conformance.vectors import load_vectors

FOLDER = Path(__file__).parents[2] / "conformance"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
EXAMPLE = (FOLDER / "examples" / "my_backend.py").read_text(encoding="utf-8")


def test_the_example_is_the_file() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert code == EXAMPLE


def test_the_example_is_short() -> None:
    assert EXAMPLE.count("\n") < 40


def test_the_counts_are_right() -> None:
    assert f"{len(load_vectors())} published vectors" in README
    assert f"the {len(FLAGS)} bug classes" in README
    nfnets = sum(mutant.wing == "nfnets" for mutant in MUTANTS)
    assert f"runs {len(MUTANTS) - nfnets} wrong implementations" in README
    assert f"and {nfnets} wrong NFNets" in README


def test_the_diagnosis_is_what_a_run_says() -> None:
    fails = killers()["squeeze"]
    results = [
        make_result(
            key.rpartition(":")[0],
            clause="AGC-1",
            level="L1",
            status="failed" if key in fails else "passed",
            dtype=key.rpartition(":")[2],
        )
        for key in checks("clipping")
    ]
    (said,) = re.findall(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert [" ".join(said.split())] == diagnose(results)


def test_the_steps_of_a_ci_are_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run on the example, which fails, and with few checks."""
    (steps,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in re.findall(r"^- run: (.*)", steps, re.MULTILINE)]
    assert commands.pop(0) == ["pip", "install", ".", "agc-sam[conformance]"]
    assert [command[:3] for command in commands] == [
        ["agc", "conformance", "run"],
        ["agc", "conformance", "report"],
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(EXAMPLE)
    commands[0] += ["--select", "L1-error-*", "--no-train", "--no-models"]
    assert [main(command[1:]) for command in commands] == [1, 1]
    assert (tmp_path / "agc-report" / "junit.xml").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (FOLDER / target).exists(), target
