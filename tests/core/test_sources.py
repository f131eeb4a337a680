"""Where images come from: what each form gives, and what each mistake is called."""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from agc.data import Batches, Evaluation, digest, open_source
from agc.data.sources import Synthetic, read_row
from agc.data.sources.digits import open_digits
from agc.data.sources.folder import Folder
from agc.data.sources.idx import open_idx
from agc.data.sources.npz import open_npz
from agc.errors import ConfigError, FormatError, MissingPackageError, ShapeError
from agc.recipe import load_recipe
from agc.recipe.tables import Augment, Data, Split, Train

IMAGES = np.random.RandomState(0).randint(0, 256, (6, 9, 7), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0], np.uint8)
FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def recipe_of(kind, images=6, **model):
    recipe = replace(load_recipe("conformance"), sam=None)
    split = Split(kind=kind, split="train", images=images)
    return replace(
        recipe,
        model=replace(recipe.model, num_classes=3, **model),
        data=Data(train=split, test=split),
        train=Train(batch=2, steps=9),
        augment=Augment(),
    )


@pytest.fixture
def folders(tmp_path):
    for name, images in {"b": IMAGES[2:4], "a": IMAGES[:2], "c": IMAGES[4:]}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for n, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{n}.png")
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "a" / "README.txt").write_text("no image")
    return tmp_path


# --- what they give -------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path, compressed):
    for name, array in {"images-idx3": IMAGES, "labels-idx1": LABELS}.items():
        data = idx(array)
        path = tmp_path / f"train-{name}-ubyte{'.gz' if compressed else ''}"
        path.write_bytes(gzip.compress(data) if compressed else data)
    source = open_source(recipe_of("idx"), "train", tmp_path)
    assert len(source) == 6
    for n, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        np.testing.assert_array_equal(source[n][0], image)
        assert source[n][1] == label


def test_npz(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS)
    source = open_source(recipe_of("npz"), "test", tmp_path)
    np.testing.assert_array_equal(source[3][0], IMAGES[3])
    assert source[3][1] == 2


def test_folder(folders):
    """Classes and files are in the order of their names; other files are passed over."""
    source = open_source(recipe_of("folder"), "train", folders)
    assert source.classes == ("a", "b", "c")
    rows = [source[n] for n in range(len(source))]
    assert [label for _, label in rows] == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(rows[2][0], IMAGES[2][:, :, None].repeat(3, axis=2))
    assert Folder(folders / "train", 3, 1)[0][0].shape == (9, 7)


def test_synthetic():
    source = Synthetic("train", 40, 10, 3)
    assert [source[n][1] for n in range(12)] == [*range(10), 0, 1]
    assert len({source[n][0].shape for n in range(40)}) > 20
    assert (source[3][0][:30, :30] != Synthetic("test", 40, 10, 3)[3][0][:30, :30]).any()
    near, far = (
        np.abs(source[n][0][:36, :36].astype(int) - source[0][0][:36, :36]).mean() for n in (10, 11)
    )
    assert near < 0.8 * far  # the class shows
    with pytest.raises(IndexError):
        source[40]


def test_digits():
    """The images of scikit-learn, and the mean that the recipe says."""
    recipe = load_recipe("digits-mini")
    train, test = (open_source(recipe, part) for part in ("train", "test"))
    digits = load_digits()
    assert [test[n][1] for n in range(297)] == digits.target[1500:].tolist()
    np.testing.assert_array_equal(test[0][0], np.floor(digits.images[1500] * 255 / 16))
    pixels = np.stack([train[n][0] for n in range(1500)]) / 255
    assert abs(pixels.mean() - recipe.input.mean[0]) < 1e-3
    assert abs(pixels.std() - recipe.input.std[0]) < 1e-3
    with pytest.raises(FormatError, match="the digits have the splits train, test, not 'all'"):
        open_digits("all", 10)
    with pytest.raises(FormatError, match="digits: labels reach from 0 to 9"):
        open_digits("test", 9)


def test_all_forms_give_the_same_batches(tmp_path, folders):
    """Also rows of Hugging Face's form, images of Pillow, and grey for three channels."""
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=[0, 0, 1, 1, 2, 2])
    pairs = list(zip(IMAGES, [0, 0, 1, 1, 2, 2], strict=True))
    sources = [
        open_source(recipe_of("npz"), "train", tmp_path),
        open_source(recipe_of("folder"), "train", folders),
        pairs,
        [{"image": Image.fromarray(image), "label": np.int64(label)} for image, label in pairs],
        [(image[:, :, None].repeat(3, axis=2), label) for image, label in pairs],
    ]
    batches = [Batches(recipe_of("rows"), source)[4] for source in sources]
    assert len({digest(batch) for batch in batches}) == 1
    grey = replace(recipe_of("rows", in_channels=3), seed=1)
    grey = replace(
        grey,
        model=replace(grey.model, in_channels=1),
        input=replace(grey.input, mean=(0.3,), std=(0.3,)),
    )
    assert Batches(grey, pairs)[0].images.shape == (2, 16, 16, 1)


# --- mistakes -------------------------------------------------------------------------------------


def test_kinds():
    with pytest.raises(ConfigError, match=r'data\.train\.kind="rows" has no files'):
        open_source(recipe_of("rows"), "train")
    with pytest.raises(ConfigError, match=r"data\.test\.kind='idx' needs the folder"):
        open_source(recipe_of("idx"), "test")


def test_another_number_of_images(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(FormatError, match=r"says data\.train\.images=7, and there are 6"):
        open_source(recipe_of("npz", 7), "train", tmp_path)
    with pytest.raises(FormatError, match=r"says data\.test\.images=6, and there are 5"):
        Evaluation(recipe_of("rows"), [(IMAGES[0], 0)] * 5, batch=1)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (None, idx(LABELS), "there is neither train-images-idx3-ubyte nor .*dataset-fashion-mnist"),
        (b"", idx(LABELS), "images-idx3-ubyte: is not an IDX file of bytes with 3 axes"),
        (idx(LABELS), idx(LABELS), "is not an IDX file of bytes with 3 axes"),
        (idx(IMAGES)[:-1], idx(LABELS), r"\(6, 9, 7\), which is 378 bytes, and there are 377; .* trunc"),
        (idx(IMAGES), idx(LABELS)[:-1], "labels-idx1-ubyte: the header says"),
        (idx(IMAGES), idx(LABELS[:-1]), r"6 images have labels of the shape \(5,\)"),
        (idx(IMAGES), idx(LABELS + 1), "labels reach from 1 to 3, and the model has num_classes=3"),
    ],
)  # fmt: skip
def test_wrong_idx(tmp_path, images, labels, message):
    for name, data in {"images-idx3": images, "labels-idx1": labels}.items():
        if data is not None:
            (tmp_path / f"train-{name}-ubyte").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_idx(tmp_path, "train", 3)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for data in (b"no gzip", gzip.compress(idx(IMAGES))[:-20]):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"images-idx3-ubyte\.gz: cannot be read"):
            open_idx(tmp_path, "train", 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "cannot be read as an .npz file .*labels"),
        ({"images": IMAGES / 255, "labels": LABELS}, "images must be uint8, .* got float64"),
        ({"images": IMAGES[0], "labels": LABELS}, r"got uint8 of the shape \(9, 7\)"),
        ({"images": IMAGES, "labels": LABELS[:2]}, r"6 images have labels of the shape \(2,\)"),
        ({"images": IMAGES, "labels": LABELS / 1.0}, "labels must be integers, got float64"),
        ({"images": IMAGES, "labels": LABELS - np.int8(1)}, "labels reach from -1 to 1"),
        ({"images": IMAGES, "labels": np.array([{}] * 6)}, "cannot be read .*pickle"),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(FormatError, match=message):
        open_npz(tmp_path / "train.npz", 3)


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "train.npz"
    with pytest.raises(FormatError, match=r"train\.npz: cannot be read"):
        open_npz(path, 3)
    np.savez(path, images=IMAGES, labels=LABELS)
    half = path.read_bytes()[:200]
    for data in (b"", b"text", half):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"train\.npz: "):
            open_npz(path, 3)
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(FormatError, match=r"train\.npz: "):
        open_npz(path, 3)


def test_wrong_folders(folders):
    recipe = recipe_of("folder")
    with pytest.raises(FormatError, match="test: is no folder; it must have a folder for each"):
        Folder(folders / "test", 3, 3)
    with pytest.raises(FormatError, match=r"has 3 folders of classes, and the model has .*=4"):
        Folder(folders / "train", 4, 3)
    (folders / "train" / "b" / "0.png").write_bytes(b"\x89PNG no")
    source = open_source(recipe, "train", folders)
    with pytest.raises(FormatError, match=r"b/0\.png: cannot be read as an image"):
        source[2]
    with pytest.raises(FormatError, match=r"b/0\.png: cannot be read as an image"):
        list(Batches(recipe, source))
    good = (folders / "train" / "a" / "0.png").read_bytes()
    (folders / "train" / "b" / "0.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(FormatError, match=r"b/0\.png: cannot be read as an image"):
        source[2]
    for file in (folders / "train" / "c").iterdir():
        file.unlink()
    with pytest.raises(FormatError, match="c: has no image; images end in"):
        Folder(folders / "train", 3, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "row 0 must be a pair"),
        ((IMAGES[0],), "row 0 must be a pair"),
        ((IMAGES[0], 1.0), "row 0 must be a pair .* integer as the label"),
        ({"img": IMAGES[0], "label": 1}, "row 0 must be .*KeyError: 'image'"),
        ((IMAGES[0] / 255, 1), "row 0: an image is uint8, .* got float64"),
        ((IMAGES[0][0], 1), r"row 0: .* of the shape \(7,\)"),
        ((IMAGES[0][:0], 1), r"row 0: .* of the shape \(0, 7\)"),
        ((np.zeros((4, 4, 4), np.uint8), 1), "row 0: the image has 4 channels, .* in_channels=3"),
        ((IMAGES[0], 3), "row 0 has the label 3, and the model has num_classes=3"),
        ((IMAGES[0], -1), "row 0 has the label -1"),
    ],
)
def test_wrong_rows(row, message):
    with pytest.raises(FormatError, match=message):
        read_row([row], 0, 3, 3)


def test_an_image_smaller_than_the_crop_is_named():
    recipe = recipe_of("rows")
    recipe = replace(
        recipe, input=replace(recipe.input, crop=replace(recipe.input.crop, margin=32))
    )
    rows = [(IMAGES[0], 0)] * 5 + [(np.zeros((1, 1), np.uint8), 0)]
    with pytest.raises(
        ShapeError, match="row 5: an image of 1 x 1 pixels is smaller than the crop"
    ):
        list(Batches(recipe, rows))


def test_pillow_is_asked_for(monkeypatch, folders):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingPackageError, match=r'reading image files .*"agc-sam\[data\]"'):
        open_source(recipe_of("folder"), "train", folders)
    recipe = recipe_of("rows")
    recipe = replace(recipe, input=replace(recipe.input, resize="pillow"))
    with pytest.raises(MissingPackageError, match=r'resize = "pillow" needs PIL'):
        Batches(recipe, [(IMAGES[0], 0)] * 6)[0]


# --- real images ----------------------------------------------------------------------------------


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist():
    recipe = load_recipe("fashion-mini")
    train, test = (open_source(recipe, part, FASHION) for part in ("train", "test"))
    assert np.bincount([test[n][1] for n in range(len(test))]).tolist() == [1000] * 10
    batch = Batches(recipe, train)[100]
    assert batch.images.shape == (128, 16, 16, 1)
    assert abs(batch.images.mean()) < 0.4
    assert 0.7 < batch.images.std() < 1.2
    whole = np.concatenate([part.images for part in Evaluation(recipe, test, batch=2500)])
    assert abs(whole.mean()) < 0.05
