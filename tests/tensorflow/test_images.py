"""The evaluation preprocessing resizes as TensorFlow does, which DeepMind's code calls."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from agc.nfnet.images import resize_bicubic

CHINA, FLOWER = load_sample_images().images


@pytest.mark.parametrize(
    ("image", "height", "width"),
    [
        (CHINA, 288, 288),
        (FLOWER, 64, 64),
        (CHINA[:10, :7], 64, 288),
        (FLOWER[:333, :500], 352, 352),
        (CHINA[:2, :3], 7, 9),
        (FLOWER[:1, :1], 5, 5),
    ],
)
def test_resize(image, height, width):
    expected = tf.image.resize(image, (height, width), "bicubic").numpy()
    np.testing.assert_allclose(resize_bicubic(image, height, width), expected, rtol=0, atol=2e-4)
