"""The cases, the clock, and the contents of a result file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.common import CONDITIONS, Measure, versions
from benchmarks.shapes import MODELS, REHEARSAL

TURNS = 8
"""The contestants take turns, so that a slow minute of the machine hits them all."""
ROUNDS = 4
PACKAGES = (
    "agc-sam", "numpy", "torch", "timm", "pytorch_optimizer", "jax", "optax", "tensorflow-cpu",
    "tensorflow", "keras", "pillow", "torchvision",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option to try the benchmarks out."""
    parser.addoption(
        "--rehearsal", action="store_true", help="every contestant once, on a few small tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep the warning that nothing is saved from becoming an error that hides the real failure."""
    config.addinivalue_line("filterwarnings", "default:Not saving anything")


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """Time one contestant: ``measure(run, setup, framework=..., model=..., ...)``."""
    once = request.config.getoption("rehearsal")

    def timed(
        run: Callable[..., Any],
        setup: Callable[[], Any] | None = None,
        rounds: int = ROUNDS,
        **case: Any,
    ) -> None:
        benchmark.group = f"{case['framework']} {case['model']} {case['condition']}"
        benchmark.extra_info.update(case)
        counts = {"rounds": 1} if once else {"rounds": rounds, "warmup_rounds": 1}
        benchmark.pedantic(run, setup=setup, **counts)

    return timed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Order: model, condition, turn, contestant; the last changes fastest."""
    rehearsal = metafunc.config.getoption("rehearsal")
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("contestant", metafunc.module.CONTESTANTS)
        turns = 1 if rehearsal else getattr(metafunc.module, "TURNS", TURNS)
        metafunc.parametrize("turn", range(turns))
    if "condition" in metafunc.fixturenames:
        conditions = getattr(metafunc.module, "CONDITIONS", CONDITIONS)
        metafunc.parametrize("condition", conditions, scope="module")
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", [REHEARSAL] if rehearsal else MODELS, scope="module")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep what a reader needs to judge the numbers, without the machine's own name."""
    cpu = machine_info.get("cpu", {})
    kept = {
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "machine": machine_info.get("machine"),
        "system": machine_info.get("system"),
        "python": machine_info.get("python_version"),
        "command": shlex.join(["python", "-m", "pytest", *_arguments()]),
        "packages": versions(PACKAGES),
    }
    machine_info.clear()
    machine_info.update(kept)


def _arguments() -> list[str]:
    return [argument for argument in sys.argv[1:] if not argument.startswith("--benchmark-json")]


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drop the times of single rounds; keep their statistics."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        for key in ("fullname", "params", "param", "options"):
            benchmark.pop(key, None)
    output_json["commit_info"] = {
        key: output_json["commit_info"].get(key) for key in ("id", "time", "dirty")
    }
