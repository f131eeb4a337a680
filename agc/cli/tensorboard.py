"""TensorBoard's files, written from the records of the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from agc.packages import need

__all__ = ["tensorboard"]

_NO_CURVES: Final = {"type", "step", "images", "weights"}


def tensorboard(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """Return what writes each record of a log into a folder, for a training's ``report``.

    Curves are called as in the log, ``step/loss`` or ``evaluation/raw/top1``. No file is made
    before the first record, and a number that is not finite has no point. A training that goes on
    replaces what was written of later steps.

    Raises
    ------
    MissingPackageError
        If tensorboardX is not installed.
    """
    library = need("tensorboardX", "agc train --tensorboard", "tensorboard")
    writer: Any = None

    def report(record: Mapping[str, Any]) -> None:
        nonlocal writer
        step = record["step"]
        match record["type"]:
            case "start":
                # The step is the number of steps made, which is that of the next one.
                writer = library.SummaryWriter(str(folder), purge_step=step)
                return
            case "end":
                writer.close()
                return
            case "evaluation":
                group = f"evaluation/{record['weights']}"
            case kind:
                group = kind
        for key in record.keys() - _NO_CURVES:
            if math.isfinite(record[key]):
                writer.add_scalar(f"{group}/{key}", record[key], step)
        writer.flush()

    return report
