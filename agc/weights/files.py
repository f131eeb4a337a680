"""Files of tensors, one at a time: safetensors, npz, PyTorch's, and DeepMind's pickles."""

from __future__ import annotations

import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError, MissingPackageError
from agc.packages import need
from agc.weights.pickles import read_pickle

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
    """An open file: its tensors by name, and what else it says in words."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a file of any kind that is read; what it is follows from its content, not its name.

    Raises
    ------
    FormatError
        If it is none of these, or truncated.
    MissingPackageError
        If the package that reads it is not installed.
    OSError
        If there is no such file.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        with _safetensors(path) as source:
            yield source
    elif start.startswith(b"PK"):
        with _open_zip(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/data.pkl") for name in names):
                yield _torch(path, zipped=True)
            elif names and all(name.endswith(".npy") for name in names):
                yield _npz(path, archive)
            else:
                raise FormatError(f"{path}: a zip archive, but neither NumPy's nor PyTorch's")
    elif start.startswith(_LEGACY_TORCH):
        yield _torch(path, zipped=False)
    elif start.startswith(b"\x80"):
        arrays = read_pickle(path)
        yield Source(path, {name: in_memory(array) for name, array in arrays.items()}, {})
    else:
        raise FormatError(
            f"{path}: neither safetensors, npz, a PyTorch file nor a pickle; it starts with {start!r}"
        )


_LEGACY_TORCH: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Start of PyTorch's older files: their magic number, pickled."""


def in_memory(array: Array) -> Tensor:
    """Return an array that is there already as a tensor."""
    return Tensor(array.shape, array.dtype.name, lambda: array)


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
    return start[8:9] == b"{" and (fits or not start.startswith((b"PK", b"\x80")))


@contextmanager
def _safetensors(path: Path) -> Iterator[Source]:
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

        yield Source(path, {name: tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _lost(path: Path) -> str | None:
    """Name the tensors that a truncated file has lost, if its header is whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, path.stat().st_size))
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


def _npz(path: Path, archive: zipfile.ZipFile) -> Source:
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
    tensors = {name.removesuffix(".npy"): tensor(name) for name in archive.namelist()}
    return Source(path, tensors, metadata)


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


# --- PyTorch --------------------------------------------------------------------------------------


def _torch(path: Path, *, zipped: bool) -> Source:
    torch = need("torch", f"{path}: reading a PyTorch file", "torch")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise MissingPackageError(
            f"{path}: PyTorch {torch.__version__} can be made to run code by a file, even with weights_only=True "
            "(CVE-2025-32434); install PyTorch 2.6 or later, or let whoever made the file save safetensors"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch's reader raises what it likes for broken files
        raise FormatError(
            f"{path}: PyTorch cannot read it with weights_only=True, which runs nothing; {_reason(error)}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    for name in loaded:
        if not isinstance(name, str):
            raise FormatError(
                f"{path}: {name!r} is a {type(name).__name__}, not the name of a tensor; save model.state_dict()"
            )

    def tensor(name: str, value: Any) -> Tensor:
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        dtype = str(value.dtype).removeprefix("torch.")

        def read() -> Array:
            if dtype == "bfloat16":
                ml_dtypes = need("ml_dtypes", f"{path}: reading bfloat16")
                return np.asarray(value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
            return np.asarray(value.detach().numpy())

        return Tensor(tuple(value.shape), dtype, read)

    return Source(path, {name: tensor(name, value) for name, value in loaded.items()}, {})


def _reason(error: Exception) -> str:
    """Return what PyTorch found, without its advice to load the file by less careful means."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    lines = text.strip().removeprefix("Weights only load failed. ").splitlines()
    said = [line for line in lines if line.strip() and "weights_only" not in line]
    # A name in the file can hold what a terminal obeys.
    printable = "".join(filter(str.isprintable, (said or lines or [""])[0]))
    return printable.partition(" Please use ")[0].strip() or type(error).__name__
