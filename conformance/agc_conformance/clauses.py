"""The clauses of the specification, a line each."""

from __future__ import annotations

from typing import Final

__all__ = ["CLAUSES", "COMPUTED", "OF_THE_CORE"]

CLAUSES: Final[dict[str, str]] = {
    "AGC-1": "limit = clipping * max(norm(W), eps)",
    "AGC-2": "strictly above the limit, scaled to it; else the bits stay",
    "AGC-3": "norms and scales in at least float32; the gradient's dtype stays",
    "AGC-4": "non-finite values fall under a policy",
    "AGC-5": "vectors, scalars, empty and missing gradients",
    "AGC-6": "explicit, verified exclusion",
    "AGC-7": "order: unscale, average, clip, decay, optimize",
    "AGC-8": "independent of sharding",
    "AGC-9": "row-sparse gradients stay sparse",
    "AGC-10": "thresholds by parameter and step",
    "AGC-11": "telemetry",
    "AGC-12": "whole tensors as a mode of its own",
    "SAM-1": "e = rho * g / norm(g), one norm over everything that is perturbed",
    "SAM-2": "a zero gradient does not move; no epsilon",
    "SAM-3": "gradient at w + e; then the weights, bit for bit",
    "SAM-4": "parameters without a gradient",
    "SAM-5": "a norm that is not finite falls under a policy",
    "SAM-6": "weight decay and AGC only on the final gradient, at w",
    "SAM-7": "ascent on the first part of the same batch",
    "SAM-8": "micro-batches, each with its own e, averaged",
    "SAM-9": "ascent local to a replica or global",
    "SAM-10": "ASAM",
    "SAM-11": "every k-th step, schedules of rho, selection",
    "SAM-12": "the clean loss is reported",
    "SAM-13": "training goes on from a checkpoint as if never stopped",
    "NFNET-1": "forward: logits and the output of every block",
    "NFNET-2": "loss and gradient of every tensor",
    "NFNET-3": "how signals propagate",
    "NFNET-4": "plan, which units are clipped, clipped gradients",
    "NFNET-5": "DeepMind's optimizer and AGC before SGD, step by step",
    "RECIPE-1": "one file, one canonical form, one id",
    "RECIPE-2": "the same batches, bit for bit, on any number of hosts",
    "RECIPE-3": "rate, thresholds, radius and decay of every step, in float32",
    "RECIPE-4": "stochastic depth and dropout keep what the batch says",
    "RECIPE-5": "the state after every step, in any number of micro-batches",
    "RECIPE-6": "an evaluation has every image once",
    "RECIPE-7": "a checkpoint goes on, bit for bit, or in another framework",
    "RECIPE-8": "a new head on old weights",
}

COMPUTED: Final = ("NFNET", *(f"RECIPE-{number}" for number in range(4, 9)))
"""Beginnings of clauses without vectors: what is expected is computed."""

OF_THE_CORE: Final = ("RECIPE-1", "RECIPE-2", "RECIPE-3")
"""Clauses that this library's core answers wherever recipes are trained; no merit of a backend."""
