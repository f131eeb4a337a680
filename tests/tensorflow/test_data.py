"""The pipeline's image operations against TensorFlow's own ops, which DeepMind's pipeline uses."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from agc.data import Batch, Batches, digest, open_source, operations
from agc.data.crop import DRAWS, crop_box
from agc.recipe import load_recipe
from agc.recipe.tables import Crop

CHINA, FLOWER = (image[:, 50:550] for image in load_sample_images().images)


def warped(image, transform):
    found = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=np.array([[*transform, 0, 0]], np.float32),
        output_shape=image.shape[:2],
        fill_value=float(operations.FILL),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )
    return found.numpy()[0]


@pytest.mark.parametrize("image", [CHINA, FLOWER[:192, :192]])
@pytest.mark.parametrize("degrees", [15, 30, 45, -15, -30, -45])
def test_rotate(image, degrees):
    """The transform is the one of the discontinued add-on's ``rotate``."""
    angle = np.float32(degrees * np.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    height, width = (np.float32(size - 1) for size in image.shape[:2])
    x = (width - (cos * width - sin * height)) / np.float32(2)
    y = (height - (sin * width + cos * height)) / np.float32(2)
    expected = warped(image, (cos, -sin, x, sin, cos, y))
    np.testing.assert_array_equal(operations.rotate(image, degrees), expected)


@pytest.mark.parametrize("amount", [0.15, 0.3, 0.45, -0.3])
def test_shear(amount):
    expected = warped(CHINA, (1, amount, 0, 0, 1, 0))
    np.testing.assert_array_equal(operations.shear(CHINA, x=amount), expected)
    expected = warped(CHINA, (1, 0, 0, amount, 1, 0))
    np.testing.assert_array_equal(operations.shear(CHINA, y=amount), expected)


@pytest.mark.parametrize("amount", [50, 100, -150])
def test_translate(amount):
    expected = warped(CHINA, (1, 0, amount, 0, 1, 0))
    np.testing.assert_array_equal(operations.translate(CHINA, x=amount), expected)


@pytest.mark.parametrize("image", [CHINA, FLOWER])
def test_grey(image):
    expected = tf.image.rgb_to_grayscale(image).numpy()
    found = operations.grey(image)
    # TensorFlow truncates a float32; where the exact value is whole, it may fall below.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def largest_gap(first, second):
    """Return the Kolmogorov-Smirnov distance of two samples of the same size."""
    places = np.sort(np.concatenate([first, second]))
    ranks = [np.searchsorted(np.sort(sample), places, "right") for sample in (first, second)]
    return np.abs(ranks[0] - ranks[1]).max() / len(first)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (256, 256), (500, 210)])
def test_crops_are_distributed_like_those_of_tensorflow(height, width):
    """And not like torchvision's: area, aspect and places of 3,000 crops of each."""
    count = 3000

    def draw(seed):
        return tf.image.stateless_sample_distorted_bounding_box(
            [height, width, 3],
            bounding_boxes=[[[0.0, 0.0, 1.0, 1.0]]],
            seed=[1, seed],
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )[:2]

    @tf.function(autograph=False)
    def draw_all(seeds):
        return tf.map_fn(draw, seeds, fn_output_signature=(tf.int32, tf.int32))

    pairs = draw_all(tf.range(count))
    theirs = np.concatenate([pair.numpy()[:, :2] for pair in pairs], axis=1)
    uniforms = np.random.RandomState(0).random_sample((count, 10 * DRAWS))

    def ours(rule):
        boxes = [crop_box(height, width, 10**6, Crop(rule=rule, margin=0), u) for u in uniforms]
        return np.array([(b.top, b.left, b.height, b.width) for b in boxes])

    limit = 1.63 * np.sqrt(2 / count)  # 99 %

    def numbers(boxes):
        top, left, tall, wide = boxes.T
        return tall * wide, wide / tall, top, left

    gaps = [
        largest_gap(a, b) for a, b in zip(numbers(ours("tensorflow")), numbers(theirs), strict=True)
    ]
    assert max(gaps) < limit
    assert largest_gap(numbers(ours("torchvision"))[0], numbers(theirs)[0]) > 1.5 * limit


@pytest.mark.parametrize("parallel", [1, 3])
def test_loader(parallel):
    """``tf.data`` over the project's batches: in order, bit for bit, from any step on."""
    recipe = load_recipe("conformance", ["train.steps=8"])
    batches = Batches(recipe, open_source(recipe, "train"))
    like = batches[0]

    def make(step):
        types = [tf.as_dtype(array.dtype) for array in like]
        arrays = tf.numpy_function(lambda step: tuple(batches[step]), [step], types)
        return Batch(*(tf.ensure_shape(a, b.shape) for a, b in zip(arrays, like, strict=True)))

    data = tf.data.Dataset.range(3, 8).map(make, num_parallel_calls=parallel, deterministic=True)
    for step, batch in zip(range(3, 8), data.prefetch(2), strict=True):
        assert isinstance(batch, Batch)
        assert digest(Batch(*(array.numpy() for array in batch))) == digest(batches[step])
