"""A folder for each class, with image files in it; Pillow reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError
from agc.packages import need

__all__ = ["Folder"]

_SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class Folder:
    """Images of ``path/CLASS/FILE``; classes and files are in the order of their names.

    Parameters
    ----------
    path : Path
        Folder of the split.
    num_classes, channels : int
        Of the model.

    Raises
    ------
    FormatError
        If there are not as many folders as classes, or one has no image.
    MissingPackageError
        If Pillow is not installed.
    """

    def __init__(self, path: Path, num_classes: int, channels: int) -> None:
        self._pillow = need("PIL.Image", "reading image files", "data")
        self._mode = "L" if channels == 1 else "RGB"
        if not path.is_dir():
            raise FormatError(f"{path}: is no folder; it must have a folder for each class")
        folders = sorted(item for item in path.iterdir() if item.is_dir() and item.name[0] != ".")
        self.classes = tuple(folder.name for folder in folders)
        if len(folders) != num_classes:
            raise FormatError(
                f"{path}: has {len(folders)} folders of classes, and the model has "
                f"num_classes={num_classes}"
            )
        self._files: list[tuple[str, int]] = []
        for label, folder in enumerate(folders):
            files = [str(file) for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES]
            if not files:
                raise FormatError(f"{folder}: has no image; images end in {sorted(_SUFFIXES)}")
            self._files += [(file, label) for file in sorted(files)]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Decode an image; raise FormatError, which names the file, if it cannot be."""
        file, label = self._files[index]
        try:
            with self._pillow.open(file) as image:
                own = image if image.mode == self._mode else image.convert(self._mode)
                pixels: Any = np.asarray(own)
        except (OSError, SyntaxError, ValueError, self._pillow.DecompressionBombError) as error:
            raise FormatError(f"{file}: cannot be read as an image: {error}") from None
        return pixels, label
