"""Result files: streamed, complete or refused."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agc.errors import FormatError
from agc_conformance.records import Writer, make_header, make_result, read_results

RESULT = make_result("L1-a", clause="AGC-1", level="L1", status="passed", dtype="float32")


def write(path: Path, *records: Any, **header: Any) -> Path:
    with Writer(path, make_header("run", backend="mine", **header)) as file:
        for record in records:
            file.write(record)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "r.jsonl", RESULT, {**RESULT, "id": "L1-b", "status": "failed"})


def test_round_trip(file: Path) -> None:
    found = read_results(file)
    assert found.header["backend"] == "mine"
    assert [result["id"] for result in found.results] == ["L1-a", "L1-b"]
    assert found.footer is not None
    assert found.footer["counts"] == {"passed": 1, "failed": 1}
    assert found.role == "backend"


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with Writer(path, make_header("run")) as file:
        file.write(RESULT)
        assert not path.exists()
        assert file.part.read_text().count("\n") == 2, "every record is written at once"
    assert path.exists()
    assert not file.part.exists()


def test_a_run_that_breaks_off_leaves_no_result(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt), Writer(path, make_header("run")) as file:
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(FormatError, match="ends without a footer"):
        read_results(file.part)


@pytest.mark.parametrize("taken", ["r.jsonl", "r.jsonl.part"])
def test_only_regular_files_are_replaced(tmp_path: Path, taken: str) -> None:
    os.mkfifo(tmp_path / taken)
    with pytest.raises(FileExistsError, match="a pipe, which is never replaced"):
        Writer(tmp_path / "r.jsonl", make_header("run"))
    assert stat.S_ISFIFO((tmp_path / taken).stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("r.jsonl")
    write(tmp_path / "link", RESULT)
    assert (tmp_path / "link").is_symlink()
    assert len(read_results(tmp_path / "r.jsonl").results) == 1


def test_header_has_provenance() -> None:
    header = make_header("run")
    assert {"suite", "python", "platform", "date", "commit"} <= set(header)
    assert json.dumps(header)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def edit(file: Path, *, line: int, **changes: Any) -> None:
    text = lines(file)
    record = {**json.loads(text[line - 1]), **changes}
    text[line - 1] = json.dumps({key: value for key, value in record.items() if value != "gone"})
    file.write_text("\n".join(text) + "\n")


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (1, {"version": 2}, r"line 1: version 2; this suite reads version 1"),
        (1, {"format": "other"}, r"line 1: not a header of the format 'agc-results'"),
        (1, {"kind": "walk"}, r"line 1: unknown kind 'walk'"),
        (2, {"type": "resultat"}, r"line 2: unknown record type 'resultat'"),
        (2, {"clause": "gone"}, r"line 2: result: the record: 'clause' is a required"),
        (1, {"versions": "gone"}, "line 1: header: the record: 'versions' is a required"),
        (1, {"date": "gone"}, "line 1: header: the record: 'date' is a required"),
        (2, {"type": ["a"]}, r"line 2: unknown record type \['a'\]"),
        (2, {"type": "header"}, "line 2: header: "),
        (2, {"clause": None}, "line 2: result: clause: None is not of type 'string'"),
        (2, {"status": "banana"}, "line 2: result: status: 'banana' is not one of"),
        (2, {"histogram": "1"}, "line 2: result: histogram: '1' is not of type 'array'"),
        (2, {"histogram": [1] * 9}, r"line 2: result: histogram: .* is too long"),
        (2, {"max_ulp": "1"}, "line 2: result: max_ulp: '1' is not "),
        (2, {"max_ulp": math.inf}, "line 2: not JSON, or truncated: "),
        (2, {"max_ulp": 10**400}, "line 2: result: max_ulp: .* greater than the maximum"),
        (2, {"detail": "\ud800"}, "line 2: not JSON, or truncated: .* surrogates not allowed"),
        (4, {"counts": "gone"}, "line 4: footer: the record: 'counts' is a required"),
        (4, {"counts": {"passed": 3}}, r"line 4: the footer counts .* records are missing"),
    ],
)
def test_a_wrong_line_is_named(
    file: Path, line: int, changes: dict[str, Any], message: str
) -> None:
    edit(file, line=line, **changes)
    with pytest.raises(FormatError, match=message):
        read_results(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], r"r\.jsonl, line 3: the file ends without a footer"),
        (lambda text: [*text[:-1], text[-1][:20]], "line 4: not JSON, or truncated"),
        (lambda text: [text[0], *text[2:]], "records are missing"),
        (lambda text: [*text, text[1]], "line 5: something follows the footer"),
    ],
    ids=["no footer", "truncated", "lost", "more"],
)
def test_lines_that_are_lost_or_too_many(file: Path, change: Any, message: str) -> None:
    file.write_text("\n".join(change(lines(file))) + "\n")
    with pytest.raises(FormatError, match=message):
        read_results(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello\n", "line 1: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b"[" * 100_000, "line 1: not JSON, or truncated: maximum recursion"),
        (b"\xff\xfe\n", "cannot be read as text"),
    ],
    ids=["empty", "text", "list", "deep", "binary"],
)
def test_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_results(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.jsonl: cannot be read"):
        read_results(tmp_path / "none.jsonl")


def test_a_header_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="header: versions/mine: None is not of type 'string'"):
        Writer(tmp_path / "r.jsonl", make_header("run", versions={"mine": None}))
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_in_a_message_can_be_written_and_read(tmp_path: Path) -> None:
    record = make_result("a", clause="AGC-1", level="L1", status="error", detail="caf\ud800")
    assert read_results(write(tmp_path / "r.jsonl", record)).results[0]["detail"] == "caf?"


def test_infinite_errors_are_json() -> None:
    record = make_result("a", clause="AGC-1", level="L1", status="failed", max_ulp=float("inf"))
    assert json.loads(json.dumps(record, allow_nan=False))["max_ulp"] > 1e300
