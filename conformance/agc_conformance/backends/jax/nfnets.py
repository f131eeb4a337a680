"""NFNets: forward, gradients, training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx

from agc.config import AGC
from agc.nfnet import Variant
from agc_conformance.backend import (
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
)
from agc_conformance.backends.jax.device import Device
from agc_jax.clip import adaptive_clip_gradients
from agc_jax.nfnet import NFNet, nfnet
from agc_jax.optimizer import adaptive_grad_clip
from agc_jax.recipe import sgd_nfnet
from agc_jax.units import flatten, plan, units
from agc_jax.weights import from_neutral

__all__ = ["NFNets"]

Array = npt.NDArray[Any]
_RULE = AGC.profile("deepmind")


class NFNets(Device):
    """:func:`agc_jax.nfnet`, compiled."""

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run the model, compiled."""
        with self._exactly(problem):
            program, images = _program_of(problem), jnp.asarray(problem.images)
            params = program.parameters(problem.parameters)
            if not problem.outputs:
                logits = program.logits(params, program.rest, images=images)
                return ModelForward(np.asarray(logits))
            logits, outputs, signals = jax.device_get(program.forward(params, images))
            return ModelForward(logits, outputs, signals)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run forward and backward, and clip by :func:`agc_jax.adaptive_clip_gradients`."""
        with self._exactly(problem):
            program = _program_of(problem)
            params = program.parameters(problem.parameters)
            loss, gradients = program.value_and_grad(params, *_batch(problem))
            declared = units(program.model)
            clip = jax.jit(lambda g, p: adaptive_clip_gradients(g, p, _RULE, units=declared)[0])
            clipped = clip(gradients, params)
            return ModelGradients(
                float(loss), _named(gradients), _named(clipped), plan(program.model, _RULE)
            )

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Step :func:`agc_jax.sgd_nfnet`, or AGC chained with ``optax.sgd``."""
        with self._exactly(problem):
            program = _program_of(problem)
            params = program.parameters(problem.parameters)
            if recipe.optimizer == "nfnet":
                rates = jnp.asarray(recipe.rates)
                tx: Any = sgd_nfnet(program.model, lambda count: rates[count])
            else:
                clip = adaptive_grad_clip(_RULE, units=units(program.model))
                tx = optax.chain(clip, optax.sgd(recipe.rates[0], momentum=recipe.momentum))

            @jax.jit  # type: ignore[untyped-decorator]
            def update(gradients: Any, state: Any, params: Any) -> Any:
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            batch, state = _batch(problem), tx.init(params)
            for _ in recipe.rates:
                loss, gradients = program.value_and_grad(params, *batch)
                params, state = update(gradients, state, params)
                yield ModelStep(float(loss), _named(params))

    @contextmanager
    def _exactly(self, problem: ModelProblem) -> Iterator[None]:
        """Compute a float64 model in float64, and matrix products of float32 in full precision."""
        with self.place([problem.images]), jax.default_matmul_precision("highest"):
            yield


class _Program:
    """A model, split into a graph and parameters, and its compiled functions of the parameters."""

    def __init__(
        self, variant: str | Variant, classes: int, dtype: str, stochastic_depth: float | None
    ) -> None:
        self.model: NFNet = nfnet(
            variant,
            classes,
            rngs=nnx.Rngs(0),
            dropout=0.0,
            stochastic_depth=stochastic_depth,
            param_dtype=dtype,
        )
        if stochastic_depth is None:
            self.model.eval()
        self.graph, _, self.rest = nnx.split(self.model, nnx.Param, ...)
        self.logits = jax.jit(lambda *parts, images: nnx.merge(self.graph, *parts)(images))
        self.forward = jax.jit(self._forward)
        self.value_and_grad = jax.jit(jax.value_and_grad(self._loss))

    def parameters(self, arrays: Any) -> Any:
        """Return parameters in the model's own form."""
        from_neutral(self.model, arrays)
        return nnx.state(self.model, nnx.Param)

    def _merge(self, params: Any) -> NFNet:
        model: NFNet = nnx.merge(self.graph, params, self.rest)
        return model

    def _forward(self, params: Any, images: jax.Array) -> Any:
        model = self._merge(params)
        outputs = {"stem": (x := model.stem(images))}
        for number, stage in enumerate(model.stages):
            for place, block in enumerate(stage):
                outputs[f"stages.{number}.{place}"] = (x := block(x))
        return model(images), outputs, model.signals(images)

    def _loss(
        self, params: Any, images: jax.Array, labels: jax.Array, smoothing: float
    ) -> jax.Array:
        logits = self._merge(params)(images)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), smoothing
        )
        return optax.softmax_cross_entropy(logits, targets).mean()


_program = lru_cache(maxsize=4)(_Program)


def _program_of(problem: ModelProblem) -> _Program:
    classes = len(problem.parameters["head.bias"])
    return _program(problem.variant, classes, problem.dtype, problem.stochastic_depth)


def _batch(problem: ModelProblem) -> tuple[jax.Array, jax.Array, float]:
    return jnp.asarray(problem.images), jnp.asarray(problem.labels), problem.smoothing


def _named(tree: Any) -> dict[str, Array]:
    """Return arrays by canonical name; Flax's layout is the neutral one."""
    names, leaves, _ = flatten(tree)
    return dict(zip(names, jax.device_get(leaves), strict=True))
