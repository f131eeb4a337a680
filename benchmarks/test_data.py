"""Input pipelines: ``agc.data``, and torchvision's and ``tf.data``'s own, doing the same work.

An image is read, cropped, flipped, resized to 192x192 and normalised. Each peer is compared with
the recipe that does what it does: torchvision's crop and Pillow's resizing, or TensorFlow's crop
and its resizing. RandAugment, MixUp and CutMix are left out: the peers have others, or none.

The clock is the processor's, over all threads, so that a pipeline is measured per core however many
threads it has, and on a busy machine as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from agc.data import Batches
from agc.data.sources.folder import Folder
from agc.nfnet.images import MEAN, STD, normalise
from agc.recipe import load_recipe
from benchmarks.common import Measure
from benchmarks.without_torchvision import torchvision_part

transforms, datasets = map(torchvision_part, ("transforms", "datasets"))

CONDITIONS = ("torchvision", "tf.data")
CONTESTANTS = ("ours", "peer")
BATCH, BATCHES, PIXELS = 32, 2, 192
CLASSES, FILES = 2, 16
SIZE = (375, 500)
"""Height and width of ImageNet's most frequent photographs."""
RULES = {
    "torchvision": ('input.resize="pillow"', 'input.crop.rule="torchvision"'),
    "tf.data": ('input.resize="bicubic"', 'input.crop.rule="tensorflow"'),
}
PLAIN = (
    "augment.mixup=", "augment.cutmix=", "augment.randaugment=", "train.epochs=",
    "schedule.warmup_epochs=", "schedule.warmup_steps=1", "train.steps=1000000",
    f"model.num_classes={CLASSES}", f"train.batch={BATCH}", f"data.train.images={CLASSES * FILES}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Return a folder of parts of scikit-learn's two photographs, as JPEG files."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label, photograph in enumerate(load_sample_images().images):
        (root / str(label)).mkdir()
        for number in range(FILES):
            top, left = (random.integers(a - b + 1) for a, b in zip(photograph.shape, SIZE))  # noqa: B905
            part = photograph[top : top + SIZE[0], left : left + SIZE[1]]
            Image.fromarray(part).save(root / str(label) / f"{number:02}.jpg", quality=95)
    return root


def ours(folder: Path, condition: str) -> Callable[[], Any]:
    recipe = load_recipe("nfnet-f0", [*PLAIN, *RULES[condition]])
    batches, steps = Batches(recipe, Folder(folder, CLASSES, 3)), count()
    return lambda: [batches[next(steps)] for _ in range(BATCHES)]


def torchvision(folder: Path) -> Callable[[], Any]:
    bicubic = transforms.InterpolationMode.BICUBIC
    work = [
        transforms.RandomResizedCrop(PIXELS, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    torch.set_num_threads(1)
    images = datasets.ImageFolder(folder, transforms.Compose(work))
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH, shuffle=True)
    epochs = BATCH * BATCHES // len(images)
    return lambda: [batch for _ in range(epochs) for batch in loader]


def tensorflow(folder: Path) -> Callable[[], Any]:
    """Decode the crop alone, as DeepMind's pipeline does."""
    files = sorted(map(str, folder.glob("*/*.jpg")))
    labels = [int(Path(file).parent.name) for file in files]
    mean, std = (255 * tf.constant(each) for each in (MEAN, STD))

    def load(file: Any, label: Any) -> Any:
        data = tf.io.read_file(file)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([begin[:2], size[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(data, box, channels=3)
        image = tf.image.random_flip_left_right(image)
        image = tf.image.resize(image, (PIXELS, PIXELS), "bicubic")
        return (image - mean) / std, label

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices((files, labels)).shuffle(len(files)).repeat()
    whole = dataset.map(load).batch(BATCH).take(BATCHES).with_options(options)
    return lambda: list(whole)


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> dict[tuple[str, str], Callable[[], Any]]:
    made = {(condition, "ours"): ours(folder, condition) for condition in CONDITIONS}
    made["torchvision", "peer"] = torchvision(folder)
    made["tf.data", "peer"] = tensorflow(folder)
    return made


@pytest.mark.benchmark(timer=time.process_time)
def test_speed(
    measure: Measure,
    pipelines: dict[tuple[str, str], Callable[[], Any]],
    condition: str,
    turn: int,
    contestant: str,
) -> None:
    case = {"framework": "data", "model": "images", "condition": condition}
    run = pipelines[condition, contestant]
    measure(run, **case, turn=turn, contestant=contestant, images=BATCH * BATCHES)


def test_contestants_make_as_many_images(pipelines: Any) -> None:
    sides = {PIXELS, 3}
    for run in pipelines.values():
        images = [np.asarray(batch[0]) for batch in run()]
        assert [len(batch) for batch in images] == [BATCH] * BATCHES
        assert {side for batch in images for side in batch.shape[1:]} == sides
        assert {batch.dtype for batch in images} == {np.dtype(np.float32)}


def test_contestants_do_the_same_work(folder: Path) -> None:
    """The same part of the same file has the same pixels."""
    from agc.data.resize import resizer

    file = next(folder.glob("*/*.jpg"))
    top, left, height, width = 40, 70, 220, 260
    pixels = np.asarray(Image.open(file).convert("RGB"))
    part = pixels[top : top + height, left : left + width]
    mine = {how: normalise(resizer(how)(part, PIXELS, PIXELS)) for how in ("pillow", "bicubic")}
    cut = transforms.functional.resized_crop(
        Image.open(file), top, left, height, width, [PIXELS, PIXELS],
        transforms.InterpolationMode.BICUBIC,
    )  # fmt: skip
    to_tensor, standard = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
    theirs = standard(to_tensor(cut)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(mine["pillow"], theirs, atol=1e-5)
    data = tf.io.read_file(str(file))
    cut = tf.io.decode_and_crop_jpeg(
        data, (top, left, height, width), channels=3, dct_method="INTEGER_ACCURATE"
    )
    theirs = normalise(tf.image.resize(cut, (PIXELS, PIXELS), "bicubic").numpy())
    inner = slice(8, -8)  # a decoder that skips the rest has no colours beyond the border
    np.testing.assert_allclose(mine["bicubic"][inner, inner], theirs[inner, inner], atol=1e-4)
