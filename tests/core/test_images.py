"""The evaluation preprocessing, against a plain computation of one pixel at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from agc.errors import ConfigError, DTypeError, ShapeError
from agc.nfnet import images
from agc.nfnet.images import evaluation_image, normalise, resize_bicubic

CHINA, FLOWER = load_sample_images().images


def keys(x):
    """R. Keys, Cubic convolution interpolation for digital image processing, 1981, a = -1/2."""
    x = abs(x)
    if x < 1:
        return 3 / 2 * x**3 - 5 / 2 * x**2 + 1
    return -1 / 2 * x**3 + 5 / 2 * x**2 - 4 * x + 2 if x < 2 else 0.0


def taps(place, size, length):
    """Weights of the pixels that one output is made of."""
    centre = (place + 0.5) * length / size - 0.5
    whole = math.floor(centre)
    fraction = round((centre - whole) * 1024) / 1024
    found = {}
    for step in (-1, 0, 1, 2):
        if 0 <= whole + step < length:
            found[whole + step] = keys(fraction - step)
    total = sum(found.values())
    return {pixel: weight / total for pixel, weight in found.items()}


def one_pixel(image, y, x, height, width, channel):
    return sum(
        wy * wx * float(image[row, column, channel])
        for row, wy in taps(y, height, image.shape[0]).items()
        for column, wx in taps(x, width, image.shape[1]).items()
    )


@pytest.mark.parametrize(
    ("image", "height", "width"),
    [
        (CHINA, 64, 64),
        (FLOWER, 288, 288),  # F0
        (CHINA[:50, :40], 96, 96),  # larger than it was
        (FLOWER[:1, :3], 5, 7),
        (CHINA[:64, :64], 64, 64),
    ],
)
def test_resize(image, height, width):
    found = resize_bicubic(image, height, width)
    assert found.shape == (height, width, 3)
    assert found.dtype == np.float32
    draw = np.random.RandomState(0)
    places = {(0, 0), (height - 1, width - 1), (0, width - 1)}
    places |= set(zip(draw.randint(height, size=200), draw.randint(width, size=200), strict=True))
    for y, x in places:
        for channel in range(3):
            exact = one_pixel(image, y, x, height, width, channel)
            assert found[y, x, channel] == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("pixels", [32, 256])
@pytest.mark.parametrize("image", [CHINA, FLOWER])
def test_evaluation_image(image, pixels):
    found = evaluation_image(image, pixels)
    assert found.shape == (pixels, pixels, 3)
    assert found.dtype == np.float32
    draw = np.random.RandomState(1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for _ in range(100):
        y, x, c = draw.randint(pixels), draw.randint(pixels), draw.randint(3)
        value = one_pixel(image, y + 16, x + 16, pixels + 32, pixels + 32, c)
        exact = (value / 255 - mean[c]) / std[c]
        assert found[y, x, c] == pytest.approx(exact, abs=5e-6)


def test_overshoot_stays():
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 30:] = 255
    assert resize_bicubic(edge, 200, 200).max() > 260
    assert resize_bicubic(edge, 200, 200).min() < -5


def test_same_size_and_one_colour():
    np.testing.assert_array_equal(resize_bicubic(FLOWER, *FLOWER.shape[:2]), FLOWER)
    grey = np.full((7, 300, 3), 99, np.uint8)
    assert (resize_bicubic(grey, 64, 64) == 99).all()


def test_sums_are_exact():
    """So that another order of adding, or fused multiply-adds, cannot change a bit."""
    image = FLOWER[:211, :307]
    index, weights = images._taps(211, 96)
    assert (weights * 2**24 == np.rint(weights * 2**24)).all()
    assert (weights.sum(axis=1) == 1).all()
    pixels = image.astype(np.float64)[index]
    orders = [
        sum(weights[:, t, None, None] * pixels[:, t] for t in order)
        for order in ((0, 1, 2, 3), (3, 1, 0, 2))
    ]
    np.testing.assert_array_equal(*orders)
    np.testing.assert_array_equal(images._along_first_axis(image, 96), orders[0])


@pytest.mark.parametrize("image", [CHINA[:, :, 0], CHINA[:, :, :2], CHINA[:0]])
def test_other_shapes(image):
    with pytest.raises(ShapeError, match=r"image must have the shape \(height, width, 3\), got"):
        evaluation_image(image, 32)


def test_other_values():
    with pytest.raises(DTypeError, match="must be uint8, from 0 to 255, got float64"):
        evaluation_image(CHINA / 255, 32)
    with pytest.raises(ShapeError, match="pixels must be >= 1, got 0"):
        evaluation_image(CHINA, 0)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,))])
def test_a_number_for_each_channel(mean, std):
    with pytest.raises(ConfigError, match=r"each of the 3 channels of images of shape \(2, 4, 3\)"):
        normalise(np.zeros((2, 4, 3), np.uint8), mean, std)
