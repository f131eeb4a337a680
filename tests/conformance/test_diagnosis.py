"""Diagnoses: mutants are told by what they fail, and other failures are not given a name."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc.cli import main
from agc_conformance.backend import Outcome, Problem
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.diagnosis import KILLERS, diagnose, killers, nearest
from agc_conformance.mutants import MUTANTS, checks, run_mutant
from agc_conformance.records import ResultRecord, Status, make_result
from agc_conformance.runner import cases, run_case
from agc_conformance.vectors import digest, load_vectors

TOLD = {mutant.name: mutant for mutant in MUTANTS if mutant.wing in ("clipping", "sharpness")}


def results(failing: frozenset[str], *dtypes: str) -> list[ResultRecord]:
    """Return the results of a backend that fails some checks and takes some dtypes."""
    made = []
    for key in [*checks("clipping"), *checks("sharpness")]:
        name, _, dtype = key.rpartition(":")
        status: Status = "failed" if key in failing else "passed"
        if dtypes and not set(dtype.split("/")) <= {"-", *dtypes}:
            status = "unsupported"
        made.append(make_result(name, clause="", level="", status=status, dtype=dtype))
    return made


def test_the_table_is_that_of_these_vectors_and_mutants() -> None:
    assert json.loads(KILLERS.read_text(encoding="utf-8"))["vectors"] == digest(), (
        "run: agc conformance teeth --write"
    )
    assert list(killers()) == list(TOLD)


@pytest.mark.parametrize("name", ["tie clipped", "SAM: rho squared"])
def test_the_table_says_what_a_mutant_fails(name: str) -> None:
    """All of them are checked by the command ``teeth``."""
    assert killers()[name] == set(run_mutant(TOLD[name], load_vectors()))


UNCHECKED = frozenset(key for key in checks("clipping") if key.startswith("L1-error"))
"""What an implementation fails that accepts any input, as most do."""


@pytest.mark.parametrize(
    ("dtypes", "also", "least"),
    [((), frozenset(), 120), (("float32",), frozenset(), 115), (("float32",), UNCHECKED, 115)],
)
def test_a_mutant_is_told_by_what_it_fails(
    dtypes: tuple[str, ...], also: frozenset[str], least: int
) -> None:
    told = 0
    for name, mutant in TOLD.items():
        more = also if mutant.wing == "clipping" else frozenset()
        sentences = diagnose(results(killers()[name] | more, *dtypes))
        told += bool(sentences)
        assert all(f"({mutant.flag}; mutant" in sentence for sentence in sentences), name
    assert told >= least


class Lazy(ReferenceBackend):
    """Clips nothing."""

    dtypes = frozenset({"float32"})

    def clip(self, problem: Problem) -> Outcome:
        return Outcome(problem.gradients)


class Hopeless(Lazy):
    """Answers nothing."""

    def clip(self, problem: Problem) -> Outcome:
        raise RuntimeError


class ByValue(Lazy):
    """Clips every element to the threshold, which is not AGC."""

    def clip(self, problem: Problem) -> Outcome:
        def clipped(name: str) -> Any:
            g, c = problem.gradients[name], problem.rule.clipping
            return np.clip(g, -c, c) if isinstance(g, np.ndarray) and isinstance(c, float) else g

        return Outcome({name: clipped(name) for name in problem.gradients})


@pytest.mark.parametrize("backend", [Lazy, Hopeless, ByValue])
def test_what_resembles_many_mutants_is_not_given_a_name(backend: type[ReferenceBackend]) -> None:
    asked = [case for case in cases(load_vectors()) if case[1] == "float32"]
    records = [run_case(backend(), *case) for case in asked if case[0].kind == "clip"]
    assert sum(record["status"] in ("failed", "error") for record in records) > 50
    assert diagnose(records) == []
    assert diagnose(results(frozenset([*checks("clipping"), *checks("sharpness")]))) == []


@pytest.mark.parametrize("wing", ["clipping", "sharpness"])
def test_what_fails_all_that_it_was_asked_is_not_given_a_name(wing: str) -> None:
    """A selection, or a backend that offers little, asks too few checks to tell mutants apart."""
    for name in ("L1-layer-*", "L1-sam-*", "L1-tie*"):
        asked = frozenset(key for key in checks(wing) if fnmatchcase(key, name))
        records = [r for r in results(asked) if f"{r['id']}:{r['dtype']}" in asked]
        assert diagnose(records) == [], name


def test_two_mutants_together() -> None:
    (sentence,) = diagnose(results(killers()["squeeze"] | killers()["NaN passes"], "float32"))
    assert sentence.startswith("AGC behaves as if axes of size 1 are squeezed away")
    assert " and a unit poisoned by NaN passes unclipped (NaNPasses; mutant NaN passes)" in sentence


def test_how_near_is_near() -> None:
    keys = {"a": "abcdefghij", "b": "abcde", "c": "k"}
    fails = {(name,): frozenset(checks) for name, checks in keys.items()}
    asked = frozenset("abcdefghijklmnopq")
    assert nearest(frozenset("abcdefghijk"), asked, fails) == [("a",)]
    assert nearest(frozenset("abcdefghij"), asked, fails) == [("a",)]
    assert nearest(frozenset("acegik"), asked, fails) == []
    assert nearest(frozenset(), asked, fails) == []
    # Both fail nearly all, and pass different checks.
    assert nearest(frozenset("abcdefghij"), frozenset("abcdefghijk"), fails) == [("a",)]
    assert nearest(frozenset("bcdefghijk"), frozenset("abcdefghijk"), fails) == []
    assert nearest(frozenset("abcdefghij"), frozenset("abcdefghij"), fails) == []


def test_the_run_and_the_report_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from agc_conformance.mutants import MUTANTS\n"
        "made = {mutant.name: mutant.make for mutant in MUTANTS}['squeeze']\n"
        "class Mine(made): name, role = 'mine', 'backend'\n"
    )
    run = ["run", "--in-process", "--backend", "mine.py:Mine", "--out", "r.jsonl"]
    assert main(["conformance", *run, "--select", "L1-*"]) == 1
    sentence = next(
        line for line in capsys.readouterr().err.splitlines() if line.startswith("AGC behaves")
    )
    assert sentence.startswith(
        "AGC behaves as if axes of size 1 are squeezed away, so Dense(1 -> C) becomes one vector "
        "(Squeeze; mutant squeeze): "
    )
    assert main(["conformance", "report", "r.jsonl", "--out", "report"]) == 1
    said = f"mine on cpu: {sentence}"
    assert said in capsys.readouterr().out
    assert f"> {said}" in Path("report/report.md").read_text()
    assert json.loads(Path("report/report.json").read_text())["runs"][0]["diagnosis"] == [sentence]
    page = Path("report/index.html").read_text()
    assert page.index("(Squeeze; mutant squeeze)") < page.index('<h2 id="matrix">')
