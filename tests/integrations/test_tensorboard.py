"""``agc train --tensorboard`` with the real writer."""

from __future__ import annotations

import math

from agc.cli.tensorboard import tensorboard


def test_tensorboard(tmp_path):
    report = tensorboard(tmp_path / "board")
    report({"type": "start", "step": 1, "time": 0.0})
    report({"type": "step", "step": 1, "loss": math.nan, "rate": 0.5})
    report({"type": "evaluation", "step": 2, "weights": "raw", "top1": 0.5, "images": 9})
    report({"type": "end", "step": 2, "time": 0.0, "reason": "diverged"})
    content = b"".join(path.read_bytes() for path in (tmp_path / "board").iterdir())
    tags = (b"step/rate", b"evaluation/raw/top1", b"loss", b"images")
    assert [content.count(tag) for tag in tags] == [1, 1, 0, 0]
