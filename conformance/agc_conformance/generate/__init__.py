"""Writes the vector files: the module ``L1_threshold`` makes ``vectors/v1/L1-threshold.json``.

Every module whose name starts with ``L`` has a ``TITLE`` and a list ``VECTORS``, and is found by
its name: a new module is a new file. The other modules are shared, in this order of reading:
``unit_table``, ``parameters``, ``build`` and ``optimizer`` for AGC; ``sam_case``, ``sam_build`` and
``sam_trajectory`` for SAM. Importing this package computes nothing; :func:`vector_files` does.
"""

from __future__ import annotations

import json
import pkgutil
import textwrap
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from agc.files import write_text
from agc_conformance.vectors import FORMAT, VECTORS, VERSION

__all__ = ["check", "vector_files", "write"]


@cache
def vector_files() -> dict[str, str]:
    """Return file name to content of every vector file."""
    return {
        f"{name.replace('_', '-')}.json": _content(f"{__name__}.{name}")
        for name in sorted(module.name for module in pkgutil.iter_modules(__path__))
        if name.startswith("L")
    }


def write(folder: Path = VECTORS) -> list[str]:
    """Write the files that differ, remove those that no module makes, and return their names."""
    files, changed = vector_files(), check(folder)
    for name in changed:
        if name in files:
            write_text(folder / name, files[name])
        else:
            (folder / name).unlink()
    return changed


def check(folder: Path = VECTORS) -> list[str]:
    """Return the names of files that are missing, differ, or are made by no module."""
    files = {name: content.encode() for name, content in vector_files().items()}
    present = {path.name: path.read_bytes() for path in folder.glob("L*.json")}
    return sorted(
        name for name in files.keys() | present.keys() if files.get(name) != present.get(name)
    )


def _content(module_name: str) -> str:
    module = import_module(module_name)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": module.TITLE,
        "vectors": module.VECTORS,
    }
    return _json(document) + "\n"


def _json(value: Any, indent: int = 0) -> str:
    """Return JSON with short values on one line and long lists of numbers filled like text."""
    on_one_line = json.dumps(value, allow_nan=False)
    if len(on_one_line) + indent <= 110 or not isinstance(value, dict | list):
        return on_one_line
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_json(item, indent + 1)}" for key, item in value.items()]
        return "{" + pad + f",{pad}".join(lines) + pad[:-1] + "}"
    if any(isinstance(item, dict | list) for item in value):
        lines = [_json(item, indent + 1) for item in value]
        return "[" + pad + f",{pad}".join(lines) + pad[:-1] + "]"
    lines = textwrap.wrap(
        on_one_line[1:-1], 109 - indent, break_long_words=False, break_on_hyphens=False
    )
    return "[" + pad + pad.join(lines) + pad[:-1] + "]"
