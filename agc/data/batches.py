"""Batches of a training: a pure function of the step (DATA-1)."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agc.checks import check_count
from agc.data.examples import Examples
from agc.data.masks import RecipeMasks
from agc.data.sources import Source
from agc.data.sources.choose import check_count_of_images
from agc.data.uniforms import Purpose
from agc.errors import ConfigError
from agc.nfnet import Masks
from agc.recipe import Recipe

__all__ = ["Batch", "Batches", "block_of"]


class Batch(NamedTuple):
    """A host's part of a step's batch: arrays with one entry, or row, for each example.

    Attributes
    ----------
    images : uint8 or float32 array, shape (n, height, width, channels)
        uint8 if RandAugment comes last: :func:`agc.data.normalise` is then still to be done, on the
        host or by a gather from :func:`agc.data.normalisation_table`. float32 is normalised.
    labels, mix_labels : int32 array, shape (n,)
        Classes of the two images that an example is mixed from; equal without mixing.
    ratio : float32 array, shape (n,)
        Weight of ``labels``; that of ``mix_labels`` is the rest.
    numbers : int64 array, shape (n,)
        Number of each example in the run.
    keep : bool array, shape (n, blocks), or None
        Residual branches that stochastic depth keeps.
    dropout : bool array, shape (n, features), or None
        Features that dropout keeps.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]
    mix_labels: npt.NDArray[np.int32]
    ratio: npt.NDArray[np.float32]
    numbers: npt.NDArray[np.int64]
    keep: npt.NDArray[np.bool_] | None
    dropout: npt.NDArray[np.bool_] | None

    @property
    def masks(self) -> Masks:
        """What an NFNet takes as ``masks``."""
        return Masks(self.keep, self.dropout)


class Batches:
    """The batches of a recipe, a sequence over its steps.

    The bits are the same for every number of hosts, workers and threads, and every version of
    NumPy. There is no other state than the step: to resume, go on at that index.

    Parameters
    ----------
    recipe : Recipe
    source : Source
        The images to train on, as :func:`agc.data.open_source` opens them, or any sequence of rows.
    host, hosts : int
        Which of how many equal, contiguous blocks of each batch.

    Raises
    ------
    ConfigError
        If the hosts do not divide the batch, or would split a group of SAM.
    FormatError
        If the source has another number of images than the recipe says.

    Examples
    --------
    >>> from agc.data import open_source
    >>> from agc.recipe import load_recipe
    >>> recipe = load_recipe("conformance")
    >>> batches = Batches(recipe, open_source(recipe, "train"))
    >>> len(batches), batches[49].images.shape
    (50, (32, 16, 16, 3))
    """

    def __init__(self, recipe: Recipe, source: Source, *, host: int = 0, hosts: int = 1) -> None:
        check_count_of_images(source, recipe.data.train.images, "train")
        self._recipe, self._source = recipe, source
        self._block = block_of("train.batch", recipe.train.batch, host, hosts)
        group = recipe.sam.group if recipe.sam else 1
        if group != "batch" and len(self._block) % group:
            raise ConfigError(
                f"sam.group={group} does not divide the {len(self._block)} examples of each of "
                f"{hosts} hosts"
            )
        self._masks = RecipeMasks(recipe)

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._recipe.steps

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step.

        Raises
        ------
        IndexError
            If there is no such step; steps count from 0 and never from the end.
        FormatError, ShapeError
            If an image cannot be read, or is too small; the message names it.
        """
        step = operator.index(step)
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not one of the recipe's {len(self)} steps")
        start = step * self._recipe.train.batch
        numbers = range(start + self._block.start, start + self._block.stop)
        # Streams are not for several threads, so each batch has its own.
        examples = Examples(self._recipe, self._source)
        images, labels, mix_labels, ratio = zip(*(examples[n] for n in numbers), strict=True)
        return Batch(
            images=np.stack(images),
            labels=np.array(labels, np.int32),
            mix_labels=np.array(mix_labels, np.int32),
            ratio=np.array(ratio, np.float32),
            numbers=np.array(numbers, np.int64),
            keep=self._masks.of(Purpose.STOCHASTIC_DEPTH, numbers),
            dropout=self._masks.of(Purpose.DROPOUT, numbers),
        )


def block_of(name: str, batch: int, host: int, hosts: int) -> range:
    """Return the places in a batch that are a host's.

    Raises
    ------
    ConfigError
        If the hosts do not divide the batch, or there is no such host.
    """
    hosts = check_count("hosts", hosts)
    if not 0 <= check_count("host", host, 0) < hosts:
        raise ConfigError(f"host must be less than hosts={hosts}, got {host}")
    if batch % hosts:
        raise ConfigError(f"{name}={batch} must be a multiple of hosts={hosts}")
    size = batch // hosts
    return range(host * size, (host + 1) * size)
