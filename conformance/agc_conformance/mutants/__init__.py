"""Mutants: wrong implementations, each of which must fail at least one vector.

A mutant replaces one part of a right implementation, in the way some published code does or one edit away from
right: of the core, of the engines of AGC and SAM, or of an NFNet. A suite that cannot fail is a defect;
``agc conformance teeth`` shows that this one can.
"""

from __future__ import annotations

from agc_conformance.mutants import clipping, core, nfnets, sharpness
from agc_conformance.mutants.mutant import MUTANTS, Mutant, run_mutant

__all__ = ["MUTANTS", "Mutant", "clipping", "core", "nfnets", "run_mutant", "sharpness"]
