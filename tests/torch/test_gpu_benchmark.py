"""The GPU benchmark, rehearsed on the CPU: its files, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc_conformance.nfnets import ask as study
from agc_conformance.records import Writer, make_header, make_result
from agc_conformance.runner import cases
from agc_conformance.training import recipes
from agc_conformance.training.ask import TASKS, result_ids
from agc_conformance.vectors import load_vectors
from agc_torch import fused
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import conformance, report, results
from benchmarks.gpu.clip_torch import _Clipping
from benchmarks.gpu.conditions import CONDITIONS, DTYPES, Truth, least_bytes, louder
from benchmarks.gpu.race import (
    Contestant,
    Crash,
    CudaClock,
    DoesNotApply,
    Effort,
    HostClock,
    race,
)
from benchmarks.gpu.results import Job
from benchmarks.gpu.tensors import Tensors, clock_of
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
            fused._compiles(fails)


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
    deadline = time.monotonic() + (3 if "sleep" in code else 60)
    stage = program.Stage("agc", 60, "agc.json")
    record = program._run(stage, tmp_path / "agc.json", Job("cpu", tiny=True), deadline)
    assert (record["status"], record["log"]) == (status, ["before"])


CRASHES = """
import os, sys
from pathlib import Path
out = Path(sys.argv[1])
if "--without" in sys.argv:
    out.write_text('{"cases": []}')
else:
    out.write_text('{"turn": "agc in a CUDA graph", "cases": []}')
    print("a segmentation fault", flush=True)
    os.kill(os.getpid(), 11)
"""


def test_a_stage_goes_on_without_the_contestant_that_it_died_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(stage: program.Stage, out: Path, job: Job, seconds: float) -> list[str]:
        return [sys.executable, "-c", CRASHES, str(out), *job.arguments()]

    monkeypatch.setattr(program.Stage, "command", command)
    stage, out = program.Stage("agc", 60, "agc.json"), tmp_path / "agc.json"
    record = program._run(stage, out, Job("cpu", tiny=True), time.monotonic() + 60)
    assert record["status"] == "complete"
    assert record["log"] == ["a segmentation fault", "-- again, without 'agc in a CUDA graph'"]
    # With too little time left, what there is stays.
    record = program._run(stage, out, Job("cpu", tiny=True), time.monotonic() + 10)
    assert record["status"] == "failed"
    assert "turn" in read(tmp_path, "agc.json")


HANGS = """
import sys
from benchmarks.gpu import __main__ as program
sleep = "import time; open(sys.argv[1], 'w').close(); time.sleep(60)".replace("sys.argv[1]", "'started'")
program.Stage.command = lambda *_: [sys.executable, "-c", sleep]
sys.exit(program.main(["--out", "out", "--tiny", "--only", "agc", "sam"]))
"""


def test_a_run_that_is_ended_kills_its_stage_and_reports(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sam.json").write_text("of an older run", encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", HANGS], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait(30) != 0
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()
    stages = read(tmp_path / "out", "summary.json")["stages"]
    assert [stage["status"] for stage in stages] == ["not finished", "not started"]
    assert "AGC in PyTorch: not finished" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "sam.json").exists()


def test_a_process_that_cannot_be_killed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        monkeypatch.setattr(program.os, "killpg", lambda *_: None)
        monkeypatch.setattr(program, "_KILLED", 0.1)
        program._kill(process)
        assert process.poll() is None
        process.kill()


def test_the_limits_leave_time() -> None:
    """Of 560 seconds, for the start and the report; what is worth most comes first."""
    assert sum(stage.limit for stage in program.STAGES) <= 540
    names = ["conformance-torch", "agc", "sam", "nfnet", "jax", "conformance-jax"]
    assert [stage.name for stage in program.STAGES] == names
    files = {stage.file for stage in program.STAGES}
    assert len({*files, report.SUMMARY, "README.md"}) == 8


@pytest.mark.parametrize("said", ["", "no devices were found", "a, b"])
def test_a_driver_that_says_nothing_of_use(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr("benchmarks.gpu.results.subprocess.run", lambda *_, **__: done)
    assert results._gpu() is None


def run_stage(folder: Path, before: str, *arguments: str) -> tuple[int, str]:
    """Run a stage in a process that does something before; return status and output."""
    code = (
        f"import sys\n{before}\nfrom benchmarks.gpu.stage import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments, "--tiny", "--out", str(folder / "x.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_wheels_that_are_missing(tmp_path: Path) -> None:
    """Without jsonschema only conformance is left out; without a peer, one contestant."""
    before = "sys.modules['jsonschema'] = sys.modules['pytorch_optimizer'] = None"
    assert run_stage(tmp_path, before, "agc") == (0, "")
    for case in read(tmp_path, "x.json")["cases"]:
        who = {name for name, outcome in case["contestants"].items() if "error" in outcome}
        assert who == {"pytorch_optimizer"}


@pytest.mark.parametrize(("module", "status"), [("timm_x", 3), ("agc_torch.sam", 1)])
def test_a_module_of_ours_that_is_missing_is_no_excuse(
    module: str, status: int, tmp_path: Path
) -> None:
    before = f"""
import benchmarks.gpu.clip_torch
def measure(job, results): raise ModuleNotFoundError("not there", name={module!r})
benchmarks.gpu.clip_torch.measure = measure"""
    found, log = run_stage(tmp_path, before, "agc")
    assert (found, "not there" in log) == (status, True)


def test_nfnets_without_a_timm_that_makes_one(tmp_path: Path) -> None:
    before = """
from benchmarks import nfnet_torch
def fails(): raise AttributeError("another version")
nfnet_torch.tiny_timm = fails"""
    assert run_stage(tmp_path, before, "nfnet") == (0, "")
    (case,) = read(tmp_path, "x.json")["cases"]
    wrong = {name: o["error"] for name, o in case["contestants"].items() if "error" in o}
    assert set(wrong) == {name for name in case["contestants"] if name.endswith("of timm")}
    assert all("another version" in error for error in wrong.values())


def test_a_turn_that_hangs_ends_the_process(tmp_path: Path) -> None:
    before = """
import time
from benchmarks.gpu import clip_torch, results
from benchmarks.gpu.race import Contestant
results._HANGS = 5
clip_torch._Clipping._timm = lambda self: Contestant(lambda: time.sleep(100))"""
    status, log = run_stage(tmp_path, before, "agc")
    assert status == 1
    assert "Timeout" in log
    assert read(tmp_path, "x.json")["turn"] == "timm"
    status, _ = run_stage(tmp_path, before, "agc", "--without", "timm", "max_norm")
    assert status == 0
    for case in read(tmp_path, "x.json")["cases"]:
        for name in ("timm", "max_norm"):
            assert "did not survive" in case["contestants"][name]["error"]


def test_wheels_that_cannot_be_installed_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no archive")
    environment = {**os.environ, "WHEELS": str(tmp_path / "wheels"), "PYTHON": sys.executable}
    script = ROOT / "benchmarks" / "gpu" / "run.sh"
    command = ["bash", str(script), str(tmp_path / "out"), "--tiny", "--only", "sam"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no wheel is installed" in done.stderr
    assert read(tmp_path / "out", "sam.json")["complete"]


def test_ours_remembers_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a module; of tensors by name everything would be found anew, and timed."""
    job = Job("cpu", tiny=True)
    entries = _Clipping(Tensors("nfnet-f0", "float32", job), "float32", job).entries()
    for name in ("agc", "agc attached"):
        contestant = entries[name]()
        contestant.prepare()
        contestant.run()
        contestant.prepare()
        with monkeypatch.context() as patch:
            patch.setattr("agc_torch.clip._jobs", None)
            contestant.run()


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


def test_a_part_that_is_killed_leaves_what_it_found(tmp_path: Path) -> None:
    for name in "ab":
        header = make_header("run", select=name, train=False, models=False, backend="torch")
        with suppress(KeyboardInterrupt), Writer(tmp_path / name, header) as file:
            file.write(make_result(name, clause="AGC-1", level="L1", status="passed"))
            if name == "a":
                raise KeyboardInterrupt
    (tmp_path / "c.part").write_text("", encoding="utf-8")  # killed before it wrote a line
    for name in "ac":
        conformance._keep(tmp_path / name, name, "out of time")
    paths = [tmp_path / name for name in "abc"]
    merged = conformance.merge(paths[:2], tmp_path / "out", Job("cuda"))
    assert merged is not None
    assert [result["id"] for result in merged.results] == ["a", "b"]
    assert merged.died == [{"type": "died", "check": "a", "reason": "out of time"}]
    assert merged.header["select"] == "a b"  # though all files are there
    assert not paths[2].exists()


def test_conformance_that_ran_out_of_time_did_not_fail(tmp_path: Path) -> None:
    stage = {"name": "conformance-torch", "status": "failed", "limit": 9, "seconds": 9.0, "log": []}
    stage["file"] = "torch-cuda.jsonl"
    summary = {"provenance": {"device": "cuda", "tiny": False}, "stages": [stage]}
    (tmp_path / report.SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    for status, judgement in (("passed", "not measured"), ("failed", "missed")):
        with Writer(tmp_path / "torch-cuda.jsonl", make_header("run", backend="torch")) as file:
            file.write(make_result("a", clause="AGC-1", level="L1", status="passed"))
            file.write(make_result("b", clause="AGC-1", level="L1", status=status))
            file.write({"type": "died", "check": "L3-*", "reason": "out of time"})
        (verdict,) = report.verdicts(report.Run(tmp_path))
        assert verdict.judgement == judgement
        assert "1 died" in verdict.reached


def test_kernels_that_do_not_compile_fail_conformance() -> None:
    assert fused.DO_NOT_COMPILE.startswith(conformance.NO_KERNELS)
    assert not set(",:") & set(conformance.NO_KERNELS)  # which PYTHONWARNINGS would split


def test_a_gpu_that_is_lost_ends_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails() -> None:
        raise RuntimeError("as every call from now on")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    seen: list[str] = []
    entries = {name: lambda: Contestant(fails) for name in ("first", "second")}
    with pytest.raises(Crash, match="illegal memory access"):
        race(entries, CudaClock(), Effort(1, 1), seen.append)
    assert seen == ["first"]


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
