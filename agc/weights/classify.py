"""Classify photographs with an NFNet of any framework."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import ConfigError, FormatError, NonFiniteError
from agc.nfnet import Options, options, seeded_parameters
from agc.nfnet.images import evaluation_image
from agc.weights.files import need

__all__ = [
    "BACKENDS",
    "Guess",
    "class_names",
    "classifier",
    "random_weights",
    "read_image",
    "read_names",
    "top",
    "untrained",
]

Array = npt.NDArray[Any]
Classifier = Callable[[Array], Array]


@dataclass(frozen=True)
class Guess:
    """One row of the table: a class, its name if there is one, and its probability."""

    index: int
    name: str | None
    probability: float


def read_image(path: str | Path, pixels: int) -> npt.NDArray[np.float32]:
    """Read a photograph and prepare it (:func:`agc.nfnet.images.evaluation_image`).

    As in DeepMind's code, a camera's note on which side is up (EXIF) is not followed. Grey of 16 bits is
    scaled to 8.

    Raises
    ------
    FormatError
        If it is not an image, or a truncated one, or its numbers do not say what white is.
    """
    images = need("PIL.Image", f"{path}: reading images")
    try:
        with images.open(path) as image:
            colours = _colours(path, image)
    except FormatError:
        raise
    except (OSError, ValueError, SyntaxError, images.DecompressionBombError) as error:
        raise FormatError(f"{path}: cannot be read as an image; {error}") from None
    return evaluation_image(colours, pixels)


def _colours(path: str | Path, image: Any) -> npt.NDArray[np.uint8]:
    """Return an image as RGB of 8 bits; Pillow would cut off wider grey at 255, not scale it."""
    # Older versions of Pillow have the 16 bits of a PNG file in 32.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        grey = np.rint(np.asarray(image) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise FormatError(
            f"{path}: has 32 bits a pixel, which do not say what is black and what is white; "
            "scale it to 8 bits a channel, 0 to 255, and save it as PNG"
        )
    return np.asarray(image.convert("RGB"))


def classifier(backend: str, chosen: Options, arrays: Mapping[str, Array]) -> Classifier:
    """Return a function from images of shape (n, h, w, 3) to logits, in evaluation mode and float32.

    Parameters
    ----------
    backend : {"torch", "jax", "tensorflow"}
        Which model runs.
    chosen : Options
        Which one.
    arrays : mapping of str to array
        Its parameters in the neutral form.

    Raises
    ------
    ConfigError
        If there is no such backend, or the model is for other images.
    MissingPackageError
        If the framework is not installed.
    ParameterError
        If the arrays are not the model's.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if chosen.in_channels != 3:
        raise ConfigError(f"the model is for {chosen.in_channels} channels; photographs have 3")
    return BACKENDS[backend](chosen, arrays)


def _model(adapter: str, chosen: Options, arrays: Mapping[str, Array], **more: Any) -> Any:
    package = importlib.import_module(adapter)  # by name: the core knows no adapter
    model = package.nfnet(
        chosen.variant,
        chosen.num_classes,
        dropout=chosen.dropout,
        stochastic_depth=chosen.stochastic_depth,
        in_channels=chosen.in_channels,
        activation=chosen.activation,
        ws_eps=chosen.ws_eps,
        **more,
    )
    package.from_neutral(model, arrays)
    return model


def _torch(chosen: Options, arrays: Mapping[str, Array]) -> Classifier:
    torch = need("torch", "the backend torch", "torch")
    model = _model("agc_torch", chosen, arrays).eval()

    def logits(images: Array) -> Array:
        with torch.inference_mode():
            found = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            return np.asarray(found.numpy())

    return logits


def _jax(chosen: Options, arrays: Mapping[str, Array]) -> Classifier:
    nnx = need("flax.nnx", "the backend jax", "jax")
    model = _model("agc_jax", chosen, arrays, rngs=nnx.Rngs(0))
    model.eval()
    run = nnx.jit(lambda model, images: model(images))
    return lambda images: np.asarray(run(model, images))


def _tensorflow(chosen: Options, arrays: Mapping[str, Array]) -> Classifier:
    tf = need("tensorflow", "the backend tensorflow", "tensorflow")
    model = _model("agc_tensorflow", chosen, arrays)
    run = tf.function(lambda images: model(images, training=False))
    return lambda images: np.asarray(run(tf.constant(images)))


BACKENDS: Final[Mapping[str, Callable[[Options, Mapping[str, Array]], Classifier]]] = {
    "torch": _torch,
    "jax": _jax,
    "tensorflow": _tensorflow,
}
"""Framework to what makes its classifier."""


def random_weights(variant: str) -> tuple[Options, dict[str, Array]]:
    """Return weights that know nothing but are the same in every framework."""
    arrays = seeded_parameters(variant)
    return options(variant), {name: array.astype(np.float32) for name, array in arrays.items()}


def untrained(arrays: Mapping[str, Array]) -> bool:
    """Whether gains and biases are still what an untrained model starts with."""
    return all(
        bool(np.all(array == (1 if name.endswith(".gain") else 0)))
        for name, array in arrays.items()
        if not name.endswith(".weight")
    )


def top(logits: Array, count: int, names: Sequence[str] | None) -> list[Guess]:
    """Return the most probable classes of one image's logits, the best first.

    Raises
    ------
    NonFiniteError
        If a logit is NaN or infinite.
    """
    lost = int(np.sum(~np.isfinite(logits)))
    if lost:
        raise NonFiniteError(
            f"{lost} of {len(logits)} logits are NaN or infinite; so are some of the weights, "
            "or they are too large for float32: take other weights"
        )
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [
        Guess(int(k), None if names is None else names[k], float(probabilities[k])) for k in best
    ]


def class_names(num_classes: int) -> list[str] | None:
    """Return the names of ImageNet's 1000 classes if timm, which comes with them, is installed."""
    found = importlib.util.find_spec("timm") if num_classes == 1000 else None
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "data" / "_info"
    order, words = folder / "imagenet_synsets.txt", folder / "imagenet_synset_to_lemma.txt"
    if not (order.is_file() and words.is_file()):
        return None
    lines = words.read_text(encoding="utf-8").splitlines()
    lemma = dict(line.split("\t", 1) for line in lines if "\t" in line)
    synsets = order.read_text(encoding="utf-8").split()
    return [lemma.get(synset, synset) for synset in synsets] if len(synsets) == 1000 else None


def read_names(path: str | Path, num_classes: int) -> list[str]:
    """Read the names of all classes: a text file with one a line, or a JSON list.

    Raises
    ------
    FormatError
        If there are more or fewer names than classes.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise FormatError(f"{path}: cannot be read as names; {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{path}: must be a list of names, one for each class")
    if len(names) != num_classes:
        raise FormatError(f"{path}: has {len(names)} names; the model has {num_classes} classes")
    return names
