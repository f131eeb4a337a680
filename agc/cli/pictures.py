"""What the pictures of all commands have in common: formats, colours, and the check of their names.

The ground is transparent and all text of a middle grey, so that a picture can be read on a light
page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from agc.errors import ConfigError
from agc.files import check_target, replacing

__all__ = ["FORMATS", "check_picture", "paper", "write_picture"]

FORMATS: Final = ("svg", "png", "pdf")
_GREY: Final = "#777777"  # contrast above 4 with white and with black
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe, Ito


def check_picture(path: Path) -> None:
    """Raise ConfigError unless a picture can be written to this path."""
    try:
        check_target(path)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    if _format(path) not in FORMATS:
        raise ConfigError(
            f"--out: {path} cannot be drawn; let its name end in .{', .'.join(FORMATS)}"
        )


@contextmanager
def paper(width: float, height: float) -> Iterator[Any]:
    """Give an empty matplotlib figure of this size in inches."""
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(keys, _GREY) | {
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=_COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "figure.facecolor": "none",
        "font.size": 9,
        "legend.frameon": False,
        "lines.linewidth": 1,
        "svg.fonttype": "none",
        "svg.hashsalt": "agc",
    }
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure; the name says how, SVG if it has no ending."""
    kind = _format(path)
    # Without a date, the same numbers give the same bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with replacing(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or FORMATS[0]
