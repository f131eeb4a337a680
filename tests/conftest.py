"""Run the documentation: every Python block of README.md and docs/ is a test.

A block belongs to the framework whose adapter it mentions, and runs in that framework's test folder by
asking for the fixture ``snippet``. Code that a block needs but a reader does not stands in an HTML comment
right before it, starting with ``<!-- setup``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agc.demo import gratings, initial_values, learning_rates

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


@pytest.fixture(scope="session")
def try_demo() -> Callable[[Any], None]:
    """Return a function that tries a framework's ``demo.train``: it learns, clips, and stops when it must."""

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
