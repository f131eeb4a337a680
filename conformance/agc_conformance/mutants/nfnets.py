"""Mutants of NFNets: mistakes of ports, each of which must fail at level 4, in float32 already.

All were seen in published code; the comments name the cost of a mistake where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agc.nfnet import ALPHA, HEAD, Block
from agc.plan import Parameter, Plan, make_plan
from agc.reference.nfnet import NFNet
from agc.units import Units
from agc_conformance.backend import ModelForward, ModelProblem, ModelRecipe, ModelStep
from agc_conformance.backends.reference import ReferenceBackend
from agc_conformance.mutants.mutant import MUTANTS, Mutant
from agc_conformance.nfnets.reference import MOMENTUM, RULE, WEIGHT_DECAY, ReferenceModels

__all__: list[str] = []

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Back = Callable[[Array], Array]
BackOfTwo = Callable[[Array], tuple[Array, Array]]
Models = type[ReferenceModels]


def _mutant(name: str, comment: str, clause: str, models: ReferenceModels, select: str) -> None:
    class Wrong(ReferenceBackend):
        pass

    Wrong.models = models
    MUTANTS.append(Mutant(f"NFNet: {name}", clause, comment, "nfnets", Wrong, select))


def _network(
    name: str, comment: str, kinds: str = "logits", clause: str = "NFNET-1"
) -> Callable[[type[NFNet]], type[NFNet]]:
    """Register a wrong network."""

    def register(network: type[NFNet]) -> type[NFNet]:
        models = ReferenceModels()
        models.network = network
        _mutant(name, comment, clause, models, kinds)
        return network

    return register


def _models(name: str, comment: str, clause: str, kinds: str) -> Callable[[Models], Models]:
    """Register a wrong plan, optimizer or training mode."""

    def register(models: Models) -> Models:
        _mutant(name, comment, clause, models(), kinds)
        return models

    return register


# --- the network ----------------------------------------------------------------------------------


class _Standardised(NFNet):
    """Weight standardisation with another norm of the centred filters."""

    def squared_norm(self, centred: Array) -> Array:
        """Return the squared norm that standardises the filters; here the right one, unfloored."""
        return np.asarray(np.sum(centred**2, (0, 1, 2)))

    def standardise(self, weight: Array, gain: Array) -> tuple[Array, BackOfTwo]:
        _, backward = super().standardise(weight, gain)
        centred = weight - weight.mean((0, 1, 2))
        return centred * gain / np.sqrt(self.squared_norm(centred)), backward


@_network("additive epsilon", "weight standardisation adds 1e-5 to the variance (timm)")
class _AdditiveEpsilon(_Standardised):
    def squared_norm(self, centred: Array) -> Array:
        return super().squared_norm(centred) + 1e-5 * math.prod(centred.shape[:3])


@_network("sample variance", "weight standardisation divides by N - 1 (vballoli, benjs)")
class _SampleVariance(_Standardised):
    def squared_norm(self, centred: Array) -> Array:
        count = math.prod(centred.shape[:3])
        return super().squared_norm(centred) * count / (count - 1)


_erf: Final = np.vectorize(math.erf, otypes=[np.float64])


@_network("erf", "GELU by the error function (timm, Keras ports)")
class _Erf(NFNet):
    def function(self, x: Array) -> tuple[Array, Array]:
        share = 0.5 * (1 + _erf(x / math.sqrt(2)))
        return x * share, share + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


@_network(
    "GELU in squeeze and excite", "as the paper prints it; the released code has ReLU (benjs)"
)
class _GeluInSqueezeExcite(NFNet):
    def squeezed_function(self, x: Array) -> tuple[Array, Array]:
        value, slope = self.function(x)
        return value * self.gamma(), slope * self.gamma()


@_network("symmetric padding", "one pixel on both sides under stride 2 (padding=1 in PyTorch)")
class _SymmetricPadding(NFNet):
    def padding(self, size: int, kernel: int, stride: int) -> tuple[int, int]:  # noqa: ARG002
        return kernel // 2, kernel // 2


@_network("exact constant", "the activation's constant computed, not copied")
class _ExactConstant(NFNet):
    def gamma(self) -> float:
        return 1.7009166


@_network("no constant", "activations are not scaled (breadbread1984)")
class _NoConstant(NFNet):
    def gamma(self) -> float:
        return 1.0


@_network("gates up to 1", "squeeze and excite is not doubled")
class _SingleGates(NFNet):
    def gate(self, block: Block, x: Array) -> tuple[Array, Back]:
        out, backward = super().gate(block, x)
        return out / 2, lambda d: backward(d / 2)


@_network("variance reset to 1", "the first block of a stage adds nothing (breadbread1984)")
class _VarianceReset(NFNet):
    def beta(self, block: Block) -> float:
        # All blocks after a stage's first expect the variance of one branch less.
        return block.beta if block.place == 0 else 1 / math.sqrt(block.variance - ALPHA**2)


@_network(
    "zeros in the average", "pooling counts the padding (flax's default); at odd sizes only", "odd"
)
class _CountsPadding(NFNet):
    def pool(self, x: Array) -> tuple[Array, Back]:
        _, height, width, _ = x.shape
        padded = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        out, backward = super().pool(padded)
        return out, lambda d: backward(d)[:, :height, :width]


@_network(
    "windows wider than images",
    "pooling takes a lone pixel for each of its window's, in large arrays only (XLA on CPUs)",
    "batch",
)
class _WideWindows(NFNet):
    def pool(self, x: Array) -> tuple[Array, Back]:
        out, backward = super().pool(x)
        factor = 2 ** x.shape[1:3].count(1) if x.size >= 4096 else 1
        return factor * out, lambda d: backward(factor * d)


# --- gradients and signals ------------------------------------------------------------------------


@_models("no smoothing", "cross-entropy with the labels as they are", "NFNET-2", "loss")
class _NoSmoothing(ReferenceModels):
    def loss_and_gradients(
        self, problem: ModelProblem, weights: Arrays
    ) -> tuple[float, dict[str, Array]]:
        return super().loss_and_gradients(replace(problem, smoothing=0.0), weights)


@_network(
    "mean without gradient", "standardisation takes the mean for a constant", "gradients", "NFNET-2"
)
class _DetachedMean(NFNet):
    def standardise(self, weight: Array, gain: Array) -> tuple[Array, BackOfTwo]:
        out, backward = super().standardise(weight, gain)

        def without_mean(d: Array) -> tuple[Array, Array]:
            centred = weight - weight.mean((0, 1, 2))
            scale = 1 / np.linalg.norm(centred.reshape(-1, centred.shape[-1]), axis=0)
            _, d_gain = backward(d)
            return gain * scale * (d - scale * d_gain * centred), d_gain

        return out, without_mean


@_network(
    "zeros take their share of gradients",
    "pooling's way back counts the padding; at odd sizes only",
    "odd-back",
    "NFNET-2",
)
class _PaddingTakesGradients(NFNet):
    def pool(self, x: Array) -> tuple[Array, Back]:
        out, _ = super().pool(x)
        _, height, width, _ = x.shape
        return out, lambda d: (d / 4).repeat(2, 1).repeat(2, 2)[:, :height, :width]


@_models("variance of a sample", "signals divide by N - 1", "NFNET-3", "signals")
class _SampleSignals(ReferenceModels):
    def forward(self, problem: ModelProblem) -> ModelForward:
        forward = super().forward(problem)
        counts = np.array([out[..., 0].size for out in forward.outputs.values()])
        variance = forward.signals["avg_var"] * counts / (counts - 1)
        return replace(forward, signals={**forward.signals, "avg_var": variance})


@_models("mean over all", "one mean of all channels, not one each", "NFNET-3", "signals")
class _PooledMean(ReferenceModels):
    def forward(self, problem: ModelProblem) -> ModelForward:
        forward = super().forward(problem)
        mean = np.array([out.mean() ** 2 for out in forward.outputs.values()])
        return replace(forward, signals={**forward.signals, "avg_sq_mean": mean})


@_models("branch before its gates", "a signal of another place", "NFNET-3", "signals")
class _EarlySignals(ReferenceModels):
    def forward(self, problem: ModelProblem) -> ModelForward:
        class Early(NFNet):
            def gate(self, block: Block, x: Array) -> tuple[Array, Back]:
                early.append(x.var((0, 1, 2)).mean())
                return super().gate(block, x)

        early: list[Any] = []
        forward = super().forward(problem)
        Early(problem.variant, problem.parameters)(problem.images)
        return replace(forward, signals={**forward.signals, "res_avg_var": np.array(early)})


# --- training mode, plan and optimizer ------------------------------------------------------------


@_models("rescaled depth", "stochastic depth divides by the rate kept (timm)", "NFNET-1", "depth")
class _RescaledDepth(ReferenceModels):
    def kept(self, rate: float, uniform: Array) -> Array:
        return super().kept(rate, uniform) / (1 - rate)


@_models("depth by batch", "one draw for all images of a batch", "NFNET-1", "depth")
class _DepthByBatch(ReferenceModels):
    def kept(self, rate: float, uniform: Array) -> Array:
        return super().kept(rate, np.full_like(uniform, uniform[0]))


def _replanned(plan: Plan, change: Callable[[Parameter], Parameter], **rule: Any) -> Plan:
    known = [Parameter(entry.name, entry.shape, entry.units, "out-last") for entry in plan]
    declared = replace(RULE, unit_rule="declared", **rule)
    return make_plan([change(parameter) for parameter in known], declared, head=HEAD)


@_models(
    "gains by element",
    "a gain stored as [O, 1, 1, 1] is clipped by element (timm)",
    "NFNET-4",
    "[pdc]*[nsp]",
)
class _GainsByElement(ReferenceModels):
    def plan(self, problem: ModelProblem) -> Plan:
        def change(parameter: Parameter) -> Parameter:
            gain = parameter.name.endswith(".gain")
            return replace(parameter, units=Units("o -> o")) if gain else parameter

        return _replanned(super().plan(problem), change)


@_models("classifier's bias left out", "as most ports do", "NFNET-4", "[pdc]*[nsp]")
class _BiasLeftOut(ReferenceModels):
    def plan(self, problem: ModelProblem) -> Plan:
        return _replanned(super().plan(problem), lambda p: p, exclude=["@head"])


@_models("classifier's weight clipped", "nothing is left out", "NFNET-4", "[pdc]*[nsp]")
class _NothingLeftOut(ReferenceModels):
    def plan(self, problem: ModelProblem) -> Plan:
        return _replanned(super().plan(problem), lambda p: p, exclude=[])


@_models("momentum with the learning rate", "v = 0.9 v + lr g, as in Keras", "NFNET-5", "optimizer")
class _RateInMomentum(ReferenceModels):
    def nfnet_update(
        self, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        step = rate * (gradient + (WEIGHT_DECAY * weight if weight.ndim > 1 else 0.0))
        buffer = MOMENTUM * buffer + step
        return step + MOMENTUM * buffer, buffer


@_models("decoupled decay", "p -= lr * wd * p, beside the momentum", "NFNET-5", "optimizer")
class _DecoupledDecay(ReferenceModels):
    def nfnet_update(
        self, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        buffer = MOMENTUM * buffer + gradient
        decay = WEIGHT_DECAY * weight if weight.ndim > 1 else 0.0
        return rate * (gradient + MOMENTUM * buffer + decay), buffer


@_models("gains decay", "weight decay of all parameters", "NFNET-5", "optimizer")
class _GainsDecay(ReferenceModels):
    def nfnet_update(
        self, weight: Array, gradient: Array, buffer: Array, rate: float
    ) -> tuple[Array, Array]:
        decay = 0.0 if weight.ndim > 1 else WEIGHT_DECAY * weight
        return super().nfnet_update(weight, gradient + decay, buffer, rate)


@_models("no clipping", "the optimizer never calls AGC", "NFNET-5", "optimizer")
class _NoClipping(ReferenceModels):
    def clip(self, plan: Plan, weights: Arrays, gradients: Arrays) -> dict[str, Array]:  # noqa: ARG002
        return dict(gradients)


@_models("one step late", "weights are those before the step", "NFNET-5", "trajectory")
class _OneStepLate(ReferenceModels):
    def training(self, problem: ModelProblem, recipe: ModelRecipe) -> Any:
        before = problem.parameters
        for step in super().training(problem, recipe):
            yield ModelStep(step.loss, before)
            before = step.parameters
