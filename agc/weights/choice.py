"""Which of the weights in a file are meant: raw or averaged ones, under a key, under a prefix.

A *set* of weights is what an NFNet's names have in common before them: ``state_dict`` or
``state_dict_ema`` in a dictionary of dictionaries, ``module.`` or ``ema_model.module.`` before each
name, or nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from agc.errors import FormatError
from agc.weights.files import Source, Tensor
from agc.weights.forms import FORMS, shared_names

__all__ = ["Chosen", "WhichWeights", "choose"]

WhichWeights = Literal["raw", "ema"]

_AVERAGED: Final = frozenset({"ema", "swa", "avg", "average", "averaged", "averages", "shadow"})
_CURRENT: Final = "current_model_state"
"""Key of the raw weights in checkpoints of Lightning whose ``state_dict`` has averaged ones."""
_OF_OPTIMIZER: Final = frozenset({"optimizer", "optim", "opt", "exp", "momentum", "velocity"})


@dataclass(frozen=True)
class Chosen:
    """One set of weights.

    Attributes
    ----------
    label : str
        Keys and prefix, dotted; empty if the names stand at the top of the file.
    tensors : mapping of str to Tensor
        By name without the prefix.
    """

    label: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Set:
    key: str
    prefix: str

    @property
    def label(self) -> str:
        return ".".join(filter(None, (self.key, re.sub(r"[./]+", ".", self.prefix).strip("."))))

    def is_of(self, words: frozenset[str]) -> bool:
        return not words.isdisjoint(re.findall(r"[a-z]+", self.label.lower()))


def choose(source: Source, key: str | None = None, weights: WhichWeights | None = None) -> Chosen:
    """Return the one set of weights that is meant.

    Parameters
    ----------
    source : Source
        An open file.
    key : str, optional
        Dotted keys of the dictionary, or the beginning of all names, that holds it. What else is in
        the file is then ignored.
    weights : {"raw", "ema"}, optional
        Which, if there are both.

    Raises
    ------
    FormatError
        If there is no such set, or more than one; the message lists them.
    """
    path, sets = source.path, _sets(source.contents)
    if key is not None:
        found = [item for item in sets if f"{item.label}.".startswith(f"{key}.")]
        if not found:
            raise FormatError(f"{path}: has no weights under {key!r}; it holds {_listed(sets)}")
    else:
        found = [item for item in sets if not item.is_of(_OF_OPTIMIZER)] or sets
    swapped = any(item.key == _CURRENT for item in sets)
    averaged = [
        item for item in found if item.is_of(_AVERAGED) or (swapped and item.key == "state_dict")
    ]
    raw = [item for item in found if item not in averaged]
    if weights is not None:
        found = averaged if weights == "ema" else raw
        if not found:
            raise FormatError(
                f"{path}: says of no weights that they are {weights}; it holds {_listed(sets)}"
            )
    elif raw and averaged:
        raise FormatError(
            f"{path}: holds raw weights ({_listed(raw)}) and averaged ones ({_listed(averaged)}); "
            "say which: raw or ema (--weights, or --use in agc classify)"
        )
    if len(found) > 1 and _are_parts(source, found):
        raise FormatError(
            f"{path}: names of one model have different prefixes: {_listed(found)}; save it with all "
            "names as model.state_dict() has them"
        )
    if len(found) > 1:
        raise FormatError(
            f"{path}: holds several weights: {_listed(found)}; say which by its key (--key)"
        )
    if not found:
        return Chosen("", _tensors(source, _Set(_most_tensors(source.contents), ""), [], ""))
    return Chosen(found[0].label, _tensors(source, found[0], sets, key or ""))


def _listed(sets: Iterable[_Set]) -> str:
    return ", ".join(item.label or "names without a prefix" for item in sets) or "none of an NFNet"


@cache
def _names() -> frozenset[str]:
    """Return the names in every form of the parameters that all variants of a family have."""
    return frozenset().union(*map(shared_names, FORMS))


def _prefix(name: object) -> str | None:
    """Return what stands before an NFNet's name; None if this is none."""
    if not isinstance(name, str):
        return None
    starts = [0, *(found.end() for found in re.finditer(r"[./]", name))]
    return next((name[:start] for start in starts if name[start:] in _names()), None)


def _sets(contents: Mapping[str, Mapping[Any, Any]]) -> list[_Set]:
    counts: Counter[_Set] = Counter()
    for key, items in contents.items():
        prefixes = Counter(
            _prefix(name) for name, value in items.items() if isinstance(value, Tensor)
        )
        counts.update(
            {_Set(key, prefix): n for prefix, n in prefixes.items() if prefix is not None}
        )
    # Another network may have a head.bias too.
    return [item for item, count in counts.items() if 2 * count >= max(counts.values())]


def _are_parts(source: Source, sets: list[_Set]) -> bool:
    """Tell whether no name of an NFNet is in two of these sets."""
    names = [
        name.removeprefix(item.prefix)
        for item in sets
        for name in source.contents[item.key]
        if _prefix(name) == item.prefix
    ]
    return len(names) == len(set(names))


def _most_tensors(contents: Mapping[str, Mapping[Any, Any]]) -> str:
    tensors = {
        key: sum(isinstance(value, Tensor) for value in items.values())
        for key, items in contents.items()
    }
    return max(tensors, key=tensors.__getitem__)


def _tensors(source: Source, chosen: _Set, sets: list[_Set], key: str) -> dict[str, Tensor]:
    """Return a set's tensors, and those beside it that are of no set: a check comes later."""
    others = [item.prefix for item in sets if item.key == chosen.key and item != chosen]
    tensors: dict[str, Tensor] = {}
    for name, value in source.contents[chosen.key].items():
        if not isinstance(name, str):
            raise FormatError(
                f"{source.path}: {name!r} is a {type(name).__name__}, not the name of a tensor; "
                "save model.state_dict()"
            )
        own = name.startswith(chosen.prefix)
        if any(
            name.startswith(prefix)
            for prefix in others
            if len(prefix) > len(chosen.prefix) or not own
        ):
            continue
        if not own and (len(key) > len(chosen.key) or _counts(value)):
            continue
        if not isinstance(value, Tensor):
            raise FormatError(f"{source.path}: {name} is a {type(value).__name__}, not a tensor")
        tensors[name.removeprefix(chosen.prefix)] = value
    return tensors


def _counts(value: Any) -> bool:
    """Tell whether this is a counter, such as an average's ``n_averaged``, and no weight."""
    whole = isinstance(value, Tensor) and value.dtype.lower().startswith(("i", "u", "bool"))
    return whole and value.shape in ((), (1,))
