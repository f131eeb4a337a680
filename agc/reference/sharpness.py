"""The executable definition of sharpness-aware minimization.

Sources: Foret et al., arXiv:2010.01412, Eq. 2; Kwon et al., arXiv:2102.11600, Eq. 7 (ASAM); Brock
et al., arXiv:2102.06171, appendix A.4 (ascent on a fraction of the same batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.checks import check_count, check_microbatches, check_step
from agc.config import SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError
from agc.reference.clipping import widen
from agc.selectors import perturbed_names

__all__ = ["GradientFunction", "SharpnessAware", "perturbation", "sharpness_aware_gradients"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
GradientFunction = Callable[[Arrays, Sequence[Array]], tuple[float, Mapping[str, Array | None]]]
"""Weights and a batch (arrays that share their first axis) to the mean loss and its gradients."""


@dataclass(frozen=True)
class SharpnessAware:
    """The gradient that the optimizer receives, and the numbers behind it.

    Attributes
    ----------
    loss : float
        Clean loss, at the weights themselves, of the examples that the first pass saw. (SAM-12)
    perturbed_loss : float
        Loss of the whole batch at the perturbed weights; equal to ``loss`` in a plain step.
    gradients : mapping of name to array or None
        Descent gradient; empty if the step is to be skipped.
    norms : tuple of float
        Norm of every ascent gradient: one for each replica and micro-batch; empty in a plain step.
    skipped : bool
        Whether the non-finite policy asks for no optimizer step at all. (SAM-5)
    """

    loss: float
    perturbed_loss: float
    gradients: dict[str, Array | None]
    norms: tuple[float, ...]
    skipped: bool = False


def perturbation(
    gradients: Mapping[str, Array | None], weights: Arrays, rule: SAM, *, step: int = 0
) -> tuple[dict[str, Array], float]:
    r"""Perturbation of the weights, and the norm that it was divided by (SAM-1, SAM-2, SAM-10).

    Parameters
    ----------
    gradients : mapping of name to array or None
        Ascent gradients; a parameter without one is not perturbed (SAM-4).
    weights : mapping of name to array
        All parameters.
    rule : SAM
        The configuration.
    step : int, default 0
        The optimizer step, for schedules of rho.

    Returns
    -------
    e : dict of name to array of float64 or complex128
        Perturbation of every selected parameter that has a gradient. Zero if the norm is zero.
    norm : float
        Global L2 norm of the (for ASAM: rescaled) gradient. Not finite if any value is not: then
        ``e`` is all NaN, and the caller's policy decides (SAM-5).

    Raises
    ------
    ConfigError
        If the step is not an integer from 0 on, or rho's schedule gives no finite number above 0.
    SelectorError
        If nothing is left to perturb, or a pattern matches nothing.
    MissingGradientError
        If no selected parameter has a gradient.

    Notes
    -----
    ``e = rho * T^2 g / norm(T g)`` with ``T = 1``, or for ASAM ``T = |w| + eta`` in parameters of
    two or more axes. Like the norms of AGC, this norm is divided by the largest magnitude before
    squaring.
    """
    step = check_step(step)
    scales: dict[str, Array] = {}
    directions: dict[str, Array] = {}
    for name in perturbed_names(weights, rule):
        gradient = gradients.get(name)
        if gradient is None:
            continue
        g, w = widen("gradient", gradient), widen("weight", weights[name])
        matrix = rule.adaptive and w.ndim >= 2
        scales[name] = np.abs(w) + rule.eta if matrix else np.ones(w.shape)
        directions[name] = scales[name] * g
    if not directions:
        raise MissingGradientError(
            "no perturbed parameter has a gradient after the first pass; the closure must call "
            "backward, and only/exclude must leave parameters that take part in the loss"
        )
    norm = _global_norm(directions.values())
    if norm == 0:
        return {name: np.zeros_like(direction) for name, direction in directions.items()}, norm
    if not math.isfinite(norm):
        return {name: np.full_like(d, np.nan) for name, d in directions.items()}, norm
    factor = rule.radius(step) / (norm + rule.eps)
    return {name: factor * scales[name] * directions[name] for name in directions}, norm


def _global_norm(arrays: Iterable[Array]) -> float:
    flat = np.concatenate([np.abs(array).ravel() for array in arrays])
    largest = float(np.max(flat, initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.sum((flat / largest) ** 2)))


def sharpness_aware_gradients(
    gradient_function: GradientFunction,
    weights: Arrays,
    batch: Sequence[Array],
    rule: SAM,
    *,
    step: int = 0,
    replicas: int = 1,
) -> SharpnessAware:
    """Gradient at the perturbed weights (SAM-1 to SAM-12).

    Parameters
    ----------
    gradient_function : callable
        Weights and a batch to the mean loss and its gradients.
    weights : mapping of name to array
        The parameters; they are not changed (SAM-3).
    batch : sequence of arrays, each of shape (examples, ...)
        One batch; inputs and labels, for example.
    rule : SAM
        The configuration.
    step : int, default 0
        The optimizer step, for schedules and ``every``.
    replicas : int, default 1
        Data-parallel replicas, each with an equal part of the batch, in order (SAM-9).

    Returns
    -------
    SharpnessAware
        Gradients in float64 or complex128.

    Raises
    ------
    ConfigError
        If the batch is not divisible by the replicas, a micro-batch would be empty, or the step is
        not an integer from 0 on.
    NonFiniteError
        If ``rule.nonfinite`` is ``"raise"`` and the norm of an ascent gradient is not finite.

    Notes
    -----
    With ``scope="local"``, R replicas are R micro-batches: each has its own perturbation.
    """
    step, replicas = check_step(step), check_count("replicas", replicas)
    weights = {name: widen("weight", weight) for name, weight in weights.items()}
    examples = len(batch[0])
    if examples % replicas:
        raise ConfigError(
            f"a batch of {examples} examples cannot be split over {replicas} replicas"
        )
    if not rule.perturbs(step):
        loss, gradients = gradient_function(weights, batch)
        return SharpnessAware(loss, loss, dict(gradients), ())
    check_microbatches(rule.microbatches, examples // replicas, " of a replica's batch")
    # rows[replica][microbatch]: the examples of one perturbation
    rows = [
        np.array_split(part, rule.microbatches) for part in np.split(np.arange(examples), replicas)
    ]
    losses: list[tuple[int, float]] = []
    perturbed_losses: list[tuple[int, float]] = []
    descents: list[tuple[int, Mapping[str, Array | None]]] = []
    norms: list[float] = []
    for micro in range(rule.microbatches):
        ascents: list[tuple[int, Mapping[str, Array | None]]] = []
        for replica in rows:
            first = replica[micro][: math.ceil(rule.fraction * len(replica[micro]))]  # SAM-7
            loss, ascent = gradient_function(weights, [array[first] for array in batch])
            losses.append((len(first), loss))
            ascents.append((len(first), ascent))
        if rule.scope == "global":
            ascents = [(1, _mean(ascents))] * replicas
        for replica, (_, ascent) in zip(rows, ascents, strict=True):
            e, norm = perturbation(ascent, weights, rule, step=step)
            norms.append(norm)
            if not math.isfinite(norm):
                if rule.nonfinite == "raise":
                    raise NonFiniteError(f"the norm of the ascent gradient is {norm}")
                if rule.nonfinite == "skip_step":
                    return SharpnessAware(
                        _average(losses), math.nan, {}, tuple(norms), skipped=True
                    )
                e = {}
            moved = {name: w + e[name] if name in e else w for name, w in weights.items()}
            part = [array[replica[micro]] for array in batch]
            loss, descent = gradient_function(moved, part)
            perturbed_losses.append((len(part[0]), loss))
            descents.append((len(part[0]), descent))
    return SharpnessAware(
        _average(losses), _average(perturbed_losses), _mean(descents), tuple(norms)
    )


def _average(values: list[tuple[int, float]]) -> float:
    return sum(n * value for n, value in values) / sum(n for n, _ in values)


def _mean(parts: list[tuple[int, Mapping[str, Array | None]]]) -> dict[str, Array | None]:
    """Mean of gradients by example count; None only where every part is None (SAM-8)."""
    total = sum(n for n, _ in parts)
    mean: dict[str, Array | None] = {}
    for name in parts[0][1]:
        pairs = [(n, gradients[name]) for n, gradients in parts]
        present = [n / total * g for n, g in pairs if g is not None]
        mean[name] = np.sum(present, axis=0) if present else None
    return mean
