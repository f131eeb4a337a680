"""Run the documentation: every Python block of README.md and docs/ is a test.

A block belongs to the framework whose adapter it mentions, and runs in that framework's test folder
by asking for the fixture ``snippet``. Code that a block needs but a reader does not stands in an
HTML comment right before it, starting with ``<!-- setup``.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc import nfnet as core
from agc.cli.demo import gratings, initial_values, learning_rates
from agc.errors import ParameterError
from agc.weights import save
from agc_conformance.nfnets.golden import GOLDEN, LIMITS
from tests.helpers import norm

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?:<!-- setup\n(?P<setup>.*?)-->\n+)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
ADAPTERS = ("agc_torch", "agc_jax", "agc_tensorflow")


@dataclass(frozen=True)
class Snippet:
    place: str
    setup: str
    code: str

    @property
    def folder(self) -> str:
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
    return found


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


@pytest.fixture(scope="session")
def check_refused() -> Callable[[Callable[[], Any], Callable[[Any], None]], None]:
    """Return a function of a model's ``to_neutral`` and ``from_neutral``: wrong arrays change
    nothing.
    """

    def check(read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        before = read()
        wrong = dict(core.seeded_parameters("tiny"))
        wrong["stages.3.2.conv2.wait"] = wrong.pop("stages.3.2.conv2.weight")
        wrong["head.bias"] = np.zeros(11)
        with pytest.raises(ParameterError) as caught:
            write(wrong)
        message = str(caught.value)
        assert "1 missing: stages.3.2.conv2.weight;" in message
        assert "1 unknown: stages.3.2.conv2.wait;" in message
        assert "head.bias (has (11,), needs (10,))" in message
        after = read()
        assert all(np.array_equal(before[name], after[name]) for name in before)

    return check


@pytest.fixture(scope="session")
def check_golden() -> Callable[..., None]:
    """Return a function that compares a model in float64, as arrays, with the numbers of DeepMind's
    code.
    """
    exact = LIMITS["float64"]

    def same(found: float, expected: float, digits: float = 1e-12) -> None:
        # The golden values are rounded, so half a digit is added to the limit.
        assert found == pytest.approx(expected, rel=exact.gradient, abs=0.51 * digits)

    def check(
        variant: str,
        *,
        logits: Any,
        loss: float,
        pooled: Any,
        signals: Mapping[str, Any],
        gradients: Mapping[str, Any],
        parameters: Mapping[str, Any],
    ) -> None:
        golden = GOLDEN[variant]
        assert abs(loss - golden.loss) <= exact.loss
        for row, expected in zip(logits, golden.logits, strict=True):
            np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=1.5e-12)
        same(np.sum(logits), golden.logits_sum)
        same(norm([logits]), golden.logits_norm)
        same(norm([pooled]), golden.pooled_norm)
        np.testing.assert_allclose(signals["avg_var"], golden.avg_var, rtol=0, atol=5.1e-10)
        for index, expected in golden.res_avg_var.items():
            same(signals["res_avg_var"][index], expected, 1e-9)
        for name, expected in golden.gradients.items():
            digit = 10.0 ** (math.floor(math.log10(expected)) - 12)
            limit = exact.skip_gain if name.endswith("skip_gain") else exact.gradient
            assert norm([gradients[name]]) == pytest.approx(expected, rel=limit, abs=0.51 * digit)
        same(norm(gradients.values()), golden.gradient_norm)
        same(norm(parameters.values()), golden.parameter_norm, 1e-9)

    return check


@pytest.fixture(scope="session")
def check_single() -> Callable[..., None]:
    """Return a function that compares logits, loss and gradients in float32 with those in
    float64.
    """
    limits = LIMITS["float32"]

    def check(found: tuple[Any, float, Mapping[str, Any]], exact: tuple[Any, Any, Any]) -> None:
        logits = np.asarray(exact[0])
        off = np.abs(np.asarray(found[0], np.float64) - logits).max()
        assert off <= limits.logits * np.abs(logits).max()
        assert abs(found[1] - float(exact[1])) <= limits.loss
        errors = {
            name: norm([np.asarray(found[2][name], np.float64) - np.asarray(gradient)])
            / norm([gradient])
            for name, gradient in exact[2].items()
        }
        skip_gains = {name for name in errors if name.endswith("skip_gain")}
        assert len(skip_gains) == 12
        assert statistics.median(errors.values()) <= limits.gradient_median
        assert max(errors[name] for name in skip_gains) <= limits.skip_gain
        assert max(errors[name] for name in errors.keys() - skip_gains) <= limits.gradient

    return check


@pytest.fixture(scope="session")
def try_demo() -> Callable[[Any], None]:
    """Return a function that tries a framework's ``demo.train``: it learns, clips, and stops when
    it must.
    """

    def run(train: Any, clipping: float | None, peak: float, steps: int = 6) -> list[Any]:
        random = np.random.default_rng(0)
        batches = (gratings(random, 16) for _ in range(steps))
        test = gratings(np.random.default_rng(1), 32)
        rates = learning_rates(peak, steps)
        return list(train(initial_values(0), batches, rates, clipping, test))

    def check(train: Any) -> None:
        seen = run(train, 0.01, 0.2)
        assert len(seen) == 7
        losses, shares = zip(*seen[:-1], strict=True)
        assert abs(losses[0] - math.log(10)) < 0.1
        assert all(0 < share < 0.1 for share in shares)
        assert 0 <= seen[-1][0] <= 1
        assert [share for _, share in run(train, None, 0.001)] == 7 * [0.0]
        lost = run(train, None, 1e30)
        assert not math.isfinite(lost[-1][0])
        assert len(lost) < 6
        again = run(train, 0.01, 0.2)  # nothing is left of the others
        np.testing.assert_allclose(again, seen, rtol=1e-3)

    return check
