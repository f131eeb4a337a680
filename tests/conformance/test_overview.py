"""The matrix in the README: that of the committed report, and only of a good one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agc.cli import main
from agc.errors import FormatError
from agc_conformance.clauses import CLAUSES
from agc_conformance.nfnets.ask import result_ids
from agc_conformance.records import read_results
from agc_conformance.report.overview import errors_figure, overview, publish

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "conformance" / "results"
MARKED = (
    "above\n<!-- matrix: written by `nox -s publish` -->\nSTALE\n<!-- end of matrix -->\nbelow\n"
)


@pytest.fixture(scope="module")
def report():
    return json.loads((RESULTS / "cpu.json").read_text())


def test_readme_shows_the_committed_report(report):
    assert overview(report) in (ROOT / "README.md").read_text()


def test_committed_report_is_complete(report):
    backends = [run for run in report["runs"] if run["header"]["role"] == "backend"]
    assert {run["header"]["backend"] for run in backends} >= {"torch", "jax", "tensorflow"}
    for run in backends:
        assert list(run["clauses"]) == list(CLAUSES)
        assert {cell["verdict"] for cell in run["clauses"].values()} <= {"passed", "unsupported"}
    assert report["ok"]
    assert not report["failures"]
    assert not report["notices"]
    assert {mutant["status"] for mutant in report["mutants"]} == {"killed"}


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_committed_results_of_f0(backend):
    file = read_results(RESULTS / f"f0-{backend}.jsonl")
    assert file.header["backend"] == backend
    assert {result["id"] for result in file.results} == set(result_ids("F0"))
    assert {result["status"] for result in file.results} == {"passed"}
    assert {result["dtype"] for result in file.results} == {"float64", "float32", "bfloat16"}


def test_what_the_matrix_says(report):
    rows = {
        row.split("**")[1]: [cell.strip() for cell in row.split("|")[2:-1]]
        for row in overview(report).splitlines()
        if row.startswith("| **")
    }
    titles = overview(report).splitlines()[0]
    assert titles.index("PyTorch") < titles.index("JAX") < titles.index("TensorFlow")
    assert rows["AGC-1"][:3] == ["✓", "✓", "✓"]
    assert rows["NFNET-5"] == ["✓", "✓", "✓"]
    assert any(cell.startswith("✗") for row in rows.values() for cell in row[3:])


def test_a_failure_shows_in_the_matrix(report):
    changed = json.loads(json.dumps(report))
    run = next(run for run in changed["runs"] if run["header"]["backend"] == "torch")
    run["clauses"]["AGC-1"].update(verdict="failed", counts={"passed": 3, "failed": 1})
    assert "| ✗ 3/4 |" in overview(changed)


def test_what_is_not_offered_or_not_asked_shows_in_the_matrix(report):
    changed = json.loads(json.dumps(report))
    run = next(run for run in changed["runs"] if run["header"]["backend"] == "torch")
    run["clauses"]["AGC-1"].update(verdict="passed", counts={"passed": 3, "unsupported": 2})
    del run["clauses"]["NFNET-2"]
    page = overview(changed)
    assert "| ✓ (2 n/a) |" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| **NFNET-2**"))
    assert row.split("|")[2].strip() == ""


def test_figure_shows_every_framework(report):
    drawn = errors_figure(report)
    assert all(name in drawn for name in ("PyTorch", "JAX", "TensorFlow", "not allowed"))


def test_publish(report, tmp_path):
    source, readme = tmp_path / "report.json", tmp_path / "README.md"
    source.write_text(json.dumps(report))
    readme.write_text(MARKED)
    publish(source, tmp_path / "results", readme)
    page = readme.read_text()
    assert page.startswith("above\n<!-- matrix")
    assert page.endswith("<!-- end of matrix -->\nbelow\n")
    assert overview(report) in page
    assert "STALE" not in page
    assert json.loads((tmp_path / "results" / "cpu.json").read_text()) == report
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(format="other"), "not a report"),
        (lambda report: report.update(runs=report["runs"][:1]), "no run of"),
        (lambda report: report.update(ok=False, headline="2 failed"), "2 failed; only a complete"),
        (lambda report: report.update(notices=["another suite"]), "another suite; only a complete"),
        (lambda report: report.update(mutants=[]), "no mutants; only a complete"),
        (lambda report: report.pop("runs"), r"a damaged report \(KeyError: 'runs'\)"),
        (lambda report: report["runs"][0].update(errors=3), r"a damaged report \(TypeError: "),
    ],
)
def test_only_a_good_report_is_published(report, change, message, tmp_path):
    source, readme = tmp_path / "report.json", tmp_path / "README.md"
    changed = json.loads(json.dumps(report))
    change(changed)
    source.write_text(json.dumps(changed))
    readme.write_text(MARKED)
    with pytest.raises(FormatError, match=message):
        publish(source, tmp_path / "results", readme)
    assert readme.read_text() == MARKED
    assert not (tmp_path / "results").exists()


def test_not_json_and_no_marks(report, tmp_path):
    source, readme = tmp_path / "report.json", tmp_path / "README.md"
    source.write_text("{")
    readme.write_text("no marks")
    with pytest.raises(FormatError, match="not JSON"):
        publish(source, tmp_path, readme)
    source.write_text(json.dumps(report))
    with pytest.raises(FormatError, match="it needs the lines"):
        publish(source, tmp_path, readme)


def test_what_cannot_be_read_or_written(report, tmp_path, capsys):
    source, readme = tmp_path / "report.json", tmp_path / "README.md"
    source.write_text(json.dumps(report))
    readme.write_text(MARKED)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for given, results, page, named in [
        (tmp_path / "none.json", tmp_path / "results", readme, "none.json"),
        (tmp_path, tmp_path / "results", readme, str(tmp_path)),
        (source, tmp_path / "results", binary, "binary"),
        (source, tmp_path / "results", tmp_path / "none.md", "none.md"),
        (source, readme, readme, "README.md"),
    ]:
        asked = ["publish", given, "--results", results, "--readme", page]
        assert main(["conformance", *map(str, asked)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
        assert not (tmp_path / "results").exists()
    assert readme.read_text() == MARKED
