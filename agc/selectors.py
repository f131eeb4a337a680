"""Which parameters a configuration means: name patterns, the head, what SAM perturbs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from agc.config import SAM
from agc.errors import SelectorError

__all__ = [
    "canonical_name",
    "first_matches",
    "matching_names",
    "perturbed_names",
    "select",
    "with_ties",
]

V = TypeVar("V")


def canonical_name(name: str) -> str:
    """Return a parameter name with dots between its parts, whatever the framework writes."""
    return name.replace("/", ".")


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the dotted names that a name pattern means, in the order given (AGC-6).

    A pattern that is literally one of the names means that one: brackets in a name are no glob.
    """
    given, wanted = list(names), canonical_name(pattern)
    if wanted in given:
        return [wanted]
    return [name for name in given if fnmatchcase(name, wanted)]


def first_matches(field: str, patterns: Mapping[str, V], names: Sequence[str]) -> dict[str, V]:
    """Return name to the value of the first pattern that matches it; other names are left out.

    Raises
    ------
    SelectorError
        If a pattern matches no name; the message begins with the configuration's field.
    """
    values: dict[str, V] = {}
    for pattern, value in patterns.items():
        for name in _some(field, pattern, names):
            values.setdefault(name, value)
    return values


def select(
    selector: str,
    shapes: Mapping[str, tuple[int, ...]],
    head: str | None = None,
    field: str = "exclude",
) -> list[str]:
    """Return the names that a selector means: a pattern, ``@head`` or ``@head.weight``.

    Parameters
    ----------
    selector : str
        ``"@head"`` means all parameters of the classifier layer, ``"@head.weight"`` its matrices.
    shapes : mapping of str to tuple of int
        Dotted name to shape of every parameter.
    head : str, optional
        Name, or name pattern, of the classifier layer.
    field : str
        Whose selector it is, for messages.

    Raises
    ------
    SelectorError
        If it matches no parameter, is an unknown selector, or needs a head that is not known.
    """
    names = list(shapes)
    if not selector.startswith("@"):
        return _some(field, selector, names)
    if selector not in ("@head", "@head.weight"):
        raise SelectorError(
            f"{field}: unknown selector {selector!r}; there are '@head' and '@head.weight'"
        )
    if head is None:
        raise SelectorError(
            f"{field}: {selector!r} needs the name of the classifier layer, and the model does not "
            "declare one; give it in the rule, for example head='fc'"
        )
    layer = f"{canonical_name(head)}."
    in_head = [name for name in names if name.startswith(layer)]
    in_head = in_head or _some("head", f"{head}.*", names)
    if selector == "@head":
        return in_head
    matrices = [name for name in in_head if len(shapes[name]) >= 2]
    if not matrices:
        raise SelectorError(
            f"{field}: {selector!r} matches no parameter, because the head {head!r} has no matrix, only "
            f"{', '.join(in_head)}; name what you mean instead"
        )
    return matrices


def perturbed_names(names: Iterable[str], rule: SAM) -> tuple[str, ...]:
    """Names of the parameters that SAM perturbs, in the order given (SAM-11).

    Raises
    ------
    SelectorError
        If a pattern of ``only`` or ``exclude`` matches no parameter, or nothing is left to perturb.
    """
    given = list(names)
    dotted = [canonical_name(name) for name in given]
    selected = {name for pattern in rule.only for name in _some("only", pattern, dotted)}
    if not rule.only:
        selected = set(dotted)
    for pattern in rule.exclude:
        selected.difference_update(_some("exclude", pattern, dotted))
    if not selected:
        raise SelectorError(
            f"no parameter is left to perturb: only={list(rule.only)} and "
            f"exclude={list(rule.exclude)} select none of {len(given)} parameters"
        )
    return tuple(name for name, dot in zip(given, dotted, strict=True) if dot in selected)


def _some(field: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern matches; raise SelectorError if it matches none."""
    matches = matching_names(pattern, names)
    if not matches:
        listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        below = f"{pattern}.*"
        hint = f", but {below!r} does" if matching_names(below, names) else ""
        raise SelectorError(
            f"{field}: the pattern {pattern!r} matches no parameter{hint}; the names are: {listing}"
        )
    return matches


def with_ties(error: SelectorError, ties: Mapping[str, str]) -> SelectorError:
    """Return an error that also says which names of tied parameters a pattern cannot mean.

    Parameters
    ----------
    error : SelectorError
        What a pattern that matches no parameter raised.
    ties : mapping of str to str
        Other name of a tied parameter to the name that it goes by.
    """
    if not ties:
        return error
    listing = ", ".join(f"{name!r} is {known!r}" for name, known in list(ties.items())[:4])
    return SelectorError(f"{error}. Tied parameters go by their first name: {listing}")
