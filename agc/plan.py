"""Plan: what will happen to every parameter, decided before any number is touched.

A plan is integers, names and patterns, so plans of different frameworks are compared exactly. The core
decides *what* here; an adapter carries it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from reprlib import repr as short_repr
from typing import Any, Final, TypeVar

from agc.config import AGC, SAM, Clipping, clipping_from_data, clipping_to_data, schedule_value
from agc.errors import (
    AmbiguousUnitsError,
    FormatError,
    ParameterError,
    SelectorError,
    ShapeError,
    UnitsError,
)
from agc.profiles import Layout, rank_units
from agc.units import UnitAxes, Units

__all__ = [
    "WHOLE",
    "Parameter",
    "Plan",
    "PlanEntry",
    "canonical_name",
    "make_plan",
    "matching_names",
    "perturbed_names",
]

V = TypeVar("V")

WHOLE: Final = Units("... ->")
"""The whole tensor is one unit."""

_CONVENTIONS: Final[dict[Layout, Units]] = {
    "out-first": Units("o ... -> o"),
    "out-last": Units("... o -> o"),
}
_CONVENTION_RANKS: Final = (2, 4, 5)
_FORMAT: Final = "agc-plan"
_VERSION: Final = 1


def canonical_name(name: str) -> str:
    """Return a parameter name with dots between its parts, whatever the framework writes."""
    return name.replace("/", ".")


@dataclass(frozen=True)
class Parameter:
    """What an adapter knows of one parameter before units are resolved.

    Attributes
    ----------
    name : str
        Full name; ``/`` counts as ``.``.
    shape : tuple of int
        Shape as stored.
    units : Units, optional
        What the owning layer's type says; None if the type is unknown.
    layout : {"out-first", "out-last"}, optional
        The framework's convention for dense and convolution weights, used for ranks 2, 4 and 5 when
        ``units`` is None; None if there is no convention.
    owner : str, optional
        The owning layer, for error messages.
    """

    name: str
    shape: tuple[int, ...]
    units: Units | None = None
    layout: Layout | None = None
    owner: str | None = None


@dataclass(frozen=True)
class PlanEntry:
    """What happens to one parameter.

    Attributes
    ----------
    name : str
        Dotted name.
    shape : tuple of int
        Shape as stored.
    units : Units
        Which axes name a unit.
    count : int
        Number of units; 0 for an empty parameter.
    clipping : float, callable or None
        Threshold, or a function of the step; None if AGC is off for this parameter.
    excluded : bool
        Whether an exclusion pattern matched.
    """

    name: str
    shape: tuple[int, ...]
    units: Units
    count: int
    clipping: Clipping
    excluded: bool

    @property
    def clipped(self) -> bool:
        """Whether AGC acts on this parameter at all."""
        return not self.excluded and self.clipping is not None and self.count > 0

    @cached_property
    def axes(self) -> UnitAxes:
        """The pattern bound to the shape: view, reduced and kept axes; worked out once."""
        return self.units.bind(self.shape)

    def threshold(self, step: int = 0) -> float | None:
        """Return the clipping threshold at a step (a Python integer); None if it is not clipped.

        Raises
        ------
        ConfigError
            If there is a schedule, and its value is not a finite number above 0 or the step is not an
            integer from 0 on.
        """
        if not self.clipped:
            return None
        if callable(self.clipping):
            return schedule_value(f"clipping of {self.name!r}", self.clipping, step)
        return self.clipping


@dataclass(frozen=True)
class Plan:
    """Every parameter with its units, threshold and exclusion, in the model's order.

    ``plan[name]`` is an entry, ``print(plan)`` a table. Plans are hashable and compare exactly; across
    frameworks, whose layouts differ, compare :meth:`decisions`.

    Attributes
    ----------
    entries : tuple of PlanEntry
        One entry a parameter.
    """

    entries: tuple[PlanEntry, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.name in seen:
                raise ParameterError(f"two parameters are called {entry.name!r}")
            seen.add(entry.name)

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        wanted = canonical_name(name) if isinstance(name, str) else name
        return any(entry.name == wanted for entry in self.entries)

    def __getitem__(self, name: str) -> PlanEntry:
        wanted = canonical_name(name)
        for entry in self.entries:
            if entry.name == wanted:
                return entry
        raise KeyError(name)

    @property
    def count(self) -> int:
        """Number of units that AGC acts on."""
        return sum(entry.count for entry in self.entries if entry.clipped)

    def decisions(self) -> dict[str, tuple[int, Clipping, bool]]:
        """Return name to (units, clipping, excluded): the part that no memory layout changes."""
        return {entry.name: (entry.count, entry.clipping, entry.excluded) for entry in self.entries}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "parameters": [
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "units": str(entry.units),
                    "count": entry.count,
                    "clipping": clipping_to_data(entry.clipping),
                    "excluded": entry.excluded,
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read a plan back from :meth:`to_dict`'s data.

        Raises
        ------
        FormatError
            If this is not a plan, is of another version, or contradicts itself.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise FormatError(f"this is not an AGC plan: 'format' is not {_FORMAT!r}")
        version = data.get("version")
        if type(version) is not int or version != _VERSION:
            raise FormatError(
                f"this plan is of version {short_repr(version)}, this library reads {_VERSION}"
            )
        items = data.get("parameters")
        if not isinstance(items, list | tuple):
            raise FormatError(
                f"this plan is damaged: 'parameters' must be a list, got {short_repr(items)}"
            )
        try:
            return cls(tuple(_read_entry(place, item) for place, item in enumerate(items)))
        except ParameterError as error:
            raise FormatError(f"this plan is damaged: {error}") from None

    def to_json(self) -> str:
        """Return the plan as a JSON document."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from a JSON document.

        Raises
        ------
        FormatError
            If the text is not JSON, or :meth:`from_dict` refuses it.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"this plan is not JSON, or is truncated: {error}") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "units", "count", "clipping")]
        rows += [
            (
                entry.name,
                "x".join(map(str, entry.shape)) or "scalar",
                str(entry.units),
                str(entry.count),
                _describe(entry),
            )
            for entry in self.entries
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        clipped = sum(entry.clipped for entry in self.entries)
        lines.append(f"{len(self)} parameters, {clipped} clipped, {self.count} units")
        return "\n".join(lines)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FIELDS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "name": (lambda value: isinstance(value, str), "a string"),
    "shape": (
        lambda value: isinstance(value, list | tuple) and all(map(_is_size, value)),
        "a list of integers >= 0",
    ),
    "units": (lambda value: isinstance(value, str), "a string"),
    "count": (_is_size, "an integer >= 0"),
    "clipping": (
        lambda value: value is None or isinstance(value, int | float | dict),
        "a number, null or a schedule",
    ),
    "excluded": (lambda value: isinstance(value, bool), "true or false"),
}
"""Fields of an entry as data: what is valid, and how to say it."""


def _read_entry(place: int, item: Any) -> PlanEntry:
    """Read one entry of :meth:`Plan.to_dict`'s data; ``place`` is for messages."""
    where = f"plan entry {place} is damaged:"
    if not isinstance(item, Mapping):
        raise FormatError(f"{where} it must be a mapping, got {short_repr(item)}")
    for field, (valid, wanted) in _FIELDS.items():
        if field not in item:
            raise FormatError(f"{where} {field!r} is missing")
        if not valid(item[field]):
            raise FormatError(f"{where} {field!r} must be {wanted}, got {short_repr(item[field])}")
    try:
        entry = PlanEntry(
            name=canonical_name(item["name"]),
            shape=tuple(item["shape"]),
            units=Units(item["units"]),
            count=item["count"],
            clipping=clipping_from_data(item["clipping"]),
            excluded=item["excluded"],
        )
        count = entry.axes.count
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} {error}") from error
    if count != entry.count:
        raise FormatError(
            f"plan entry {entry.name!r} says {entry.count} units, but {entry.units} "
            f"gives the shape {entry.shape} {count}"
        )
    return entry


def _describe(entry: PlanEntry) -> str:
    if entry.excluded:
        return "excluded"
    if entry.clipping is None:
        return "off"
    if entry.count == 0:
        return "empty"
    return "schedule" if callable(entry.clipping) else f"{entry.clipping:g}"


def make_plan(parameters: Iterable[Parameter], rule: AGC, *, head: str | None = None) -> Plan:
    """Resolve units, thresholds and exclusions of all parameters.

    Parameters
    ----------
    parameters : iterable of Parameter
        The model's parameters in its own order, tied ones once.
    rule : AGC
        The configuration.
    head : str, optional
        Name of the classifier layer as the model declares it; ``rule.head`` takes precedence.

    Returns
    -------
    Plan
        One entry a parameter.

    Raises
    ------
    SelectorError
        If a name pattern matches no parameter, a parameter matches no pattern of ``clipping``, or the
        head is selected but unknown.
    AmbiguousUnitsError
        If nothing settles the units of a parameter that would be clipped.
    UnitsError, ShapeError
        If a pattern does not fit a shape, or what is given as a shape is none.

    Notes
    -----
    Units come from, in this order: ``granularity="tensor"`` (AGC-12), the first matching pattern of
    ``rule.units``, a published ``unit_rule``, rank 0 and 1 (one unit, AGC-5), the owning layer's type,
    and the layout convention for ranks 2, 4 and 5.
    """
    given = [
        Parameter(canonical_name(p.name), tuple(p.shape), p.units, p.layout, p.owner)
        for p in parameters
    ]
    names = [parameter.name for parameter in given]
    head = rule.head or head
    excluded: set[str] = set()
    for selector in rule.exclude:
        excluded.update(_select("exclude", selector, given, head))
    declared = _first_matches("units", rule.units, names)
    thresholds = _thresholds(rule, names)
    entries = []
    for parameter in given:
        clipping = thresholds[parameter.name]
        acts = clipping is not None and parameter.name not in excluded
        units = _resolve(parameter, rule, declared.get(parameter.name), required=acts)
        try:
            axes = units.bind(parameter.shape)
        except (ShapeError, UnitsError) as error:
            raise type(error)(f"parameter {parameter.name!r}: {error}") from None
        entries.append(
            PlanEntry(
                name=parameter.name,
                shape=parameter.shape,
                units=units,
                count=axes.count,
                clipping=clipping,
                excluded=parameter.name in excluded,
            )
        )
    return Plan(tuple(entries))


def perturbed_names(names: Iterable[str], rule: SAM) -> tuple[str, ...]:
    """Names of the parameters that SAM perturbs, in the order given (SAM-11).

    Raises
    ------
    SelectorError
        If a pattern of ``only`` or ``exclude`` matches no parameter, or nothing is left to perturb.
    """
    given = list(names)
    dotted = [canonical_name(name) for name in given]
    chosen = {name for pattern in rule.only for name in _match("only", pattern, dotted)}
    if not rule.only:
        chosen = set(dotted)
    for pattern in rule.exclude:
        chosen.difference_update(_match("exclude", pattern, dotted))
    if not chosen:
        raise SelectorError(
            f"no parameter is left to perturb: only={list(rule.only)} and "
            f"exclude={list(rule.exclude)} select none of {len(given)} parameters"
        )
    return tuple(name for name, dot in zip(given, dotted, strict=True) if dot in chosen)


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the dotted names that a name pattern means, in the order given (AGC-6).

    A pattern that is literally one of the names means that one: brackets in a name are no glob.
    """
    given, wanted = list(names), canonical_name(pattern)
    if wanted in given:
        return [wanted]
    return [name for name in given if fnmatchcase(name, wanted)]


def _match(field: str, pattern: str, names: list[str]) -> list[str]:
    found = matching_names(pattern, names)
    if not found:
        listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise SelectorError(
            f"{field}: the pattern {pattern!r} matches no parameter; the names are: {listing}"
        )
    return found


def _select(field: str, selector: str, parameters: list[Parameter], head: str | None) -> list[str]:
    """Names that a selector means: a pattern, ``@head`` or ``@head.weight``."""
    if not selector.startswith("@"):
        return _match(field, selector, [parameter.name for parameter in parameters])
    if selector not in ("@head", "@head.weight"):
        raise SelectorError(
            f"{field}: unknown selector {selector!r}; there are '@head' and '@head.weight'"
        )
    if head is None:
        raise SelectorError(
            f"{field}: {selector!r} needs the name of the classifier layer, and the model does not "
            "declare one; give it in the rule, for example head='fc'"
        )
    names = [parameter.name for parameter in parameters]
    layer = f"{canonical_name(head)}."
    found = [name for name in names if name.startswith(layer)] or _match("head", f"{head}.*", names)
    if selector == "@head":
        return found
    matrices = [p.name for p in parameters if p.name in found and len(p.shape) >= 2]
    if not matrices:
        raise SelectorError(
            f"{field}: {selector!r} matches no parameter, because the head {head!r} has no matrix, only "
            f"{', '.join(found)}; name what you mean instead"
        )
    return matrices


def _thresholds(rule: AGC, names: list[str]) -> dict[str, Clipping]:
    """Threshold of every parameter: the first pattern that matches decides."""
    if not isinstance(rule.clipping, Mapping):
        return dict.fromkeys(names, rule.clipping)
    chosen = _first_matches("clipping", rule.clipping, names)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise SelectorError(
            f"clipping: parameter {missing[0]!r} matches none of the patterns "
            f"{list(rule.clipping)}; add '*' as the last one, for example '*': 0.01"
        )
    return chosen


def _first_matches(field: str, patterns: Mapping[str, V], names: list[str]) -> dict[str, V]:
    """Name to the value of the first pattern that matches it; names that none matches are left out."""
    chosen: dict[str, V] = {}
    for pattern, value in patterns.items():
        for name in _match(field, pattern, names):
            chosen.setdefault(name, value)
    return chosen


def _resolve(
    parameter: Parameter, rule: AGC, declared: str | Units | None, *, required: bool
) -> Units:
    rank = len(parameter.shape)
    if rule.granularity == "tensor":
        return WHOLE
    if declared is not None:
        return declared if isinstance(declared, Units) else Units(declared)
    if rule.unit_rule != "declared" and required:
        try:
            return rank_units(rule.unit_rule, parameter.shape, parameter.layout, parameter.units)
        except UnitsError as error:
            raise UnitsError(f"parameter {parameter.name!r}: {error}") from None
    if parameter.units is not None:
        return parameter.units
    if rank <= 1:
        return WHOLE
    if parameter.layout is not None and rank in _CONVENTION_RANKS:
        return _CONVENTIONS[parameter.layout]
    if not required:
        return WHOLE
    owner = f" of {parameter.owner}" if parameter.owner else ""
    names = " ".join("abcdefghijklmnopqrstuvwxyz"[:rank]) if rank <= 26 else "..."
    raise AmbiguousUnitsError(
        f"parameter {parameter.name!r}{owner} with shape {parameter.shape}: nothing says which axes "
        f"name its units. Declare them, for example AGC(units={{{parameter.name!r}: "
        f"'{names} -> {names.split()[0]}'}}) if the first axis is the output, "
        f"'{names} ->' to take the tensor as one unit, or exclude the parameter"
    )
