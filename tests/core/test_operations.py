"""RandAugment's operations against Pillow's, and what the flavours differ in."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from agc.data import operations
from agc.data.randaugment import DRAWS, OPERATIONS, apply, randaugment
from agc.recipe.tables import RandAugment

CHINA, FLOWER = load_sample_images().images
RANDOM = np.random.RandomState(0)
IMAGES = [
    CHINA[100:292, 100:292],
    FLOWER[:224, :300],
    RANDOM.randint(0, 256, (64, 48, 3), dtype=np.uint8),
    RANDOM.randint(90, 140, (33, 70, 3), dtype=np.uint8),
]


def gap(found, expected):
    return np.abs(found.astype(int) - np.asarray(expected).astype(int))


@pytest.fixture(params=range(len(IMAGES)))
def image(request):
    return IMAGES[request.param]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (operations.equalize, ImageOps.equalize),
        (operations.invert, ImageOps.invert),
        *(
            (lambda i, n=n: operations.posterize(i, n), lambda i, n=n: ImageOps.posterize(i, n))
            for n in (2, 4, 6, 8)
        ),
        *(
            (lambda i, n=n: operations.solarize(i, n), lambda i, n=n: ImageOps.solarize(i, n))
            for n in (1, 128, 255)
        ),
        *(
            (
                lambda i, f=f: operations.blend(np.zeros_like(i), i, f),
                lambda i, f=f: ImageEnhance.Brightness(i).enhance(f),
            )
            for f in (0.6, 1.0, 1.9)
        ),
        (
            lambda i: operations.translate(i, x=50, y=-20),
            lambda i: i.transform(
                i.size, Image.Transform.AFFINE, (1, 0, 50, 0, 1, -20), fillcolor=(128,) * 3
            ),
        ),
        *(
            (
                lambda i, d=d: operations.rotate(i, d),
                lambda i, d=d: i.rotate(d, fillcolor=(128,) * 3),
            )
            for d in (15, -30)
        ),
    ],
)
def test_equal_to_pillow(image, ours, theirs):
    difference = gap(ours(image), theirs(Image.fromarray(image)))
    # Pillow rotates in fixed-point numbers: single pixels between two are the other one's.
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [
        (operations.autocontrast, ImageOps.autocontrast, 0.01),
        (
            lambda i: apply("Color", i, 10),
            lambda i: ImageEnhance.Color(i).enhance(1.9),
            0.6,
        ),
        (
            lambda i: apply("Sharpness", i, 10),
            lambda i: ImageEnhance.Sharpness(i).enhance(1.9),
            0.6,
        ),
        (
            lambda i: apply("Contrast", i, 10, "clean"),
            lambda i: ImageEnhance.Contrast(i).enhance(1.9),
            0.6,
        ),
    ],
)
def test_one_level_from_pillow(image, ours, theirs, share):
    difference = gap(ours(image), theirs(Image.fromarray(image)))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


def test_what_pillow_has_not():
    image = IMAGES[2]
    cut = operations.cutout(image, 5, 2, 40)
    mask = np.zeros(image.shape[:2], bool)
    mask[:7, 35:45] = True
    assert (cut[mask] == 128).all()
    assert (cut[~mask] == image[~mask]).all()
    added = operations.solarize_add(image, 110)
    assert (added[image >= 128] == image[image >= 128]).all()
    assert (added[image < 128] == np.minimum(image[image < 128].astype(int) + 110, 255)).all()
    sheared = operations.shear(image, x=0.5)
    for row in range(0, 64, 2):
        shift = row // 2
        np.testing.assert_array_equal(sheared[row, : 48 - shift], image[row, shift:])
        assert (sheared[row, 48 - shift :] == 128).all()


def test_operations_leave_their_input_alone():
    for name in OPERATIONS:
        for channels in (1, 3):
            image = RANDOM.randint(0, 256, (20, 24, channels), dtype=np.uint8)
            before = image.copy()
            result = apply(name, image, 7, "deepmind", 1, (0.5, 0.5))
            assert result.shape == image.shape
            assert result.dtype == np.uint8
            np.testing.assert_array_equal(image, before)


def test_quirks_of_the_published_code():
    image = IMAGES[0]
    noise = IMAGES[2]
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        np.testing.assert_array_equal(apply(name, image, 5), image)
        assert (apply(name, image, 5, "clean") != image).any()
    np.testing.assert_array_equal(apply("Solarize", image, 10), 255 - image)
    half = (apply("Solarize", noise, 15) != noise).mean()
    assert 0.48 < half < 0.52
    kept = [len(np.unique(apply("Posterize", noise, magnitude))) for magnitude in (5, 10, 15)]
    assert kept == [4, 16, 64]
    # 192 x 192 / 256 = 144, of which 0.1 - 1.9 = -0.9 is added.
    flat = np.full((192, 192, 3), 144, np.uint8)
    np.testing.assert_array_equal(apply("Contrast", flat, 10), flat)
    large = np.full((256, 256, 3), 255, np.uint8)
    np.testing.assert_array_equal(apply("Contrast", large, 10), large)


@pytest.mark.parametrize("name", ["Posterize", "Solarize", "Color", "Contrast", "Brightness"])
def test_clean_operations_grow_with_the_magnitude(name):
    image = IMAGES[0]
    changes = [gap(apply(name, image, m, "clean", -1), image).mean() for m in (0, 2.5, 5, 7.5, 10)]
    assert changes[0] == 0
    assert changes == sorted(changes)
    assert changes[-1] > changes[1]


def test_draws():
    """Operation, sign and place come from one layer's numbers each."""
    image = IMAGES[2]
    one = RandAugment(layers=1, magnitude=10)
    for n, name in enumerate(OPERATIONS):
        for sign, uniform in ((-1, 0.49), (1, 0.5)):
            found = randaugment(image, one, [(n + 0.5) / 16, uniform, 0.25, 0.75])
            expected = apply(name, image, 10, "deepmind", sign, (0.25, 0.75))
            np.testing.assert_array_equal(found, expected)
    two = RandAugment(layers=2, magnitude=10)
    draws = [2.5 / 16, 0, 0, 0, 3.5 / 16, 0.9, 0, 0]
    np.testing.assert_array_equal(
        randaugment(image, two, draws), operations.rotate(255 - image, 30)
    )
    names = Counter(int(16 * u) for u in np.random.RandomState(1).random_sample(1600))
    assert min(names.values()) > 60
    assert DRAWS == 4
