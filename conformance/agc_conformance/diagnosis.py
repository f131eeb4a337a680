"""Diagnosis: the mutants that a backend resembles by the set of checks that it fails."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from agc_conformance.flags import FLAGS
from agc_conformance.records import ResultRecord
from agc_conformance.vectors import digest

__all__ = ["KILLERS", "diagnose", "killers", "nearest", "table"]

KILLERS: Final = Path(__file__).parent / "mutants" / "killers.json"
"""The table, written by ``agc conformance teeth --write``."""

_ALIKE: Final = 0.8
"""Least share of the checks failed by the backend or the mutant that both fail."""
_CLASSES: Final = 3
"""Most bug classes that a diagnosis names: where more fit as well, nothing is known."""
_METHODS: Final = {"clipping": "AGC", "sharpness": "SAM"}
"""Wing of mutants to the method it tests. NFNets' mutants are asked for a part of the results."""


def table(killed_by: Mapping[str, Iterable[str]]) -> str:
    """Return the text of :data:`KILLERS`: for every mutant, the checks that it fails."""
    lines = [f"{json.dumps(name)}: {json.dumps(sorted(keys))}" for name, keys in killed_by.items()]
    return f'{{"vectors": "{digest()}",\n"mutants": {{\n' + ",\n".join(lines) + "\n}}\n"


@cache
def killers() -> dict[str, frozenset[str]]:
    """Return the checks (``id:dtype``) that each mutant fails; none if the vectors have changed."""
    data = json.loads(KILLERS.read_text(encoding="utf-8"))
    if data["vectors"] != digest():
        return {}
    return {name: frozenset(keys) for name, keys in data["mutants"].items()}


def nearest(
    failing: frozenset[str], asked: frozenset[str], fails: Mapping[str, frozenset[str]]
) -> list[str]:
    """Return the mutants that resemble a backend, the most similar first.

    Parameters
    ----------
    failing, asked : frozenset of str
        Checks that the backend fails, and those that it answers.
    fails : mapping of name to frozenset of str
        Mutants, and the checks that each of them fails.

    Returns
    -------
    list of str
        Those that differ from the backend in at most twice as many checks as the most similar one,
        or in 5 % of those that fail. Empty if even that shares less than 80 % of all failures.
    """
    if not failing or not fails:
        return []
    differing = {name: len((keys & asked) ^ failing) for name, keys in fails.items()}
    order = sorted(differing, key=lambda name: differing[name])
    best = order[0]
    if len(fails[best] & failing) < _ALIKE * len(fails[best] & asked | failing):
        return []
    close = max(2 * differing[best], 0.05 * len(failing))
    return [name for name in order if differing[name] <= close]


def _ids(keys: Iterable[str]) -> set[str]:
    return {key.rpartition(":")[0] for key in keys}


def diagnose(results: Iterable[ResultRecord]) -> list[str]:
    """Return a sentence for AGC and one for SAM, each only if its failures resemble few mutants'.

    Parameters
    ----------
    results : iterable of ResultRecord
        The results of one backend.
    """
    statuses = {f"{result['id']}:{result['dtype']}": result["status"] for result in results}
    bad = frozenset(key for key, s in statuses.items() if s in ("failed", "error", "xfail"))
    if not bad:
        return []
    from agc_conformance.mutants import MUTANTS, checks

    sentences = []
    for wing, method in _METHODS.items():
        asked = frozenset(
            k for k in checks(wing) if statuses.get(k, "unsupported") != "unsupported"
        )
        failing = asked & bad
        mutants = {mutant.name: mutant for mutant in MUTANTS if mutant.wing == wing}
        # Mutants most of whose vectors were not asked could resemble anything.
        fails = {
            name: keys
            for name, keys in killers().items()
            if name in mutants and 2 * len(_ids(keys & asked)) >= len(_ids(keys))
        }
        names = nearest(failing, asked, fails)
        classes: dict[str, list[str]] = {}
        for name in names:
            classes.setdefault(mutants[name].flag, []).append(name)
        if not 1 <= len(classes) <= _CLASSES:
            continue
        described = "; or ".join(
            f"{FLAGS[flag]} ({flag}; mutant{'s' * (len(alike) > 1)} {', '.join(alike)})"
            for flag, alike in classes.items()
        )
        same = killers()[names[0]] & asked
        sentences.append(
            f"{method} behaves as if {described}: {len(same & failing)} of the {len(same)} checks "
            f"that catch this fail, and {len(failing - same)} more."
        )
    return sentences
