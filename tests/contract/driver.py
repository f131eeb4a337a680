"""What the contract asks of a framework: NumPy arrays go in, NumPy arrays come out.

Images are ``n h w c``, weights have the neutral layout, and dtypes have NumPy's names; ``bfloat16``
is that of ``ml_dtypes``, and ``mixed_bfloat16`` stores float32 and computes in bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from agc import AGC
from agc import nfnet as core
from agc.recipe import Recipe
from agc.training import Launch, Trainer
from agc.verification import Verification
from agc_conformance.backend import Backend
from tests.helpers import Array


@dataclass(frozen=True)
class Outputs:
    """A model on a batch; the loss has label smoothing."""

    loss: Any
    logits: Array
    gradients: Mapping[str, Array]
    features: Mapping[str, Array]
    signals: Mapping[str, Array]


@dataclass(frozen=True)
class SamProblem:
    """A rule and a loss ``loss(xp, weights, *batch)``, where ``xp`` is like NumPy."""

    rule: Any
    loss: Callable[..., Any]
    weights: Mapping[str, Array]
    batch: Sequence[Array] = ()
    step: int | None = None


@dataclass(frozen=True)
class Sharpened:
    """A sharpness-aware gradient; of complex weights, it is the steepest ascent."""

    loss: float
    perturbed_loss: float
    norm: float
    gradients: Mapping[str, Array]


class Optimizer(ABC):
    """The recipe's optimizer of one model."""

    @abstractmethod
    def step(self, images: Array, labels: Array) -> float:
        """Train on a batch in evaluation mode, and return the loss before the step."""

    @abstractmethod
    def update(self, gradient: float) -> None:
        """Step with gradients that are this number everywhere."""

    @abstractmethod
    def total(self) -> Any:
        """Return the telemetry of the last step, over all parameters."""

    @abstractmethod
    def has_momentum(self) -> bool:
        """Tell whether something is kept for each weight."""


class Driver(ABC):
    """One framework.

    Attributes
    ----------
    adapter : module
        The adapter, whose ``to_neutral``, ``from_neutral`` and ``plan`` are the same everywhere.
    channels_first : bool
        The framework's own layout: images ``n c h w`` and weights ``o i h w``, or ``n h w c`` and
        ``h w i o``.
    norm_names : tuple of str
        Names of batch normalisation's gain, bias, running mean and running variance.
    unbiased : bool
        Whether a running variance is the mean of unbiased ones.
    modes : tuple of str
        Ways to compute gradients of the same model.
    dtypes : tuple of str
        What models are folded in.
    ways : tuple of str
        Ways to run the same optimizer.
    exported_sizes : tuple of (int, int, int)
        Images, height and width that one exported program takes.
    sam_modes : tuple of str
        Ways to compute sharpness-aware gradients, ``eager`` and ``traced``.
    backend : type
        The adapter's backend of the suite.
    clip_ways : tuple of str
        Ways to clip gradients by hand; the first is that of the suite.
    accurate_ways : tuple of str
        Those which are as accurate on this machine as on the one that they are made for.
    """

    adapter: ModuleType
    norm_names: tuple[str, str, str, str]
    unbiased = False
    backend: type[Backend]
    clip_ways: tuple[str, ...] = ("by hand",)
    accurate_ways: tuple[str, ...] = ("by hand",)
    channels_first = False
    modes: tuple[str, ...] = ("plain",)
    dtypes: tuple[str, ...] = ("float64", "float32")
    ways: tuple[str, ...] = ("plain",)
    exported_sizes: tuple[tuple[int, int, int], ...] = ((2, 20, 27), (1, 20, 27))
    sam_modes: tuple[str, ...] = ("eager",)

    # Models

    @abstractmethod
    def nfnet(self, variant: Any, *arguments: Any, dtype: str, seed: int, **options: Any) -> Any:
        """Return an NFNet with random initial values."""

    def blank(self, variant: Any, *arguments: Any, dtype: str = "float32", **options: Any) -> Any:
        """Return an NFNet whose values do not matter."""
        return self.nfnet(variant, *arguments, dtype=dtype, seed=0, **options)

    @abstractmethod
    def abstract(self, variant: Any, **options: Any) -> Any:
        """Return an NFNet of shapes, without values."""

    def seeded(self, variant: Any = "tiny", dtype: str = "float64", **options: Any) -> Any:
        """Return an NFNet with the parameters that every framework can make."""
        model = self.blank(variant, dtype=dtype, **options)
        classes, channels = model.options.num_classes, model.options.in_channels
        self.adapter.from_neutral(model, core.seeded_parameters(variant, classes, channels))
        return model

    @abstractmethod
    def two_layers(self) -> Any:
        """Return a model with dense layers from 3 to 4 and from 4 to 2, which declares no head."""

    @abstractmethod
    def own_layer(self, shape: tuple[int, ...]) -> type[Any]:
        """Return a new type of layers, made without arguments, with a weight called ``table``."""

    # What they are made of

    @abstractmethod
    def parameters(self, model: Any) -> Mapping[str, Any]:
        """Return the parameters by name, in the framework's layout, without gradients."""

    @abstractmethod
    def layers(self, model: Any) -> list[Any]:
        """Return the layers, and the layers in these, in order."""

    @abstractmethod
    def conv(
        self, conv: core.Conv, ws_eps: str, dtype: str, values: Mapping[str, Array], **options: Any
    ) -> Any:
        """Return a convolution with standardised weights whose weight, gain and bias are these."""

    @abstractmethod
    def standardised(self, conv: Any) -> Array:
        """Return its standardised weight."""

    def canonical(self, name: str) -> str:
        """Return a name of a batch-normalised twin as ``stem.conv0.gain``, ``.mean`` and so on."""
        owner, norm, own = name.rpartition(".norm.")
        ours = dict(zip(self.norm_names, ("gain", "bias", "mean", "variance"), strict=True))
        return f"{owner}.{ours[own]}" if norm else name

    @abstractmethod
    def norms(self, twin: Any) -> dict[str, Array]:
        """Return gains, biases and running statistics of a twin by their canonical names."""

    @abstractmethod
    def set_norms(self, twin: Any, values: Mapping[str, Array]) -> None:
        """Set what :meth:`norms` returns."""

    @abstractmethod
    def standardised_in_bfloat16(self, conv: Any, gradient: Array) -> tuple[Array, Array, Array]:
        """Return its weight for a convolution in bfloat16, and the gradients of weight and gain."""

    @abstractmethod
    def activation(self, name: str, x: Array) -> Array:
        """Return an activation's values."""

    # How gradients are clipped

    @contextmanager
    def clipping(self, way: str) -> Iterator[Backend]:
        """Give a backend whose ``clip`` goes this way."""
        yield self.backend()

    @abstractmethod
    def integer(self, value: int) -> Any:
        """Return the framework's own scalar."""

    @abstractmethod
    def rule_takers(self) -> list[Callable[[AGC], Any]]:
        """Return everything that takes a rule for AGC, with all other arguments given."""

    @abstractmethod
    def limited_step(
        self,
        rule: AGC,
        max_norm: float,
        weights: Mapping[str, Array],
        gradients: Mapping[str, Array],
    ) -> Mapping[str, Array]:
        """Return the weights after AGC, a clip by the global norm, and SGD of learning rate 1."""

    @abstractmethod
    def logged(
        self, rule: AGC, weights: Mapping[str, Array], gradients: Mapping[str, Array]
    ) -> dict[str, float]:
        """Clip by hand, and return what a logger is given."""

    # What they compute

    def autocast(self) -> AbstractContextManager[Any]:
        """Return what a model in ``mixed_bfloat16`` is run in."""
        return nullcontext()

    @abstractmethod
    def run(self, layer: Any, x: Array, train: bool = False, **options: Any) -> Array:
        """Return what a model, block or layer makes of an array, and of other arguments."""

    @abstractmethod
    def call(self, model: Any, method: str, x: Array) -> Any:
        """Call ``__call__``, ``features`` or ``signals`` with an array as it is, in any layout."""

    @abstractmethod
    def signals(self, model: Any, images: Array) -> Mapping[str, Array]:
        """Return how signals propagate in a model."""

    @abstractmethod
    def outputs(
        self,
        model: Any,
        images: Array,
        labels: Array,
        mode: str | None = None,
        masks: core.Masks | None = None,
    ) -> Outputs:
        """Return all that a model computes; with masks in training mode, and without features."""

    def shapes(self, model: Any, images: Array, labels: Array) -> Outputs:
        """Return what has the shapes and dtypes of :meth:`outputs`."""
        return self.outputs(model, images, labels)

    @abstractmethod
    def check_gradients(self, conv: Any, images: Array) -> None:
        """Compare a convolution's derivatives with differences, as this framework does it."""

    @abstractmethod
    def export(self, model: Any, folder: Path) -> Callable[[Array], Array]:
        """Return a program that is loaded from what was saved, and takes ``exported_sizes``."""

    @abstractmethod
    def optimizer(self, model: Any, lr: float, way: str | None = None, **options: Any) -> Optimizer:
        """Return the recipe's optimizer, ``sgd_nfnet``, ready to use."""

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Return a training of a recipe, as ``agc train`` runs it."""
        module: Any = import_module(f"{self.adapter.__name__}.train")
        made: Trainer = module.trainer(recipe, launch)
        return made

    # SAM

    @abstractmethod
    def sharpen(self, problem: SamProblem, mode: str = "eager") -> Sharpened:
        """Return the gradient that a rule asks for."""

    @abstractmethod
    def verify_sam(self, problem: SamProblem) -> Verification:
        """Probe SAM, or without a rule a plain gradient."""
