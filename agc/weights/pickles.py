"""DeepMind's released files: pickles, read without letting them run anything.

A pickle is a program. This reader runs it with stand-ins: every name that it may ask for is in the
table below, everything else is refused before it is looked up, nothing is imported, and neither
NumPy's own reconstruction nor its dtypes see what the file holds, since both can be misused. Arrays
are made here, from bytes, with checked shapes.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from agc.errors import FormatError

__all__ = ["Global", "RefusedError", "read_pickle"]

Array = npt.NDArray[Any]


def read_pickle(path: Path) -> dict[str, Array]:
    """Return the arrays of a pickled ``{module: {name: array}}`` by ``module/name``.

    Dictionaries may be Haiku's immutable mappings; pickles of dill are read as well. The arrays
    share the memory of what was read, so one file's worth is needed.

    Raises
    ------
    FormatError
        If the file is truncated, holds anything else, or asks for anything that is not needed for
        this. It has run nothing then.
    """
    with path.open("rb") as file:
        try:
            tree = _Unpickler(file).load()
        except RefusedError as error:
            raise FormatError(
                f"{path}: refused, this pickle {error}. DeepMind's files hold dictionaries of arrays and "
                "nothing else, so do not load it by other means"
            ) from None
        except EOFError:
            raise FormatError(f"{path}: truncated; the pickle has no end") from None
        except Exception as error:  # a broken pickle can make the unpickler raise anything
            if "truncated" in str(error):
                raise FormatError(f"{path}: truncated; {error}") from None
            raise FormatError(f"{path}: not a readable pickle; {error}") from None
        if file.read(1):
            raise FormatError(f"{path}: something follows the end of the pickle")
    return _arrays(path, tree)


def _arrays(path: Path, tree: object) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    if not isinstance(tree, dict):
        raise FormatError(f"{path}: holds {_kind(tree)}, not a dictionary of modules")
    for module, leaves in tree.items():
        if not isinstance(module, str) or not isinstance(leaves, dict):
            raise FormatError(
                f"{path}: module {module!r} holds {_kind(leaves)}, not a dictionary of arrays"
            )
        for name, leaf in leaves.items():
            if not isinstance(name, str) or not isinstance(leaf, _Array) or leaf.value is None:
                raise FormatError(f"{path}: {module}/{name} is {_kind(leaf)}, not an array")
            arrays[f"{module}/{name}"] = leaf.value
    return arrays


def _kind(value: object) -> str:
    return "an unfinished array" if isinstance(value, _Array) else f"a {type(value).__name__}"


class RefusedError(pickle.UnpicklingError):
    """What a pickle asked for, or tried."""


class _StandIn:
    """An inert object: a pickle cannot set anything on it, nor on its class."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise RefusedError(f"changes {self!r}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise RefusedError(f"sets {name!r} on {self!r}")


class Global(_StandIn):
    """A name that a pickle may ask for; calling it runs this file's function in its place."""

    __slots__ = ("_name", "_run")
    _name: str
    _run: Callable[..., object] | None

    def __init__(self, name: str, run: Callable[..., object] | None = None) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_run", run)

    def __call__(self, *arguments: object) -> object:
        """Run the function in place of what was named; raise RefusedError if it has none."""
        if self._run is None:
            raise RefusedError(f"calls {self._name}")
        try:
            return self._run(*arguments)
        except TypeError:
            raise RefusedError(
                f"calls {self._name} with other arguments than arrays need"
            ) from None

    def __repr__(self) -> str:
        return self._name


class _Module(_StandIn):
    """The name of a module, which is not imported."""

    __slots__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __repr__(self) -> str:
        return self.name


class _DType(_StandIn):
    """The dtype of an array: a real floating point number, in either byte order."""

    __slots__ = ("value",)
    value: np.dtype[Any]

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "value", np.dtype(name))

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), "<" | ">" | "=" | "|" as order, None, None, None, *_):
                object.__setattr__(self, "value", self.value.newbyteorder(order))
            case _:
                raise RefusedError("describes a dtype with fields")

    def __repr__(self) -> str:
        return f"dtype {self.value}"


class _Array(_StandIn):
    """An array, once its state has come."""

    __slots__ = ("value",)
    value: Array | None

    def __init__(self) -> None:
        object.__setattr__(self, "value", None)

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _DType() as dtype, bool() as fortran, data):
                value = _from_bytes(data, dtype, shape, "F" if fortran else "C")
                object.__setattr__(self, "value", value)
            case _:
                raise RefusedError(
                    "describes an array that is not made of real floating point numbers"
                )

    def __repr__(self) -> str:
        return "an array"


def _from_bytes(data: object, dtype: object, shape: object, order: object) -> Array:
    if (
        not isinstance(data, (bytes, bytearray))
        or not isinstance(dtype, _DType)
        or not isinstance(shape, tuple)
        or not all(isinstance(size, int) and size >= 0 for size in shape)
        or order not in ("C", "F")
        or math.prod(shape) * dtype.value.itemsize != len(data)
    ):
        raise RefusedError("describes an array whose bytes do not fit its shape and dtype")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def _dtype(name: object, *_: object) -> _DType:
    if name not in ("f2", "f4", "f8"):
        raise RefusedError(f"has an array of dtype {name!r}, where only f2, f4 and f8 are read")
    return _DType(str(name))


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _NDARRAY:
        raise RefusedError(f"makes an array of the class {kind!r}")
    return _Array()


def _finished(
    data: object, dtype: object, shape: object, order: object, axes: object = None
) -> _Array:
    array = _Array()
    # Since NumPy 2.4 a transposed array is its bytes in C order, and where its axes go.
    value = _from_bytes(data, dtype, shape, "C" if order == "K" else order)
    if order == "K":
        value = _transposed(value, axes)
    elif axes is not None:
        raise RefusedError("describes an array with axes that its order does not need")
    object.__setattr__(array, "value", value)
    return array


def _transposed(array: Array, axes: object) -> Array:
    if (
        not isinstance(axes, tuple)
        or not all(isinstance(axis, int) for axis in axes)
        or sorted(axes) != list(range(array.ndim))
    ):
        raise RefusedError("describes an array whose axes do not fit its shape")
    return array.transpose(axes)


def _scalar(dtype: object, data: object) -> _Array:
    return _finished(data, dtype, (), "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError(f"encodes {_kind(text)} as {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _mapping(data: object) -> object:
    if not isinstance(data, dict):
        raise RefusedError(f"makes a mapping of {_kind(data)}")
    return data


def _create_array(
    function: object, arguments: object, state: object, more: object = None
) -> _Array:
    """Make an array as dill has it: both steps of NumPy in one."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple) or more:
        raise RefusedError(f"makes an array with {function!r}")
    array = function(*arguments)
    if not isinstance(array, _Array):
        raise RefusedError(f"makes an array with {function!r}")
    array.__setstate__(state)
    return array


def _import_module(name: object, *_: object) -> _Module:
    if not isinstance(name, str):
        raise RefusedError(f"imports {_kind(name)}")
    return _Module(name)


def _get_attr(owner: object, name: object) -> Global:
    if not isinstance(owner, _Module) or not isinstance(name, str):
        raise RefusedError(f"takes the attribute {name!r} of {owner!r}")
    return _find(owner.name, name)


_NDARRAY: Final = Global("numpy.ndarray")

_HAIKU: Final = ("haiku._src.data_structures", "haiku.data_structures")
_ALLOWED: Final[tuple[tuple[tuple[str, ...], dict[str, Callable[..., object]]], ...]] = (
    (("numpy",), {"ndarray": _NDARRAY, "dtype": _dtype}),
    (
        tuple(
            f"numpy.{core}.{part}"
            for core in ("core", "_core")  # before and since NumPy 2
            for part in ("multiarray", "_multiarray_umath")
        ),
        {"_reconstruct": _reconstruct, "scalar": _scalar},
    ),
    (("numpy.core.numeric", "numpy._core.numeric"), {"_frombuffer": _finished}),
    (_HAIKU, {"FlatMapping": _mapping, "FlatMap": _mapping, "frozendict": _mapping}),
    # What bytes are in protocol 2, from before Python had them.
    (("_codecs",), {"encode": _encode}),
    (("__builtin__",), {"bytes": _no_bytes}),
    # dill of 2021 reaches NumPy's functions by these two, dill of today makes arrays by the third.
    (
        ("dill._dill", "dill.dill"),
        {
            "_import_module": _import_module,
            "_get_attr": _get_attr,
            "_create_array": _create_array,
        },
    ),
)
_TABLE: Final[Mapping[tuple[str, str], Global]] = {
    (module, name): run if isinstance(run, Global) else Global(f"{module}.{name}", run)
    for modules, names in _ALLOWED
    for module in modules
    for name, run in names.items()
}


def _find(module: str, name: str) -> Global:
    try:
        return _TABLE[module, name]
    except KeyError:
        raise RefusedError(f"asks for {module}.{name}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise RefusedError(f"refers to something outside of it, {pid!r}")
