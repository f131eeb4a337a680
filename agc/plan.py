"""Plan: what will happen to every parameter, decided before any number is touched.

A plan is integers, names and patterns, so plans of different frameworks are compared exactly. The
core decides *what* here; an adapter carries it out.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias, get_args

from agc.checks import check_distinct, short_repr
from agc.config import AGC, Clipping, clipping_from_data, clipping_to_data
from agc.errors import (
    AmbiguousUnitsError,
    FormatError,
    ParameterError,
    SelectorError,
    ShapeError,
    UnitsError,
    UnitsWarning,
)
from agc.layouts import Layout
from agc.rank_rules import rank_units
from agc.schedule import schedule_value
from agc.selectors import canonical_name, first_matches, select
from agc.units import UnitAxes, Units

__all__ = [
    "WHOLE",
    "Parameter",
    "Plan",
    "PlanEntry",
    "Source",
    "make_plan",
]

WHOLE: Final = Units("... ->")
"""The whole tensor is one unit."""

Source: TypeAlias = Literal["rule", "layer", "name", "vector", "layout", "none"]
"""What settled a parameter's units: the rule, the layer's type, the leaf's name, its being a
vector, the framework's layout convention, or nothing where it is not clipped."""

_CONVENTIONS: Final[Mapping[tuple[Layout, int], Units]] = {
    ("out-first", 2): Units("o i -> o"),
    ("out-first", 4): Units("o i ... -> o"),
    ("out-first", 5): Units("o i ... -> o"),
    ("out-last", 2): Units("i o -> o"),
}
"""Units by layout and rank, where frameworks of that layout store nothing else at that rank."""

_FORMAT: Final = "agc-plan"
_VERSION: Final = 1


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
        What the owning layer's type, or the leaf's name, says; None if they say nothing.
    layout : {"out-first", "out-last"}, optional
        The framework's convention for dense and convolution weights, used when ``units`` is None
        for ranks 2, 4 and 5 (out-first) or 2 (out-last); None if there is no convention.
    owner : str, optional
        The owning layer, for error messages.
    source : {"layer", "name"}, default "layer"
        What ``units`` come from.
    inactive : str, optional
        Why the parameter has no gradient at present, such as ``"frozen"``; shown in the plan's
        table.
    """

    name: str
    shape: tuple[int, ...]
    units: Units | None = None
    layout: Layout | None = None
    owner: str | None = None
    source: Literal["layer", "name"] = "layer"
    inactive: str | None = None


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
    source : {"rule", "layer", "name", "vector", "layout", "none"}
        What settled the units. Does not count when plans are compared.
    inactive : str, optional
        Why the parameter has no gradient at present: ``"frozen"``, ``"not in the optimizer"``. Does
        not count when plans are compared, and is not written to files.
    """

    name: str
    shape: tuple[int, ...]
    units: Units
    count: int
    clipping: Clipping
    excluded: bool
    source: Source = field(default="rule", compare=False)
    inactive: str | None = field(default=None, compare=False)

    @property
    def clipped(self) -> bool:
        """Whether AGC acts on this parameter when it has a gradient."""
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
            If there is a schedule, and its value is not a finite number above 0 or the step is not
            an integer from 0 on.
        """
        if not self.clipped:
            return None
        if callable(self.clipping):
            return schedule_value(f"clipping of {self.name!r}", self.clipping, step)
        return self.clipping


@dataclass(frozen=True)
class Plan:
    """Every parameter with its units, threshold and exclusion, in the model's order.

    ``plan[name]`` is an entry, ``print(plan)`` a table. Plans are hashable and compare exactly;
    across frameworks, whose layouts differ, compare :meth:`decisions`.

    Attributes
    ----------
    entries : tuple of PlanEntry
        One entry a parameter.
    """

    entries: tuple[PlanEntry, ...]

    def __post_init__(self) -> None:
        check_distinct(entry.name for entry in self.entries)

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
        """Number of units that AGC acts on, those of inactive parameters not among them."""
        return sum(entry.count for entry in self.entries if entry.clipped and not entry.inactive)

    def marked(self, inactive: Callable[[str], str | None]) -> Plan:
        """Return the plan with a new reason for which parameters are inactive, if any, by name."""
        return Plan(tuple(replace(entry, inactive=inactive(entry.name)) for entry in self.entries))

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
                    "source": entry.source,
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
        rows = [("parameter", "shape", "units", "source", "count", "clipping")]
        rows += [
            (
                entry.name,
                "x".join(map(str, entry.shape)) or "scalar",
                str(entry.units),
                entry.source,
                str(entry.count),
                _describe(entry),
            )
            for entry in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 4 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        clipped = sum(entry.clipped and not entry.inactive for entry in self.entries)
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
    "source": (lambda value: value in get_args(Source), f"one of {', '.join(get_args(Source))}"),
}
"""Fields of an entry as data: what is valid, and how to say it."""


def _read_entry(place: int, item: Any) -> PlanEntry:
    """Read one entry of :meth:`Plan.to_dict`'s data; ``place`` is for messages."""
    where = f"plan entry {place} is damaged:"
    if not isinstance(item, Mapping):
        raise FormatError(f"{where} it must be a mapping, got {short_repr(item)}")
    for key, (valid, wanted) in _FIELDS.items():
        if key not in item:
            raise FormatError(f"{where} {key!r} is missing")
        if not valid(item[key]):
            raise FormatError(f"{where} {key!r} must be {wanted}, got {short_repr(item[key])}")
    try:
        entry = PlanEntry(
            name=canonical_name(item["name"]),
            shape=tuple(item["shape"]),
            units=Units(item["units"]),
            count=item["count"],
            clipping=clipping_from_data(item["clipping"]),
            excluded=item["excluded"],
            source=item["source"],
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
    if entry.inactive:
        return entry.inactive
    return "schedule" if callable(entry.clipping) else f"{entry.clipping:g}"


def make_plan(
    parameters: Iterable[Parameter], rule: AGC, *, head: str | None = None, cure: str = ""
) -> Plan:
    """Resolve units, thresholds and exclusions of all parameters.

    Parameters
    ----------
    parameters : iterable of Parameter
        The model's parameters in its own order, tied ones once.
    rule : AGC
        The configuration.
    head : str, optional
        Name of the classifier layer as the model declares it; ``rule.head`` takes precedence.
    cure : str, optional
        What the caller could do before declaring units, such as giving the model; begins messages
        about parameters whose units nothing settles.

    Returns
    -------
    Plan
        One entry a parameter.

    Raises
    ------
    SelectorError
        If a name pattern matches no parameter, a parameter matches no pattern of ``clipping``, or
        the head is selected but unknown.
    AmbiguousUnitsError
        If nothing settles the units of parameters that would be clipped; one error lists all of
        them.
    UnitsError, ShapeError
        If a pattern does not fit a shape, or what is given as a shape is none.

    Warns
    -----
    UnitsWarning
        If the units of parameters that are clipped follow the layout convention; one warning lists
        them.

    Notes
    -----
    Units come from, in this order: ``granularity="tensor"`` (AGC-12), the first matching pattern of
    ``rule.units``, a published ``unit_rule``, the owning layer's type or the leaf's name, the shape
    of a vector (at most one axis longer than 1: one unit, AGC-5), and the layout convention.
    """
    given = [
        replace(parameter, name=canonical_name(parameter.name), shape=tuple(parameter.shape))
        for parameter in parameters
    ]
    shapes = {parameter.name: parameter.shape for parameter in given}
    names = list(shapes)
    head = rule.head or head
    excluded = {name for selector in rule.exclude for name in select(selector, shapes, head)}
    declared = first_matches("units", rule.units, names)
    thresholds = _thresholds(rule, names)
    entries: list[PlanEntry] = []
    undecided: list[Parameter] = []
    by_layout: list[PlanEntry] = []
    for parameter in given:
        clipping = thresholds[parameter.name]
        acts = clipping is not None and parameter.name not in excluded
        resolved = _resolve(parameter, rule, declared.get(parameter.name), required=acts)
        if resolved is None:
            undecided.append(parameter)
            continue
        units, source = resolved
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
                source=source,
                inactive=parameter.inactive,
            )
        )
        if source == "layout" and acts:
            by_layout.append(entries[-1])
    if undecided:
        raise AmbiguousUnitsError(_undecided_message(undecided, names, cure))
    if by_layout:
        warnings.warn(_layout_message(by_layout, cure), UnitsWarning, stacklevel=3)
    return Plan(tuple(entries))


def _thresholds(rule: AGC, names: list[str]) -> dict[str, Clipping]:
    """Threshold of every parameter: the first pattern that matches decides."""
    if not isinstance(rule.clipping, Mapping):
        return dict.fromkeys(names, rule.clipping)
    thresholds = first_matches("clipping", rule.clipping, names)
    missing = [name for name in names if name not in thresholds]
    if missing:
        raise SelectorError(
            f"clipping: parameter {missing[0]!r} matches none of the patterns "
            f"{list(rule.clipping)}; add '*' as the last one, for example '*': 0.01"
        )
    return thresholds


def _resolve(
    parameter: Parameter, rule: AGC, declared: str | Units | None, *, required: bool
) -> tuple[Units, Source] | None:
    """Return a parameter's units and their source; None if nothing settles required ones."""
    if rule.granularity == "tensor":
        return WHOLE, "rule"
    if declared is not None:
        return declared if isinstance(declared, Units) else Units(declared), "rule"
    if rule.unit_rule != "declared" and required:
        try:
            by_rank = rank_units(rule.unit_rule, parameter.shape, parameter.layout, parameter.units)
        except UnitsError as error:
            raise UnitsError(f"parameter {parameter.name!r}: {error}") from None
        return by_rank, "rule"
    if parameter.units is not None:
        return parameter.units, parameter.source
    if sum(size > 1 for size in parameter.shape) <= 1 or 0 in parameter.shape:
        return WHOLE, "vector"
    if parameter.layout is not None:
        convention = _CONVENTIONS.get((parameter.layout, len(parameter.shape)))
        if convention is not None:
            return convention, "layout"
    return None if required else (WHOLE, "none")


def _undecided_message(undecided: list[Parameter], names: list[str], cure: str) -> str:
    """Say which parameters' units nothing settles, and write the declaration to paste (AGC-5)."""
    first = undecided[0]
    owner = f" of {first.owner}" if first.owner else ""
    more = f" and of {len(undecided) - 1} more" if len(undecided) > 1 else ""
    declarations = _declarations(undecided, names)
    width = max(len(line) for line, _ in declarations)
    lines = "\n".join(f"        {line:<{width}}  # {shapes}" for line, shapes in declarations)
    return (
        f"parameter {first.name!r}{owner} with shape {first.shape}{more}: nothing says which axes name the "
        f"units. {f'{cure[0].upper()}{cure[1:]}; or declare' if cure else 'Declare'} them; in this "
        "proposal, check that the axes right of '->' are the outputs of each layer:\n"
        f"    AGC(units={{\n{lines}\n    }})\n"
        "'... ->' takes a tensor as one unit, and exclude= leaves parameters unclipped."
    )


def _declarations(undecided: list[Parameter], names: list[str]) -> list[tuple[str, str]]:
    """Write one proposal for each group of undecided parameters that a common pattern selects.

    Returns
    -------
    list of (str, str)
        An item of a dictionary, and a comment with the shapes and owners that it is for.
    """
    groups: dict[tuple[str, str], list[Parameter]] = {}
    for parameter in undecided:
        proposal = _proposal(parameter.shape, parameter.layout)
        pattern = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", parameter.name)
        groups.setdefault((pattern, proposal), []).append(parameter)
    lines = []
    for (pattern, proposal), members in groups.items():
        wanted = [member.name for member in members]
        selects = [name for name in names if fnmatchcase(name, pattern)]
        patterns = [pattern] if len(members) > 1 and selects == wanted else wanted
        shapes = list(dict.fromkeys(str(member.shape) for member in members))
        owners = list(dict.fromkeys(member.owner for member in members if member.owner))
        comment = ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else "")
        comment += f" of {owners[0]}" if owners else ""
        lines += [(f"{name!r}: {proposal!r},", comment) for name in patterns]
    return lines


def _proposal(shape: tuple[int, ...], layout: Layout | None) -> str:
    """Propose a units pattern for a common meaning of a shape; its reader must check it."""
    rank = len(shape)
    if rank == 3 and shape[0] == 1:
        return "one n d -> n"  # a table of positions with a batch axis
    if rank > 26:
        return "first ... -> first"
    axes = "abcdefghijklmnopqrstuvwxyz"[:rank]
    return f"{' '.join(axes)} -> {axes[-1] if layout == 'out-last' else axes[0]}"


def _layout_message(entries: list[PlanEntry], cure: str) -> str:
    listed = ", ".join(f"{entry.name!r} {entry.shape} as '{entry.units}'" for entry in entries[:8])
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    return (
        f"no layer's type settles the units of {len(entries)} parameter(s), which follow the framework's "
        f"layout: {listed}{more}. {f'{cure[0].upper()}{cure[1:]}; or check' if cure else 'Check'} them, "
        f"and declare them, for example AGC(units={{{entries[0].name!r}: '{entries[0].units}'}})"
    )
