"""AGC in JAX: ours and ``optax.adaptive_grad_clip``, both jitted with donated gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agc_jax
from agc import AGC
from benchmarks.common import flax_tree
from benchmarks.gpu.conditions import (
    CLIPPING,
    CONDITIONS,
    COPIED,
    DTYPES,
    Truth,
    drawn,
    least_bytes,
    louder,
    samples,
    shapes_of,
    with_ratios,
)
from benchmarks.gpu.race import Contestant, DoesNotApply, Entry, HostClock, Outcome
from benchmarks.gpu.results import Job, Results
from benchmarks.shapes import MODELS, declared, out_last

__all__ = ["measure"]


def measure(job: Job, results: Results) -> None:
    """Time clipping alone; one program of each contestant serves all shares of clipped units."""
    _choose_device(job)
    clock = HostClock(jax.block_until_ready)
    with ThreadPoolExecutor() as pool:  # nothing is timed before everything is compiled
        clippings = {
            (dtype, model): _Clipping(model, dtype, job, pool)
            for dtype in DTYPES
            for model in MODELS
        }
    for (dtype, model), clipping in clippings.items():
        for condition in CONDITIONS:
            clipping.set_condition(condition)
            outcomes = results.race(clipping.entries(), clock, job.effort(4, 6))
            # Results are new arrays or donated ones, written whatever is clipped.
            needs = dict.fromkeys(("agc", "optax"), least_bytes(clipping.size, 1.0))
            results.add(
                model=model,
                dtype=dtype,
                condition=condition,
                base="agc",
                contestants=with_ratios(outcomes, needs, "agc"),
            )


def _choose_device(job: Job) -> None:
    try:
        jax.config.update("jax_default_device", jax.devices(job.device)[0])
    except RuntimeError as error:
        raise DoesNotApply(f"JAX {jax.__version__} sees no {job.device} device: {error}") from None


class _Clipping:
    """Parameters and gradients as Flax trees, and the contestants' compiled programs."""

    def __init__(self, model: str, dtype: str, job: Job, pool: Executor) -> None:
        self._dtype, self._job = dtype, job
        shapes = shapes_of(model, tiny=job.tiny)
        self._shapes = {name: out_last(name, shape) for name, shape in shapes.items()}
        pairs = drawn(tuple(self._shapes.items()))
        self._loud = {name: gradient for name, (_, gradient) in pairs.items()}
        self._weights = {name: jnp.asarray(weight, dtype) for name, (weight, _) in pairs.items()}
        self._parameters = flax_tree(self._weights)
        self.size = sum(weight.nbytes for weight in self._weights.values())
        self._given: dict[str, jax.Array] = {}
        self._fresh: Any = None
        rule = AGC(clipping=CLIPPING, units=declared(shapes, "... i o -> o", "kernel"))
        clips = {
            "agc": agc_jax.adaptive_grad_clip(rule, units=agc_jax.units(self._parameters)),
            "optax": optax.adaptive_grad_clip(CLIPPING),
        }
        self._programs = {
            name: pool.submit(_compiled, clip, self._weights, self._parameters)
            for name, clip in clips.items()
        }

    def set_condition(self, condition: str) -> None:
        """Choose which units are clipped from now on."""
        self._given = {
            name: jnp.asarray(loud * self._louder(name, condition, seed), self._dtype)
            for seed, (name, loud) in enumerate(self._loud.items())
        }
        # Embeddings are left out: their units are columns in optax.
        names = [name for name in samples(self._shapes) if not name.endswith("embedding")]
        pairs = {
            name: (_numbers(self._weights[name]), _numbers(self._given[name])) for name in names
        }
        units = {n: "... o -> o" if w.ndim > 1 else "... ->" for n, (w, _) in pairs.items()}
        self._truth = Truth(pairs, units, self._dtype)

    def entries(self) -> dict[str, Entry]:
        return {
            "agc": lambda: self._entry("agc"),
            "optax": lambda: self._entry("optax"),
            "copy": self._copy,
        }

    def _louder(self, name: str, condition: str, seed: int) -> Any:
        axis = 0 if name.endswith("embedding") else -1
        return louder(self._shapes[name], axis, condition, seed)

    def _refresh(self) -> None:
        self._fresh = jax.block_until_ready({n: g.copy() for n, g in self._given.items()})

    def _entry(self, name: str) -> Contestant:
        program = self._programs[name].result()
        clipped: list[Any] = []

        def run() -> Any:
            clipped[:] = [program(self._fresh)]
            return clipped[0]

        def check() -> Outcome:
            compare = self._truth.compare if name == "agc" else self._truth.deviation
            return compare(lambda leaf: _numbers(_leaf(clipped[0], leaf)))

        return Contestant(run, self._refresh, check)

    def _copy(self) -> Contestant:
        size = 1 << 16 if self._job.tiny else COPIED
        source = jnp.ones(size // 4, jnp.float32)
        program = jax.jit(lambda x: x + 1)  # a copy, of which no compiler makes an alias
        return Contestant(lambda: program(source), check=lambda: {"copied_bytes": size})


def _compiled(clip: Any, gradients: Any, parameters: Any) -> Callable[[Any], Any]:
    """Compile a clip of gradients by name, which are donated and look like these."""
    state = clip.init(parameters)

    def update(gradients: Any, state: Any, parameters: Any) -> Any:
        return clip.update(flax_tree(gradients), state, parameters)[0]

    lowered = jax.jit(update, donate_argnums=0).lower(gradients, state, parameters)
    program = lowered.compile()
    return lambda fresh: program(fresh, state, parameters)


def _numbers(array: jax.Array) -> Any:
    """Return an array's values in float64."""
    return np.asarray(array, np.float64)


def _leaf(tree: Any, name: str) -> Any:
    """Return what :func:`benchmarks.common.flax_tree` put under a name."""
    return reduce(operator.getitem, name.replace("weight", "kernel").split("."), tree)
