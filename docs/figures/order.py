"""Draw docs/figures/order.svg: ``python docs/figures/order.py`` (needs matplotlib)."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from agc.files import replacing

SAM, COMMON, AGC = "#d5e8d4", "#eeeeee", "#dae8fc"
STEPS = [
    ("ascent", "gradient at w\nfirst fraction of the batch\nlocal: not reduced", SAM),
    ("perturb", "copy w aside\nw + e\ne = rho g / |g|", SAM),
    ("descent", "gradient at w + e\nwhole batch\nsame random numbers", COMMON),
    ("restore", "w, bit for bit", SAM),
    ("unscale", "divide by the\nloss scale", COMMON),
    ("average", "over accumulated\nmicro-batches", COMMON),
    ("reduce", "over replicas\nor shards", COMMON),
    ("AGC", "clip each unit\nagainst w", AGC),
    ("decay", "weight decay\nat w", COMMON),
    ("update", "the optimizer", COMMON),
]


def draw() -> None:
    """Draw two rows of five boxes, joined by arrows."""
    plt.rcParams.update({"svg.hashsalt": "agc", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(10, 3.6))
    for index, (title, text, colour) in enumerate(STEPS):
        row, column = divmod(index, 5)
        x, y = 2 * column, 1.4 - 1.6 * row
        axes.add_patch(
            FancyBboxPatch((x, y), 1.6, 1.1, boxstyle="round,pad=0.06", facecolor=colour, lw=0.8)
        )
        axes.text(x + 0.8, y + 0.9, title, ha="center", va="center", weight="bold", size=11)
        axes.text(x + 0.8, y + 0.38, text, ha="center", va="center", size=8)
        if column < 4:
            axes.annotate(
                "", (x + 1.92, y + 0.55), (x + 1.68, y + 0.55), arrowprops={"arrowstyle": "->"}
            )
    axes.plot([8.8, 8.8, 0.8], [1.32, 1.17, 1.17], color="black", lw=1)
    axes.annotate("", (0.8, 0.98), (0.8, 1.18), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-0.2, 9.9), ylim=(-0.4, 2.7))
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    with replacing(Path(__file__).with_suffix(".svg")) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
