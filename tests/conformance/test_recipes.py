"""Level 5: the reference passes, what is wrong is said, and what is not offered is reported."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agc.recipe import Recipe
from agc.training import Launch, Metrics
from agc_conformance.backend import Backend
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clauses import CLAUSES
from agc_conformance.mutants import MUTANTS
from agc_conformance.records import Writer, make_header, read_results
from agc_conformance.report import html, summarize
from agc_conformance.report.figures import recipe_curves
from agc_conformance.runner import cases, run_case
from agc_conformance.training.processes import Process, started
from agc_conformance.training.recipes import (
    KINDS,
    SHORT,
    count_results,
    result_ids,
    run_recipes,
)
from agc_conformance.training.reference import ReferenceTrainer
from agc_conformance.vectors import load_vectors


def results(backend: Backend, select: str | None = None) -> list[dict[str, Any]]:
    records = run_recipes(backend, SHORT, select=select)
    return [dict(record) for record in records if record["type"] == "result"]


def test_the_reference_passes() -> None:
    found = results(ReferenceBackend())
    assert list(dict.fromkeys(record["id"] for record in found)) == result_ids()
    assert len(found) == count_results() == len(result_ids()) + 1
    assert [record["dtype"] for record in found][:2] == ["float32", "float64"]
    assert {record["status"] for record in found} == {"passed"}
    assert {record["clause"] for record in found} == set(CLAUSES) & set(KINDS.values())


class Nothing(Backend):
    name = "nothing"


def test_the_report_draws_the_runs_over_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    records = list(run_recipes(ReferenceBackend(), SHORT, select="L5-trajectory"))
    for path in paths:
        header = make_header("run", vectors="v", backend=path.stem, role="backend")
        with Writer(path, header) as file:
            for record in records:
                file.write(record)
    report = summarize([read_results(path) for path in paths])
    runs = {column.name: column.recipe for column in report.backends}
    assert {len(values) for run in runs.values() for values in run.values()} == {4}
    assert runs["one"]["loss"] == pytest.approx(runs["one"]["reference_loss"])
    drawn, page = recipe_curves(runs), html(report)
    assert drawn == recipe_curves(runs)
    assert "<title>One recipe in several frameworks: loss and error by step</title>" in page
    assert all(f">{name}</text>" in drawn for name in ("one", "two", "float64 reference"))
    for dtype in ("float32", "float64"):
        assert f'<code>L5-trajectory</code> <span class="soft">{dtype}</span>' in page


def test_what_is_not_offered_is_reported() -> None:
    assert {record["status"] for record in results(Nothing())} == {"unsupported"}
    for case in cases(load_vectors(), select="RECIPE-*"):
        record = run_case(Nothing(), *case)
        refusal = case[0].data["expect"].get("error")
        assert record["status"] == "unsupported", refusal


class Low(ReferenceTrainer):
    """Reports losses of another step."""

    def step(self, *arguments: Any) -> Metrics:
        return Metrics(loss=7.0 if self.made == 2 else super().step(*arguments).loss)


class LowBackend(ReferenceBackend):
    training = Low


class Apart(ReferenceBackend):
    """Starts processes that know nothing of each other."""

    make = "agc_conformance.training.reference:ReferenceTrainer"

    def processes(self, count: int) -> Any:
        return started(self.make, [Process({"WHO": str(n)}, {}) for n in range(count)])


class Ended(Apart):
    make = f"{__name__}:end"


def end(*_: Any) -> None:
    if os.environ["WHO"] == "1":
        sys.stderr.write("no more")
        sys.stderr.flush()
        os._exit(3)
    time.sleep(600)


class Absent(ReferenceBackend):
    def trainer(self, recipe: Recipe, launch: Launch) -> Any:
        raise RuntimeError("no memory")


class Alone(ReferenceBackend):
    """Is never started in another process."""

    def elsewhere(self) -> Any:
        return Backend.elsewhere(self)


class Crashed(ReferenceBackend):
    """Ends before it is killed."""

    def elsewhere(self) -> Any:
        return crash


def crash(*_: Any) -> Any:
    raise RuntimeError("no such device")


class Stopped(ReferenceBackend):
    """Is killed too soon, by somebody else."""

    def elsewhere(self) -> Any:
        return stop


def stop(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("backend", "kind", "status", "detail"),
    [
        (LowBackend(), "trajectory", "failed", "step 0: perturbed_loss is None, it should be 2.3"),
        (Absent(), "mask", "error", "RuntimeError: no memory"),
        (Alone(), "resume", "passed", "the same bits in one process; reference is not started"),
        (Crashed(), "resume", "error", "ended with status 1 after 0 steps: "),
        (Crashed(), "resume", "error", "RuntimeError: no such device"),
        (Stopped(), "resume", "error", "ended with status -9 after 0 steps: "),
        (Apart(), "processes", "error", "RuntimeError: step: process 1 says Metrics(loss=2."),
        (Ended(), "processes", "error", "RuntimeError: process 1, make: it ended: no more"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, kind: str, status: str, detail: str) -> None:
    record = results(backend, f"L5-{kind}")[0]
    assert record["status"] == status
    assert detail in record["detail"]


@pytest.mark.parametrize(
    ("name", "killed_by", "detail"),
    [
        ("float64 in float32", "L5-trajectory:float64", "step 0: momentum is "),
        ("random rounding", "L5-resume:float32", "3 steps, after 3 of which a process was killed:"),
        ("momentum left out", "L5-migrate:float32", "to the reference: step 2: "),
    ],
)
def test_what_only_one_question_finds(name: str, killed_by: str, detail: str) -> None:
    """The rest of the same questions passes: the other dtype, process or direction."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == f"training: {name}")
    found = results(mutant.make(), f"L5-{mutant.select}")
    bad = {f"{r['id']}:{r['dtype']}": r["detail"] for r in found if r["status"] == "failed"}
    assert list(bad) == [killed_by]
    assert bad[killed_by].startswith(detail)
