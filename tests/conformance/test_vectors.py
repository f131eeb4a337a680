"""Vectors: the files are what their modules make, and what a damaged file says."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agc.errors import FormatError
from agc_conformance import generate
from agc_conformance.clauses import CLAUSES, COMPUTED
from agc_conformance.data import (
    decode_numbers,
    decode_values,
    encode_numbers,
    from_layout,
    splitmix64,
    to_layout,
)
from agc_conformance.flags import FLAGS
from agc_conformance.lint import lint
from agc_conformance.vectors import VECTORS, check_schema, digest, load_vectors, vector_counts


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A copy of all vectors to damage."""
    copy = tmp_path / "whole"
    shutil.copytree(VECTORS, copy)
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of some vectors to damage."""
    copy = tmp_path / "some"
    copy.mkdir()
    for name in ("L1-sparse.json", "L2-trajectory.json"):
        shutil.copy(VECTORS / name, copy)
    return copy


def damage(folder: Path, name: str, old: str, new: str) -> Path:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_every_vector_file_has_the_module_of_its_name() -> None:
    modules = Path(generate.__file__).parent.glob("L*.py")
    assert {path.stem for path in VECTORS.glob("L*.json")} == {
        module.stem.replace("_", "-") for module in modules
    }


def test_running_the_suite_makes_no_vectors() -> None:
    code = """
import sys
import agc_conformance.cli, agc_conformance.suite, agc_conformance.runner
assert "agc_conformance.generate" not in sys.modules
import agc_conformance.generate
assert not [name for name in sys.modules if name.startswith("agc_conformance.generate.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_committed_files_are_what_their_modules_make() -> None:
    assert generate.check() == []


def test_a_hand_edit_is_found_and_undone(whole: Path) -> None:
    damage(whole, "L1-layer.json", '"weight_norm": [', '"weight_norm":  [')
    assert generate.check(whole) == ["L1-layer.json"]
    assert generate.write(whole) == ["L1-layer.json"]
    assert generate.check(whole) == []


def test_files_that_no_module_makes_are_found_and_removed(whole: Path) -> None:
    (whole / "L9-mine.json").write_text("{}")
    assert generate.check(whole) == ["L9-mine.json"]
    generate.write(whole)
    assert not (whole / "L9-mine.json").exists()


def test_vectors_are_sound() -> None:
    check_schema(VECTORS)
    assert lint() == []


def test_every_level_clause_and_flag_is_covered() -> None:
    counts = vector_counts(load_vectors())
    assert set(counts["level"]) == {"L0", "L1", "L2", "L3", "L5"}
    # Of models and trainings, what is expected is computed: test_models.py, test_recipes.py.
    assert set(counts["clause"]) == {name for name in CLAUSES if not name.startswith(COMPUTED)}
    assert set(counts["flag"]) == set(FLAGS)


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in VECTORS.iterdir()) < 1_000_000


def test_data_differ_along_every_axis() -> None:
    layers = [v for v in load_vectors() if v.id.startswith("L1-layer-")]
    assert len(layers) > 30
    for vector in layers:
        for p in vector.data["parameters"]:
            shape = tuple(p["axes"].values())
            for data in (p["weight"], p["gradient"]):
                array = np.abs(decode_values(data, shape))
                for axis, size in enumerate(shape):
                    norms = np.sqrt(
                        (array**2).sum(tuple(a for a in range(len(shape)) if a != axis))
                    )
                    assert size == 1 or len(set(norms.tolist())) > 1, (vector.id, axis)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', r"L1-sparse\.json: version 2; this suite reads version 1"),
        ('"format": "agc-vectors"', '"format": "x"', r"L1-sparse\.json: not a vector file"),
        ('"clause": "AGC-9"', '"clause": 9', r"vectors/0/clause.*L1-sparse-rows"),
        ('"step": 0', '"stride": 0', r"L1-sparse-rows"),
        ('"action": [', '"actions": [', r"vectors/0/.*L1-sparse-rows"),
        ('"keep"', '"kept"', r"vectors/0/.*kept"),
    ],
    ids=["version", "format", "clause", "unknown-field", "missing-field", "unknown-action"],
)
def test_a_damaged_file_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    damage(folder, "L1-sparse.json", old, new)
    with pytest.raises(FormatError, match=message):
        load_vectors(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "L2-trajectory.json"
    path.write_text(path.read_text()[:5000])
    with pytest.raises(FormatError, match=r"L2-trajectory\.json: not JSON, or truncated: .*line"):
        load_vectors(folder)


def test_a_binary_file_is_refused(folder: Path) -> None:
    (folder / "L1-sparse.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"L1-sparse\.json: cannot be read as text"):
        load_vectors(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no vector files"):
        load_vectors(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"L1-sparse-nan"', '"L1-sparse-rows"', "L1-sparse-rows: the id is used 2 times"),
        ('"id": "L1-sparse-nan"', '"id": "L2-sparse-nan"', "does not start with its level"),
        ('"clause": "AGC-9"', '"clause": "AGC-99"', "there is no clause 'AGC-99'"),
        ('"SparseDensified"', '"Sparse"', "flag 'Sparse' is not described"),
        ('"error": "UnitsError"', '"error": "UnitError"', "there is no error class 'UnitError'"),
        ('"v d -> v"', '"v d -> d"', "'v d -> d' has other units"),
        ('"v d -> v"', '"v d e -> v"', "is for 3 axes"),
        ('"values": [-2', '"values": [0.1', "is not exact in float32"),
    ],
    ids=["duplicate", "level", "clause", "flag", "error", "units", "misfit", "inexact"],
)
def test_lint_finds(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "L1-sparse.json"
    if old == '"values": [-2':
        data = json.loads(path.read_text())
        data["vectors"][0]["parameters"][0]["weight"]["values"][0] = 0.1
        path.write_text(json.dumps(data))
    else:
        damage(folder, "L1-sparse.json", old, new)
    assert any(message in problem for problem in lint(folder))


def test_digest_depends_on_every_byte(whole: Path) -> None:
    before = digest(whole)
    assert before == digest()
    damage(whole, "L0-units.json", "o i", "o  i")
    assert digest(whole) != before


@given(st.lists(st.floats(width=64)))
def test_numbers_survive_json(values: list[float]) -> None:
    text = json.dumps(encode_numbers(values), allow_nan=False)
    back = decode_numbers(json.loads(text))
    want = np.array(values, np.float64)
    assert np.array_equal(back, want, equal_nan=True)
    assert np.array_equal(np.signbit(back), np.signbit(np.where(np.isnan(want), 1, want)))


def test_a_number_that_is_none() -> None:
    with pytest.raises(FormatError, match="not a list of numbers"):
        decode_numbers(["many"])


def test_values_that_do_not_fill_the_shape() -> None:
    with pytest.raises(FormatError, match=r"2 values do not fill the shape \(3,\)"):
        decode_values({"values": [1, 2]}, (3,))


def test_splitmix64_is_the_published_one() -> None:
    assert splitmix64(1234567, 3).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("stored", ["g o i", "(g i) o", "o (i g)", "o g i", "(o g i)"])
def test_layouts_are_undone(stored: str) -> None:
    axes = {"g": 2, "o": 3, "i": 5, "one": 1}
    array = np.arange(30.0).reshape(2, 3, 5, 1)
    back = from_layout(to_layout(array, stored, axes), stored, axes)
    assert np.array_equal(back, array)


@pytest.mark.parametrize("stored", ["g o", "g o i i", "g o x"])
def test_bad_layouts_are_refused(stored: str) -> None:
    with pytest.raises(FormatError, match="layout"):
        to_layout(np.zeros((2, 3, 5)), stored, {"g": 2, "o": 3, "i": 5})


@pytest.mark.parametrize("module", ["data", "verdict"])
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(import_module(f"agc_conformance.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
