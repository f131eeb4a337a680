"""Diagnosis: the mutants that a backend resembles by the set of checks that it fails."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Final

from agc_conformance.flags import FLAGS
from agc_conformance.records import ResultRecord
from agc_conformance.vectors import digest, load_vectors

__all__ = ["KILLERS", "diagnose", "killers", "nearest", "table"]

KILLERS: Final = Path(__file__).parent / "mutants" / "killers.json"
"""The table, written by ``agc conformance teeth --write``."""

_ALIKE: Final = 0.8
"""Least share of the checks failed by the backend or the mutant that both fail; passed likewise."""
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


Names = tuple[str, ...]


def nearest(
    failing: frozenset[str], asked: frozenset[str], fails: Mapping[Names, frozenset[str]]
) -> list[Names]:
    """Return the mutants that resemble a backend, the most similar first.

    Parameters
    ----------
    failing, asked : frozenset of str
        Checks that the backend fails, and those that it answers.
    fails : mapping of names to frozenset of str
        Mutants, alone or together, and the checks that they fail.

    Returns
    -------
    list of tuple of str
        Those that differ from the backend in at most twice as many checks as the most similar one,
        or in 5 % of those that fail. Empty if even that one is not close: both must fail 80 % of
        what either fails, and pass 80 % of what either passes. Whoever fails nearly everything
        resembles everybody who does.
    """
    if not failing or not fails:
        return []
    differing = {names: len((keys & asked) ^ failing) for names, keys in fails.items()}
    order = sorted(differing, key=lambda names: differing[names])
    best = fails[order[0]] & asked
    if not (_close(best, failing) and _close(asked - best, asked - failing)):
        return []
    close = max(2 * differing[order[0]], 0.05 * len(failing))
    return [names for names in order if differing[names] <= close]


def diagnose(results: Iterable[ResultRecord]) -> list[str]:
    """Return a sentence for AGC and one for SAM, each only if its failures resemble few mutants'.

    A backend is compared with every mutant and, if it resembles none, with every two of them.
    Checks that ask for an error are compared only if no others fail.

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

    flags = {mutant.name: mutant.flag for mutant in MUTANTS}
    refusals = {vector.id for vector in load_vectors() if "error" in vector.data["expect"]}
    sentences = []
    for wing, method in _METHODS.items():
        answered = frozenset(
            k for k in checks(wing) if statuses.get(k, "unsupported") != "unsupported"
        )
        # Most implementations check no input, whatever else is wrong with them.
        asked = frozenset(k for k in answered if k.rpartition(":")[0] not in refusals)
        if not asked & bad:
            asked = answered
        failing = asked & bad
        if not failing:
            continue
        alone: dict[Names, frozenset[str]] = {
            (mutant.name,): keys
            for mutant in MUTANTS
            if mutant.wing == wing and (keys := killers().get(mutant.name, frozenset()))
        }
        fails, near = alone, nearest(failing, asked, alone)
        if not near:
            fails = {a + b: alone[a] | alone[b] for a, b in combinations(alone, 2)}
            near = nearest(failing, asked, fails)
        classes: dict[frozenset[str], list[str]] = {}
        for names in near:
            alike = classes.setdefault(frozenset(flags[name] for name in names), [])
            alike += [name for name in names if name not in alike]
        if not 1 <= len(classes) <= _CLASSES:
            continue
        same = fails[near[0]] & asked
        more = len(failing - same)
        sentences.append(
            f"{method} behaves as if {'; or '.join(_described(n, flags) for n in classes.values())}: "
            f"{len(same & failing)} of the {len(same)} checks that catch this fail, "
            f"and {more or 'no'} other{'s' * (more != 1)}."
        )
    return sentences


def _close(a: frozenset[str], b: frozenset[str]) -> bool:
    """Tell whether two sets share enough of their union, and anything at all."""
    return len(a & b) >= max(1, _ALIKE * len(a | b))


def _described(names: Iterable[str], flags: Mapping[str, str]) -> str:
    """Say what mutants do, by bug class."""
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(flags[name], []).append(name)
    return " and ".join(
        f"{FLAGS[flag]} ({flag}; mutant{'s' * (len(alike) > 1)} {', '.join(alike)})"
        for flag, alike in classes.items()
    )
