"""Recipe files: TOML in, TOML out, the recipes that come with this package, and single changes.

A file may begin with ``base = "nfnet-f0"``, the name of a recipe of this package or a path relative
to the file: its own keys then replace those of the base. Tables of a recipe are merged key by key;
a value that is written as a table, such as a schedule or thresholds by pattern, is replaced whole.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from agc.errors import ConfigError, FormatError
from agc.recipe.keys import dotted, fields_of, tables_of
from agc.recipe.recipe import Recipe

__all__ = ["flat", "load_recipe", "shipped_recipes", "to_toml"]

_DEPTH: Final = 8


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with this package."""
    folder = files("agc.recipe") / "shipped"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir())


def load_recipe(name: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    name : str or Path
        A name of :func:`shipped_recipes`, or the path of a TOML file.
    changes : iterable of str
        Keys to set, as TOML with dots: ``"train.steps=100"``. Text needs no quotes;
        ``"train.epochs="`` takes the key out.

    Raises
    ------
    FormatError
        If the file cannot be read, or is not TOML; the message has the line.
    ConfigError
        If there is no recipe of that name, or what it says is not allowed; the message names the
        file and the key.
    """
    tables = _read(str(name), Path(), 0)
    for change in changes:
        tables = _merged(tables, _change(change))
    try:
        return Recipe.from_dict(tables)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key to value, every default filled in, without the notes."""
    data = recipe.to_dict()
    data.pop("notes", None)
    return dict(dotted(data))


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML, a dotted key a line, notes behind their keys; it reads back equal."""
    lines = []
    for key, value in flat(recipe).items():
        lines.append(f"{key} = {_value(value)}\n")
        if key in recipe.notes:
            lines.append(f"notes.{_value(key)} = {_value(recipe.notes[key])}\n")
    return "".join(lines)


def _read(name: str, folder: Path, depth: int) -> dict[str, Any]:
    """Return the tables of a recipe, merged into those of its base."""
    if name in shipped_recipes():
        text = (files("agc.recipe") / "shipped" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        path = folder / name
        if path.suffix != ".toml":
            raise ConfigError(
                f"there is no recipe {name!r}; give the path of a .toml file, or one of "
                f"{', '.join(shipped_recipes())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: cannot be read as a recipe: {error}") from None
        folder = path.parent
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{name}: is not TOML: {error}") from None
    base = tables.pop("base", None)
    if base is None:
        return tables
    if not isinstance(base, str) or depth == _DEPTH:
        raise ConfigError(f"{name}: base must name a recipe that does not lead back, got {base!r}")
    return _merged(_read(base, folder, depth + 1), tables)


def _change(change: str) -> dict[str, Any]:
    """Return the tables that one change such as ``train.steps=100`` means."""
    key, equals, value = change.partition("=")
    if equals and not value:  # TOML has no null
        return _emptied(_change(f"{key}=0"))
    for text in (change, f"{key}{equals}{json.dumps(value)}"):
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            pass
    raise ConfigError(f"{change!r} is no change of a key, such as train.steps=100")


def _emptied(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with None for their values."""
    return {
        key: _emptied(value) if isinstance(value, Mapping) else None
        for key, value in tables.items()
    }


def _merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], cls: Any = Recipe
) -> dict[str, Any]:
    """Return a table of a class with changes put over it; what they say is None is left out.

    Tables in it, and notes, are merged key by key. Other mappings are values, whose keys belong
    together and whose order may count.
    """
    merged, tables = dict(base), tables_of(cls)
    for key, value in changes.items():
        old = merged.get(key)
        if value is None and key in fields_of(cls):
            merged.pop(key, None)
            continue
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if key in tables:
                value = _merged(old, value, tables[key])
            elif cls is Recipe and key == "notes":
                value = {**old, **value}
        merged[key] = value
    return merged


def _value(value: Any) -> str:
    """Write one value as TOML."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return repr(value) if math.isfinite(value) else str(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case Mapping():
            return "{}"
    return str(value)
