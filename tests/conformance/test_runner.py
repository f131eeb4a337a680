"""Runs: the reference conforms in every layout, and whatever a backend does becomes a record."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agc
from agc.cli import main
from agc.errors import ConfigError, FormatError, ShapeError
from agc_conformance import apart, load, mutants, suite, xfail
from agc_conformance import teeth as teeth_module
from agc_conformance.backend import Outcome, Problem, Unavailable, Unsupported
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.clipping.problems import parse_clip
from agc_conformance.core.functions import Core
from agc_conformance.load import load_backend
from agc_conformance.mutants.sharpness import SharpnessEngine
from agc_conformance.nfnets.ask import result_ids, run_study
from agc_conformance.records import make_result, read_results
from agc_conformance.runner import OF_THIS_LIBRARY, cases, run_case
from agc_conformance.training.ask import run_task
from agc_conformance.vectors import Vector, load_vectors

EXAMPLE = Path(__file__).parents[2] / "conformance" / "examples" / "my_backend.py"
VECTORS = {vector.id: vector for vector in load_vectors()}


@pytest.mark.parametrize("layout", ["torch", "flax", "keras"])
@pytest.mark.parametrize("backend", [ReferenceBackend, SharpnessEngine])
def test_right_implementations_pass_everything(
    backend: type[ReferenceBackend], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "layout", layout)
    one = backend()  # as a run has it: no vector may leave anything to the next
    records = [run_case(one, *case) for case in cases(load_vectors(), full=True)]
    assert len(records) > 500
    assert [r for r in records if r["status"] != "passed"] == []


class TwoPaths(ReferenceBackend):
    """Its compiled code is less accurate."""

    paths = ("compiled", "sharded")  # of which it has one
    factor = 1 + 2**-23

    def scenario_compiled(self, problem: Problem) -> Outcome:
        outcome = self.clip(problem)
        before, after = (np.asarray(x.gradients["weight"]) for x in (problem, outcome))
        larger = after * np.float32(self.factor)
        return Outcome({"weight": np.where(after == before, after, larger)})

    def scenario_sharded(self, problem: Problem) -> Outcome:  # type: ignore[override]
        raise Unsupported("not here")


def test_every_path_must_be_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = VECTORS["L1-fan-in-4608"]
    record = run_case(TwoPaths(), vector, "float32")
    assert record["status"] == "passed"
    errors = record["ulp_by_path"]
    assert list(errors) == ["eager", "compiled"]
    assert errors["eager"] == record["max_ulp"] < 1 < errors["compiled"] <= 4
    assert "ulp_by_path" not in run_case(TwoPaths(), vector, "bfloat16")
    monkeypatch.setattr(TwoPaths, "factor", 1 + 2**-20)
    record = run_case(TwoPaths(), vector, "float32")
    assert record["status"] == "failed"
    assert record["detail"].startswith("compiled: weight, unit 0, element ")


MUTANTS = [mutant for mutant in mutants.MUTANTS if mutant.wing not in ("nfnets", "training")]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_killed_by_its_own_flag(mutant: mutants.Mutant) -> None:
    """The command ``teeth`` shows all vectors that kill it; those that claim to must."""
    flagged = [vector for vector in load_vectors() if mutant.flag in vector.flags]
    assert flagged
    assert mutants.run_mutant(mutant, flagged)


def test_mutants_are_many_and_have_different_names() -> None:
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert sum(mutant.wing == "clipping" for mutant in mutants.MUTANTS) >= 20
    assert sum(mutant.wing == "sharpness" for mutant in mutants.MUTANTS) >= 12
    assert len(set(names)) == len(names)


class Broken(ReferenceBackend):
    """Does what it is told to do wrong."""

    name = "broken"
    dtypes = frozenset({"float32"})
    do: Any = None

    def clip(self, problem: Problem) -> Outcome:
        return self.do(super().clip, problem)  # type: ignore[no-any-return]


def broken(do: Any, vector: str = "L1-none-gradient", dtype: str = "float32") -> dict[str, Any]:
    backend = Broken()
    backend.do = do
    return dict(run_case(backend, VECTORS[vector], dtype))


SHAPE = "L1-error-shape"


@pytest.mark.parametrize(
    ("error", "vector", "status", "detail"),
    [
        (ZeroDivisionError("0"), "L1-tie", "error", r"ZeroDivisionError: 0 \(test_runner.py:"),
        (Unsupported("not here"), "L1-tie", "unsupported", "not here$"),
        (ConfigError("no"), SHAPE, "failed", ".*ShapeError was expected, not ConfigError"),
        (ShapeError("shapes differ"), SHAPE, "failed", r".*does not name \['weight'\]"),
    ],
)
def test_what_a_backend_raises(error: Exception, vector: str, status: str, detail: str) -> None:
    def fail(clip: Any, problem: Problem) -> Outcome:
        raise error

    record = broken(fail, vector)
    assert record["status"] == status
    assert re.match(detail, record["detail"])


class Quitter(ReferenceBackend):
    """Wants to end the run."""

    def clip(self, problem: Problem) -> Outcome:
        raise self.reason

    def train(self, task: Any) -> Any:
        raise self.reason

    def model_forward(self, problem: Any) -> Any:
        raise self.reason

    reason: BaseException = SystemExit(0)


def test_nobody_but_the_user_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        run_case(Quitter(), VECTORS["L1-tie"], "float32"),
        *run_task(Quitter(), "digits", steps=1),
        *run_study(Quitter(), "tiny", select="model-tiny-logits"),
    ]
    assert {r["status"] for r in records} == {"error"}
    assert all("SystemExit: 0" in r["detail"] for r in records)
    monkeypatch.setattr(Quitter, "reason", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_case(Quitter(), VECTORS["L1-tie"], "float32")


def test_an_unknown_dtype_is_unsupported() -> None:
    record = broken(lambda clip, problem: clip(problem), dtype="bfloat16")
    assert (record["status"], record["detail"]) == (
        "unsupported",
        "the backend does not take bfloat16",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {k: v for k, v in g.items() if k != "weight"}, "weight: no gradient came back"),
        (lambda g: {**g, "more": g["weight"]}, "came back for ['more']"),
        (lambda g: {**g, "frozen": np.zeros(4, np.float32)}, "frozen: had no gradient"),
        (lambda g: {**g, "weight": g["weight"].T}, "came back with shape"),
        (lambda g: {**g, "weight": g["weight"].astype(np.float64)}, "came back in float64"),
        (lambda g: {**g, "weight": g["weight"] * 0}, "unit 0"),
    ],
    ids=["lost", "more", "made-up", "transposed", "promoted", "zero"],
)
def test_wrong_outcomes_fail(change: Any, message: str) -> None:
    record = broken(lambda clip, problem: Outcome(change(clip(problem).gradients)))
    assert record["status"] == "failed"
    assert message in record["detail"]


def test_an_answer_of_another_type_fails() -> None:
    class Other(ReferenceBackend):
        def clip(self, problem: Problem) -> Any:
            return dict(super().clip(problem).gradients)

        def sharpen(self, problem: Any) -> Any:
            return None

        def trajectory(self, *arguments: Any) -> Any:
            return iter(())

    said = {
        "L1-tie": "a dict came back, not an Outcome",
        "L1-sam-restore": "a NoneType came back, not a SharpnessOutcome",
        "L2-sgd": "a tuple_iterator came back, not a list of weights",
    }
    for name, detail in said.items():
        record = run_case(Other(), VECTORS[name], "float32")
        assert (record["status"], record["detail"]) == ("failed", detail)


def test_a_backend_that_clips_in_place_cannot_hide() -> None:
    """What comes back is compared with what went in, not with an array that was overwritten."""

    def wipe(clip: Any, problem: Problem) -> Outcome:
        for gradient in problem.gradients.values():
            if gradient is not None:
                gradient[...] = 0  # type: ignore[index]
        return Outcome(problem.gradients)

    assert broken(wipe)["status"] == "failed"


def test_silence_where_an_error_is_expected() -> None:
    record = broken(lambda clip, problem: Outcome(problem.gradients), SHAPE)
    assert (record["status"], record["detail"]) == (
        "failed",
        "ShapeError was expected; nothing was raised",
    )


def test_no_telemetry_is_unsupported() -> None:
    def mute(clip: Any, problem: Problem) -> Outcome:
        return replace(clip(problem), stats=None)

    assert broken(mute, "L1-stats")["status"] == "unsupported"
    assert broken(mute, "L1-tie")["status"] == "passed"


def test_trajectories_are_compared_at_every_step() -> None:
    class Short(ReferenceBackend):
        def trajectory(self, *arguments: Any) -> Any:
            return super().trajectory(*arguments)[:-1]

    class Wrong(ReferenceBackend):
        def trajectory(self, *arguments: Any) -> Any:
            steps = super().trajectory(*arguments)
            steps[2] = {**steps[2], "conv.bias": steps[2]["conv.bias"] * np.float32(1.0001)}
            return steps

    vector = VECTORS["L2-sgd"]
    assert "4 steps came back, not 5" in run_case(Short(), vector, "float32")["detail"]
    assert "conv.bias, step 3" in run_case(Wrong(), vector, "float32")["detail"]


def test_the_same_numbers_reach_every_layout() -> None:
    vector = VECTORS["L1-layer-conv-transpose2d"]
    arrays = {
        layout: parse_clip(vector, layout, "float32").problem.parameters["weight"]
        for layout in ("torch", "flax", "keras")
    }
    assert [a.shape for a in arrays.values()] == [(4, 5, 3, 3), (3, 3, 4, 5), (3, 3, 5, 4)]
    assert np.array_equal(arrays["torch"].transpose(2, 3, 0, 1), arrays["flax"])
    assert np.array_equal(arrays["torch"].transpose(2, 3, 1, 0), arrays["keras"])


def test_select_by_id_clause_and_flag() -> None:
    def ids(select: str) -> set[str]:
        return {vector.id for vector, _ in cases(load_vectors(), select=select)}

    assert ids("L1-tie") == {"L1-tie"}
    assert all(VECTORS[i].clause == "AGC-9" for i in ids("AGC-9"))
    assert all("Squeeze" in VECTORS[i].flags for i in ids("Squeeze"))
    assert ids("nothing") == set()


def test_subjects_are_not_asked_about_our_core() -> None:
    kinds = {vector.kind for vector, _ in cases(load_vectors(), without=OF_THIS_LIBRARY)}
    sharp = {"sharpen", "sharpness-trajectory", "sharpness-scenario"}
    assert kinds == {"layer", "clip", "trajectory", "scenario"} | sharp


OTHERS = """
import sys
from agc_conformance.backend import Backend

class NoDevice(Backend):
    def __init__(self): pass

class Raises(Backend):
    def __init__(self, device): raise RuntimeError("no\\nway")

class Exits(Backend):
    def __init__(self, device): sys.exit(0)

class Nameless:
    def __init__(self, device): pass
    clip = layer_plan = None

class Caffe(Backend):
    layout = "caffe"

class Fp32(Backend):
    dtypes = {"fp32"}

class Unversioned(Backend):
    def versions(self): raise LookupError("none")

class Number(Backend):
    name = 7

class OfDevice(Backend):
    def device_name(self): return None

class Version(Backend):
    def versions(self): return "1.0"

class Versions(Backend):
    def versions(self): return {"numpy": 2}

class Paths(Backend):
    paths = ("compiled", "fast")

instance = Backend()
number = 3
"""


FILES = {
    "x.py": OTHERS,
    "raises.py": "raise RuntimeError('no\\nway')",
    "wrong.py": "x = (",
    "exits.py": "import sys; sys.exit(0)",
    "needs.py": "import a_framework_that_is_not_there",
    "empty.py": "from agc_conformance.backend import Backend\nclass Empty(Backend): name = 'empty'",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules of backends."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALLED = "called with device='cpu', it raises"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody", "not registered; there are reference"),
        ("no_such_package.module:Thing", "there is no module 'no_such_package'"),
        ("agc.units:Thing", "agc.units has no 'Thing'"),
        ("nowhere.py:Thing", ".*no such Python file"),
        ("agc_conformance.data:dtype_of", f"{CALLED} TypeError"),
        (":x", "'' is no module; give package.module:object or path/to/file.py:object"),
        ("..:x", "'..' is no module"),
        ("raises.py:X", r"imported, it raises RuntimeError: no \(raises.py:1\)"),
        ("wrong.py:X", r"imported, it raises SyntaxError: .* \(wrong.py, line 1\)"),
        ("exits.py:X", "imported, it raises SystemExit: 0"),
        ("x.py", "name the backend in the file too: x.py:object"),
        (
            "x.py:NoDevice",
            f"{CALLED} TypeError: .*'device'.*; give a class of backends, which accepts",
        ),
        ("x.py:Fp32", r"dtypes must be a set of float16, .*, got \{'fp32'\}"),
        ("x.py:Raises", f"{CALLED} RuntimeError: no "),
        ("x.py:Exits", f"{CALLED} SystemExit: 0"),
        ("x.py:Nameless", "Nameless has no name, .*; derive it from agc_conformance.backend.B"),
        ("x.py:Caffe", "layout must be one of torch, flax, keras, got 'caffe'"),
        ("x.py:Unversioned", "asked for its versions and device, it raises LookupError: none"),
        ("x.py:number", f"{CALLED} TypeError"),
        ("x.py:Number", "name must be a str, got 7"),
        ("x.py:OfDevice", r"device_name\(\) must be a str, got None"),
        ("x.py:Version", r"versions\(\) must be a dict of package to version, .*got '1.0'"),
        ("x.py:Versions", r"versions\(\) must be a dict of .*got \{'numpy': 2\}"),
        ("x.py:Paths", "paths must be a tuple of scenarios, .*no method scenario_fast"),
    ],
)
def test_backends_that_do_not_exist_or_are_broken(
    spec: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Path("r.jsonl"), backend=spec) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^agc: --backend {re.escape(spec)}: {message}", line)
    assert not (folder / "r.jsonl").exists()


def test_a_backend_may_be_an_instance(folder: Path) -> None:
    assert load_backend("x.py:instance", "cpu").name == "unnamed"


@pytest.mark.parametrize(
    ("spec", "device", "message"),
    [
        ("x.py:instance", "cuda", "is made for cpu, not for cuda"),
        ("needs.py:Thing", "cpu", "a_framework_that_is_not_there"),
        ("reference", "cuda", "reference runs on the CPU only"),
    ],
)
def test_what_is_unavailable(folder: Path, spec: str, device: str, message: str) -> None:
    with pytest.raises(Unavailable, match=message):
        load_backend(spec, device)


def agc_command(*arguments: object) -> int:
    return main(["conformance", *map(str, arguments)])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


def run(out: Path, *options: object, backend: str = "reference") -> int:
    return agc_command("run", "--in-process", "--backend", backend, "--out", out, *options)


def test_the_command_writes_a_complete_file(out: Path) -> None:
    assert run(out, "--select", "L1-n*") == 0
    found = read_results(out)
    assert found.header["backend"] == "reference"
    assert found.header["device"] == "cpu"
    assert found.header["select"] == "L1-n*"
    assert found.header["versions"] == {"numpy": np.__version__}
    assert found.header["suite"] == agc.__version__
    assert {r["status"] for r in found.results} == {"passed"}


def test_an_absent_device_is_listed_and_fails(out: Path) -> None:
    assert run(out, "--device", "cuda") == 1
    assert "CPU only" in read_results(out).unavailable[0]["reason"]
    assert run(out, "--device", "cuda", "--allow-unavailable") == 0


@pytest.mark.parametrize(
    ("select", "status", "said"),
    [
        ("L7-*", 2, "no id, clause or bug class matches; agc conformance list shows all"),
        ("l1-layer-dens", 2, "; nearest are L1-layer-dense"),
        ("sqeeze*", 2, "; nearest are Squeeze"),
        ("model-F0-*", 1, "nothing was run: --select model-F0-* matches only what this run leaves"),
        ("L0-plan-*", 0, "passed"),
    ],
)
def test_selecting_nothing_fails_and_plans_alone_do_not(
    out: Path, select: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(out, "--select", select) == status
    assert said in " ".join(capsys.readouterr().err.split())
    assert out.exists() == (status < 2)


def test_a_backend_that_does_nothing_fails(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the core of this library does right is not to its credit."""
    assert run(out, backend="empty.py:Empty") == 1
    assert "nothing passed beyond the plans of level 0" in capsys.readouterr().err
    assert {r["status"] for r in read_results(out).results} == {"unsupported"}
    role = ("--role", "subject")
    assert run(out, *role, backend="empty.py:Empty") == 0, "subjects are only looked at"


MOVES = """
import os
from agc_conformance.backend import Backend

class Moves(Backend):
    name = "[red]moves"
    def clip(self, problem):
        os.chdir("/")
        raise ValueError("no " * 40)
"""


def test_a_run_whatever_the_backend_does_with_the_folder(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And its summary: a failure is one line, and those that are not shown are counted."""
    Path("moves.py").write_text(MOVES)
    run = ("run", "--backend", "moves.py:Moves", "--out", "r.jsonl", "--select", "L1-layer-*")
    assert agc_command(*run) == 1
    found = read_results(folder / "r.jsonl")
    errors = sum(r["status"] == "error" for r in found.results)
    assert errors > 20
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("error L1-layer-") for line in lines) == 20
    assert all(line.endswith("(moves.py:9)") for line in lines if line.startswith("error "))
    assert f"and {errors - 20} more, which the report lists" in lines
    assert any(line.startswith("[red]moves on cpu: ") for line in lines)
    assert agc_command("report", folder / "r.jsonl") == 1
    lines = capfd.readouterr().out.splitlines()
    assert f"and {errors - 30} more; --out DIR writes all" in lines
    assert any(line.startswith("error [red]moves on cpu L1-layer-") for line in lines)


class Point(EntryPoint):
    """An entry point of no installed package."""

    dist = None


def test_two_packages_that_register_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("mine", f"{name}:Backend", "agc.backends") for name in ("a", "b")]
    monkeypatch.setattr(load, "entry_points", lambda group: points)
    with pytest.raises(ConfigError, match=r"several are registered: a:Backend .* and b:Backend"):
        load_backend("mine", "cpu")
    assert load.backend_names() == ["reference", "mine"]


@pytest.mark.parametrize("text", ["abc", "nan", "-1", "0", "inf"])
def test_a_timeout_is_a_number_of_seconds(
    text: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        agc_command("run", "--backend", "reference", "--out", out, f"--timeout={text}")
    assert f"a number above 0 and below 1e6 is needed, not '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_is_no_result_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agc_command("run", "--backend", "reference", "--out", name) == 2
    assert "name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize("everyone", [True, False], ids=["terminal", "kill"])
def test_an_interrupted_run_leaves_a_file_that_says_so(everyone: bool, out: Path) -> None:
    """Ctrl-C in a terminal reaches both processes, and ``kill -INT`` one."""
    out.with_name("dying.py").write_text(DYING + "print('here', flush=True)\n")
    backend = f"{out.with_name('dying.py')}:Hang"
    command = ("conformance", "run", "--backend", backend, "--out", out, "--select", "L1-tie*")
    with subprocess.Popen(
        [sys.executable, "-m", "agc", *map(str, command)],
        start_new_session=True,
        # A shell lets what it runs in the background ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            part = out.with_name("r.jsonl.part")
            while not part.exists() or part.read_text().count("\n") < 3:
                time.sleep(0.05)
            (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # or the end of the context waits for it
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("agc: interrupted\n")
    (died,) = read_results(out).died
    assert died == {
        "type": "died",
        "check": "L1-tie:float16",
        "reason": "interrupted by the user",
    }


def test_a_thread_that_never_ends_does_not_keep_a_run(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("threads.py").write_text(
        "import threading, time\n"
        "from agc_conformance.backends.reference import ReferenceBackend\n"
        "class Threads(ReferenceBackend):\n"
        "    def clip(self, problem):\n"
        "        threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "        return super().clip(problem)\n"
    )
    monkeypatch.setattr(apart, "_SECONDS_TO_END", 0.5)
    run = ("run", "--backend", "threads.py:Threads", "--out", out, "--select", "L1-tie")
    assert agc_command(*run) == 0
    assert read_results(out).died == []


DYING = """
import ctypes, os, time
from agc_conformance.backends.reference import ReferenceBackend

class Dying(ReferenceBackend):
    name = "dying"
    asked = 0
    def clip(self, problem):
        self.asked += 1
        return super().clip(problem) if self.asked < 3 else self.die()

class Crash(Dying):
    def die(self): ctypes.string_at(0)

class Leave(Dying):
    def die(self): os._exit(0)

class Hang(Dying):
    def die(self): time.sleep(600)

class Interrupt(Dying):
    def die(self): raise KeyboardInterrupt

class Stillborn(Dying):
    def __init__(self, device): os.abort()
"""


@pytest.mark.parametrize(
    ("backend", "check", "reason", "passed"),
    [
        ("Crash", "L1-tie:float16", r"SIGSEGV \(.*\)", 2),
        ("Leave", "L1-tie:float16", "the process ended with status 0", 2),
        ("Hang", "L1-tie:float16", r"no answer in 10 s \(dying.py:\d+, in die\)", 2),
        ("Interrupt", "L1-tie:float16", r"KeyboardInterrupt \(dying.py:\d+\)", 2),
        ("Stillborn", "loading the backend", r"SIGABRT \(dying.py:\d+, in __init__\)", 0),
    ],
)
def test_a_backend_that_dies_leaves_a_file_that_says_where(
    backend: str,
    check: str,
    reason: str,
    passed: int,
    out: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out.with_name("dying.py").write_text(DYING)
    out.with_name("r.jsonl.part").write_text("of another run")
    spec = f"{out.with_name('dying.py')}:{backend}"
    options = ("--select", "L1-tie*", "--timeout", 10)
    assert agc_command("run", "--backend", spec, "--out", out, *options) == 1
    found = read_results(out)
    (died,) = found.died
    assert died["check"] == check
    assert re.fullmatch(reason, died["reason"])
    assert [r["status"] for r in found.results] == ["passed"] * passed
    assert f"died in {check}: {died['reason']}" in capfd.readouterr().err
    assert not list(out.parent.glob("*.part"))
    assert agc_command("report", out, "--out", out.parent) == 1
    report = json.loads((out.parent / "report.json").read_text())
    assert report["headline"].endswith("1 died")
    assert f"died in {check}" in report["notices"][0]


@pytest.mark.parametrize("select", ["L1-tie", "L7-*"])
def test_a_process_of_its_own_says_what_a_run_in_this_one_does(
    select: str, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = run(out, "--select", select)
    said = capfd.readouterr().err
    command = ("run", "--backend", "reference", "--out", out, "--select", select)
    assert agc_command(*command) == status
    assert capfd.readouterr().err == said


def run_example(out: Path, *options: object) -> int:
    return run(out, "--no-train", *options, backend=f"{EXAMPLE}:MyBackend")


def test_the_example_finds_what_the_readme_says(out: Path) -> None:
    assert run_example(out) == 1
    found = read_results(out)
    bad = {r["id"] for r in found.results if r["status"] in ("failed", "error")}
    assert bad == {
        "L1-error-shape",
        "L1-error-rank",
        "L1-error-integer-gradient",
        "L1-error-boolean-gradient",
        "L1-error-no-gradients",
    }
    assert sum(r["status"] == "passed" for r in found.results) > 100
    assert run_example(out, "--role", "subject") == 0


def test_a_backend_by_module_name(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    assert run(out, "--select", "L1-layer-*", backend="my_backend:MyBackend") == 0


@pytest.mark.parametrize("out", ["folder", "file/r.jsonl", "locked/r.jsonl"])
@pytest.mark.parametrize("command", [("run", "--in-process", "--backend", "reference"), ("teeth",)])
def test_where_nothing_can_be_written(
    command: tuple[str, ...],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said before anything is run, and nothing is left behind."""

    def run_case(*_: Any) -> Any:
        raise AssertionError("something was run")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "run_case", run_case)
    monkeypatch.setattr(teeth_module, "run_mutant", run_case)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert agc_command(*command, "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert out.partition("/")[0] in line
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file", "locked"}


TALK = """
from agc import cli

class Talk:
    name = "talk"
    def load(self):
        return lambda add: add.add_parser("talk").set_defaults(run=lambda _: print(1) or 0)

cli.entry_points = lambda group: [Talk()]
raise SystemExit(cli.main(["talk"]))
"""


@pytest.mark.parametrize("lines", [0, 1])
@pytest.mark.parametrize("command", [("-m", "agc", "conformance", "list"), ("-c", TALK)])
def test_a_reader_that_has_seen_enough(command: tuple[str, ...], lines: int) -> None:
    """As ``head`` does: it is no error, whether the output is printed line by line or at the
    end.
    """
    asked = [sys.executable, *command]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("more", "status", "unexpected", "message"),
    [
        ("", 0, [], ""),
        ("L1-error-u*  accepts bad input\n", 1, ["L1-error-units-misfit"], ""),
        ("L1-oops-*  gone\n", 1, [], "'L1-oops-*' matches no result that fails"),
    ],
)
def test_expected_failures(
    more: str,
    status: int,
    unexpected: list[str],
    message: str,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = out.with_name("mine.txt")
    file.write_text(f"# known\nL1-error-[!u]*  accepts bad input\n{more}")
    assert run_example(out, "--xfail", file) == status
    found = read_results(out)
    assert found.footer is not None
    assert found.footer["counts"]["xfail"] == 5
    assert [r["id"] for r in found.results if r["status"] == "xpass"] == unexpected
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["L1-a\tslow\n", "  L1-a   slow", "\ufeffL1-a slow\r\n"])
def test_how_an_expectation_may_be_written(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text(text, encoding="utf-8")
    (line,) = xfail.read_xfail(file)
    assert (line.pattern, line.reason) == ("L1-a", "slow")


def test_an_expectation_without_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("\nL1-*\n")
    with pytest.raises(FormatError, match=r"x\.txt, line 2: 'L1-\*' gives no reason"):
        xfail.read_xfail(file)


def test_an_expectation_may_name_a_dtype() -> None:
    line = xfail.Expected("L1-a:float16", "slow", "here")
    for dtype, status in (("float16", "xfail"), ("float32", "failed")):
        record = make_result("L1-a", clause="AGC-1", level="L1", status="failed", dtype=dtype)
        assert xfail.apply(record, [line])["status"] == status
    assert line.hits == 1


def teeth_of(out: Path, mutant: mutants.Mutant, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(teeth_module, "MUTANTS", [mutant])
    monkeypatch.setattr(teeth_module, "FLAGS", {mutant.flag: ""})
    return agc_command("teeth", "--out", out)


def test_teeth_fail_if_a_mutant_survives(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = mutants.clipping.Engine
    survivor = mutants.Mutant("harmless", "Squeeze", "does nothing wrong", "clipping", engine)
    assert teeth_of(out, survivor, monkeypatch) == 1
    assert [m["status"] for m in read_results(out).mutants] == ["survived"]
    error = capsys.readouterr().err
    assert "survived harmless" in error
    assert "no vector with the flag Squeeze" in error


def test_teeth_pass_if_all_are_killed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = next(m for m in mutants.MUTANTS if m.flag == "GroupedSplit")
    assert teeth_of(out, killed, monkeypatch) == 0
    (mutant,) = read_results(out).mutants
    assert "L1-layer-conv-transpose2d-grouped:float32" in mutant["killed_by"]


def test_vectors_and_list_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert agc_command("vectors") == 0
    assert agc_command("list", "--select", "AGC-8") == 0
    assert "L3-sharded" in capsys.readouterr().out


def test_list_shows_every_result_and_names_a_selection_of_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert agc_command("list") == 0
    shown = capsys.readouterr().out
    assert all(
        one in shown for one in [*result_ids("tiny"), "real-digits-clip", "real-sam-digits-run"]
    )
    assert agc_command("list", "--select", "L7-*") == 2
    assert "--select L7-*: no id, clause or bug class matches" in capsys.readouterr().err


def test_a_vector_file_can_be_read_without_this_library() -> None:
    """The README's promise: JSON and a little arithmetic are enough."""
    vector: Vector = VECTORS["L1-layer-dense"]
    data = json.loads(json.dumps(vector.data))
    (p,) = data["parameters"]
    rows, columns = p["axes"].values()
    gradient = p["gradient"]["values"]
    clipped = data["expect"]["gradients"]["weight"]
    for row in range(rows):
        part = gradient[row * columns : (row + 1) * columns]
        norm = sum(x * x for x in part) ** 0.5
        assert norm == pytest.approx(clipped["gradient_norm"][row], rel=1e-14)
        scale = min(1.0, clipped["limit"][row] / norm)
        want = clipped["gradient"]["values"][row * columns : (row + 1) * columns]
        assert [x * scale for x in part] == pytest.approx(want, rel=1e-14)


def test_the_core_is_asked_through_one_object() -> None:
    assert Core().config({}) == agc.AGC()


@pytest.mark.parametrize(("task", "results"), [("digits", 4), ("sam-digits", 6)])
def test_training_can_be_selected(task: str, results: int, out: Path) -> None:
    assert run(out, "--select", f"real-{task}-*") == 0
    found = read_results(out)
    assert {record["task"] for record in found.train} == {task}
    assert len(found.results) == results
