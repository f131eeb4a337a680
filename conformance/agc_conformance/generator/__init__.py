"""Writes the vector files; nothing else does, and a test compares them byte for byte."""

from __future__ import annotations

import json
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from agc.files import write_text
from agc_conformance.generator.core import config_vectors, plan_vectors, units_vectors
from agc_conformance.generator.functions import function_vectors
from agc_conformance.generator.layers import layer_plans, layer_vectors
from agc_conformance.generator.sharpness import (
    sam_config_vectors,
    sam_scenario_vectors,
    sam_select_vectors,
    sam_trajectory_vectors,
    sharpen_vectors,
)
from agc_conformance.generator.training import scenario_vectors, trajectory_vectors
from agc_conformance.vectors import FORMAT, VECTORS, VERSION

__all__ = ["check", "generate", "write"]


@cache
def generate() -> dict[str, str]:
    """Return file name to content of every vector file."""
    functions, sharpen = function_vectors(), sharpen_vectors()
    contents: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "L0-config": ("Configuration: defaults, round trips, refusals", config_vectors()),
        "L0-units": ("Units patterns", units_vectors()),
        "L0-select": ("Plans: selection, thresholds, exclusion", plan_vectors()),
        "L0-plan": ("Plans of the frameworks' own layers", layer_plans()),
        "L1-layer": ("Every row of the table of units", layer_vectors()),
        "L1-threshold": ("Threshold, ties, epsilon", functions["threshold"]),
        "L1-precision": ("Dtypes, overflow, underflow, fan-in", functions["precision"]),
        "L1-nonfinite": ("NaN and infinity", functions["nonfinite"]),
        "L1-selection": ("What takes part; schedules; telemetry", functions["selection"]),
        "L1-sparse": ("Row-sparse gradients", functions["sparse"]),
        "L1-errors": ("What is refused", functions["errors"]),
        "L2-trajectory": ("Every step of an optimizer", trajectory_vectors()),
        "L3-scenario": ("Settings of real training", scenario_vectors()),
        "L0-sam-config": ("SAM: configuration", sam_config_vectors()),
        "L0-sam-select": ("SAM: what is perturbed", sam_select_vectors()),
        "L1-sam-perturbation": ("SAM: perturbation and restoring", sharpen["perturbation"]),
        "L1-sam-nonfinite": ("SAM: NaN and infinity", sharpen["nonfinite"]),
        "L1-sam-batch": ("SAM: parts of the batch; losses", sharpen["batch"]),
        "L1-sam-variants": ("SAM: ASAM, selection, schedules", sharpen["variants"]),
        "L2-sam-trajectory": ("SAM: every step in front of AGC", sam_trajectory_vectors()),
        "L3-sam-scenario": ("SAM: settings of real training", sam_scenario_vectors()),
    }
    return {
        f"{name}.json": _dump(
            {"format": FORMAT, "version": VERSION, "title": title, "vectors": vectors}
        )
        + "\n"
        for name, (title, vectors) in contents.items()
    }


def write(folder: Path = VECTORS) -> list[str]:
    """Write the files that differ, remove those that are no longer made, and return their names."""
    wanted = generate()
    changed = check(folder, wanted)
    for name in changed:
        if name in wanted:
            write_text(folder / name, wanted[name])
        else:
            (folder / name).unlink()
    return changed


def check(folder: Path = VECTORS, wanted: dict[str, str] | None = None) -> list[str]:
    """Return the names of files that are not what the generator writes."""
    wanted = wanted or generate()
    there = {path.name: path.read_bytes() for path in folder.glob("L*.json")}
    return sorted(
        name
        for name in wanted.keys() | there.keys()
        if there.get(name) != wanted.get(name, "").encode()
    )


def _dump(value: Any, indent: int = 0) -> str:
    """JSON with short values on one line and long lists of numbers filled like text."""
    flat = json.dumps(value, allow_nan=False)
    if len(flat) + indent <= 100 or not isinstance(value, dict | list):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(k)}: {_dump(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(pad + line for line in lines) + f"\n{' ' * indent}}}"
    if any(isinstance(item, dict | list) for item in value):
        return (
            "[\n"
            + ",\n".join(pad + _dump(item, indent + 1) for item in value)
            + f"\n{' ' * indent}]"
        )
    return (
        "[\n"
        + textwrap.fill(
            flat[1:-1],
            110,
            initial_indent=pad,
            subsequent_indent=pad,
            break_long_words=False,
            break_on_hyphens=False,
        )
        + f"\n{' ' * indent}]"
    )
