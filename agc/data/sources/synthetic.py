"""Images that are made, not read: the same everywhere, for checks that need no files."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Synthetic"]

_KEY: Final = 0x5E7
_CELLS: Final = 6
_CELL: Final = 9
_SMALLEST: Final = 36


class Synthetic:
    """Coloured mosaics, one pattern for each class, in noise; the sizes differ.

    Parameters
    ----------
    split : str
        Images of different splits differ, their classes' patterns do not.
    images, num_classes, channels : int
    """

    def __init__(self, split: str, images: int, num_classes: int, channels: int) -> None:
        self._split = int.from_bytes(split.encode()[:8], "little")
        self._images, self._classes, self._channels = images, num_classes, channels

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Return image and label; both follow from the index by integer arithmetic alone."""
        if not 0 <= index < self._images:
            raise IndexError(index)
        label = index % self._classes
        size = _CELLS * _CELL
        pattern = _bytes((1, label), _CELLS * _CELLS * self._channels)
        pattern = pattern.reshape(_CELLS, _CELLS, self._channels)
        mosaic = pattern.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
        noise = _bytes((2 + self._split, index), mosaic.size + 2)
        height, width = (_SMALLEST + int(byte) % (size - _SMALLEST + 1) for byte in noise[:2])
        image = (2 * mosaic.astype(np.uint16) + noise[2:].reshape(mosaic.shape)) // 3
        return image[:height, :width].astype(np.uint8), label


def _bytes(item: tuple[int, int], count: int) -> npt.NDArray[np.uint8]:
    """Return the first bytes of an item's Philox bits, lowest first."""
    counter = np.array([0, 0, item[1], item[0] % 2**64], np.uint64)
    words = np.random.Philox(counter=counter, key=_KEY).random_raw((count + 7) // 8)
    return np.asarray(words).astype("<u8").view(np.uint8)[:count]
