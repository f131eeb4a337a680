"""Keras' own files of an NFNet: ``model.save_weights("x.weights.h5")``, ``model.save("x.keras")``.

They have no names of variables, but paths of layers by class and number, and the variables of a
layer in order: ``layers/stage_1/blocks/nf_block_2/conv0/vars/1``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError
from agc.packages import need
from agc.weights.forms import FORMAT, FORMAT_VERSION

__all__ = ["ARCHIVED", "array_of", "datasets", "dtype_of", "metadata_of", "unzipped"]

ARCHIVED: Final = "model.weights.h5"
"""Member of a ``.keras`` archive that holds the weights."""

_SKIPPED: Final = re.compile(r"(^|/)(optimizer|metrics?|compile_metrics|loss_tracker)/")
_BLOCK: Final = re.compile(r"layers/stage(?:_(\d+))?/blocks/nf_block(?:_(\d+))?/")
_LEAF: Final = re.compile(r"(?:(\w+)/)?vars/(\d)$")


@contextmanager
def datasets(path: Path, file: Path | IO[bytes]) -> Iterator[dict[str, Any]]:
    """Open an HDF5 file; yield its datasets by the names of the form ``keras``.

    What is no weight of the model, such as the state of its optimizer, is left out.

    Raises
    ------
    FormatError
        If it is truncated, or of Keras 2's form, or a dataset's numbers lie in another file, which
        could be any.
    """
    library = need("h5py", f"{path}: reading files of Keras", "tensorflow")
    try:
        opened = library.File(file, "r")
    except OSError as error:
        raise FormatError(f"{path}: truncated, or not a whole HDF5 file; {error}") from None
    with opened as tree:
        if "model_weights" in tree or "layer_names" in tree.attrs:
            raise FormatError(
                f"{path}: in the form of Keras 2, which is not read; load it in Keras and save it "
                "with model.save('x.keras') or model.save_weights('x.weights.h5')"
            )
        sets: dict[str, Any] = {}

        def visit(name: str, item: Any) -> None:  # visits no links, which may lead elsewhere
            if isinstance(item, library.Dataset) and not _SKIPPED.search(name):
                if item.external or item.is_virtual:
                    raise FormatError(f"{path}: {name} refers to another file")
                sets[_name(name)] = item

        tree.visititems(visit)
        yield sets


def array_of(path: Path, dataset: Any) -> npt.NDArray[Any]:
    """Read a dataset."""
    try:
        value = np.asarray(dataset[()])
    except OSError as error:
        raise FormatError(f"{path}: {dataset.name} cannot be read; {error}") from None
    if dtype_of(dataset) == "bfloat16":
        value = value.view(need("ml_dtypes", f"{path}: reading bfloat16").bfloat16)
    return value


def dtype_of(dataset: Any) -> str:
    """Return the name of a dataset's dtype, which Keras notes for bfloat16."""
    noted = dataset.attrs.get("dtype")
    return str(dataset.dtype.name if noted is None else noted)


def unzipped(archive: zipfile.ZipFile) -> IO[bytes]:
    """Return the weights of a ``.keras`` archive, in memory: HDF5 is not read from an archive."""
    return io.BytesIO(archive.read(ARCHIVED))


def metadata_of(archive: zipfile.ZipFile) -> Mapping[str, str]:
    """Return the options that a ``.keras`` archive of an NFNet says; empty for another model."""
    try:
        config = json.loads(archive.read("config.json"))
        if config["registered_name"] != "agc>NFNet":
            return {}
        options = config["config"]["options"]
        return {
            **{name: str(value) for name, value in options.items()},
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "form": "keras",
            "variant": json.loads(options["variant"])["name"],
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _name(path: str) -> str:
    """Return the name that a dataset's variable has in the form ``keras``."""
    name = _BLOCK.sub(lambda found: f"stages.{found[1] or 0}/{found[2] or 0}/", path)
    name = name.replace("layers/", "").replace("res_net_stem/", "stem/")
    found = _LEAF.search(name)
    if not found:
        return name
    layer, number = found[1] or "", int(found[2])
    if layer.isdigit():
        leaves: tuple[str, ...] = ("skip_gain",)
    elif layer in ("fc0", "fc1", "head"):
        leaves = ("weight", "bias")
    else:
        leaves = ("weight", "bias", "gain")
    return name[: found.start()] + (
        f"{layer}/{leaves[number]}" if number < len(leaves) else found[0]
    )
