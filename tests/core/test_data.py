"""Batches as functions of the step: bits, distributions, and what the pieces do."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from agc.data import (
    Batches,
    Evaluation,
    digest,
    feed,
    initial_values,
    normalisation_table,
    normalise,
    open_source,
    soft_labels,
)
from agc.data.crop import DRAWS, Box, crop_box
from agc.data.initial import normal_numbers
from agc.data.mix import CUTMIX_DRAWS, MIXUP_DRAWS, cut_in, cutmix_box, is_cutmix, mixup_ratio
from agc.data.order import image_at
from agc.data.uniforms import Purpose, Stream, integer
from agc.errors import ConfigError, FormatError, ShapeError
from agc.nfnet import blocks, parameters
from agc.recipe import load_recipe
from agc.recipe.tables import Augment, Crop, RandAugment
from tests.core import data_hashes

RECIPE = load_recipe("conformance")
TRAIN, TEST = open_source(RECIPE, "train"), open_source(RECIPE, "test")


# --- random numbers -------------------------------------------------------------------------------


def philox(key, counter):
    """Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011."""
    mask = 2**64 - 1
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [
            (second >> 64) ^ c[1] ^ k0,
            second & mask,
            (first >> 64) ^ c[3] ^ k1,
            first & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


def test_philox_is_the_published_generator():
    """Known answers of its authors' test file."""
    assert philox((0, 0), (0, 0, 0, 0))[0] == 0x16554D9ECA36314C
    full = 2**64 - 1
    assert philox((full, full), (full,) * 4)[0] == 0x87B092C3013FE90B


@pytest.mark.parametrize(
    ("seed", "purpose", "number"), [(0, 0, 0), (7, 3, 41), (2**63 - 1, 5, 10**9)]
)
def test_bits(seed, purpose, number):
    expected = [
        word for block in (1, 2, 3) for word in philox((seed, purpose), (block, 0, 0, number))
    ]
    stream = Stream(seed, Purpose(purpose))
    stream.raw(3, 5)  # what was drawn before changes nothing
    assert stream.raw(number, 12).tolist() == expected
    assert stream.uniforms(number, 12).tolist() == [(word >> 11) / 2**53 for word in expected]


def test_uniforms_are_uniform_over_items_and_places():
    stream = Stream(1, Purpose.MIX)
    numbers = np.array([stream.uniforms(item, 8) for item in range(2000)])
    for column in (*numbers.T, numbers.ravel()):
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.1
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1
    assert len({purpose: Stream(1, purpose).raw(0, 1)[0] for purpose in Purpose}) == len(Purpose)
    assert integer(1 - 2.0**-53, 7) == 6
    assert integer(0.5, 0) == 0


# --- order (DATA-2) -------------------------------------------------------------------------------


def test_order():
    """Each epoch is a permutation of its own, by a sort of its uniforms."""
    epochs = [[image_at(3, 50, 50 * epoch + place) for place in range(50)] for epoch in range(3)]
    for epoch, order in enumerate(epochs):
        assert sorted(order) == list(range(50))
        uniforms = Stream(3, Purpose.ORDER).uniforms(epoch, 50)
        assert order == sorted(range(50), key=uniforms.__getitem__)
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_image_once_an_epoch():
    recipe = load_recipe("conformance", ["train.batch=16", "train.steps=26", "sam.group=16"])
    recipe = replace(recipe, augment=Augment(), sam=None)
    batches = Batches(recipe, TRAIN)
    seen = [image_at(recipe.seed, 401, n) for batch in batches for n in batch.numbers.tolist()]
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert Counter(seen[:401]) == Counter(range(401))
    assert labels == [TRAIN[index][1] for index in seen]


# --- a pure function of the step (DATA-1, DATA-3) -------------------------------------------------


@pytest.mark.parametrize("name", data_hashes.RECIPES)
def test_known_answers(name):
    expected = json.loads(data_hashes.FILE.read_text(encoding="utf-8"))
    assert expected.keys() == data_hashes.RECIPES.keys()
    assert data_hashes.measure(data_hashes.RECIPES[name]) == expected[name]


@pytest.mark.parametrize("hosts", [2, 4, 32])
def test_hosts_make_the_same_batch_together(hosts):
    recipe = replace(RECIPE, sam=None)
    whole = Batches(recipe, TRAIN)[6]
    parts = [Batches(recipe, TRAIN, host=host, hosts=hosts)[6] for host in range(hosts)]
    for name, array in whole._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, array, strict=True)


def test_threads_and_pickles_and_the_order_of_asking_change_nothing():
    batches = Batches(RECIPE, TRAIN)
    plain = [digest(batches[step]) for step in range(6)]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda step: digest(batches[step]), [5, 3, 1, 0, 2, 4]))
    assert again == [plain[step] for step in (5, 3, 1, 0, 2, 4)]
    assert digest(pickle.loads(pickle.dumps(batches))[np.int64(3)]) == plain[3]
    assert digest(Batches(replace(RECIPE, seed=1), TRAIN)[3]) != plain[3]


@pytest.mark.parametrize("threads", [1, 3])
def test_feed(threads):
    batches = Batches(RECIPE, TRAIN)
    found = [digest(batch) for batch in feed(batches, range(41, 50), threads=threads)]
    assert found == [digest(batches[step]) for step in range(41, 50)]
    assert next(feed(batches, range(3, 50), threads=threads)).numbers[0] == 96
    broken = [*TRAIN]
    broken[image_at(RECIPE.seed, 401, 64)] = (None, 0)  # the first image of step 1
    made = feed(Batches(RECIPE, broken), range(3), threads=threads)
    assert next(made).numbers[0] == 0
    with pytest.raises(FormatError, match="an image is uint8"):
        next(made)
    with pytest.raises(ConfigError, match="threads must be an integer >= 1"):
        next(feed(batches, [], threads=0))


def test_a_batch():
    batch = Batches(RECIPE, TRAIN)[2]
    assert batch.images.shape == (32, 16, 16, 3)
    assert batch.images.dtype == np.uint8
    assert batch.numbers.tolist() == list(range(64, 96))
    assert batch.labels.dtype == batch.mix_labels.dtype == np.int32
    for n, *labels in zip(batch.numbers.tolist(), batch.labels, batch.mix_labels, strict=True):
        assert labels == [TRAIN[image_at(RECIPE.seed, 401, 2 * n + k)][1] for k in range(2)]
    assert batch.ratio.dtype == np.float32
    assert ((batch.ratio >= 0) & (batch.ratio <= 1)).all()
    base = Batches(replace(RECIPE, augment=replace(RECIPE.augment, randaugment=None)), TRAIN)[2]
    assert base.images.dtype == np.float32
    np.testing.assert_array_equal(base.ratio, batch.ratio)


def test_there_are_as_many_steps_as_the_recipe_says():
    batches = Batches(RECIPE, TRAIN)
    assert len(batches) == 50
    for step in (-1, 50):
        with pytest.raises(IndexError, match="is not one of the recipe's 50 steps"):
            batches[step]
    with pytest.raises(TypeError):
        batches[1.0]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([], {"hosts": 3}, r"train\.batch=32 must be a multiple of hosts=3"),
        ([], {"hosts": 64}, r"train\.batch=32 must be a multiple of hosts=64"),
        ([], {"hosts": 0}, "hosts must be an integer >= 1"),
        ([], {"host": 2, "hosts": 2}, "host must be less than hosts=2, got 2"),
        ([], {"host": -1}, "host must be an integer >= 0"),
        ([], {"hosts": 4}, r"sam\.group=16 does not divide the 8 examples of each of 4 hosts"),
        (["data.train.images=400"], {}, r"says data\.train\.images=400, and there are 401"),
    ],
)
def test_what_does_not_fit(changes, options, message):
    with pytest.raises((ConfigError, FormatError), match=message):
        Batches(load_recipe("conformance", changes), TRAIN, **options)


# --- crops (DATA-6b) ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["tensorflow", "torchvision"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (30, 300), (9, 5)])
def test_crops_keep_their_bounds(rule, height, width):
    crop = Crop(rule=rule, margin=0)
    draws = np.random.RandomState(0).random_sample((300, DRAWS * crop.attempts)).tolist()
    boxes = [crop_box(height, width, 64, crop, uniforms) for uniforms in draws]
    for box in boxes:
        assert 0 <= box.top <= box.top + box.height <= height
        assert 0 <= box.left <= box.left + box.width <= width
        assert box.height * box.width > 0
    if (height, width) == (375, 500):
        area = np.array([box.height * box.width / (height * width) for box in boxes])
        aspect = np.array([box.width / box.height for box in boxes])
        assert area.min() >= (0.1 if rule == "tensorflow" else 0.08) - 0.002
        assert 0.74 < aspect.min() < 0.76
        assert 1.31 < aspect.max() < 1.35


def test_torchvision_crops_have_uniform_areas():
    crop = Crop(rule="torchvision")
    draws = np.random.RandomState(1).random_sample((2000, DRAWS * crop.attempts)).tolist()
    boxes = [crop_box(2000, 2000, 64, crop, uniforms) for uniforms in draws]
    area = np.array([box.height * box.width / 2000**2 for box in boxes])
    small = area[area < 0.7]  # larger ones are refused where the aspect does not fit
    assert stats.kstest(small, stats.uniform(0.08, 0.62).cdf).pvalue > 1e-3
    logs = np.log(
        [box.width / box.height for box, part in zip(boxes, area, strict=True) if part < 0.7]
    )
    assert stats.kstest(logs, stats.uniform(-np.log(4 / 3), 2 * np.log(4 / 3)).cdf).pvalue > 1e-3


def test_last_resorts():
    never = [0.999] * DRAWS
    tall = Crop(attempts=1, area=(0.99, 1.0))
    assert crop_box(400, 100, 192, tall, never) == Box(158, 8, 85, 85)  # 192 / 224 of 100
    vision = replace(tall, rule="torchvision")
    assert crop_box(400, 100, 192, vision, never) == Box(133, 0, 133, 100)
    assert crop_box(100, 400, 192, vision, never) == Box(0, 133, 100, 133)
    assert crop_box(100, 100, 192, replace(vision, aspect=(0.5, 0.6)), never).width < 100
    assert crop_box(30, 40, 192, Crop(rule="none"), []) == Box(0, 0, 30, 40)
    with pytest.raises(ShapeError, match=r"1 x 1 pixels is smaller than the crop"):
        crop_box(1, 1, 192, tall, never)


def test_flip_is_half_of_them():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3).reshape(16, 16, 3)
    changes = ["data.train.images=400", "input.crop.rule=none", "train.steps=12"]
    recipe = replace(load_recipe("conformance", changes), augment=Augment(), sam=None)
    batches = Batches(recipe, [(image, 1)] * 400)
    plain, mirrored = (normalise(i) for i in (image, image[:, ::-1]))
    flips = 0
    for batch in batches:
        for found in batch.images:
            flipped = (found == mirrored).all()
            assert flipped or (found == plain).all()
            flips += int(flipped)
    assert 0.42 < flips / (32 * 12) < 0.58
    still = Batches(replace(recipe, input=replace(recipe.input, flip=False)), [(image, 1)] * 400)
    assert (still[0].images == plain).all()


# --- mixing (DATA-4, DATA-5) ----------------------------------------------------------------------


def test_which_examples_are_mixed_how():
    assert [is_cutmix(n, 0.5) for n in range(4)] == [False, True, False, True]
    assert all(is_cutmix(n, 1.0) for n in range(50))
    for share in (0.1, 0.3, 0.75):
        counts = np.cumsum([is_cutmix(n, share) for n in range(1000)])
        assert np.abs(counts - share * np.arange(1, 1001)).max() <= 1


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_mixup_ratios(alpha):
    draws = np.random.RandomState(2).random_sample((3000, MIXUP_DRAWS)).tolist()
    ratios = np.array([mixup_ratio(alpha, uniforms) for uniforms in draws])
    assert (ratios * 2**16 == np.rint(ratios * 2**16)).all()
    assert stats.kstest(ratios, stats.beta(alpha, alpha).cdf, alternative="two-sided").statistic < (
        1.63 / np.sqrt(3000) + stats.beta(alpha, alpha).cdf(2**-17)
    )
    assert mixup_ratio(0.2, [0.0, 0.0] * 64) == 0.5


def test_cutmix_boxes():
    draws = np.random.RandomState(3).random_sample((3000, CUTMIX_DRAWS)).tolist()
    for uniforms in draws:
        box = cutmix_box(64, uniforms)
        half = int(np.sqrt(1 - uniforms[0]) * 64) // 2
        row, column = int(64 * uniforms[1]), int(64 * uniforms[2])
        mask = np.zeros((64, 64), bool)
        mask[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = True
        first, second = np.zeros((64, 64, 1)), np.ones((64, 64, 1))
        np.testing.assert_array_equal(cut_in(first, second, box)[..., 0], 1.0 - mask)
        assert box.height * box.width == mask.sum()


@pytest.mark.parametrize("order", ["mix-first", "augment-first"])
def test_ratio_belongs_to_the_first_label(order):
    """Images of one grey each, ten times their label: the mean tells the weights."""
    rows = [(np.full((20, 20, 3), 25 * (n % 10), np.uint8), n % 10) for n in range(401)]
    quiet = (
        RandAugment(layers=1, magnitude=0, flavour="clean") if order == "augment-first" else None
    )
    augment = replace(RECIPE.augment, order=order, randaugment=quiet)
    plain = replace(RECIPE.input, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    batch = Batches(replace(RECIPE, augment=augment, input=plain), rows)[0]
    expected = 25 * (batch.ratio * batch.labels + (1 - batch.ratio) * batch.mix_labels)
    means = batch.images.mean(axis=(1, 2, 3))
    # Bytes are truncated, and one operation in sixteen changes a flat image at magnitude 0: Invert.
    close = np.isclose(means, expected, atol=1e-3 if quiet is None else 1)
    assert close.all() if quiet is None else close.mean() > 0.8
    assert len(set(batch.ratio.tolist())) > 20


def test_soft_labels():
    batch = Batches(RECIPE, TRAIN)[0]
    soft = soft_labels(batch, 10, 0.1)
    assert soft.dtype == np.float32
    assert soft.shape == (32, 10)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    wide = soft_labels(batch, 10, 0.1, "float64")
    np.testing.assert_allclose(wide.sum(axis=1), 1, rtol=1e-15)
    np.testing.assert_array_equal(wide.astype(np.float32), soft, strict=True)
    for row, a, b, r in zip(soft, batch.labels, batch.mix_labels, batch.ratio, strict=True):
        expected = [0.9 * (r * (k == a) + (1 - r) * (k == b)) + 0.01 for k in range(10)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_normalisation_table_has_the_same_bits():
    batch = Batches(RECIPE, TRAIN)[0]
    mean, std = RECIPE.input.mean, RECIPE.input.std
    table = normalisation_table(mean, std)
    gathered = np.stack([table[batch.images[..., c], c] for c in range(3)], axis=-1)
    np.testing.assert_array_equal(gathered, normalise(batch.images, mean, std), strict=True)
    plain = (batch.images / 255.0 - mean) / std
    np.testing.assert_allclose(gathered, plain, rtol=1e-5, atol=1e-6)


# --- masks (DATA-8) -------------------------------------------------------------------------------


def test_masks():
    recipe = load_recipe("conformance", ["model.variant=tiny"])
    batches = Batches(replace(recipe, augment=Augment(), sam=None), TRAIN)
    keep = np.concatenate([batches[step].keep for step in range(30)])
    dropout = batches[0].dropout
    assert keep.shape == (960, 12)
    rates = [0.25 * block.stochastic_depth for block in blocks("tiny")]
    assert keep[:, 0].all()
    assert np.abs(keep.mean(axis=0) - 1 + rates).max() < 0.05
    assert dropout.shape == (32, 192)
    assert abs(dropout.mean() - 0.8) < 0.03
    assert keep.dtype == dropout.dtype == np.bool_
    uniforms = Stream(recipe.seed, Purpose.STOCHASTIC_DEPTH).uniforms(5, 12)
    np.testing.assert_array_equal(keep[5], [u >= r for u, r in zip(uniforms, rates, strict=True)])


def test_masks_that_nobody_wants():
    recipe = load_recipe("conformance", ["train.masks=[]"])
    assert Batches(recipe, TRAIN)[0].keep is Batches(recipe, TRAIN)[0].dropout is None
    recipe = load_recipe("conformance", ["model.stochastic_depth=0", "model.dropout=0"])
    assert Batches(recipe, TRAIN)[0].keep is Batches(recipe, TRAIN)[0].dropout is None
    nf_resnet = replace(load_recipe("nf-resnet-ablation"), data=RECIPE.data)
    assert Batches(nf_resnet, TRAIN).__len__() > 0


# --- evaluation (DATA-7) --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 32, 75, 200])
def test_evaluation_has_every_image_once(batch):
    found = list(Evaluation(RECIPE, TEST, batch=batch))
    assert len(found) == -(-75 // batch)
    whole = Evaluation(RECIPE, TEST, batch=75)[0]
    weight = np.concatenate([part.weight for part in found])
    assert weight.sum() == 75
    for name in ("images", "labels"):
        joined = np.concatenate([getattr(part, name) for part in found])
        np.testing.assert_array_equal(joined[weight > 0], getattr(whole, name))
        assert not joined[weight == 0].any()


def test_hosts_evaluate_the_same_together():
    whole = Evaluation(RECIPE, TEST, batch=32)
    hosts = [Evaluation(RECIPE, TEST, batch=32, host=host, hosts=4) for host in range(4)]
    for index, expected in enumerate(whole):
        parts = [host[index] for host in hosts]
        for name, array in expected._asdict().items():
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, array)
    with pytest.raises(ConfigError, match="batch=32 must be a multiple of hosts=5"):
        Evaluation(RECIPE, TEST, batch=32, hosts=5)
    with pytest.raises(IndexError, match="batch 3 is not one of 3"):
        whole[3]


@pytest.mark.parametrize("resize", ["bicubic", "pillow"])
def test_evaluation_transform_of_an_image_that_has_the_size(resize):
    """Resizing is then the identity, so that crop and normalisation are all there is."""
    recipe = load_recipe("conformance", [f"input.resize={resize}", "data.test.images=1"])
    image = np.random.RandomState(4).randint(0, 256, (20, 20, 3), dtype=np.uint8)
    found = Evaluation(recipe, [(image, 3)], batch=1)[0]
    expected = (image[2:18, 2:18] / 255.0 - recipe.input.mean) / recipe.input.std
    np.testing.assert_allclose(found.images[0], expected, rtol=1e-5, atol=1e-6)
    assert found.labels.tolist() == [3]


def test_two_kinds_of_resizing():
    stripes = np.tile(np.array([0, 255], np.uint8), (40, 20))[:, :, None].repeat(3, axis=2)
    recipe = load_recipe("conformance", ["data.test.images=1"])
    spread = []
    for resize in ("bicubic", "pillow"):
        chosen = replace(recipe, input=replace(recipe.input, resize=resize))
        spread.append(Evaluation(chosen, [(stripes, 0)], batch=1)[0].images.std())
    assert spread[1] < 0.2 * spread[0] or spread[0] < 0.2


# --- initial values -------------------------------------------------------------------------------


def test_normal_numbers():
    stream = Stream(3, Purpose.INITIAL)
    numbers = normal_numbers(stream, 7, 50_000)
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    np.testing.assert_array_equal(normal_numbers(stream, 7, 10), numbers[:10])
    bounded = normal_numbers(stream, 7, 20_000, 0.5)  # needs more pairs than are drawn at first
    assert np.abs(bounded).max() <= 0.5
    assert stats.kstest(bounded, stats.truncnorm(-0.5, 0.5).cdf).pvalue > 1e-3


def test_initial_values():
    recipe = load_recipe("conformance", ["model.variant=tiny"])
    values = initial_values(recipe)
    assert list(values) == [spec.name for spec in parameters("tiny")]
    for spec in parameters("tiny"):
        value = values[spec.name]
        assert value.shape == spec.shape
        assert value.dtype == np.float32
        how = spec.initial
        if how.distribution == "constant":
            assert (value == np.float32(how.value)).all()
        elif value.size > 500:
            width = {"normal": 1, "truncated": 0.8796}[how.distribution] * how.value
            assert value.std() == pytest.approx(width, rel=5 / np.sqrt(value.size))
    assert (
        values["stem.conv0.weight"] != initial_values(replace(recipe, seed=1))["stem.conv0.weight"]
    ).all()
    grey = replace(
        recipe,
        model=replace(recipe.model, in_channels=1),
        input=replace(recipe.input, mean=(0.5,), std=(0.5,)),
    )
    assert initial_values(grey)["stem.conv0.weight"].shape == (3, 3, 1, 16)
