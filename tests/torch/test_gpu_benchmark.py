"""The GPU benchmark, rehearsed on the CPU: its files, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agc_conformance.nfnets import ask as study
from agc_conformance.records import Writer, make_header, make_result
from agc_conformance.runner import cases
from agc_conformance.training import recipes
from agc_conformance.training.ask import TASKS, result_ids
from agc_conformance.vectors import load_vectors
from agc_torch import fused
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import conformance, report
from benchmarks.gpu.conditions import CONDITIONS, DTYPES, Truth, least_bytes, louder
from benchmarks.gpu.race import Contestant, DoesNotApply, Effort, HostClock, race
from benchmarks.gpu.results import Job
from benchmarks.gpu.tensors import clock_of
from benchmarks.shapes import MODELS

ROOT = Path(__file__).parents[2]
OURS_ON_GPUS = {"agc in a CUDA graph", "agc without Triton", "perturb without Triton"}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a rehearsal of the stages of PyTorch alone has written."""
    folder = tmp_path_factory.mktemp("gpu")
    command = ["-m", "benchmarks.gpu", "--tiny", "--only", "agc", "sam", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def test_files(rehearsal: Path) -> None:
    assert {path.name for path in rehearsal.iterdir()} == {
        "README.md", "agc.json", "sam.json", "summary.json",
    }  # fmt: skip
    for name in ("agc.json", "sam.json", "summary.json"):
        made = read(rehearsal, name)["provenance"]
        assert (made["device"], made["tiny"], made["gpu"]) == ("cpu", True, None)
        assert {"torch", "timm", "numpy"} <= set(made["packages"])
        assert made["command"].startswith("python -m benchmarks.gpu")
        assert made["date"]
        assert str(rehearsal) not in json.dumps(made)
    stages = read(rehearsal, "summary.json")["stages"]
    assert [(stage["name"], stage["status"]) for stage in stages] == [
        ("agc", "complete"), ("sam", "complete"),
    ]  # fmt: skip


def test_every_contestant_was_measured_in_every_case(rehearsal: Path) -> None:
    expected = {
        "agc.json": [
            {"dtype": d, "model": m, "condition": c} for d in DTYPES for m in MODELS for c in CONDITIONS
        ],
        "sam.json": [
            {"dtype": d, "model": m, "adaptive": a} for d in DTYPES for m in MODELS for a in (False, True)
        ],
    }  # fmt: skip
    for name, labels in expected.items():
        content = read(rehearsal, name)
        assert content["complete"]
        assert [{key: case[key] for key in labels[0]} for case in content["cases"]] == labels
        for case in content["cases"]:
            outcomes = case["contestants"]
            assert {who for who, outcome in outcomes.items() if "absent" in outcome} == (
                OURS_ON_GPUS & set(outcomes)
            )
            assert outcomes[case["base"]]["relative"] == 1
            for who in set(outcomes) - OURS_ON_GPUS:
                for clock in ("device_ms", "host_ms"):
                    times = outcomes[who][clock]
                    assert 0 < times["low"] <= times["median"] <= times["high"]
                    assert len(times["turns"]) == 2
                assert outcomes[who]["relative"] > 0


def test_results_were_compared_with_the_reference(rehearsal: Path) -> None:
    for name, who in (("agc.json", "agc"), ("sam.json", "perturb")):
        for case in read(rehearsal, name)["cases"]:
            assert case["contestants"][who]["right"] is True
            assert case["contestants"][who]["max_ulp"] <= 4
    shares = {c["condition"]: c["clipped_share"] for c in read(rehearsal, "agc.json")["cases"]}
    assert (shares["all"], shares["none"]) == (1, 0)
    assert 0.02 < shares["tenth"] < 0.3


def test_kernels_that_do_not_compile_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or PyTorch's own operations would be timed in their place."""

    def fails() -> None:
        raise OSError("no compiler")

    monkeypatch.setenv("AGC_TORCH_TRITON", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clock_of(Job("cpu"))
        with pytest.raises(RuntimeWarning, match="no compiler"):
            fused._compiles(fails, torch.device("cpu"))


def test_a_rehearsal_meets_no_target(rehearsal: Path) -> None:
    run = report.Run(rehearsal)
    assert {verdict.judgement for verdict in report.verdicts(run)} == {"does not apply"}
    text = (rehearsal / "README.md").read_text(encoding="utf-8")
    assert "A rehearsal" in text
    assert "| met |" not in text


def on_a_gpu(rehearsal: Path, folder: Path, change: Any) -> report.Run:
    """Return a run that says it is of a GPU, after a change of the cases of AGC."""
    agc, summary = read(rehearsal, "agc.json"), read(rehearsal, "summary.json")
    summary["provenance"] |= {"device": "cuda", "tiny": False}
    summary["stages"] = summary["stages"][:1]
    change(agc["cases"], summary["stages"][0])
    (folder / "agc.json").write_text(json.dumps(agc), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return report.Run(folder)


def test_targets_are_judged_on_a_gpu(rehearsal: Path, tmp_path: Path) -> None:
    def change(cases: list[dict[str, Any]], stage: dict[str, Any]) -> None:
        for case in cases:
            for name in ("agc", "agc attached"):
                case["contestants"][name]["of_copy_bandwidth"] = 0.9
            case["contestants"]["timm"]["relative"] = 11.0
        cases[0]["contestants"]["agc"] |= {"right": False, "of_copy_bandwidth": 0.8}
        del cases[1]["contestants"]["timm"]["relative"]

    judged = report.verdicts(on_a_gpu(rehearsal, tmp_path, change))
    # What needs a GPU was absent, so nothing is said of it.
    found = {(v.what, v.judgement) for v in judged if "CUDA graph" not in v.what}
    assert found == {
        ("results that are right", "missed"),
        ("agc: share of a copy's bandwidth", "met"),
        ("agc: share of a copy's bandwidth", "missed"),
        ("agc attached: share of a copy's bandwidth", "met"),
        ("time of timm, relative to agc", "met"),
        ("time of timm, relative to agc", "not measured"),
    }
    assert {v.judgement for v in judged if "CUDA graph" in v.what} == {"not measured"}
    assert report.main([str(tmp_path)]) == 1


def test_what_was_measured_before_a_crash_is_shown(rehearsal: Path, tmp_path: Path) -> None:
    def change(cases: list[dict[str, Any]], stage: dict[str, Any]) -> None:
        del cases[1:]
        stage |= {"status": "failed", "log": ["an illegal memory access"]}

    text = report.document(on_a_gpu(rehearsal, tmp_path, change))
    assert "an illegal memory access" in text
    assert "| NFNet-F0, float32, all clipped | agc |" in text
    assert "**not measured**" in text


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import time; print('before', flush=True); time.sleep(60)", "out of time"),
        ("print('before'); raise SystemExit(1)", "failed"),
        ("print('before'); raise SystemExit(3)", "does not apply"),
    ],
)
def test_a_stage_that_ends_badly(
    code: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.Stage, "command", lambda *_: [sys.executable, "-c", code])
    limit = 3 if "sleep" in code else 60
    stage = program.Stage("agc", limit, "agc.json")
    (tmp_path / "agc.json").write_text("of an older run", encoding="utf-8")
    (record,) = program._run([stage], tmp_path, Job("cpu", tiny=True))
    assert (record["status"], record["log"]) == (status, ["before"])
    assert not (tmp_path / "agc.json").exists()


def test_the_limits_leave_time() -> None:
    assert sum(max(stage.limit for stage in group) for group in program.STAGES) <= 8 * 60 - 15
    files = [stage.file for group in program.STAGES for stage in group]
    assert len({*files, report.SUMMARY, "README.md"}) == 8


@pytest.mark.parametrize("backend", conformance.PARTS)
def test_the_parts_of_conformance_are_the_whole_suite(backend: str) -> None:
    ids = [vector.id for vector, _ in cases(load_vectors())]
    ids += [name for task in TASKS for name in result_ids(task)]
    ids += recipes.result_ids()
    ids += [
        name
        for one, details in study.STUDIES.items()
        if not details.full
        for name in study.result_ids(one)
    ]
    for name in ids:
        assert sum(fnmatchcase(name, part) for part in conformance.PARTS[backend]) == 1, name


def test_parts_of_conformance_become_one_file(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path, part in zip(paths[:2], ("L1-*", "L2-*"), strict=True):
        header = make_header(
            "run", select=part, train=part == "L2-*", models=False, commit=None, backend="torch"
        )
        with Writer(path, header) as file:
            file.write(make_result(part, clause="AGC-1", level=part[:2], status="passed"))
    job = Job("cuda", commit="abc")
    whole = conformance.merge(paths[:2], tmp_path / "whole.jsonl", job)
    partial = conformance.merge(paths, tmp_path / "partial.jsonl", job)
    assert whole is not None
    assert partial is not None
    assert [result["id"] for result in whole.results] == ["L1-*", "L2-*"]
    assert whole.header["select"] is None
    assert (whole.header["commit"], whole.header["train"]) == ("abc", True)
    assert partial.header["select"] == "L1-* L2-*"
    assert conformance.merge(paths[2:], tmp_path / "none.jsonl", job) is None


def test_a_race_goes_on_without_those_who_fail() -> None:
    calls = []

    def fails_later() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more")

    def absent() -> Contestant:
        raise DoesNotApply("needs a GPU")

    outcomes = race(
        {
            "steady": lambda: Contestant(lambda: None, check=lambda: {"right": True}),
            "fails": lambda: Contestant(fails_later),
            "absent": absent,
        },
        HostClock(),
        Effort(3, 2),
    )
    assert outcomes["absent"] == {"absent": "needs a GPU"}
    assert outcomes["fails"] == {"error": "RuntimeError: no more"}
    assert outcomes["steady"]["right"] is True
    assert outcomes["steady"]["rounds"] == 6
    assert len(outcomes["steady"]["device_ms"]["turns"]) == 3


def test_a_wrong_result_is_seen() -> None:
    weight, gradient = np.ones((2, 8)), np.full((2, 8), 0.5)
    gradient[1] = 2.0**-20
    truth = Truth({"w": (weight, gradient)}, {"w": "o i -> o"}, "float32")
    clipped = gradient.copy()
    clipped[0] *= 0.01 / 0.5
    assert truth.compare(lambda _: clipped.astype(np.float32).astype(np.float64))["right"] is True
    assert truth.compare(lambda _: gradient)["right"] is False
    clipped[1, 0] *= 1 + 1e-7  # of a unit that is not clipped
    assert truth.compare(lambda _: clipped)["right"] is False


def test_the_least_traffic() -> None:
    assert least_bytes(100, 0.0) == 200
    assert least_bytes(100, 1.0) == 400
    assert louder((1000, 3), 0, "tenth", 0).shape == (1000, 1)
    assert louder((3,), 0, "all", 0).shape == (1,)
