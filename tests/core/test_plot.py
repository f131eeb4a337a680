"""What shows a training: ``agc plot``, and TensorBoard's files."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agc.cli import main
from agc.cli.plot import _curve
from agc.cli.tensorboard import tensorboard
from agc.errors import MissingPackageError
from tests.core.test_demo import FAKE

LOG = [
    {"type": "start", "step": 0, "time": 0.0},
    {"type": "step", "step": 0, "loss": 2.0, "rate": 0.0, "clipped": 0.25},
    {"type": "step", "step": 1, "loss": 1.0, "rate": 0.1, "clipped": 0.5},
    {"type": "step", "step": 2, "loss": None, "rate": 0.2, "clipped": 0.5},
    {"type": "evaluation", "step": 3, "weights": "raw", "top1": 0.5, "loss": 1.0, "images": 9},
    {"type": "end", "step": 3, "reason": "diverged"},
]


@pytest.fixture
def folders(tmp_path):
    """Two runs; the second has neither clipping nor an evaluation."""
    plain = [{k: v for k, v in r.items() if k != "clipped"} for r in LOG[:4]]
    for name, log in (("run", LOG), ("other", plain)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(record) + "\n" for record in log)
        (tmp_path / name / "log.jsonl").write_text(text)
    return tmp_path


def test_plot(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["plot", "run", "no clipping=other/log.jsonl", "--mean", "2"]) == 0
    assert "written: curves.svg" in capsys.readouterr().out
    text = Path("curves.svg").read_text()
    for words in ("loss", "learning rate", "share of clipped units", "test accuracy", "average"):
        assert f">{words}</text>" in text
    assert re.search(r">run</text>.*>no clipping</text>", text, re.DOTALL)
    assert "fill: #ffffff" not in text  # transparent, for light and dark pages
    assert main(["plot", "other", "--out", "x.png"]) == 0
    assert Path("x.png").read_bytes()[:4] == b"\x89PNG"


def test_means_of_steps():
    assert _curve(LOG[:3], "loss", 2) == ([0.5], [1.5])
    steps, losses = _curve(LOG, "loss", 1)
    assert steps == [0, 1, 2]
    assert losses[:2] == [2.0, 1.0]
    assert math.isnan(losses[2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run", "run"], "two runs are called 'run': give labels, run2=run"),
        (["absent"], "No such file or directory: 'absent'"),
        (["run", "--mean", "0"], "mean must be an integer >= 1, got 0"),
        (["run", "--out", "x.tiff"], r"x.tiff cannot be drawn; .* .svg, .png, .pdf"),
        (["empty=empty.jsonl"], "empty.jsonl: has no step as yet"),
    ],
)
def test_plots_that_are_refused(folders, monkeypatch, capsys, given, message):
    monkeypatch.chdir(folders)
    Path("empty.jsonl").touch()
    assert main(["plot", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def calls(monkeypatch):
    """What a double of tensorboardX is told; ``tests/integrations`` has the real package."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    return calls


def test_tensorboard(calls, tmp_path):
    report = tensorboard(tmp_path / "tb")
    assert not calls
    for record in (*LOG[:2], {"type": "step", "step": 1, "loss": math.nan}, *LOG[4:]):
        report(record)
    assert calls[0] == (str(tmp_path / "tb"), 0)
    assert sorted(calls[1:]) == [
        ("evaluation/raw/loss", 1.0, 3),
        ("evaluation/raw/top1", 0.5, 3),
        ("step/clipped", 0.25, 0),
        ("step/loss", 2.0, 0),
        ("step/rate", 0.0, 0),
    ]


def test_training_with_tensorboard(calls, tmp_path, monkeypatch):
    monkeypatch.setattr("agc.cli.train.load_framework", lambda *_: FAKE)
    changes = ("train.batch=8", "train.epochs=", "train.steps=2", "schedule.warmup_epochs=")
    given = [*("train", "digits-mini", "--framework", "torch"), *("--out", str(tmp_path / "run"))]
    given += [word for change in changes for word in ("--set", change)]
    assert main([*given, "--tensorboard", str(tmp_path / "board")]) == 0
    assert calls[0] == (str(tmp_path / "board"), 0)
    assert [call[2] for call in calls[1:] if call[0] == "step/loss"] == [0, 1]
    assert {call[0] for call in calls[1:]} >= {"evaluation/raw/top1", "evaluation/ema/top1"}


def test_missing_tensorboard_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingPackageError, match=r'pip install "agc-sam\[tensorboard\]"'):
        tensorboard(tmp_path)
