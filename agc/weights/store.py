"""Weights in files: open, load, save and convert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import ConfigError, FormatError, ParameterError
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
from agc.weights.files import (
    DTYPES,
    Source,
    Tensor,
    in_memory,
    open_source,
    write_npz,
    write_safetensors,
)
from agc.weights.forms import FORMS, Form, guess, sizes

__all__ = ["FORMAT_VERSION", "Weights", "convert", "load", "open_weights", "save"]

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

FORMAT_VERSION: Final = 1
"""Version of the metadata; a file of a later one is refused."""

_FORMAT: Final = "agc-nfnet"
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
    """

    path: Path
    form: str
    options: Options
    complete: bool
    tensors: Mapping[str, Tensor]

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
) -> Iterator[Weights]:
    """Open a file of weights of any form, and check that it holds exactly an NFNet's parameters.

    Parameters
    ----------
    path : str or Path
        safetensors, npz, a PyTorch file, or one of DeepMind's pickles. What it is follows from its
        content.
    variant : str, optional
        What it must be; what its tensors look like most if None.
    activation, ws_eps : str, optional
        Instead of what the file says; see :func:`agc.nfnet.options`.

    Raises
    ------
    FormatError
        If it is truncated, of a later version, or no such file.
    ParameterError
        If tensors are missing, unknown, of another shape, or not floating point; the message names
        them as the file does, up to ten of each kind.
    MissingPackageError
        If the package that reads this kind of file is not installed.
    ConfigError
        If a value is not allowed.
    OSError
        If there is no such file.
    """
    path = Path(path)
    with open_source(path) as source:
        complete = source.metadata.get("format") == _FORMAT
        form, chosen = _from_metadata(source) if complete else _from_shapes(source)
        if variant is not None:
            chosen = replace(chosen, variant=named_variant(variant))
        if activation is not None:
            chosen = replace(chosen, activation=activation)
        if ws_eps is not None:
            chosen = replace(chosen, ws_eps=ws_eps)
        yield Weights(path, form.name, chosen, complete, _check(source, form, chosen))


def load(path: str | Path) -> tuple[Options, dict[str, Array]]:
    """Return the model that a file's weights belong to, and its arrays in the neutral form.

    Raises
    ------
    FormatError, ParameterError, MissingPackageError, OSError
        As :func:`open_weights`.
    """
    with open_weights(path) as weights:
        return weights.options, weights.arrays()


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
        If there is no such form, or the variant is one that is only yours and has no name to be
        found by.
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
    progress: Progress | None = None,
) -> Weights:
    """Convert weights from the form they are in to another, bit for bit, one tensor at a time.

    Parameters
    ----------
    source, target : str or Path
        Different files. What stands at ``target`` is replaced when everything is written.
    to : {"neutral", "torch", "flax", "keras", "timm", "haiku"}
        The form of ``target``: an npz file for ``haiku``, otherwise safetensors.
    variant, activation, ws_eps : str, optional
        As in :func:`open_weights`.
    progress : callable, optional
        Called with a tensor's name, its bytes, and the bytes of all, when it has been written.

    Returns
    -------
    Weights
        What was read, closed: its form and options.

    Raises
    ------
    FormatError, ParameterError, MissingPackageError, ConfigError, OSError
        As :func:`open_weights`.
    """
    form = _form(to)
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and source.samefile(target):
        raise ConfigError(f"{target}: source and target are the same file; choose another target")
    with open_weights(source, variant=variant, activation=activation, ws_eps=ws_eps) as weights:
        _write(target, weights.options, weights.tensors, form, progress)
    return weights


def _write(
    path: Path,
    chosen: Options,
    tensors: Mapping[str, Tensor],
    form: Form,
    progress: Progress | None,
) -> None:
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


def _encoded(form: Form, spec: ParameterSpec, tensor: Tensor) -> Tensor:
    return Tensor(form.shape(spec), tensor.dtype, lambda: form.encode(spec, tensor.read()))


def _decoded(form: Form, spec: ParameterSpec, tensor: Tensor) -> Tensor:
    return Tensor(spec.shape, tensor.dtype, lambda: form.decode(spec, tensor.read()))


def _check(source: Source, form: Form, chosen: Options) -> dict[str, Tensor]:
    """Return neutral tensors by canonical name; raise unless they are exactly the model's."""
    specs = _specs(chosen)
    try:
        check_arrays([form.spec(spec) for spec in specs], source.tensors)
    except ParameterError as error:
        raise ParameterError(
            f"{source.path}, read as {form.name} weights of {chosen.variant.name}: "
            f"{error}{_hint(source, chosen)}"
        ) from None
    return {spec.name: _decoded(form, spec, source.tensors[form.spec(spec).name]) for spec in specs}


def _hint(source: Source, chosen: Options) -> str:
    """Say what the tensors look like, if not like what they should be."""
    try:
        like = guess({name: tensor.shape for name, tensor in source.tensors.items()})[1].name
    except KeyError:
        return ". None of its names is an NFNet's"
    return "" if like == chosen.variant.name else f". Its tensors look like those of {like}"


def _metadata(chosen: Options, form: Form) -> dict[str, str]:
    if VARIANTS.get(chosen.variant.name) != chosen.variant:
        raise ConfigError(
            f"the variant {chosen.variant.name!r} is not one of {', '.join(VARIANTS)}, "
            "so a file cannot say which it is"
        )
    return {
        "format": _FORMAT,
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


def _from_shapes(source: Source) -> tuple[Form, Options]:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    try:
        form, variant = guess(shapes)
    except KeyError:
        some = ", ".join(list(shapes)[:5]) or "nothing"
        raise FormatError(f"{source.path}: no tensor is an NFNet's; it holds {some}") from None
    classes, channels = sizes(form, shapes)
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
