"""Draw docs/figures/order.svg: ``python docs/figures/order.py`` (needs matplotlib)."""

from pathlib import Path

from matplotlib.patches import FancyBboxPatch

from agc.cli.pictures import paper, write_picture

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
    with paper(10, 3.6) as figure:
        axes = figure.subplots()
        grey = axes.spines["left"].get_edgecolor()
        arrow = {"arrowstyle": "->", "color": grey}
        written = {"ha": "center", "va": "center", "color": "black"}  # on the boxes
        for index, (title, text, colour) in enumerate(STEPS):
            row, column = divmod(index, 5)
            x, y = 2 * column, 1.4 - 1.6 * row
            box = {"boxstyle": "round,pad=0.06", "facecolor": colour, "edgecolor": grey, "lw": 0.8}
            axes.add_patch(FancyBboxPatch((x, y), 1.6, 1.1, **box))
            axes.text(x + 0.8, y + 0.9, title, weight="bold", size=11, **written)
            axes.text(x + 0.8, y + 0.38, text, size=8, **written)
            if column < 4:
                axes.annotate("", (x + 1.92, y + 0.55), (x + 1.68, y + 0.55), arrowprops=arrow)
        axes.plot([8.8, 8.8, 0.8], [1.32, 1.17, 1.17], color=grey, lw=1)
        axes.annotate("", (0.8, 0.98), (0.8, 1.18), arrowprops=arrow)
        axes.set(xlim=(-0.2, 9.9), ylim=(-0.4, 2.7))
        axes.axis("off")
        write_picture(figure, Path(__file__).with_suffix(".svg"))


if __name__ == "__main__":
    draw()
