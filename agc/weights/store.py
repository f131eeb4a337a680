"""Weights in files: open, load, save and convert."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import ConfigError, FormatError, ParameterError, WeightsWarning
from agc.files import replacing
from agc.nfnet import (
    VARIANTS,
    Options,
    ParameterSpec,
    WsEps,
    check_arrays,
    options,
    parameters,
)
from agc.nfnet import variant as named_variant
from agc.weights.choice import Chosen, WhichWeights, choose
from agc.weights.files import (
    DTYPES,
    Source,
    Tensor,
    in_memory,
    open_source,
    write_npz,
    write_safetensors,
)
from agc.weights.folders import weights_file
from agc.weights.forms import FORMAT, FORMAT_VERSION, FORMS, Form, guess, sizes

__all__ = ["FORMAT_VERSION", "Weights", "convert", "load", "open_weights", "save"]

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

_LAYOUTS: Final = {False: "HWIO, IO", True: "OIHW, OI"}


@dataclass(frozen=True)
class Weights:
    """An open file of weights; nothing has been read but its header.

    Attributes
    ----------
    path : Path
        The file.
    form : str
        In which form it is: ``neutral``, ``torch``, ``flax``, ``keras``, ``timm`` or ``haiku``.
    options : Options
        The model that the weights belong to.
    complete : bool
        Whether the file itself says so. If not, the variant and the numbers of classes and image
        channels follow from its tensors, and the rest is DeepMind's.
    tensors : mapping of str to Tensor
        By canonical name; ``read()`` gives an array in the neutral layout.
    notes : tuple of str
        What was assumed, in sentences for whoever asked: which of several weights were taken, and
        for which activation and epsilon weights of a file that does not say it.
    files : tuple of Path
        All files that are read: ``path``, and the shards if it is an index.
    """

    path: Path
    form: str
    options: Options
    complete: bool
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def arrays(self) -> dict[str, Array]:
        """Read all of them, for ``from_neutral`` of any framework."""
        return {name: tensor.read() for name, tensor in self.tensors.items()}


@contextmanager
def open_weights(
    path: str | Path,
    *,
    variant: str | None = None,
    activation: str | None = None,
    ws_eps: WsEps | None = None,
    key: str | None = None,
    weights: WhichWeights | None = None,
) -> Iterator[Weights]:
    """Open a file of weights of any form, and check that it holds exactly an NFNet's parameters.

    Parameters
    ----------
    path : str or Path
        safetensors, npz, a PyTorch file, one of Keras or of DeepMind's pickles, an index of shards,
        or a folder of ``agc train``. What it is follows from its content.
    variant : str, optional
        What it must be; what its tensors look like most if None.
    activation, ws_eps : str, optional
        Instead of what the file says; see :func:`agc.nfnet.options`.
    key : str, optional
        Where in the file they are, if there are several: ``"state_dict"``, ``"ema.model"``. What is
        elsewhere is ignored.
    weights : {"raw", "ema"}, optional
        Which, if there are raw and averaged ones. Of a folder of ``agc train`` those that its
        recipe evaluates are taken if None.

    Raises
    ------
    FormatError
        If it is truncated, of a later version, or no such file; or if it holds several weights and
        nothing says which are meant.
    ParameterError
        If tensors are missing, unknown, of another shape, or not floating point; the message names
        them as the file does, up to ten of each kind.
    MissingPackageError
        If the package that reads this kind of file is not installed.
    ConfigError
        If a value is not allowed.
    OSError
        If there is no such file, or it is a pipe or device.
    """
    path, notes = Path(path), []
    if weights not in (None, "raw", "ema"):
        raise ConfigError(f"weights must be 'raw' or 'ema', got {weights!r}")
    if path.is_dir():
        path, note = weights_file(path, weights)
        weights = None
        notes += [note] if note else []
    with open_source(path) as source:
        found = choose(source, key, weights)
        complete = source.metadata.get("format") == FORMAT
        form, chosen = _from_metadata(source) if complete else _from_shapes(source, found)
        if variant is not None:
            chosen = replace(chosen, variant=named_variant(variant))
        if activation is not None:
            chosen = replace(chosen, activation=activation)
        if ws_eps is not None:
            chosen = replace(chosen, ws_eps=ws_eps)
        if problem := _misfit(chosen, form):
            raise FormatError(f"{path}: {problem}")
        tensors = _check(source, found, form, chosen)
        if not complete and None in (activation, ws_eps):
            notes.append(_assumed(path, chosen))
        yield Weights(path, form.name, chosen, complete, tensors, tuple(notes), source.files)


def _assumed(path: Path, chosen: Options) -> str:
    return (
        f"{path} does not say how it was trained; taken for activation={chosen.activation}, "
        f"ws_eps={chosen.ws_eps}. DeepMind's weights, also timm's dm_nfnet_*.dm_in1k, are gelu and "
        "deepmind; for what you trained with timm, say --activation gelu_erf --ws-eps timm"
    )


def load(
    path: str | Path,
    *,
    variant: str | None = None,
    activation: str | None = None,
    ws_eps: WsEps | None = None,
    key: str | None = None,
    weights: WhichWeights | None = None,
) -> tuple[Options, dict[str, Array]]:
    """Return the model that a file's weights belong to, and its arrays in the neutral form.

    The parameters are those of :func:`open_weights`.

    Raises
    ------
    FormatError, ParameterError, MissingPackageError, ConfigError, OSError
        As :func:`open_weights`.

    Warns
    -----
    WeightsWarning
        If something was assumed: which weights are meant, or, of a file that does not say it and
        is not in DeepMind's own form, the activation or the epsilon.
    """
    opened = open_weights(
        path, variant=variant, activation=activation, ws_eps=ws_eps, key=key, weights=weights
    )
    with opened as found:
        assumed = not found.complete and None in (activation, ws_eps)
        for note in found.notes[: -1 if assumed and found.form == "haiku" else None]:
            warnings.warn(note, WeightsWarning, stacklevel=2)
        return found.options, found.arrays()


def save(
    path: str | Path, chosen: Options, arrays: Mapping[str, Array], to: str = "neutral"
) -> None:
    """Write arrays in the neutral form, such as ``to_neutral`` gives, into a file.

    Parameters
    ----------
    path : str or Path
        What stands there is replaced when everything is written.
    chosen : Options
        The model that they belong to: ``model.options``.
    arrays : mapping of str to array
        Exactly its parameters.
    to : str
        The form.

    Raises
    ------
    ParameterError
        If they are not; the message names them.
    ConfigError
        If there is no such form, or none of this model, or the variant is one that is only yours
        and has no name to be found by.
    OSError
        If ``path`` is a folder, or in none.
    """
    check_arrays(_specs(chosen), arrays)
    tensors = {name: in_memory(np.asarray(array)) for name, array in arrays.items()}
    _write(Path(path), chosen, tensors, _form(to), None)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    variant: str | None = None,
    activation: str | None = None,
    ws_eps: WsEps | None = None,
    key: str | None = None,
    weights: WhichWeights | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Convert weights from the form they are in to another, bit for bit, one tensor at a time.

    Parameters
    ----------
    source, target : str or Path
        Different files. What stands at ``target`` is replaced when everything is written.
    to : {"neutral", "torch", "flax", "keras", "timm", "haiku"}
        The form of ``target``: an npz file for ``haiku``, otherwise safetensors.
    variant, activation, ws_eps, key, weights : str, optional
        As in :func:`open_weights`.
    progress : callable, optional
        Called with a tensor's name, its bytes, and the bytes of all, when it has been written.

    Returns
    -------
    Weights
        What was read, closed: its form, options, and ``notes`` on what was assumed.

    Raises
    ------
    FormatError, ParameterError, MissingPackageError, ConfigError, OSError
        As :func:`open_weights`.
    """
    form, target = _form(to), Path(target)
    opened = open_weights(
        source, variant=variant, activation=activation, ws_eps=ws_eps, key=key, weights=weights
    )
    with opened as found:
        if target.exists() and any(target.samefile(file) for file in found.files):
            raise ConfigError(
                f"{target}: source and target are the same file; choose another target"
            )
        _write(target, found.options, found.tensors, form, progress)
    return found


def _write(
    path: Path,
    chosen: Options,
    tensors: Mapping[str, Tensor],
    form: Form,
    progress: Progress | None,
) -> None:
    if problem := _misfit(chosen, form):
        raise ConfigError(problem)
    # NumPy's files do not tell bfloat16 from other numbers of two bytes.
    npz = form.suffix == ".npz"
    writable = [dtype for dtype in DTYPES.values() if not (npz and dtype == "bfloat16")]
    encoded = {}
    for spec in _specs(chosen):
        tensor, entry = tensors[spec.name], form.spec(spec)
        if tensor.dtype not in writable:
            raise ParameterError(
                f"{spec.name} is {tensor.dtype}; {form.name} weights can be {', '.join(writable)}"
            )
        encoded[entry.name] = _encoded(form, spec, tensor)
    write = write_npz if npz else write_safetensors
    total = sum(tensor.nbytes for tensor in encoded.values())
    with replacing(path) as file:
        for name in write(file, encoded, _metadata(chosen, form)):
            if progress is not None:
                progress(name, encoded[name].nbytes, total)


def _misfit(chosen: Options, form: Form) -> str | None:
    """Say why no weights of a model have a form; None if they do."""
    if form.name != "timm" or chosen.variant.family != "NF-ResNet":
        return None
    return (
        "timm's NF-ResNets are other networks than DeepMind's: 2x2 pixels are averaged in shortcuts, "
        "convolutions pad on both sides, weights are scaled instead of activations, and skip gains "
        "are missing; the weights of the one are not those of the other"
    )


def _encoded(form: Form, spec: ParameterSpec, tensor: Tensor) -> Tensor:
    return Tensor(form.shape(spec), tensor.dtype, lambda: form.encode(spec, tensor.read()))


def _decoded(form: Form, spec: ParameterSpec, tensor: Tensor) -> Tensor:
    return Tensor(spec.shape, tensor.dtype, lambda: form.decode(spec, tensor.read()))


def _check(source: Source, found: Chosen, form: Form, chosen: Options) -> dict[str, Tensor]:
    """Return neutral tensors by canonical name; raise unless they are exactly the model's."""
    specs = _specs(chosen)
    try:
        check_arrays([form.spec(spec) for spec in specs], found.tensors)
    except ParameterError as error:
        under = f" under {found.label}" if found.label else ""
        raise ParameterError(
            f"{source.path}, read as {form.name} weights of {chosen.variant.name}{under}: "
            f"{error}{_hint(source, found, chosen)}"
        ) from None
    return {spec.name: _decoded(form, spec, found.tensors[form.spec(spec).name]) for spec in specs}


def _hint(source: Source, found: Chosen, chosen: Options) -> str:
    """Say what the tensors look like, if not like what they should be."""
    if re.search(r"-\d+-of-\d+\.", source.path.name):
        return ". The file is one of several; give their index, *.index.json"
    if re.search(r"_\d{5}\.weights\.h5$", source.path.name):
        return ". The file is one of Keras' several; load them in Keras and save one file"
    if found.label and not found.tensors.keys().isdisjoint(source.contents.get("", ())):
        return f". To read only what is under {found.label}, name it by --key"
    try:
        like = guess(_shapes(found))[1].name
    except KeyError:
        return ". None of its names is an NFNet's"
    return "" if like == chosen.variant.name else f". Its tensors look like those of {like}"


def _shapes(found: Chosen) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in found.tensors.items()}


def _metadata(chosen: Options, form: Form) -> dict[str, str]:
    if VARIANTS.get(chosen.variant.name) != chosen.variant:
        raise ConfigError(
            f"the variant {chosen.variant.name!r} is not one of {', '.join(VARIANTS)}, "
            "so a file cannot say which it is"
        )
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "form": form.name,
        "layout": _LAYOUTS[form.outputs_first],
        "variant": chosen.variant.name,
        "num_classes": str(chosen.num_classes),
        "in_channels": str(chosen.in_channels),
        "activation": chosen.activation,
        "ws_eps": chosen.ws_eps,
        "dropout": repr(float(chosen.dropout)),
        "stochastic_depth": repr(float(chosen.stochastic_depth)),
    }


def _from_shapes(source: Source, found: Chosen) -> tuple[Form, Options]:
    shapes = _shapes(found)
    try:
        form, variant = guess(shapes)
    except KeyError:
        some = ", ".join(list(shapes)[:5]) or "nothing"
        raise FormatError(f"{source.path}: no tensor is an NFNet's; it holds {some}") from None
    classes, channels = sizes(form, variant, shapes)
    return form, options(variant, classes, in_channels=channels)


def _from_metadata(source: Source) -> tuple[Form, Options]:
    said = source.metadata
    try:
        version = int(said["format_version"])
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{source.path}: format version {version}; this program reads up to {FORMAT_VERSION}, "
                "a later one is needed"
            )
        ws_eps: Any = said["ws_eps"]
        return FORMS[said["form"]], options(
            said["variant"],
            int(said["num_classes"]),
            in_channels=int(said["in_channels"]),
            activation=said["activation"],
            ws_eps=ws_eps,
            dropout=float(said["dropout"]),
            stochastic_depth=float(said["stochastic_depth"]),
        )
    except (KeyError, ConfigError, ValueError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        what = f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{source.path}: broken metadata; {what}") from None


def _specs(chosen: Options) -> tuple[ParameterSpec, ...]:
    return parameters(chosen.variant, chosen.num_classes, chosen.in_channels)


def _form(name: str) -> Form:
    if name not in FORMS:
        raise ConfigError(f"unknown form {name!r}; the forms are {', '.join(FORMS)}")
    return FORMS[name]
