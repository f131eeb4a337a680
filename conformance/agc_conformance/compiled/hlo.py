"""What a compiled program moves, read from its text: XLA's scheduled HLO.

XLA's own count of bytes also has what moves between memory on the chip and the units that compute,
so it says little of device memory. In the text every array has a layout, such as
``{1,0:T(8,128)S(1)}``: the order of its axes, the tiles that it is padded to, and its memory. Only
an array without ``S(n)`` is in device memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agc.errors import FormatError

__all__ = ["Collectives", "Program", "parse"]


@dataclass(frozen=True)
class Collectives:
    """What one device exchanges with others.

    Attributes
    ----------
    count : int
        Collective operations.
    bytes : int
        Of each operation what goes in or what comes out, whichever is more.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class Array:
    """One array that an instruction makes."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    on_device: bool

    @property
    def size(self) -> int:
        """Bytes without padding."""
        return self._bytes(self.shape)

    @property
    def moved(self) -> int:
        """Bytes in device memory, padded to whole tiles; 0 for an array in another memory."""
        if not self.on_device:
            return 0
        sizes = [self.shape[axis] for axis in reversed(self.order)] or [1]
        tile = self.tile[-len(sizes) :]
        if len(self.tile) > len(sizes):  # a vector that lies in tiles of two axes
            tile = (*tile[:-1], math.prod(self.tile[len(sizes) - 1 :]))
        for place, length in enumerate(reversed(tile), 1):
            sizes[-place] = -(-sizes[-place] // length) * length
        return self._bytes(sizes)

    def _bytes(self, sizes: tuple[int, ...] | list[int]) -> int:
        return math.prod(sizes) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    index: int
    """Place among the arguments, of a parameter."""
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        names = _CALLED.findall(self.attributes)
        branches = _BRANCHES.findall(self.attributes)
        return names + [name for group in branches for name in _NAME.findall(group)]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """A parsed program; what runs is its entry."""

    computations: dict[str, Computation]
    entry: str
    aliases: frozenset[int] = frozenset()
    """Arguments, by place, whose memory holds a result."""

    @property
    def aliased_bytes(self) -> int:
        """Bytes of arguments whose memory is used again for results."""
        return sum(
            array.size
            for x in self.computations[self.entry].values()
            if x.index in self.aliases
            for array in x.arrays
        )

    @property
    def device_bytes(self) -> int:
        """Bytes that one device reads from its memory and writes to it.

        Raises
        ------
        FormatError
            If there is an operation of which this module does not know what it moves.
        """
        return sum(self._moved(self.entry))

    @property
    def kernels(self) -> int:
        """Operations of the entry that run something: on a GPU, kernels that are launched."""
        return sum(not _is_free(x) for x in self.computations[self.entry].values())

    @property
    def collectives(self) -> Collectives:
        """Exchange with other devices, wherever in the program."""
        sizes = []
        for computation in self.computations.values():
            for x in computation.values():
                if x.opcode.removesuffix("-start") in _COLLECTIVES:
                    into = sum(array.size for array in _operands(computation, x))
                    out = sum(array.size for array in x.arrays)
                    if x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
                        out -= into  # the result repeats the operands
                    sizes.append(max(into, out))
        return Collectives(len(sizes), sum(sizes))

    def _moved(self, name: str) -> Iterator[int]:
        """Yield the bytes of every instruction of a computation that runs."""
        computation = self.computations[name]
        for x in computation.values():
            operands = _operands(computation, x)
            written = sum(array.moved for array in x.arrays)
            if _is_free(x):
                continue
            if x.opcode in ("call", "conditional"):
                yield max(sum(self._moved(called)) for called in x.called)
            elif x.opcode == "while" and (times := _TIMES.search(x.attributes)):
                yield int(times[1]) * sum(sum(self._moved(called)) for called in x.called)
            elif x.opcode == "copy-start":  # into, from, context
                yield x.arrays[0].moved + x.arrays[1].moved
            elif x.opcode == "slice-start":  # all of the source, the slice, context
                source, piece = x.arrays[0], x.arrays[1]
                yield piece.moved + source.on_device * piece.size
            elif x.opcode == "fusion":
                yield self._written(x) + sum(
                    self._read(x.called[0], n) for n in range(len(operands))
                )
            elif x.opcode == _UPDATE:
                yield operands[1].moved + x.arrays[0].on_device * operands[1].size
            elif x.opcode in _SLICES:
                yield written + operands[0].on_device * x.arrays[0].size
            elif x.opcode in _PLAIN or x.opcode.removesuffix("-start") in _COLLECTIVES:
                yield written + sum(array.moved for array in operands)
            else:
                raise FormatError(f"operation {x.opcode!r}: no rule says which bytes it moves")

    def _written(self, fusion: Instruction) -> int:
        """Bytes that a fusion writes; an array that it updates in place keeps the rest."""
        computation = self.computations[fusion.called[0]]
        (root,) = (x for x in computation.values() if x.is_root)
        results = [root] * len(fusion.arrays)
        if root.opcode == "tuple":
            results = [computation[name] for name in root.operands]
        return sum(
            array.on_device * computation[x.operands[1]].arrays[0].size
            if x.opcode == _UPDATE
            else array.moved
            for x, array in zip(results, fusion.arrays, strict=True)
        )

    def _read(self, name: str, index: int) -> int:
        """Bytes that a fusion reads of one argument, of which it may need only slices."""
        computation = self.computations[name]
        parameter = next(
            key for key, x in computation.items() if x.opcode == "parameter" and x.index == index
        )
        (array,) = computation[parameter].arrays
        slices = self._slices(computation, parameter)
        if slices is None:
            return array.moved
        return array.on_device * min(array.moved, sum(piece.size for piece in slices))

    def _slices(self, computation: Computation, name: str) -> list[Array] | None:
        """Return the slices that are all that is used of an array, or None if all of it is."""
        slices: list[Array] = []
        for key, x in computation.items():
            if name not in x.operands:
                continue
            if x.opcode == _UPDATE and x.operands[0] == name:
                continue  # in place
            if x.opcode in _SLICES:
                slices += x.arrays
            elif x.opcode == "bitcast" and (more := self._slices(computation, key)) is not None:
                slices += more
            else:
                return None
        return slices


def parse(text: str) -> Program:
    """Parse the text of a compiled program, ``jax.stages.Compiled.as_text()``.

    Raises
    ------
    FormatError
        If it is no HLO, or has a line that cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    aliases = frozenset(map(int, _ALIAS.findall(text.partition("\n")[0])))
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (given := _INSTRUCTION.match(line)):
            current[given[2]] = _instruction(_COMMENT.sub("", given[3]), given[1] is not None)
    if not entry:
        raise FormatError("no HLO: there is no line that begins with ENTRY")
    return Program(computations, entry, aliases)


def _instruction(text: str, is_root: bool) -> Instruction:
    """Parse what follows the ``=``: ``type opcode(operands), attributes``."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        raise FormatError(f"no operation in {text[:80]!r}")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close - 1]
    return Instruction(
        opcode,
        tuple(_array(*found) for found in _ARRAY.findall(kind)),
        tuple(_OPERAND.findall(inside)),
        rest[close:],
        int(inside) if opcode == "parameter" else -1,
        is_root,
    )


def _closing(text: str, start: int) -> int:
    """Return the place after the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise FormatError(f"a bracket is not closed in {text[:80]!r}")


def _array(dtype: str, shape: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tile = _TILE.search(rest)
    return Array(
        dtype,
        _integers(shape),
        _integers(order),
        _integers(tile[1]) if tile else (),
        _MEMORY.search(rest) is None,
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _operands(computation: Computation, x: Instruction) -> list[Array]:
    return [array for name in x.operands for array in computation[name].arrays]


def _is_free(x: Instruction) -> bool:
    """Whether an operation only names memory, or waits for another that is counted."""
    view = x.opcode == "custom-call" and 'custom_call_target="ConcatBitcast"' in x.attributes
    return view or x.opcode in _FREE or x.opcode.endswith("-done")


_HEAD: Final = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION: Final = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ALIAS: Final = re.compile(r"\{[0-9, ]*\}: \(([0-9]+), \{\}, (?:may|must)-alias\)")
_COMMENT: Final = re.compile(r"/\*.*?\*/")
_ARRAY: Final = re.compile(r"([a-z]+[0-9][a-z0-9]*|pred)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_OPERAND: Final = re.compile(r"%([\w.\-]+)")
_NAME: Final = re.compile(r"%?([\w.\-]+)")
_CALLED: Final = re.compile(
    r"(?:body|calls|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_TIMES: Final = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"')
_BRANCHES: Final = re.compile(r"branch_computations=\{([^}]*)\}")
_TILE: Final = re.compile(r"T\(([0-9,]+)\)")
_MEMORY: Final = re.compile(r"S\([0-9]+\)")

_BITS: Final = {
    dtype: bits
    for bits, dtypes in {
        8: ("pred", "s8", "u8"),
        16: ("s16", "u16", "bf16", "f16"),
        32: ("s32", "u32", "f32"),
        64: ("s64", "u64", "f64", "c64"),
        128: ("c128",),
    }.items()
    for dtype in dtypes
}
_FREE: Final = {
    *("after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter"),
    *("partition-id", "replica-id", "tuple"),
}
_SLICES: Final = {"dynamic-slice", "slice"}
_UPDATE: Final = "dynamic-update-slice"
_COLLECTIVES: Final = {
    *("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"),
}
_PLAIN: Final = {
    *("abs", "add", "and", "bitcast-convert", "broadcast", "ceil", "clamp", "compare", "complex"),
    *("concatenate", "convert", "copy", "cosine", "divide", "exponential", "floor", "gather"),
    *("imag", "is-finite", "log", "maximum", "minimum", "multiply", "negate", "not", "or", "pad"),
    *("power", "real", "reduce", "reduce-precision", "reduce-window", "remainder", "reshape"),
    *("reverse", "rsqrt", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical"),
    *("sign", "sine", "sqrt", "subtract", "tanh", "transpose", "xor", "convolution", "dot"),
}
"""Operations that read every operand once and write their results."""
