"""Run the documentation: every Python block of README.md and docs/, and every file of examples/.

A block belongs to the framework whose adapter it mentions, and runs in that framework's test folder
by asking for the fixture ``snippet``. Code that a block needs but a reader does not stands in an
HTML comment right before it, starting with ``<!-- setup``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agc import nfnet as core
from agc.weights import save

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?:<!-- setup\n(?P<setup>.*?)-->\n+)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
ADAPTERS = ("agc_torch", "agc_jax", "agc_tensorflow")
TRAINERS = ("transformers", "lightning", "accelerate", "timm")


@dataclass(frozen=True)
class Snippet:
    place: str
    setup: str
    code: str

    @property
    def folder(self) -> str:
        if self.place.startswith(
            ("docs/trainers.md", *(f"examples/{name}" for name in TRAINERS))
        ):  # needs the trainers' packages
            return "integrations"
        used = [name for name in ADAPTERS if name in self.code]
        assert len(used) <= 1, f"{self.place} mentions {used}: one framework a block"
        return used[0].removeprefix("agc_") if used else "core"

    def run(self) -> dict[str, object]:
        """Execute the block as a reader would, with its line numbers, and return its variables."""
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(self.setup, f"{self.place} (setup)", "exec"), names)
        exec(compile(self.code, self.place, "exec"), names)
        return names


def find_snippets() -> list[Snippet]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start("code")].count("\n")
            place = f"{path.relative_to(ROOT).as_posix()}:{line}"
            code = "\n" * line + match["code"]  # so that a traceback points into the document
            found.append(Snippet(place, match["setup"] or "", code))
    for path in sorted((ROOT / "examples").glob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        # Of timm's installation here, without torchvision.
        setup = "from benchmarks.without_torchvision import import_timm\nimport_timm()"
        found.append(Snippet(place, setup if "timm" in place else "", path.read_text("utf-8")))
    return found


@pytest.hookimpl(trylast=True)  # after some are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let every process begin with what takes long, so that at the end none waits for another.

    Each of them is first given as many tests, in their order.
    """
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    share = len(items) // processes
    items.clear()
    for number in range(processes):
        items += long[number::processes]
        missing = (number + 1) * share - len(items) if number < processes - 1 else len(short)
        items += short[: max(missing, 0)]
        del short[: max(missing, 0)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "snippet" in metafunc.fixturenames:
        folder = metafunc.definition.path.parent.name
        mine = [snippet for snippet in find_snippets() if snippet.folder == folder]
        metafunc.parametrize("snippet", mine, ids=[snippet.place for snippet in mine])


@pytest.fixture
def run_suite(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that runs the suite on this folder's framework, in a process as a user's
    run is.

    It takes more options, and returns the status of every result by ``id:dtype``.
    """

    def run(*options: str) -> dict[str, str]:
        out = tmp_path / "results.jsonl"
        command = ["conformance", "run", "--backend", request.path.parent.name, "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "agc", *command, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        results = [record for record in records if record["type"] == "result"]
        return {f"{record['id']}:{record['dtype']}": record["status"] for record in results}

    return run


@pytest.fixture(scope="session")
def arrays() -> dict[str, Any]:
    """Return the seeded parameters of ``tiny`` in float32."""
    return {name: a.astype("float32") for name, a in core.seeded_parameters("tiny").items()}


@pytest.fixture
def neutral(tmp_path: Path, arrays: dict[str, Any]) -> Path:
    """Return a file of them."""
    save(tmp_path / "neutral", core.options("tiny"), arrays)
    return tmp_path / "neutral"
