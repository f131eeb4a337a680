"""Batches of an evaluation: every image once (DATA-7)."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agc.checks import check_count
from agc.data.batches import block_of
from agc.data.resize import resizer
from agc.data.sources import Source, read_row
from agc.data.sources.choose import check_count_of_images
from agc.nfnet.images import evaluation_image
from agc.recipe import Recipe

__all__ = ["Evaluation", "EvaluationBatch"]


class EvaluationBatch(NamedTuple):
    """A host's part of a batch.

    Attributes
    ----------
    images : float32 array, shape (n, height, width, channels)
        Normalised; zeros where there is no image left.
    labels : int32 array, shape (n,)
    weight : float32 array, shape (n,)
        1, or 0 where there is no image left: what is summed is multiplied by it, and divided by the
        number of all images.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]


class Evaluation:
    """The test images of a recipe in batches; the last one is filled up.

    Parameters
    ----------
    recipe : Recipe
    source : Source
        The images to evaluate on.
    batch : int
        Images of a batch on all hosts together; no result depends on it.
    host, hosts : int
        Which of how many equal, contiguous blocks of each batch.

    Raises
    ------
    ConfigError
        If the hosts do not divide the batch.
    FormatError
        If the source has another number of images than the recipe says.
    """

    def __init__(
        self, recipe: Recipe, source: Source, *, batch: int, host: int = 0, hosts: int = 1
    ) -> None:
        check_count_of_images(source, recipe.data.test.images, "test")
        self._recipe, self._source = recipe, source
        self._batch = check_count("batch", batch)
        self._block = block_of("batch", self._batch, host, hosts)
        self._resize = resizer(recipe.input.resize)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._source) // self._batch)

    def __getitem__(self, index: int) -> EvaluationBatch:
        """Return a batch; raise IndexError if there is no such, and as :class:`Batches`."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is not one of {len(self)}")
        model, rule = self._recipe.model, self._recipe.input
        assert rule.test_pixels is not None
        assert model.num_classes is not None
        size = len(self._block)
        images = np.zeros((size, rule.test_pixels, rule.test_pixels, model.in_channels), np.float32)
        labels, weight = np.zeros(size, np.int32), np.zeros(size, np.float32)
        start = index * self._batch + self._block.start
        for n, row in enumerate(range(start, min(start + size, len(self._source)))):
            image, labels[n] = read_row(self._source, row, model.in_channels, model.num_classes)
            images[n] = evaluation_image(
                image,
                rule.test_pixels,
                more=rule.margin,
                mean=rule.mean,
                std=rule.std,
                resize=self._resize,
            )
            weight[n] = 1
        return EvaluationBatch(images, labels, weight)
