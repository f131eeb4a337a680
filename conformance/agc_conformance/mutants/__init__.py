"""Mutants: wrong implementations, each of which must fail at least one vector.

A mutant replaces one part of a right implementation by a mistake of published code, or by one that
is a single edit away. The implementations are the core, the engines of AGC and SAM, an NFNet and a
training. A suite that cannot fail is a defect; ``agc conformance teeth`` shows that this one can.
"""

from __future__ import annotations

from agc_conformance.mutants import clipping, core, nfnets, recipes, sharpness
from agc_conformance.mutants.mutant import MUTANTS, Mutant, checks, run_mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "checks",
    "clipping",
    "core",
    "nfnets",
    "recipes",
    "run_mutant",
    "sharpness",
]
