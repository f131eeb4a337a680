"""The report: every presentation says the same, and none says more than was run."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from agc.cli import main
from agc.errors import FormatError
from agc_conformance.clauses import CLAUSES
from agc_conformance.records import Writer, make_header, make_result, read_results
from agc_conformance.report import Summary, html, junit, markdown, report, summarize, terminal
from agc_conformance.report.figures import histograms

EVIL = "<script>alert('x')</script> | \x01"


def result(name: str, status: str = "passed", **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"clause": "AGC-2", "level": "L1", "dtype": "float32", **more}
    return dict(make_result(name, status=status, **fields))  # type: ignore[arg-type]


def train(step: int) -> dict[str, Any]:
    names = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "head.weight", "head.bias")
    layers = {name: {"units": 4, "clipped": step % 4} for name in names}
    return {
        "type": "train",
        "task": "digits",
        "step": step,
        "loss": 1.0,
        "reference_loss": 1.0,
        "layers": layers,
    }


def write(path: Path, kind: str, *records: Any, **header: Any) -> Path:
    with Writer(path, make_header(kind, vectors="v", **header)) as file:  # type: ignore[arg-type]
        for record in records:
            file.write(record)
    return path


def costs(device_bytes: int, kernels: int) -> dict[str, int]:
    return {
        "device_bytes": device_bytes,
        "temporary_bytes": 81_920,
        "kernels": kernels,
        "collectives": 2,
        "collective_bytes": 144,
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    def run(name: str, *records: Any, **header: Any) -> Path:
        given = {"backend": name, "role": "backend", **header}
        return write(tmp_path / f"{name}.jsonl", "run", *records, **given)

    every = [result(f"L1-{clause}", clause=clause) for clause in CLAUSES]
    mutant = {
        "type": "mutant",
        "name": "squeeze",
        "flag": "Squeeze",
        "comment": "drops axes",
        "status": "killed",
        "killed_by": ["L1-a:float32"],
    }
    survivor = {**mutant, "status": "survived", "killed_by": []}
    compiled = {
        "type": "program",
        "id": "clip",
        "status": "compiled",
        "target": "v5e:2x2",
        "detail": "",
        "minimum_bytes": 1_000_000,
        "costs": costs(1_020_000, kernels=25),
        "peer": "optax",
        "peer_costs": costs(1_340_000, kernels=33),
    }
    absent = {"type": "unavailable", "backend": "jax", "device": "tpu", "reason": "no TPU here"}
    return {
        "whole": run("whole", *every),
        "hasty": run("hasty", *every, train=False, models=False),
        "parser": run("parser", *({**record, "level": "L0"} for record in every)),
        "good": run(
            "good",
            result(
                "L1-a",
                max_ulp=1.5,
                histogram=[3, 1, 0, 1, 0, 0, 0, 0],
                ulp_by_path={"eager": 1.5, "xla": 2.25},
            ),
            result("L0-b", dtype="-", level="L0", clause="AGC-6"),
            result("L1-c", "unsupported", clause="AGC-9", detail="no sparse gradients"),
            result("real-digits-clip", level="L2", flags=["RealImages"]),
            *(train(step) for step in range(3)),
            device="cpu",
            versions={"numpy": "2"},
        ),
        "bad": run(
            "bad",
            result("L1-a", "failed", detail=EVIL),
            result("L1-d", "error", detail="ZeroDivisionError"),
            result("L1-e", "xfail", clause="AGC-3"),
            device="cuda",
        ),
        "peer": run(
            "peer", result("L1-a", "failed", detail="wrong axis"), role="subject", device="cpu"
        ),
        "absent": write(tmp_path / "absent.jsonl", "run", absent, backend="jax", device="tpu"),
        "teeth": write(tmp_path / "teeth.jsonl", "teeth", mutant),
        "survivor": write(tmp_path / "survivor.jsonl", "teeth", survivor),
        "compiled": write(tmp_path / "compiled.jsonl", "compiled", compiled),
    }


def summary(files: dict[str, Path], *names: str) -> Summary:
    return summarize([read_results(files[name]) for name in names])


def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["good"], 0),
        (["good", "peer"], 0),
        (["good", "absent"], 0),
        (["good", "compiled", "teeth"], 0),
        (["good", "bad"], 1),
        (["good", "survivor"], 1),
        (["absent"], 1),
    ],
    ids=["right", "with-subject", "with-absent", "with-teeth", "failed", "survivor", "nothing"],
)
def test_exit_status(files: dict[str, Path], names: list[str], status: int) -> None:
    assert report([files[name] for name in names], console=quiet()) == status


def test_headline_and_mood(files: dict[str, Path]) -> None:
    everything = summary(files, "good", "bad", "peer", "absent", "teeth", "compiled")
    assert everything.headline == (
        "1 of 3 backends conform, 3 passed, 1 error, 1 failed, 1 xfail, 1 unsupported, "
        "1 unavailable, 1 of 1 mutants killed"
    )
    assert everything.mood == "no"
    assert summary(files, "whole").mood == "ok"
    assert summary(files, "whole", "absent").mood == "partly"
    assert summary(files, "whole", "parser").headline.startswith("1 of 2 backends conform")


def test_what_was_not_asked_is_said(files: dict[str, Path]) -> None:
    assert summary(files, "whole").notices == []
    (notice,) = summary(files, "good").notices
    assert notice.startswith("good on cpu was not asked about AGC-1, AGC-3, ")
    assert "NFNET-5" in notice
    assert summary(files, "good").mood == "partly"
    assert summary(files, "hasty").notices == [
        "hasty on cpu ran without training on real images.",
        "hasty on cpu ran without NFNets and recipes.",
    ]


def test_four_files_are_written(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert report([files["good"], files["bad"]], out, console=quiet()) == 1
    assert {p.name for p in out.iterdir()} == {
        "index.html",
        "report.md",
        "report.json",
        "junit.xml",
    }
    data = json.loads((out / "report.json").read_text())
    assert data["ok"] is False
    assert data["runs"][0]["clauses"]["AGC-2"]["max_ulp"] == 1.5
    assert [run["paths"] for run in data["runs"]] == [{"eager": 1.5, "xla": 2.25}, {}]
    page = (out / "index.html").read_text()
    assert '<td class="num">1.5</td><td class="num">2.25</td>' in page
    assert [failure["id"] for failure in data["failures"]] == ["L1-a", "L1-d"]


def test_only_regular_files_are_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "junit.xml")
    with pytest.raises(FileExistsError, match="a pipe, which is never replaced"):
        report([files["good"]], out, console=quiet())
    assert [path.name for path in out.iterdir()] == ["junit.xml"], (
        "no file of a report that cannot be complete"
    )
    assert stat.S_ISFIFO((out / "junit.xml").stat().st_mode)


def test_a_report_that_cannot_be_written_leaves_what_was_there(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    report([files["good"]], out, console=quiet())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report([files["bad"]], out, console=quiet())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_where_no_report_can_be_written(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (files["good"], files["good"] / "report"):
        assert main(["conformance", "report", str(files["good"]), "--out", str(out)]) == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        assert len(seen.err.splitlines()) == 1
        assert str(files["good"]) in seen.err


def test_html_is_self_contained(files: dict[str, Path]) -> None:
    page = html(summary(files, *files))
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", page) == []
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_html_escapes_what_backends_say(files: dict[str, Path]) -> None:
    page = html(summary(files, "bad"))
    assert "&lt;script&gt;" in page


def test_failures_are_grouped_and_can_be_filtered(tmp_path: Path) -> None:
    records = [
        result("L1-a", "failed", clause="AGC-4", flags=["NaNPasses", "InfToZero"]),
        result("L1-b", "error", clause="AGC-4", flags=["NaNPasses"]),
        result("L1-c", "failed", clause="AGC-1", flags=["MissingEps"]),
        result("L1-d", "unsupported", clause="SAM-1"),
        result("model-tiny-loss", "unsupported", clause="NFNET-2", level="L4"),
    ]
    path = write(tmp_path / "x.jsonl", "run", *records, backend="x", role="backend")
    page = html(summary({"x": path}, "x"))
    failing = page[page.index('<div id="failing">') : page.index('<h2 id="numbers">')]
    places = [failing.index(f"<b>{clause}</b>") for clause in ("AGC-1", "AGC-4")]
    assert places == sorted(places)
    options = [
        failing.index(f'<option value="{value}"') for value in ("AGC-1", "AGC-4", "MissingEps")
    ]
    assert options == sorted(options)
    assert failing.count('scope="rowgroup"') == 2
    assert '<option value="InfToZero">InfToZero (1)</option>' in failing
    assert '<option value="AGC-4">AGC-4 (2)</option>' in failing
    assert '<tr data-of="run0 AGC-4 NaNPasses InfToZero">' in failing
    assert '#failing:has(option[value="InfToZero"]:checked) [data-of]:not(' in page
    assert '<optgroup label="Run">' not in page, "there is one run"
    assert "Not offered or not asked: 36 clauses" in page
    assert page.count("Not offered: 2 clauses") == 1
    assert 'id="model-tiny"' not in page


def test_html_links_lead_somewhere(files: dict[str, Path]) -> None:
    page = html(summary(files, *files))
    targets = set(re.findall(r' id="([^"]+)"', page))
    links = set(re.findall(r'<a [^>]*href="#([^"]+)"', page))
    assert "matrix" in links
    assert links <= targets


def test_html_opens_what_a_cell_links_to(files: dict[str, Path]) -> None:
    """A browser opens a closed element if its target is inside, not if it is the target."""
    page = html(summary(files, *files))
    links = set(re.findall(r'<a class="cell [^"]*" href="#([^"]+)"', page))
    inside = r"<details[^>]*>\s*<summary>(?:(?!<details|</details>).)*? id=\"([^\"]+)\""
    assert links
    assert links <= set(re.findall(inside, page, re.DOTALL))


def test_html_shows_every_part(files: dict[str, Path]) -> None:
    page = html(summary(files, *files))
    for part in (
        "no TPU here",
        "v5e:2x2",
        "Compiled is not passed",
        "1.02 MB, 1.020 x least (1.34 MB, 1.340 x least)",
        "25 (33)",
        "144 B in 2",
        "squeeze",
        "survived",
        "wrong axis",
    ):
        assert part in page
    assert page.count("<svg") == 2, "one histogram, one training figure"


def test_sam_has_its_own_row_figure_and_limits(tmp_path: Path) -> None:
    counts = [5, 0, 0, 2, 0, 0, 0, 0]
    records = [
        result("L1-a", dtype="float16", max_ulp=0.5, histogram=[4, 1, 0, 0, 0, 0, 0, 0]),
        result("L1-sam-b", clause="SAM-1", dtype="float16", max_ulp=1.5, histogram=counts),
    ]
    path = write(tmp_path / "x.jsonl", "run", *records, backend="x", role="backend", device="cpu")
    found = summary({"x": path}, "x")
    (column,) = found.backends
    assert column.errors("AGC") == {"float16": (0.5, 1.0)}
    assert column.errors("SAM") == {"float16": (1.5, 2.0)}
    assert column.histograms("SAM") == {"float16": counts}
    page = html(found)
    assert page.count("<svg") == 2
    assert '<th scope="row">SAM, x on cpu</th>' in page
    assert re.search(r"SAM-1<small>.*\n<td><a class=\"cell passed\"", page)
    assert "| SAM-1: " in markdown(found)


def test_html_does_not_change(files: dict[str, Path]) -> None:
    assert html(summary(files, *files)) == html(summary(files, *files))


def test_junit(files: dict[str, Path]) -> None:
    root = ET.fromstring(junit(summary(files, "good", "bad", "peer", "absent", "survivor")))
    suites = {suite.get("name"): suite for suite in root}
    assert suites["good on cpu"].get("failures") == "0"
    assert suites["good on cpu"].get("skipped") == "1"
    assert (suites["bad on cuda"].get("failures"), suites["bad on cuda"].get("errors")) == (
        "1",
        "1",
    )
    assert suites["peer on cpu"].get("failures") == "0", "subjects are only looked at"
    assert suites["jax on tpu"].get("skipped") == "1"
    assert suites["mutants"].get("failures") == "1"
    for suite in root:
        cases = suite.findall("testcase")
        assert suite.get("tests") == str(len(cases))
        assert suite.get("skipped") == str(len(suite.findall("testcase/skipped")))
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))


def test_markdown(files: dict[str, Path]) -> None:
    text = markdown(summary(files, *files))
    assert "✗ 0/2" in text
    assert "✓ 2/2 1.5 ULP" in text
    assert "| run | eager | xla |" in text
    assert "| good on cpu | 1.50 | 2.25 |" in text
    assert "| v5e:2x2 | compiled | 1.02 MB, 1.020 x least (1.34 MB, " in text
    assert "**survived**" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_terminal(files: dict[str, Path]) -> None:
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    terminal(summary(files, *files), console)
    console.file.close()
    text = console.export_text()
    assert "FAILED 0/2" in text
    assert "unavailable jax on tpu: no TPU here" in text
    assert "survived squeeze" in text
    assert "1 of 1 programs compiled ahead of time (not run)" in text


def test_compiled_is_never_passed(files: dict[str, Path]) -> None:
    found = summary(files, "compiled")
    assert found.headline == "0 of 0 backends conform"
    assert found.mood == "partly"


def test_other_vectors_are_noticed(files: dict[str, Path], tmp_path: Path) -> None:
    header = make_header("run", backend="other", device="cpu", vectors="w", select="L1-*")
    with Writer(tmp_path / "other.jsonl", header) as file:
        file.write(result("L1-a"))
    files["other"] = tmp_path / "other.jsonl"
    notices = " ".join(summary(files, "good", "other").notices)
    assert "different vectors" in notices
    assert "other on cpu ran only 'L1-*'" in notices


def test_an_empty_run_is_noticed(files: dict[str, Path], tmp_path: Path) -> None:
    files["empty"] = write(tmp_path / "empty.jsonl", "run", backend="empty", device="cpu")
    found = summary(files, "empty")
    assert found.mood == "no"
    assert found.notices == [f"{files['empty']} has no results at all."]
    assert found.headline.startswith("0 of 1 backend conforms")
    assert report([files["empty"]], console=quiet()) == 1


def test_a_damaged_file_stops_the_report(files: dict[str, Path]) -> None:
    path = files["good"]
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(FormatError, match=r"good\.jsonl, line \d+: the file ends without a footer"):
        report([path], console=quiet())


def test_histogram_is_the_same_svg_every_time() -> None:
    counts = {"float32": [5, 3, 2, 0, 0, 0, 0, 0], "bfloat16": [9, 0, 1, 0, 0, 0, 0, 0]}
    first = histograms("a < b", counts)
    assert first.startswith("<svg")
    assert "<title>a &lt; b: elements by error in ULP</title>" in first
    assert "10 %" in first
    assert first == histograms("a < b", counts)
