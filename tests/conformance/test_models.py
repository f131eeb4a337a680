"""Level 4: the reference passes, and every mistake that ports make is caught."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agc.cli import main
from agc.nfnet import blocks, seeded_batch, seeded_parameters
from agc_conformance.backend import (
    Backend,
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
)
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clauses import CLAUSES
from agc_conformance.mutants import MUTANTS
from agc_conformance.nfnets import ask as study
from agc_conformance.nfnets.golden import OPTIMIZER
from agc_conformance.nfnets.reference import ReferenceModels
from agc_conformance.records import read_results
from agc_conformance.report import html, markdown, summarize
from agc_conformance.report.figures import model_errors

FAST = "model-tiny-[!t]*"  # all but the trajectory of 50 steps


def asked(backend: Backend, select: str, **options: Any) -> dict[str, Mapping[str, Any]]:
    records = study.run_study(backend, "tiny", select=select, **options)
    return {f"{r['id']}:{r['dtype']}": r for r in records if r["type"] == "result"}


def statuses(backend: Backend, select: str, **options: Any) -> set[str]:
    return {str(r["status"]) for r in asked(backend, select, **options).values()}


@pytest.mark.long
def test_the_reference_passes() -> None:
    found = asked(ReferenceBackend(), FAST)
    assert {r["status"] for r in found.values()} == {"passed"}
    assert all(r["level"] == "L4" for r in found.values())
    assert len(found) == study.count_results("tiny", FAST) == 26
    assert "254 units are clipped" in found["model-tiny-decisions:float64"]["detail"]
    assert "4855 units in 233 parameters" in found["model-tiny-plan:float32"]["detail"]


def test_the_trajectory_is_well_conditioned() -> None:
    """Rounding the start to float32 is all that the reference does wrong; it must not grow."""
    (result,) = asked(ReferenceBackend(), "*-trajectory", dtypes=("float32",)).values()
    assert result["status"] == "passed"
    error = float(result["detail"].split("together are ")[1].split(" off")[0])
    assert 1e-9 < error < 1e-7


NFNETS = [mutant for mutant in MUTANTS if mutant.wing == "nfnets"]


def test_mutants_are_asked_of_their_clause() -> None:
    """The command ``teeth`` runs them."""
    for mutant in NFNETS:
        asked_for = fnmatch.filter(study.KINDS, mutant.select)
        assert {study.KINDS[kind] for kind in asked_for} == {mutant.flag}, mutant.name


def test_every_clause_has_results_and_mutants() -> None:
    clauses = {clause for clause in CLAUSES if clause.startswith("NFNET")}
    assert set(study.KINDS.values()) == clauses
    assert {mutant.flag for mutant in NFNETS} == clauses
    assert {f"model-tiny-{kind}" for kind in study.KINDS} == set(study.result_ids("tiny"))
    assert set(study.result_ids("F0")) < {f"model-F0-{kind}" for kind in study.KINDS}


def test_the_first_steps_are_compared_with_published_numbers() -> None:
    """Whatever the reference says: the comparison with DeepMind's own numbers stands by itself."""
    problem = ModelProblem("tiny", seeded_parameters("tiny"), *seeded_batch(2, 32))
    recipe = ModelRecipe("nfnet", (0.1, 0.1))
    steps = list(ReferenceModels().training(problem, recipe))
    for number, (step, golden) in enumerate(zip(steps, OPTIMIZER, strict=True), start=1):
        assert study._compare_golden(number, step, golden, problem.parameters) == ""
    worse = replace(steps[1], loss=steps[1].loss + 1e-10)
    message = study._compare_golden(2, worse, OPTIMIZER[1], problem.parameters)
    assert message.startswith("step 2: the loss is 2.0872985479")
    late = study._compare_golden(2, steps[0], OPTIMIZER[1], problem.parameters)
    assert "DeepMind's code has" in late


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("logits", lambda g: {"logits": ((g.logits[0][0] + 1e-9,), g.logits[1])}, "a logit is"),
        ("logits", lambda g: {"logits_norm": g.logits_norm + 1e-9}, "the norm of the logits is"),
        ("gradients", lambda g: {"gradient_norm": g.gradient_norm * (1 + 1e-9)}, "all together: "),
        (
            "gradients",
            lambda g: {"gradients": {n: x * (1 + 1e-9) for n, x in g.gradients.items()}},
            "stem.conv0.weight: the norm is",
        ),
    ],
)
def test_published_numbers_decide_where_the_reference_would_agree(
    monkeypatch: pytest.MonkeyPatch, kind: str, change: Any, message: str
) -> None:
    golden = study.GOLDEN["tiny"]
    monkeypatch.setitem(study.GOLDEN, "tiny", replace(golden, **change(golden)))
    (result,) = asked(ReferenceBackend(), f"*-{kind}", dtypes=("float64",)).values()
    assert result["status"] == "failed"
    assert result["detail"].startswith(message)


class Wrong(ReferenceBackend):
    """Answers that are changed at the end."""

    name: ClassVar[str] = "wrong"

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        found = super().model_forward(problem)
        name = blocks("tiny")[4].name
        outputs = {n: out * (1 + 1e-4 * (n == name)) for n, out in found.outputs.items()}
        signals = {**found.signals, "avg_var": found.signals["avg_var"][1:]}
        return ModelForward(np.full_like(found.logits, np.nan), outputs, signals)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        found = super().model_gradients(problem)
        gradients = {**found.gradients}
        gradients["stages.2.0.se.fc0.weight"] = -gradients["stages.2.0.se.fc0.weight"]
        del gradients["stages.3.0.conv1.gain"]
        return replace(found, loss=found.loss + 1e-3, gradients=gradients)

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        for number, step in enumerate(super().model_training(problem, recipe)):
            if number == 3:
                return
            yield step


def test_the_message_says_where() -> None:
    found = asked(Wrong(), FAST, dtypes=("float32",))
    detail = {key.split("-", 2)[2].split(":")[0]: r["detail"] for key, r in found.items()}
    assert "logits: inf" in detail["logits"]
    assert detail["outputs"].startswith("stages.2.1: 0.0001, 1e-05 allowed; 1 of 13")
    assert "avg_var has the shape (12,), not (13,)" in detail["signals"]
    assert detail["loss"].startswith("loss: 0.001")
    assert detail["gradients"] == "stages.3.0.conv1.gain: nothing came back"
    assert "stages.3.0.conv1.gain: no gradient" in detail["decisions"]
    assert detail["optimizer"] == "the training ends after 3 of 50 steps"
    assert [r["status"] for key, r in found.items() if "-plan" in key] == ["passed"]


class Half(Wrong):
    """Fails to answer, and does not take float64."""

    dtypes: ClassVar[frozenset[str]] = frozenset({"float32"})

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        raise ValueError(f"no {problem.dtype}")


def test_errors_and_what_is_not_offered() -> None:
    assert statuses(Half(), "model-tiny-logits", dtypes=("float64",)) == {"unsupported"}
    found = asked(Half(), "model-tiny-logits", dtypes=("float32",))
    assert found["model-tiny-logits:float32"]["status"] == "error"
    assert "ValueError: no float32" in found["model-tiny-logits:float32"]["detail"]
    assert statuses(Backend(), "model-tiny-[lp]*", dtypes=("float32",)) == {"unsupported"}


def test_a_backend_cannot_change_what_others_are_asked() -> None:
    class Greedy(ReferenceBackend):
        def model_forward(self, problem: ModelProblem) -> ModelForward:
            found = super().model_forward(problem)
            problem.images[...] = 0
            for array in problem.parameters.values():
                array[...] = 0
            return found

    for _ in range(2):
        assert statuses(Greedy(), "*-logits", dtypes=("float32",)) == {"passed"}


def test_run_report_and_figure(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    select = "model-tiny-[glo]*[st]"
    asked = ["run", "--backend", "reference", "--out", str(out), "--select", select]
    assert main(["conformance", *asked]) == 0
    file = read_results(out)
    assert {record["kind"] for record in file.models} >= {"outputs", "gradients"}
    gradients = next(r for r in file.models if r["kind"] == "gradients" and r["dtype"] == "float32")
    assert len(gradients["errors"]) == 233
    assert gradients["limits"]["stages.1.1.skip_gain"] == 1e-3
    found = summarize([file])
    page = html(found)
    assert '<h2 id="model-tiny">' in page
    assert '<a href="#model-tiny">' in page
    assert "output of the stem and of every block" in page
    assert page == html(found)
    assert "| NFNET-1: " in markdown(found)
    drawn = model_errors({"x": file.models})
    assert "stages.3.2" in drawn
    assert "gradient of every tensor" in drawn


def test_models_can_be_left_out(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    command = ["conformance", "run", "--in-process", "--backend", "reference", "--out", str(out)]
    asked = [*command, "--select", "NFNET-2"]
    assert main([*asked, "--no-models"]) == 1, "nothing was run"
    assert main([*asked, "--role", "subject"]) == 1, "subjects are not asked"
    assert main(asked) == 0
    assert {r["clause"] for r in read_results(out).results} == {"NFNET-2"}
    assert all(json.dumps(record) for record in read_results(out).models)


def test_list_shows_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "list", "--select", "NFNET-5"]) == 0
    shown = capsys.readouterr().out
    assert "model-tiny-trajectory" in shown
    assert "model-F0-optimizer" in shown
