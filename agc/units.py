"""Units: which axes of a parameter name a unit.

A *unit* is the set of weights that feed one output, a row of W in Eq. 3 of Brock et al. (2021).
Rank alone cannot tell which axis that is, so it is declared, in a notation that follows einops::

    "o i -> o"              a dense layer stored out-first: one unit per output
    "... i o -> o"          a convolution of any rank stored out-last
    "(g=2 i) o ... -> g o"  a transposed convolution with two groups: axis 0 holds g times i
    "... ->"                the whole tensor is one unit

Names on the left are the axes of the array, in order. Names on the right are the unit axes; every
other axis is reduced. ``(a b)`` splits one axis into several, ``...`` stands for any run of axes
(also none), and ``name=4`` fixes the size of an axis.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

from agc.errors import ShapeError, UnitsError

__all__ = ["UnitAxes", "Units"]

_ELLIPSIS = "..."
_TOKEN = re.compile(
    r"\s*(?:(?P<arrow>->)|(?P<ellipsis>\.\.\.)|(?P<open>\()|(?P<close>\))"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:\s*=\s*(?P<size>[0-9]+))?)"
)


@dataclass(frozen=True)
class UnitAxes:
    """A :class:`Units` pattern bound to one shape: all that an implementation needs to reduce.

    Attributes
    ----------
    shape : tuple of int
        Shape of the array as stored.
    view : tuple of int
        Shape after the split axes are taken apart; equal to ``shape`` when nothing is split.
    reduce : tuple of int
        Axes of ``view`` that the norm runs over, ascending.
    keep : tuple of int
        Axes of ``view`` that name a unit, ascending.
    count : int
        Number of units; 0 for an empty array.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    reduce: tuple[int, ...]
    keep: tuple[int, ...]
    count: int

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the per-unit values when the reduced axes are kept with size 1."""
        return tuple(1 if axis in self.reduce else size for axis, size in enumerate(self.view))

    @property
    def fan_in(self) -> int:
        """Number of elements in each unit."""
        return math.prod(self.view[axis] for axis in self.reduce)


class Units:
    """Which axes of a parameter name a unit.

    Parameters
    ----------
    pattern : str
        For example ``"o i ... -> o"``; the module's docstring has the notation.
    **sizes : int
        Sizes of named axes, needed where a split cannot be inferred:
        ``Units("(g i) o -> g o", g=4)``. The same size may be written in the pattern,
        ``"(g=4 i) o -> g o"``.

    Raises
    ------
    UnitsError
        If the pattern cannot be parsed (the message points at the place) or a size is not a
        positive integer, names no axis, or contradicts the pattern.

    Notes
    -----
    Two patterns are equal when they mean the same: axis names and the order on the right do not
    count.

    Examples
    --------
    >>> Units("o i ... -> o").count((64, 3, 7, 7))
    64
    >>> Units("(g i) o ... -> g o", g=2).bind((6, 5, 3)).view
    (2, 3, 5, 3)
    >>> Units("o i -> o") == Units("row column -> row")
    True
    """

    __slots__ = ("_axes", "_pattern", "_unit_names")

    _pattern: str
    _axes: tuple[tuple[tuple[str, int | None], ...], ...]
    _unit_names: frozenset[str]

    def __init__(self, pattern: str, /, **sizes: int) -> None:
        if not isinstance(pattern, str):
            raise UnitsError(
                f"a units pattern is a string such as 'o i -> o', got {type(pattern).__name__}"
            )
        axes, right = _parse(pattern)
        names = {name for group in axes for name, _ in group}
        for axis, value in sizes.items():
            if axis not in names:
                raise UnitsError(f"size {axis}={value!r} names no axis of the pattern {pattern!r}")
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UnitsError(
                    f"size {axis}={value!r} of the pattern {pattern!r} must be a positive integer"
                )
        merged = []
        for group in axes:
            members: list[tuple[str, int | None]] = []
            for name, size in group:
                given = int(sizes[name]) if name in sizes else size
                if size is not None and given != size:
                    raise UnitsError(
                        f"size {name}={given} contradicts {name}={size} in the pattern {pattern!r}"
                    )
                members.append((name, given))
            merged.append(tuple(members))
        self._axes = tuple(merged)
        self._unit_names = frozenset(right)
        self._pattern = _format(self._axes, right)

    @property
    def pattern(self) -> str:
        """The pattern in normal form, with the sizes written into it."""
        return self._pattern

    @property
    def whole(self) -> bool:
        """True if there are no unit axes: the whole tensor is one unit."""
        return not self._unit_names

    def bind(self, shape: tuple[int, ...]) -> UnitAxes:
        """Match the pattern with a shape.

        Parameters
        ----------
        shape : tuple of int
            Shape of the parameter.

        Returns
        -------
        UnitAxes
            The split view, the axes to reduce and to keep, and the number of units.

        Raises
        ------
        ShapeError
            If the shape is not a sequence of integers from 0 on.
        UnitsError
            If the number of axes differs, a fixed size differs, or a split does not divide its
            axis.
        """
        try:
            sizes = tuple(map(operator.index, shape))
        except TypeError:
            raise _not_a_shape(shape) from None
        return _bind(self, sizes)

    def count(self, shape: tuple[int, ...]) -> int:
        """Return the number of units of a parameter of this shape (0 if it is empty)."""
        return self.bind(shape).count

    def _meaning(self) -> tuple[object, ...]:
        """Describe the pattern without its axis names."""
        return tuple(
            tuple(
                (name == _ELLIPSIS, size if name != _ELLIPSIS else None, name in self._unit_names)
                for name, size in group
            )
            for group in self._axes
        )

    def __eq__(self, other: object) -> bool:
        return self._meaning() == other._meaning() if isinstance(other, Units) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._meaning())

    def __str__(self) -> str:
        return self._pattern

    def __repr__(self) -> str:
        return f"Units({self._pattern!r})"

    def __reduce__(self) -> tuple[type[Units], tuple[str]]:
        return Units, (self._pattern,)


def _parse(
    pattern: str,
) -> tuple[tuple[tuple[tuple[str, int | None], ...], ...], tuple[str, ...]]:
    """Parse a pattern into its axes (each a group of named parts) and the names on its right."""
    axes: list[tuple[tuple[str, int | None], ...]] = []
    group: list[tuple[str, int | None]] | None = None
    group_start = 0
    right: list[str] = []
    seen: set[str] = set()
    arrow = False
    text = pattern.rstrip()
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            start = place + len(text[place:]) - len(text[place:].lstrip())
            raise _error(pattern, start, f"unexpected character {text[start]!r}")
        kind = match.lastgroup if match.lastgroup != "size" else "name"
        start, place = match.start(str(kind)), match.end()
        name = _ELLIPSIS if kind == "ellipsis" else match["name"]
        if kind == "arrow":
            if arrow:
                raise _error(pattern, start, "a second '->'")
            if group is not None:
                raise _error(pattern, group_start, "this '(' is never closed")
            arrow = True
        elif arrow:
            if kind in ("open", "close"):
                raise _error(pattern, start, "parentheses are not allowed on the right of '->'")
            if match["size"] is not None:
                raise _error(pattern, start, "sizes belong on the left of '->'")
            if name not in seen:
                raise _error(pattern, start, f"{name!r} is not an axis on the left of '->'")
            if name in right:
                raise _error(pattern, start, f"{name!r} appears twice on the right of '->'")
            right.append(name)
        elif kind == "open":
            if group is not None:
                raise _error(pattern, start, "a '(' inside another")
            group, group_start = [], start
        elif kind == "close":
            if group is None:
                raise _error(pattern, start, "this ')' was never opened")
            if not group:
                raise _error(pattern, start, "empty parentheses")
            axes.append(tuple(group))
            group = None
        else:
            if name in seen:
                raise _error(pattern, start, f"{name!r} appears twice on the left of '->'")
            if name == _ELLIPSIS and group is not None:
                raise _error(pattern, start, "'...' inside parentheses")
            size = None if match["size"] is None else int(match["size"])
            if size == 0:
                raise _error(pattern, start, f"the size of {name!r} must be positive")
            seen.add(name)
            if group is None:
                axes.append(((name, size),))
            else:
                group.append((name, size))
    if not arrow:
        raise _error(pattern, len(text), "'->' is missing: write 'axes -> unit axes'")
    return tuple(axes), tuple(right)


def _not_a_shape(shape: object) -> ShapeError:
    return ShapeError(f"a shape is a sequence of integers >= 0, got {shape!r}")


def _error(pattern: str, place: int, problem: str) -> UnitsError:
    pattern = re.sub(r"\s", " ", pattern)  # a tab or newline would move the caret
    return UnitsError(f"units pattern: {problem}\n    {pattern}\n    {' ' * place}^")


def _format(axes: tuple[tuple[tuple[str, int | None], ...], ...], right: tuple[str, ...]) -> str:
    groups = []
    for group in axes:
        names = " ".join(name if size is None else f"{name}={size}" for name, size in group)
        groups.append(names if len(group) == 1 else f"({names})")
    return " ".join([*groups, "->", *right])


@lru_cache(maxsize=4096)
def _bind(units: Units, shape: tuple[int, ...]) -> UnitAxes:
    if any(size < 0 for size in shape):
        raise _not_a_shape(shape)
    axes = units._axes
    place = next((i for i, group in enumerate(axes) if group[0][0] == _ELLIPSIS), None)
    fixed = len(axes) - (place is not None)
    if len(shape) != fixed if place is None else len(shape) < fixed:
        least = "at least " if place is not None else ""
        raise UnitsError(
            f"units pattern {units.pattern!r} is for {least}{fixed} axes, "
            f"the shape {shape} has {len(shape)}"
        )
    view: list[int] = []
    keep: list[int] = []
    position = 0
    for group in axes:
        if group[0][0] == _ELLIPSIS:
            sizes = shape[position : position + len(shape) - fixed]
            names = [_ELLIPSIS] * len(sizes)
            position += len(sizes)
        else:
            sizes = _split(units, group, shape, position)
            names = [name for name, _ in group]
            position += 1
        for name, size in zip(names, sizes, strict=True):
            if name in units._unit_names:
                keep.append(len(view))
            view.append(size)
    reduce = tuple(axis for axis in range(len(view)) if axis not in keep)
    count = 0 if 0 in shape else math.prod(view[axis] for axis in keep)
    return UnitAxes(shape, tuple(view), reduce, tuple(keep), count)


def _split(
    units: Units, group: tuple[tuple[str, int | None], ...], shape: tuple[int, ...], position: int
) -> tuple[int, ...]:
    """Sizes of the parts that one axis is split into."""
    total = shape[position]
    unknown = [name for name, size in group if size is None]
    known = math.prod(size for _, size in group if size is not None)
    where = f"axis {position} of the shape {shape} under the units pattern {units.pattern!r}"
    if len(unknown) > 1:
        raise UnitsError(
            f"{where}: the split leaves {' and '.join(unknown)} open; give the size of all but "
            f"one, for example Units({units.pattern!r}, {unknown[0]}=2)"
        )
    if (total % known if unknown else total != known) != 0:
        relation = "is not divisible by" if unknown else "is not"
        raise UnitsError(f"{where}: its size {total} {relation} {known}")
    return tuple(total // known if size is None else size for _, size in group)
