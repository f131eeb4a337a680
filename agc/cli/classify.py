"""``agc classify``: what photographs show, according to an NFNet of any framework."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc import nfnet
from agc.cli.frameworks import framework_names, load_framework
from agc.cli.model_options import add_model_options, add_which_option, describe
from agc.errors import ConfigError, FormatError, NonFiniteError
from agc.files import named_files
from agc.nfnet import Options
from agc.nfnet.images import evaluation_image
from agc.packages import need
from agc.weights import open_weights

__all__ = [
    "Guess",
    "class_names",
    "classifier",
    "random_weights",
    "read_image",
    "read_names",
    "register",
    "top",
    "untrained",
]

Array = npt.NDArray[Any]

_RANDOM: Final = "random"

_EXAMPLE: Final = """\
examples:
  agc classify china.jpg flower.jpg --weights F0.safetensors --backend torch
  agc classify *.jpg --weights run --use raw --backend jax --json

exit status: 0; 1 if an image could not be classified, although the others were; 2 for misuse
"""


def register(subparsers: Any) -> None:
    """Add the command ``classify`` to ``agc`` (entry-point group ``agc.commands``)."""
    command = subparsers.add_parser(
        "classify",
        help="say what photographs show, with an NFNet",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="photograph")
    command.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help=f"file of any form, folder of agc train, or '{_RANDOM}'",
    )
    command.add_argument(
        "--backend", required=True, choices=framework_names(), help="framework that runs the model"
    )
    command.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes (timm's for ImageNet's 1000, if timm is installed)",
    )
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes an image (5)")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_which_option(command, "--use")
    add_model_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    with named_files():
        options, arrays = _weights(arguments)
        if arguments.top < 1:
            raise ConfigError(f"--top must be >= 1, got {arguments.top}")
        classes = options.num_classes
        names = read_names(arguments.labels, classes) if arguments.labels else class_names(classes)
        model = classifier(arguments.backend, options, arrays)
        answers: list[_Answer] = []
        for path in arguments.images:
            try:
                logits = model(read_image(path, options.variant.test_pixels)[None])[0]
                answers.append((path, top(logits, arguments.top, names)))
            except FormatError as error:
                answers.append((path, str(error)))
            except NonFiniteError as error:
                answers.append((path, f"{path} with {arguments.weights}: {error}"))
    note = None
    if arguments.weights == _RANDOM:
        note = "THE WEIGHTS ARE RANDOM: these answers mean nothing"
    elif untrained(arrays):
        note = "THE WEIGHTS LOOK UNTRAINED, with every gain and bias as at the start: these answers mean nothing"
    if arguments.json:
        _print_json(arguments, options, note, answers)
    else:
        _print_tables(arguments, options, note, answers)
    failed = [answer for _, answer in answers if isinstance(answer, str)]
    for reason in failed:
        print(f"agc: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _weights(arguments: argparse.Namespace) -> tuple[Options, dict[str, Array]]:
    """Return the model and its arrays, and say what was assumed of the file."""
    if arguments.weights == _RANDOM:
        options, arrays = random_weights(arguments.variant or "tiny")
        return _override(options, activation=arguments.activation, ws_eps=arguments.ws_eps), arrays
    opened = open_weights(
        arguments.weights,
        variant=arguments.variant,
        activation=arguments.activation,
        ws_eps=arguments.ws_eps,
        key=arguments.key,
        weights=arguments.which,
    )
    with opened as weights:
        for note in weights.notes:
            print(note, file=sys.stderr)
        return weights.options, weights.arrays()


def _override(options: Options, **given: str | None) -> Options:
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(options, **changes)


def _print_json(
    arguments: argparse.Namespace,
    options: Options,
    note: str | None,
    answers: Sequence[_Answer],
) -> None:
    document = {
        "weights": arguments.weights,
        "trained": note is None,
        "note": note,
        "backend": arguments.backend,
        "variant": options.variant.name,
        "pixels": options.variant.test_pixels,
        "images": [
            {"image": str(path), "error": answer}
            if isinstance(answer, str)
            else {"image": str(path), "top": [dataclasses.asdict(guess) for guess in answer]}
            for path, answer in answers
        ],
    }
    print(json.dumps(document, indent=2))


def _print_tables(
    arguments: argparse.Namespace,
    options: Options,
    note: str | None,
    answers: Sequence[_Answer],
) -> None:
    console = need("rich.console", "agc classify").Console()
    table = need("rich.table", "agc classify").Table
    text = need("rich.text", "agc classify").Text

    def say(line: str, **how: Any) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True, **how)

    say(f"{describe(options)} with {arguments.backend}, weights: {arguments.weights}")
    classified = [(path, found) for path, found in answers if not isinstance(found, str)]
    for path, guesses in classified:
        say(str(path))
        shown = table()
        shown.add_column("class", justify="right")
        if any(guess.name is not None for guess in guesses):
            shown.add_column("name")
        shown.add_column("probability", justify="right")
        for guess in guesses:
            name = [] if guess.name is None else [text(guess.name)]
            shown.add_row(str(guess.index), *name, f"{guess.probability:.1%}")
        console.print(shown)
    if any(guess.name is None for _, guesses in classified for guess in guesses):
        say("(no names of classes; give them with --labels FILE)")
    if note is not None:
        say(note, style="bold red")


@dataclass(frozen=True)
class Guess:
    """One row of the table: a class, its name if there is one, and its probability."""

    index: int
    name: str | None
    probability: float


_Answer = tuple[Path, list[Guess] | str]
"""An image, and its classes or why it has none."""


def read_image(path: str | Path, pixels: int) -> npt.NDArray[np.float32]:
    """Read a photograph and prepare it (:func:`agc.nfnet.images.evaluation_image`).

    As in DeepMind's code, a camera's note on which side is up (EXIF) is not followed. Grey of 16
    bits is scaled to 8, and of a moving picture the first frame is taken.

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


def classifier(
    framework: str, model: Options, arrays: Mapping[str, Array]
) -> Callable[[Array], Array]:
    """Return a function from images, shape (n, h, w, 3), to logits in evaluation mode and float32.

    Parameters
    ----------
    framework : str
        Which framework's model runs, such as ``"torch"``.
    model : Options
        Which one.
    arrays : mapping of str to array
        Its parameters in the neutral form.

    Raises
    ------
    ConfigError
        If there is no such framework, or the model is for other images.
    MissingPackageError
        If the framework is not installed.
    ParameterError
        If the arrays are not the model's.
    """
    if model.in_channels != 3:
        raise ConfigError(f"the model is for {model.in_channels} channels; photographs have 3")
    module = load_framework(framework, f"the backend {framework}", framework)
    return module.classifier(model, arrays)


def random_weights(variant: str) -> tuple[Options, dict[str, Array]]:
    """Return weights that know nothing but are the same in every framework."""
    arrays = nfnet.seeded_parameters(variant)
    options = nfnet.options(variant)
    return options, {name: array.astype(np.float32) for name, array in arrays.items()}


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
    timm = importlib.util.find_spec("timm") if num_classes == 1000 else None
    if timm is None or not timm.submodule_search_locations:
        return None
    folder = Path(timm.submodule_search_locations[0]) / "data" / "_info"
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
