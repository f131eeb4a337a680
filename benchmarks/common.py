"""Shared by the three frameworks: the numbers to clip, and the bound that memory sets."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

__all__ = [
    "CONDITIONS",
    "SAM_CONTESTANTS",
    "SAM_PASSES",
    "SAM_ROUNDS",
    "Measure",
    "bound",
    "draw",
    "flax_tree",
    "grid",
    "nfnet_batch",
    "over_turns",
    "sam_batch",
    "versions",
]

CONDITIONS = ("all", "none")
"""Every unit is clipped, or no unit is."""

SAM_CONTESTANTS = ("plain", "sam", "fraction")
"""A training step without SAM, with it, and with the ascent on a fifth of the batch."""

SAM_PASSES = ("bare sam", "bare fraction")
"""The same steps of SAM with the two passes alone: no norm, no restoration, no policy."""

SAM_ROUNDS = 8
"""Rounds a turn: steps of two threads differ more than clipping does."""

Measure = Callable[..., None]
"""Type of the fixture ``measure``."""


def draw(shape: tuple[int, ...], condition: str, seed: int) -> tuple[Any, Any]:
    """Return a weight and a gradient that is far above every limit, or far below."""
    random = np.random.default_rng(seed)
    weight, gradient = (np.asarray(random.random(shape, np.float32)) for _ in range(2))
    # Weights stay away from 0: the limit of a scalar near 0 would differ from its neighbours'.
    weight = np.float32(0.05) + np.float32(0.1) * weight
    gradient = np.float32(1e2 if condition == "all" else 1e-6) * (np.float32(0.5) + gradient)
    return np.asarray(weight), np.asarray(gradient)


def bound(weights: Sequence[Any], gradients: Sequence[Any], condition: str) -> Callable[[], None]:
    """Return a function that does the least that clipping must do, on every core.

    It reads all float32 arrays once and, if everything is clipped, writes to copies of the
    gradients in place.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    pool = ThreadPoolExecutor(cores)
    if condition == "all":
        gradients = [np.asarray(gradient).copy() for gradient in gradients]

    def scale(piece: Any) -> None:
        np.multiply(piece, np.float32(1), out=piece)

    def read(piece: Any) -> None:
        np.dot(piece, piece)  # the fastest reader that NumPy has

    work = [(read, piece) for piece in _pieces(weights)]
    work += [(scale if condition == "all" else read, piece) for piece in _pieces(gradients)]
    shares = [work[core::cores] for core in range(cores)]

    def run(share: list[tuple[Callable[[Any], None], Any]]) -> None:
        for action, piece in share:
            action(piece)

    def everywhere() -> None:
        list(pool.map(run, shares))

    return everywhere


def _pieces(arrays: Sequence[Any], step: int = 1 << 20) -> list[Any]:
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    return [array[start : start + step] for array in flat for start in range(0, array.size, step)]


def sam_batch() -> tuple[Any, Any]:
    """Return 100 images of shape (32, 32, 3), channels last, and their labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(100, 32, 32, 3))
    return images.astype(np.float32), random.integers(0, 10, 100)


def nfnet_batch(count: int = 4, pixels: int = 128) -> tuple[Any, Any]:
    """Return images of shape (pixels, pixels, 3), channels last, and their labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(count, pixels, pixels, 3))
    return images.astype(np.float32), random.integers(0, 1000, count)


def flax_tree(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by name as the tree that Flax makes of them: a ``weight`` is a ``kernel``."""
    root: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        tree = root
        for key in path:
            tree = tree.setdefault(key, {})
        tree[leaf.replace("weight", "kernel")] = array
    return root


def over_turns(theirs: Iterable[float], ours: Iterable[float]) -> float:
    """Return times as a multiple of others: the median over the turns, compared one by one."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def grid(rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; its second row says how columns are aligned."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
