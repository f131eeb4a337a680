"""Keys of a recipe file: which there are, which must be there, and the nearest to a wrong one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Final, get_args, get_type_hints

from agc.config import AGC, SAM
from agc.errors import ConfigError
from agc.recipe.tables import Sharpness

__all__ = ["check_keys", "check_tables", "dotted", "fields_of", "tables_of"]

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def check_keys(cls: Any, data: Any, where: str = "", root: Any = None) -> None:
    """Raise ConfigError for the first key that is unknown, missing, or should be a table.

    Parameters
    ----------
    cls : dataclass
        What the table becomes.
    data : mapping of str to object
        The table.
    where : str
        Dotted name of the table, with a dot behind it; empty for the whole file.
    root : dataclass, optional
        What the whole file becomes; ``cls`` if None.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'a recipe'} must be a table, got {data!r}")
    known = fields_of(cls)
    for key in data:
        if key not in known:
            hint = _hint(str(key), where, list(known), root or cls)
            raise ConfigError(f"unknown key {where}{key}{hint}")
    for name, item in known.items():
        if item and item.default is item.default_factory is MISSING and name not in data:
            raise ConfigError(f"{where}{name} is missing")
    for name, nested in tables_of(cls).items():
        if name in data:
            check_keys(nested, data[name], f"{where}{name}.", root or cls)


def check_tables(table: Any, where: str = "") -> None:
    """Raise ConfigError unless each table in a table, and in those, is of its class.

    What comes from a file always is; a recipe may also be made in Python.
    """
    optional = {item.name for item in fields(table) if item.default is None}
    for name, cls in tables_of(type(table)).items():
        value = getattr(table, name)
        if isinstance(value, cls):
            check_tables(value, f"{where}{name}.")
        elif value is not None or name not in optional:
            raise ConfigError(f"{where}{name} must be of the class {cls.__name__}, got {value!r}")


def tables_of(cls: Any) -> dict[str, type]:
    """Return key to class of the tables that a table has in it."""
    if cls in (AGC, Sharpness):
        return {}
    return {
        name: candidate
        for name, hint in get_type_hints(cls).items()
        for candidate in (hint, *get_args(hint))
        if isinstance(candidate, type) and is_dataclass(candidate)
    }


def fields_of(cls: Any) -> dict[str, dataclasses.Field[Any] | None]:
    """Return key to field; None for keys that exist in files only, and for those of AGC and SAM."""
    if cls is AGC:
        return dict.fromkeys(["profile", *(item.name for item in fields(AGC))])
    if cls is Sharpness:
        names = [item.name for item in fields(SAM)]
        return dict.fromkeys(["profile", "group", *names])
    return {item.name: item for item in fields(cls)}


def _hint(key: str, where: str, known: list[str], root: Any) -> str:
    """Say which key was probably meant: one of this table, one of another, or list this table's."""
    near = get_close_matches(key, known, 1)
    if near:
        return f"; did you mean {where}{near[0]}?"
    everywhere = {name.rpartition(".")[2]: name for name in _names(root, "")}
    near = get_close_matches(key, everywhere, 1)
    if near:
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; the keys are {', '.join(f'{where}{name}' for name in known)}"


def _names(cls: Any, where: str) -> Iterator[str]:
    """Yield the dotted names of all keys of a table, and of the tables in it."""
    for name in fields_of(cls):
        yield f"{where}{name}"
    for name, nested in tables_of(cls).items():
        yield from _names(nested, f"{where}{name}.")


def dotted(data: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name, as TOML writes it, and the value of all that is no table."""
    for key, value in data.items():
        name = where + (key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False))
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{name}.")
        else:
            yield name, value
