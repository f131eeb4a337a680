"""Units by layer type: a table that every adapter fills with its framework's layers.

A layer is looked up along its class hierarchy by dotted class name, so classes of packages that are
not imported can be in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from agc.errors import ParameterError
from agc.units import Units

__all__ = ["LayerRule", "LayerTable", "LayerUnits", "class_path", "first_match"]

V = TypeVar("V")

LayerUnits: TypeAlias = Mapping[str, str | Units]
"""Name of a layer's parameter (a glob, the first that matches decides) to units."""
LayerRule: TypeAlias = LayerUnits | Callable[[Any], Mapping[str, Any]]
"""Units of a layer's parameters, or a function of the layer that returns them."""


class LayerTable:
    """Layer types and what they say of their parameters.

    Parameters
    ----------
    example : mapping of str to str
        Units of a dense layer in the framework, for messages.
    keep : type, optional
        A class of the adapter that rules may return in the place of units.

    Examples
    --------
    >>> class Dense:
    ...     pass
    >>> table = LayerTable({"kernel": "i o -> o"})
    >>> table.register(Dense, {"kernel": "i o -> o"})
    >>> table.of(Dense())
    {'kernel': Units('i o -> o')}
    """

    def __init__(self, example: Mapping[str, str], keep: type | tuple[()] = ()) -> None:
        self._example = example
        self._keep = keep
        self._by_class: dict[str, LayerRule] = {}
        self._by_glob: dict[str, LayerRule] = {}
        self._changes = 0

    @property
    def changes(self) -> int:
        """How often the table was changed, so that what was made from it can be made again."""
        return self._changes

    def register(self, layer: type | str, units: LayerRule) -> None:
        """Add a layer type, or change what the table says of one.

        Parameters
        ----------
        layer : type or str
            The layer's class; its subclasses follow it unless they are registered themselves. A
            string is the full path of a class that need not be imported, ``"package.module.Name"``,
            or a glob of paths, ``"package.*"``, which speaks for the names that no class of its own
            speaks for.
        units : mapping of str to str or Units, or callable
            Name of a parameter (a glob, the first that matches decides) to units; or a function of
            the layer that returns such a mapping.

        Raises
        ------
        ParameterError
            If ``units`` is neither a mapping nor callable.
        UnitsError
            If a pattern cannot be parsed.
        """
        if isinstance(units, Mapping):
            units = {name: Units(str(pattern)) for name, pattern in units.items()}
        elif not callable(units):
            raise ParameterError(
                f"units of {layer!r} must be a mapping such as {self._example!r}, "
                f"or a function of the layer that returns one, got {units!r}"
            )
        path = class_path(layer) if isinstance(layer, type) else layer
        rules = self._by_glob if "*" in path else self._by_class
        rules[path] = units
        self._changes += 1

    def of(self, layer: object) -> dict[str, Any]:
        """Return what the type of a layer says of its parameters.

        Parameters
        ----------
        layer : object
            The layer itself.

        Returns
        -------
        dict of str to Units, or to an object of the class that is kept
            By name (a glob, the first that matches decides): first what the nearest registered
            class in the hierarchy says, then what globs say.
        """
        paths = [class_path(kind) for kind in type(layer).__mro__]
        nearest = next((path for path in paths if path in self._by_class), None)
        rules = [] if nearest is None else [self._by_class[nearest]]
        rules += [
            rule
            for glob, rule in self._by_glob.items()
            if any(fnmatchcase(path, glob) for path in paths)
        ]
        rows: dict[str, Any] = {}
        for rule in rules:
            said = rule if isinstance(rule, Mapping) else rule(layer)
            for name, units in said.items():
                rows.setdefault(name, self._parsed(units))
        return rows

    def _parsed(self, units: Any) -> Any:
        return units if isinstance(units, (Units, self._keep)) else Units(str(units))


def class_path(kind: type) -> str:
    """Return the dotted name of a class: its module, and its own name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def first_match(rows: Mapping[str, V], name: str) -> V | None:
    """Return what the first glob that matches a name stands for; None if no glob matches."""
    return next((value for glob, value in rows.items() if fnmatchcase(name, glob)), None)
