"""Files of tensors, one at a time: safetensors, npz, PyTorch's, Keras', and DeepMind's pickles.

A file may hold several sets of weights, in dictionaries within a dictionary; :mod:`choice
<agc.weights.choice>` says which of them is meant.
"""

from __future__ import annotations

import json
import math
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError, MissingPackageError
from agc.files import check_source
from agc.packages import need
from agc.weights.keras_h5 import (
    ARCHIVED,
    array_of,
    datasets,
    dtype_of,
    metadata_of,
    unzipped,
)
from agc.weights.pickles import RefusedError, read_pickle
from agc.weights.torch_zip import StoredTensor, read_tree

__all__ = [
    "DTYPES",
    "Source",
    "Tensor",
    "in_memory",
    "open_source",
    "write_npz",
    "write_safetensors",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, which is not read until ``read`` is called."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass(frozen=True)
class Source:
    """An open file: what it holds, and what else it says in words.

    Attributes
    ----------
    path : Path
        What was opened.
    contents : mapping of str to mapping
        Dotted key of a dictionary, empty for the outermost, to what is in it by name: a
        :class:`Tensor`, or anything else that the file may hold.
    metadata : mapping of str to str
    files : tuple of Path
        All files that are read: several if it is an index.
    """

    path: Path
    contents: Mapping[str, Mapping[Any, Any]]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]


@contextmanager
def open_source(path: Path, *, shard: bool = False) -> Iterator[Source]:
    """Open a file of any kind that is read; what it is follows from its content, not its name.

    Parameters
    ----------
    path : Path
    shard : bool
        An index names it, so it is none itself.

    Raises
    ------
    FormatError
        If it is none of these, or truncated.
    MissingPackageError
        If the package that reads it is not installed.
    OSError
        If there is no such file, or it is a pipe or device.
    """
    check_source(path)
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise FormatError(f"{path}: is empty")
    metadata: Mapping[str, str] = {}
    with ExitStack() as stack:
        contents: Mapping[str, Mapping[Any, Any]]
        files: tuple[Path, ...] = (path,)
        if _is_safetensors(start, path.stat().st_size):
            tensors, metadata = stack.enter_context(_safetensors(path))
            contents = {"": tensors}
        elif start.startswith(b"PK"):
            archive = stack.enter_context(_open_zip(path))
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if pickles:
                contents = _torch(path, archive, pickles[0])
            elif ARCHIVED in names:
                metadata = metadata_of(archive)
                contents = {"": stack.enter_context(_keras(path, unzipped(archive)))}
            elif names and all(name.endswith(".npy") for name in names):
                tensors, metadata = _npz(path, archive)
                contents = {"": tensors}
            else:
                raise FormatError(
                    f"{path}: a zip archive, but neither NumPy's nor PyTorch's nor Keras'"
                )
        elif start.startswith(_HDF5):
            contents = {"": stack.enter_context(_keras(path, path))}
        elif start.startswith(_LEGACY_TORCH):
            contents = _legacy_torch(path)
        elif start.startswith(b"\x80"):
            arrays = read_pickle(path)
            contents = {"": {name: in_memory(array) for name, array in arrays.items()}}
        elif not shard and start.lstrip().startswith(b"{"):
            shard_of = _weight_map(path)
            shards = {
                name: stack.enter_context(open_source(path.parent / name, shard=True))
                for name in sorted(set(shard_of.values()))
            }
            contents = {"": _gathered(path, shard_of, shards)}
            files = (path, *(opened.path for opened in shards.values()))
        else:
            raise FormatError(
                f"{path}: neither safetensors, npz, HDF5, a PyTorch file nor a pickle; "
                f"it starts with {start!r}"
            )
        yield Source(path, contents, metadata, files)


_LEGACY_TORCH: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Start of PyTorch's older files: their magic number, pickled."""
_HDF5: Final = b"\x89HDF\r\n\x1a\n"


def in_memory(array: Array) -> Tensor:
    """Return an array that is there already as a tensor."""
    return Tensor(array.shape, array.dtype.name, lambda: array)


# --- indices of shards ----------------------------------------------------------------------------


def _weight_map(path: Path) -> dict[str, str]:
    """Return which file has which tensor, by an index such as ``model.safetensors.index.json``."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        return dict(items)

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=pairs)["weight_map"]
        if not isinstance(found, dict) or not found:
            raise ValueError("it maps no tensor to a file")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: JSON, but no index of shards with a weight_map; {error}"
        ) from None
    if repeated:
        raise FormatError(f"{path}: has {repeated[0]!r} twice, so it does not say which is meant")
    for tensor, name in found.items():
        if isinstance(name, list):
            raise FormatError(
                f"{path}: an index of Keras, whose shards are not read; load them in Keras and save "
                "one file, model.save_weights('x.weights.h5')"
            )
        if not isinstance(name, str) or not name or name != Path(name).name:
            raise FormatError(f"{path}: puts {tensor} into {name!r}; shards must be beside it")
        if not (path.parent / name).is_file():
            raise FormatError(f"{path}: names {name}, which is no file of weights beside it")
    return found


def _gathered(
    path: Path, shard_of: Mapping[str, str], shards: Mapping[str, Source]
) -> dict[str, Any]:
    """Return each tensor from the file that an index names: another may have its name too."""
    lost = [
        f"{tensor} ({name})"
        for tensor, name in shard_of.items()
        if tensor not in shards[name].contents[""]
    ]
    if lost:
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        raise FormatError(
            f"{path}: {len(lost)} not in the file where it says: {', '.join(lost[:10])}{more}. "
            "Are all files of one model, and whole?"
        )
    return {tensor: shards[name].contents[""][tensor] for tensor, name in shard_of.items()}


# --- safetensors ----------------------------------------------------------------------------------

DTYPES: Final[Mapping[str, str]] = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
"""Code in a safetensors file to the dtype's name: what weights may be made of."""


def _is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of this size, which starts with these bytes, is safetensors.

    Its first eight bytes are the length of its header and can be those of any other kind, so the
    brace that follows decides, unless the header would not fit and the file looks like another
    kind.
    """
    fits = int.from_bytes(start[:8], "little") <= size - 8
    return start[8:9] == b"{" and (fits or not start.startswith((b"PK", b"\x80", b"{")))


@contextmanager
def _safetensors(path: Path) -> Iterator[tuple[dict[str, Tensor], Mapping[str, str]]]:
    library = need("safetensors", f"{path}: reading safetensors")
    try:
        opened = library.safe_open(path, "np")
    except library.SafetensorError as error:
        raise FormatError(f"{path}: {_lost(path) or error}") from None
    with opened as file:

        def tensor(name: str) -> Tensor:
            part = file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype(), part.get_dtype())

            def read() -> Array:
                if dtype == "bfloat16":  # which NumPy has only once this is imported
                    need("ml_dtypes", f"{path}: reading bfloat16")
                return np.asarray(file.get_tensor(name))

            return Tensor(tuple(part.get_shape()), dtype, read)

        yield {name: tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _lost(path: Path) -> str | None:
    """Name the tensors that a truncated file has lost, if its header is whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, path.stat().st_size))
    if len(text) < length:
        return f"truncated; its header has {len(text)} of {length} bytes"
    try:
        header = json.loads(text)
        have = path.stat().st_size - 8 - length
        lost = [
            name
            for name, entry in header.items()
            if name != "__metadata__" and entry["data_offsets"][1] > have
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    if not lost:
        return None
    more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    return f"truncated; {len(lost)} tensors are not whole: {', '.join(lost[:10])}{more}"


def write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Iterator[str]:
    """Write tensors one by one, which the library cannot; yield each name once it is written."""
    # The widest numbers first, as the library has them, so that all are aligned.
    ordered = sorted(
        tensors.items(),
        key=lambda item: ("64" in item[1].dtype, "32" in item[1].dtype),
        reverse=True,
    )
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in ordered:
        file.write(_bytes(tensor.read()))
        yield name


def _bytes(array: Array) -> memoryview:
    """Return the bytes of an array, in C order and little endian, also of a transposed view."""
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return array.reshape(-1).view(np.uint8).data


# --- npz ------------------------------------------------------------------------------------------


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    # The latter two are zipfile's for a version that it does not know and for names that are no
    # text.
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise FormatError(f"{path}: truncated, or not a whole zip archive; {error}") from None
    with archive:
        yield archive


def _npz(path: Path, archive: zipfile.ZipFile) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    def tensor(member: str) -> Tensor:
        with _member(path, archive, member) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        return Tensor(shape, dtype.name, lambda: read(member))

    def read(member: str) -> Array:
        with _member(path, archive, member) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    metadata: dict[str, str] = {}
    if archive.comment.startswith(b"{"):  # where this project puts it; np.load does not look there
        try:
            metadata = json.loads(archive.comment)
        except ValueError as error:
            raise FormatError(f"{path}: truncated, or its comment is broken; {error}") from None
    return {name.removesuffix(".npy"): tensor(name) for name in archive.namelist()}, metadata


# RuntimeError is zipfile's for a member that is encrypted, or compressed in a way that it does not
# know; OSError is what a place outside of the file gives.
_BROKEN_MEMBER: Final = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    OSError,
)


@contextmanager
def _member(path: Path, archive: zipfile.ZipFile, member: str) -> Iterator[IO[bytes]]:
    try:
        with archive.open(member) as file:
            yield file
    except _BROKEN_MEMBER as error:
        raise FormatError(
            f"{path}: {member.removesuffix('.npy')} cannot be read; {error}"
        ) from None


def write_npz(
    file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[str]:
    """Write an npz file tensor by tensor; yield each name once it is written."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = json.dumps(dict(metadata)).encode()
        for name, tensor in tensors.items():
            # Without the time of day: the same weights give the same file.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                array = np.asarray(tensor.read(), order="C")
                np.lib.format.write_array(member, array, allow_pickle=False)
            yield name


# --- Keras ----------------------------------------------------------------------------------------


@contextmanager
def _keras(path: Path, file: Path | IO[bytes]) -> Iterator[dict[str, Tensor]]:
    with datasets(path, file) as sets:

        def tensor(dataset: Any) -> Tensor:
            return Tensor(dataset.shape, dtype_of(dataset), lambda: array_of(path, dataset))

        yield {name: tensor(dataset) for name, dataset in sets.items()}


# --- PyTorch --------------------------------------------------------------------------------------


def _torch(path: Path, archive: zipfile.ZipFile, member: str) -> dict[str, dict[Any, Any]]:
    try:
        tree = read_tree(archive, member)
    except RefusedError as error:
        raise FormatError(
            f"{path}: refused by a reader which runs nothing: its pickle {error}. If you trust the "
            "file, let whoever made it save model.state_dict() alone"
        ) from None
    except Exception as error:  # a broken pickle can make the unpickler raise anything
        raise FormatError(f"{path}: truncated, or no readable PyTorch file; {error}") from None

    def tensor(name: str, stored: StoredTensor) -> Tensor:
        def read() -> Array:
            try:
                return stored.read()
            except (*_BROKEN_MEMBER, KeyError) as error:
                raise FormatError(f"{path}: {name} cannot be read; {error}") from None

        return Tensor(stored.shape, stored.dtype, read)

    return _dictionaries(path, tree, StoredTensor, tensor)


def _legacy_torch(path: Path) -> dict[str, dict[Any, Any]]:
    torch = need("torch", f"{path}: reading a PyTorch file from before version 1.6", "torch")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise MissingPackageError(
            f"{path}: PyTorch {torch.__version__} can be made to run code by a file, even with weights_only=True "
            "(CVE-2025-32434); install PyTorch 2.6 or later, or let whoever made the file save safetensors"
        )
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises what it likes for broken files
        raise FormatError(
            f"{path}: PyTorch cannot read it with weights_only=True, which runs nothing; {_reason(error)}"
        ) from None

    def tensor(name: str, value: Any) -> Tensor:  # noqa: ARG001
        dtype = str(value.dtype).removeprefix("torch.")

        def read() -> Array:
            if dtype == "bfloat16":
                ml_dtypes = need("ml_dtypes", f"{path}: reading bfloat16")
                return np.asarray(value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
            return np.asarray(value.detach().numpy())

        return Tensor(tuple(value.shape), dtype, read)

    return _dictionaries(path, tree, torch.Tensor, tensor)


_DEPTH: Final = 6
_DICTIONARIES: Final = 10_000


def _dictionaries(
    path: Path, tree: Any, cls: Any, tensor: Callable[[str, Any], Tensor]
) -> dict[str, dict[Any, Any]]:
    """Return each dictionary in a tree of them by its dotted key, with tensors as :class:`Tensor`.

    Parameters
    ----------
    path : Path
        For messages.
    tree : dict
        What the file holds.
    cls : type
        Of its tensors.
    tensor : callable
        Name and tensor to :class:`Tensor`.
    """
    if not isinstance(tree, dict):
        raise FormatError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    contents: dict[str, dict[Any, Any]] = {}
    waiting = [("", tree, 0)]
    while waiting:
        key, found, depth = waiting.pop(0)
        if len(contents) > _DICTIONARIES:
            raise FormatError(f"{path}: holds more than {_DICTIONARIES} dictionaries")
        contents[key] = {}
        for name, value in found.items():
            if not isinstance(value, dict):
                contents[key][name] = tensor(name, value) if isinstance(value, cls) else value
            elif isinstance(name, str) and depth < _DEPTH:  # a pickle may have circles
                waiting.append((f"{key}.{name}" if key else name, value, depth + 1))
    return contents


def _reason(error: Exception) -> str:
    """Return what PyTorch found, without its advice to load the file by less careful means."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    lines = text.strip().removeprefix("Weights only load failed. ").splitlines()
    said = [line for line in lines if line.strip() and "weights_only" not in line]
    # A name in the file can hold what a terminal obeys.
    printable = "".join(filter(str.isprintable, (said or lines or [""])[0]))
    return printable.partition(" Please use ")[0].strip() or type(error).__name__
