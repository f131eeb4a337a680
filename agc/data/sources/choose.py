"""The source that a recipe names, in the folder that a launch names."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, get_args

from agc.data.sources.digits import open_digits
from agc.data.sources.folder import Folder
from agc.data.sources.idx import open_idx
from agc.data.sources.npz import open_npz
from agc.data.sources.rows import Source
from agc.data.sources.synthetic import Synthetic
from agc.errors import ConfigError, FormatError
from agc.recipe import Recipe

__all__ = ["PARTS", "Part", "check_count_of_images", "open_source"]

Part = Literal["train", "test"]

PARTS: Final[tuple[Part, ...]] = get_args(Part)
"""The two sets of images of a recipe."""


def open_source(recipe: Recipe, part: Part, folder: Path | None = None) -> Source:
    """Open the images that a recipe is about.

    ======================  ========================================================
    ``kind``                files below ``folder``
    ======================  ========================================================
    ``idx``                 ``{split}-images-idx3-ubyte[.gz]``, ``{split}-labels-...``
    ``folder``              ``{split}/CLASS/IMAGE``
    ``npz``                 ``{split}.npz`` with ``images`` and ``labels``
    ``synthetic``           none
    ``digits``              none; scikit-learn has them
    ``rows``                none: give your own sequence to :class:`agc.data.Batches`
    ======================  ========================================================

    Parameters
    ----------
    recipe : Recipe
    part : {"train", "test"}
    folder : Path, optional
        Where the data lie.

    Raises
    ------
    FormatError
        If the data cannot be read, or are not what the recipe says: other classes, another number
        of images.
    ConfigError
        If the kind needs a folder and none is given, or the kind is ``rows``.
    MissingPackageError
        If it needs Pillow, which is not installed.
    """
    split = getattr(recipe.data, part)
    classes, channels = recipe.model.num_classes, recipe.model.in_channels
    assert classes is not None
    source: Source
    if split.kind == "synthetic":
        source = Synthetic(split.split, split.images, classes, channels)
    elif split.kind == "digits":
        source = open_digits(split.split, classes)
    elif split.kind == "rows":
        raise ConfigError(
            f'data.{part}.kind="rows" has no files: give a sequence of (image, label) to '
            "agc.data.Batches"
        )
    elif folder is None:
        raise ConfigError(f"data.{part}.kind={split.kind!r} needs the folder of the data")
    elif split.kind == "idx":
        source = open_idx(folder, split.split, classes)
    elif split.kind == "npz":
        source = open_npz(folder / f"{split.split}.npz", classes)
    else:
        source = Folder(folder / split.split, classes, channels)
    check_count_of_images(source, split.images, part)
    return source


def check_count_of_images(source: Source, images: int, part: str) -> None:
    """Raise FormatError unless a source has as many images as the recipe says."""
    if len(source) != images:
        raise FormatError(
            f"the recipe says data.{part}.images={images}, and there are {len(source)}"
        )
