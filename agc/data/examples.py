"""One example of a training: from the number of the example to pixels and labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agc.data.crop import DRAWS as CROP_DRAWS
from agc.data.crop import crop_box
from agc.data.mix import CUTMIX_DRAWS, MIXUP_DRAWS, cut_in, cutmix_box, is_cutmix, mixup_ratio
from agc.data.order import image_at
from agc.data.randaugment import DRAWS as LAYER_DRAWS
from agc.data.randaugment import randaugment
from agc.data.resize import resizer
from agc.data.sources import Source, read_row
from agc.data.uniforms import Purpose, Stream
from agc.errors import ShapeError
from agc.nfnet.images import normalise
from agc.recipe import Recipe

__all__ = ["Example", "Examples"]

Array = npt.NDArray[Any]


class Example(NamedTuple):
    """Pixels, the two labels, and the weight of the first of them."""

    image: Array
    label: int
    mix_label: int
    ratio: float


class Examples:
    """Examples by number; not for several threads at once.

    Parameters
    ----------
    recipe : Recipe
    source : Source
        The images to train on.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self._recipe, self._source = recipe, source
        self._resize = resizer(recipe.input.resize)
        pixels = recipe.input.train_pixels
        assert pixels is not None
        self._pixels: int = pixels
        self._crop = Stream(recipe.seed, Purpose.CROP)
        self._mix = Stream(recipe.seed, Purpose.MIX)
        self._randaugment = Stream(recipe.seed, Purpose.RANDAUGMENT)

    def __getitem__(self, number: int) -> Example:
        """Return an example: uint8 if RandAugment is last, or else normalised float32 (DATA-6)."""
        augment = self._recipe.augment
        mix_first = augment.order == "mix-first"
        if augment.mixes:
            sources = [self._source_image(2 * number + n) for n in range(2)]
            if not mix_first:
                sources = [
                    (self._augmented(image, 2 * number + n), label)
                    for n, (image, label) in enumerate(sources)
                ]
            (first, label), (second, mix_label) = sources
            image, ratio = self._mixed(number, first, second)
        else:
            (image, label), ratio = self._source_image(number), 1.0
            mix_label = label
        if mix_first or not augment.mixes:
            image = self._augmented(image, number)
        if image.dtype != np.uint8:
            image = normalise(image, self._recipe.input.mean, self._recipe.input.std)
        return Example(image, label, mix_label, ratio)

    def _source_image(self, place: int) -> tuple[Array, int]:
        """Return a source image after crop, flip and resize, float32, and its label."""
        recipe, crop = self._recipe, self._recipe.input.crop
        index = image_at(recipe.seed, len(self._source), place)
        channels, classes = recipe.model.in_channels, recipe.model.num_classes
        assert classes is not None
        image, label = read_row(self._source, index, channels, classes)
        flip, *draws = self._crop.uniforms(place, 1 + CROP_DRAWS * crop.attempts).tolist()
        try:
            box = crop_box(image.shape[0], image.shape[1], self._pixels, crop, draws)
        except ShapeError as error:
            raise ShapeError(f"row {index}: {error}") from None
        part = image[box.rows, box.columns]
        if recipe.input.flip and flip < 0.5:
            part = _mirrored(part)
        return self._resize(part, self._pixels, self._pixels), label

    def _mixed(self, number: int, first: Array, second: Array) -> tuple[Array, float]:
        augment = self._recipe.augment
        if augment.cutmix and is_cutmix(number, augment.cutmix.share):
            box = cutmix_box(self._pixels, self._mix.uniforms(number, CUTMIX_DRAWS).tolist())
            return cut_in(first, second, box), box.height * box.width / self._pixels**2
        assert augment.mixup is not None
        uniforms = self._mix.uniforms(number, MIXUP_DRAWS).tolist()
        ratio = mixup_ratio(augment.mixup.alpha, uniforms)
        # The ratio has 16 bits, so that float32 holds it and its complement exactly.
        weights = np.float32(ratio), np.float32(1 - ratio)
        return weights[0] * first + weights[1] * second, ratio

    def _augmented(self, image: Array, item: int) -> Array:
        """Return an image as uint8 after RandAugment; as it is without."""
        rule = self._recipe.augment.randaugment
        if rule is None:
            return image
        whole = np.clip(image, 0, 255).astype(np.uint8)
        draws = self._randaugment.uniforms(item, LAYER_DRAWS * rule.layers).tolist()
        return randaugment(whole, rule, draws)


def _mirrored(image: Array) -> Array:
    """Exchange left and right, a channel at a time: NumPy is slow along an axis of three."""
    result = np.empty_like(image)
    for channel in range(image.shape[2]):
        result[:, :, channel] = image[:, ::-1, channel]
    return result
