"""PyTorch's files since 1.6, read without PyTorch and without running anything.

They are zip archives: ``data.pkl`` is a pickle of whatever was saved, in which each tensor refers
to a member that has its bytes. The pickle is run with stand-ins (:mod:`agc.weights.pickles`). What
tensors are made of is interpreted; a few classes that checkpoints have beside their weights, such
as ``argparse.Namespace``, become inert objects; whatever else is asked for is refused. No name is
ever looked up or imported.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from agc.packages import need
from agc.weights.pickles import Global, RefusedError

__all__ = ["StoredTensor", "read_tree"]

Array = npt.NDArray[Any]

_DTYPES: Final = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Inert:
    """Stands for any object that is no tensor: it can be made and described, and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setattr__(self, name: str, value: object) -> None:
        raise RefusedError(f"sets {name!r} on an object")


class _Dict(dict[Any, Any]):
    """An ordered or other dictionary; attributes, such as a state dict's versions, are ignored."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


class _StorageType:
    """The class of a storage, which says the dtype."""

    __slots__ = ("dtype",)
    dtype: str

    def __init__(self, dtype: str) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: object) -> None:
        raise RefusedError(f"sets {name!r} on a storage")


class _Storage(NamedTuple):
    """A member of the archive: so many numbers of a dtype. A pickle cannot change it."""

    member: str
    dtype: str
    numbers: int


class StoredTensor(NamedTuple):
    """A tensor whose numbers are still in the archive. A pickle cannot change it.

    Attributes
    ----------
    archive : ZipFile
    storage : tuple
        Member, dtype and number of its numbers.
    offset : int
        Of the first element, in numbers.
    shape, strides : tuple of int
        Strides in numbers.
    order : {"<", ">"}
        Byte order.
    """

    archive: zipfile.ZipFile
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: Literal["<", ">"]

    @property
    def dtype(self) -> str:
        """Name of the dtype; ``"bfloat16"`` is that of ``ml_dtypes``."""
        return self.storage.dtype

    def read(self) -> Array:
        """Return the numbers; raise as :meth:`zipfile.ZipFile.open` if the archive is damaged."""
        bfloat16 = self.dtype == "bfloat16"
        stored = np.dtype("uint16" if bfloat16 else self.dtype).newbyteorder(self.order)
        numbers = _span(self.shape, self.strides)
        with self.archive.open(self.storage.member) as file:
            file.seek(self.offset * stored.itemsize)
            data = file.read(numbers * stored.itemsize)
        flat = np.frombuffer(data, stored)
        if len(flat) != numbers:
            raise EOFError(f"{self.storage.member} has fewer bytes than its tensor needs")
        bytes_of = tuple(stride * stored.itemsize for stride in self.strides)
        array = np.lib.stride_tricks.as_strided(flat, self.shape, bytes_of, writeable=False)
        if bfloat16:
            wide = np.ascontiguousarray(array, "uint16").reshape(self.shape)
            return wide.view(need("ml_dtypes", "reading bfloat16").bfloat16)
        return array


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many numbers lie from the first element of a tensor to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def read_tree(archive: zipfile.ZipFile, member: str) -> Any:
    """Return what was saved: dictionaries, lists, numbers and :class:`StoredTensor`.

    Parameters
    ----------
    archive : ZipFile
        Open as long as tensors are read.
    member : str
        The one that ends with ``/data.pkl``.

    Raises
    ------
    RefusedError
        If the pickle asks for what is not needed to read tensors. It has run nothing then.
    Exception
        Of any class, if the pickle or the archive is broken.
    """
    with archive.open(member) as file:
        return _Unpickler(file, archive, member.removesuffix("data.pkl")).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        mark = f"{folder}byteorder"
        big = mark in archive.namelist() and archive.read(mark) == b"big"
        self._order: Literal["<", ">"] = ">" if big else "<"

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return Global(f"{module}.{name}", self._tensor)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return Global(f"{module}.{name}", _first)
        if module == "collections" and name in ("OrderedDict", "defaultdict", "Counter"):
            return Global(f"{module}.{name}", _dictionary)
        if (module, name) in _INERT or module.partition(".")[0] in ("torch", "numpy"):
            return _Inert
        raise RefusedError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str(key), str(), int(numbers)):
                return _Storage(f"{self._folder}data/{key}", kind.dtype, numbers)
        raise RefusedError(f"refers to something outside of it, {pid!r}")

    def _tensor(
        self, storage: object, offset: object, shape: object, strides: object, *_: object
    ) -> StoredTensor:
        if (
            not isinstance(storage, _Storage)
            or not (_sizes(shape) and _sizes(strides) and len(shape) == len(strides))
            or not (type(offset) is int and offset >= 0)
            or offset + _span(shape, strides) > storage.numbers
            or math.prod(shape) > storage.numbers
        ):
            raise RefusedError("describes a tensor that does not fit its storage")
        return StoredTensor(self._archive, storage, offset, shape, strides, self._order)


def _sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)


def _first(value: object, *_: object) -> object:
    return value


def _dictionary(*arguments: object) -> _Dict:
    """Make a dictionary, of pairs or another one if it is given; a default is of no use here."""
    made = _Dict()
    for argument in arguments:
        if isinstance(argument, dict | list | tuple):
            made.update(argument)
    return made


_INERT: Final = frozenset(
    (module, name)
    for modules, names in (
        (("argparse",), ("Namespace",)),
        (
            ("pathlib", "pathlib._local"),
            ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        ),
        (("_codecs",), ("encode",)),
        (("copyreg", "copy_reg"), ("_reconstructor",)),
        (
            ("builtins", "__builtin__"),
            ("object", "set", "frozenset", "list", "dict", "bytearray", "complex"),
        ),
    )
    for module in modules
    for name in names
)
"""Classes that become inert objects, besides all of PyTorch's and NumPy's."""
