"""docs/specification.md has every clause, and what it says about where they are tested is so."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from agc_conformance.clauses import CLAUSES
from agc_conformance.nfnets import ask as study
from agc_conformance.training import recipes
from agc_conformance.training.ask import TASKS, result_ids
from agc_conformance.vectors import load_vectors

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
HEADS = re.findall(r"^\*\*([A-Z]+-\d+): ", TEXT, re.MULTILINE)
TABLE = TEXT[TEXT.index("## Where the clauses are tested") : TEXT.index("## What other code does")]


def test_every_clause_has_its_paragraph_in_order() -> None:
    clauses = [*CLAUSES]
    place = clauses.index("SAM-13") + 1
    clauses[place:place] = ["SAM-14", "SAM-15"]
    assert clauses == HEADS


def test_no_code_cites_a_clause_that_is_not_there() -> None:
    folders = ("agc", "adapters", "conformance", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    cited = {
        clause: path
        for path in files
        for clause in re.findall(
            r"\b(?:AGC|SAM|NFNET|RECIPE)-\d+\b", path.read_text(encoding="utf-8")
        )
    }
    assert set(HEADS) <= set(cited)
    assert {clause: path for clause, path in cited.items() if clause not in HEADS} == {}


def test_the_table_of_tests_names_what_is_there() -> None:
    ids = [
        *(vector.id for vector in load_vectors()),
        *(name for task in TASKS for name in result_ids(task)),
        *recipes.result_ids(),
        *(name for one in study.STUDIES for name in study.result_ids(one)),
    ]
    patterns = re.findall(r"`((?:L\d|real|model)-[^`]*)`", TABLE)
    assert len(patterns) >= 13
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in ids), pattern
    for framework in ("torch", "jax", "tensorflow"):
        for path in re.findall(r"`(tests/[^`]*)`", TABLE):
            text = (ROOT / path.replace("<framework>", framework)).read_text(encoding="utf-8")
            assert "class TestVerify" in text
