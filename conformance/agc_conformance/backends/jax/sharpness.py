"""SAM as a function of the loss, and in front of optax."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import serialization
from jax.sharding import AxisType, PartitionSpec

from agc.config import SAM
from agc.selectors import perturbed_names
from agc_conformance.backend import (
    Examples,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    Unsupported,
)
from agc_conformance.backends.jax.clipping import optax_sgd
from agc_conformance.backends.jax.device import Device
from agc_jax.optimizer import adaptive_grad_clip
from agc_jax.sam import sam_value_and_grad

__all__ = ["Sharpness"]

Array = npt.NDArray[Any]
Batch = tuple[Mapping[str, Any], Mapping[str, Any]]


class Sharpness(Device):
    """SAM by :func:`agc_jax.sam_value_and_grad`."""

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compile with the step as a constant."""
        with self.place(problem.parameters.values()):
            return _sharpen(problem)

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compile with the step as an argument."""
        with self.place(problem.parameters.values()):
            return _sharpen(problem, traced=True)

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Scale the loss and unscale the gradients by hand, as around any ``value_and_grad``."""
        with self.place(problem.parameters.values()):
            return _scaled(problem, float(scale))

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Run under ``shard_map``, one share of the batch on each device."""
        with self.place(problem.parameters.values()):
            return _replicas(problem, self._devices[:replicas], replicas)

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Raise Unsupported: JAX keeps no gradients between steps."""
        raise Unsupported("in JAX gradients are values: none is left from an earlier step")

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Differentiate by the other parameters only; the loss closes over the fixed ones."""
        with self.place(problem.parameters.values()):
            return _fixed(problem, {*frozen, *absent})

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Thread the number through the loss, as Flax does with statistics."""
        with self.place(problem.parameters.values()):
            return _stateful(problem)

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Take jitted steps with ``optax.sgd`` behind AGC; optax skips non-finite ones."""
        with self.place(task.problem.parameters.values()):
            return _trajectory(task)


def _sharpen(problem: SharpnessProblem, *, traced: bool = False) -> SharpnessOutcome:
    """Call :func:`agc_jax.sam_value_and_grad`, with the step traced or as a constant."""
    if not set(perturbed_names(problem.parameters, problem.rule)) & set(
        problem.examples.curvatures
    ):
        raise Unsupported("JAX has no missing gradients, only zeros")
    function = _value_and_grad(_loss, problem.rule, return_stats=True)
    step: dict[str, Any] = {"step": problem.step}
    if not traced:
        function, step = functools.partial(function, **step), {}
    if problem.rule.nonfinite != "raise":  # "raise" works only outside jit
        function = jax.jit(function)
    params = _tree(problem.parameters)
    loss, gradients, stats = function(params, _batch(problem.examples), **step)
    plain = not problem.rule.perturbs(problem.step)
    return SharpnessOutcome(
        _arrays(gradients),
        _arrays(params),
        float(loss),
        None if plain else float(stats.perturbed_loss),
        None if plain else float(stats.norm),
        _skipped(gradients),
    )


def _trajectory(task: SharpnessTask) -> list[Mapping[str, Array]]:
    problem = task.problem
    chain = optax_sgd(task.optimizer)
    if problem.clipping is not None:
        chain = optax.chain(adaptive_grad_clip(problem.clipping), chain)
    tx = optax.apply_if_finite(chain, max_consecutive_errors=len(task.batches))
    function = _value_and_grad(_loss, problem.rule)

    @jax.jit  # type: ignore[untyped-decorator]
    def take(training: Any, batch: Batch) -> Any:
        _, gradients = function(training["params"], batch, step=training["step"])
        updates, state = tx.update(gradients, training["state"], training["params"])
        params = optax.apply_updates(training["params"], updates)
        return {"params": params, "state": state, "step": training["step"] + 1}

    def start() -> Any:
        params = _tree(problem.parameters)
        return {"params": params, "state": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    training = start()
    steps: list[Mapping[str, Array]] = []
    for index, examples in enumerate(task.batches):
        if index == task.restart:
            training = serialization.from_bytes(start(), serialization.to_bytes(training))
        training = take(training, _batch(examples))
        steps.append({name: np.asarray(value) for name, value in training["params"].items()})
    return steps


def _loss(params: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Return the mean loss of :class:`agc_conformance.backend.Examples`."""
    curvatures, centers = batch
    losses = []
    for name, a in curvatures.items():
        away = params[name].astype(a.dtype) - centers[name]
        losses.append(jnp.sum(0.5 * a * away**2, axis=tuple(range(1, a.ndim))))
    return jnp.mean(sum(losses[1:], losses[0]))


def _value_and_grad(loss: Any, rule: SAM, **options: Any) -> Any:
    return sam_value_and_grad(loss, rule, batch_argnums=1, **options)


def _fixed(problem: SharpnessProblem, fixed: Collection[str]) -> SharpnessOutcome:
    params = _tree(problem.parameters)
    moving = {name: value for name, value in params.items() if name not in fixed}
    still = {name: value for name, value in params.items() if name in fixed}

    def loss(moving: Mapping[str, Any], batch: Batch) -> jax.Array:
        return _loss({**moving, **still}, batch)

    function = functools.partial(_value_and_grad(loss, problem.rule), step=problem.step)
    value, gradients = jax.jit(function)(moving, _batch(problem.examples))
    return SharpnessOutcome(
        {**dict.fromkeys(fixed), **_arrays(gradients)}, _arrays(params), float(value)
    )


def _stateful(problem: SharpnessProblem) -> SharpnessOutcome:
    def loss(params: Any, batch: Batch, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return state * _loss(params, batch), 2 * state

    function = functools.partial(
        jax.jit(_value_and_grad(loss, problem.rule, has_aux=True)), step=problem.step
    )
    params, batch = _tree(problem.parameters), _batch(problem.examples)
    (_, state), _ = function(params, batch, jnp.ones((), jnp.float32))
    (value, _), gradients = function(params, batch, state)
    return SharpnessOutcome(_arrays(gradients), _arrays(params), float(value))


def _scaled(problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
    params = _tree(problem.parameters)

    def scaled(params: Any, batch: Batch) -> jax.Array:
        return _loss(params, batch) * scale

    function = functools.partial(_value_and_grad(scaled, problem.rule), step=problem.step)
    value, gradients = jax.jit(function)(params, _batch(problem.examples))
    gradients = jax.tree.map(lambda g: g / scale, gradients)
    return SharpnessOutcome(
        _arrays(gradients), _arrays(params), float(value) / scale, skipped=_skipped(gradients)
    )


def _replicas(problem: SharpnessProblem, devices: Sequence[Any], replicas: int) -> SharpnessOutcome:
    if len(devices) < replicas:
        raise Unsupported(f"{replicas} replicas need as many devices, there are {len(devices)}")
    mesh = jax.make_mesh(
        (replicas,), ("replica",), axis_types=(AxisType.Auto,), devices=tuple(devices)
    )
    function = _value_and_grad(_loss, problem.rule, axis_name="replica")
    everywhere, split = PartitionSpec(), PartitionSpec("replica")
    run = jax.shard_map(
        lambda params, batch: function(params, batch, step=problem.step),
        mesh=mesh,
        in_specs=(everywhere, split),
        out_specs=everywhere,
    )
    params = _tree(problem.parameters)
    loss, gradients = jax.jit(run)(params, _batch(problem.examples))
    return SharpnessOutcome(
        _arrays(gradients), _arrays(params), float(loss), skipped=_skipped(gradients)
    )


def _skipped(gradients: Mapping[str, Any]) -> bool:
    """Tell whether the step is to be skipped: every gradient is NaN."""
    return all(bool(np.isnan(g).all()) for g in _arrays(gradients).values())


def _batch(examples: Examples) -> Batch:
    return _tree(examples.curvatures), _tree(examples.centers)


def _tree(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: jax.device_put(value) for name, value in arrays.items()}


def _arrays(tree: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.asarray(value) for name, value in tree.items()}
