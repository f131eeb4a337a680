"""The protocol of conformance backends: implementations of AGC, SAM or both, asked in NumPy arrays.

The suite hands a backend *problems* and compares its *outcomes* with :mod:`agc.reference`. Every
question is a method of :class:`Backend`: AGC asks :meth:`Backend.clip` first, SAM
:meth:`Backend.sharpen`. A method that a backend does not define raises :class:`Unsupported`, and
the report says so.

Backends register in the entry-point group ``agc.backends`` or are named on the command line as
``package.module:object``, where the object is a subclass of :class:`Backend`, any callable that
takes ``device=`` and returns one, or an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy.typing as npt

from agc.config import AGC, SAM
from agc.nfnet import Variant
from agc.plan import Plan
from agc.recipe import Recipe
from agc.reference import RowSparse, Stats
from agc.training import Launch, Trainer
from agc.units import Units

__all__ = [
    "Backend",
    "Examples",
    "Layer",
    "ModelForward",
    "ModelGradients",
    "ModelProblem",
    "ModelRecipe",
    "ModelStep",
    "Optimizer",
    "Outcome",
    "Problem",
    "SharpnessOutcome",
    "SharpnessProblem",
    "SharpnessTask",
    "TrainStep",
    "TrainingTask",
    "Unavailable",
    "Unsupported",
]

Array = npt.NDArray[Any]
Gradient = Array | RowSparse | None


class Unsupported(Exception):
    """The backend does not support the question; this is reported and never counts as passed."""


class Unavailable(Exception):
    """The backend or the device is not available on this machine."""


@dataclass(frozen=True)
class Problem:
    """Gradients to clip.

    Attributes
    ----------
    rule : AGC
        The configuration, without the units of this problem.
    parameters : mapping of name to array
        Weights, in the backend's layout and the dtype to compute in; bfloat16 is that of ml_dtypes.
    gradients : mapping of name to array, RowSparse or None
        Their gradients.
    units : mapping of name to Units
        Units of every parameter in the backend's layout.
    step : int
        Optimizer step, for schedules.
    """

    rule: AGC
    parameters: Mapping[str, Array]
    gradients: Mapping[str, Gradient]
    units: Mapping[str, Units] = field(default_factory=dict)
    step: int = 0

    @property
    def declared_rule(self) -> AGC:
        """The configuration with this problem's units as explicit declarations."""
        return replace(self.rule, units={**self.rule.units, **self.units})


@dataclass(frozen=True)
class Outcome:
    """A backend's answer to a :class:`Problem`.

    Attributes
    ----------
    gradients : mapping of name to array, RowSparse or None
        Clipped gradients, each in the dtype of the raw one.
    stats : mapping of name to Stats, optional
        Telemetry of each parameter, if the backend has it.
    """

    gradients: Mapping[str, Gradient]
    stats: Mapping[str, Stats] | None = None


@dataclass(frozen=True)
class Examples:
    """A batch for SAM, and with it the loss.

    Example ``b`` has the loss ``sum over parameters p of 0.5 * sum(a_b * (w_p - c_b)**2)``, where
    ``a_b`` is row ``b`` of the parameter's curvatures and ``c_b`` of its centers; the loss of a
    batch is the mean over its examples. It is computed in the dtype of these arrays, float32 or
    float64, to which weights in float16 and bfloat16 are cast.

    Attributes
    ----------
    curvatures, centers : mapping of name to array, shape (examples, *shape of the parameter)
        In the backend's layout. The loss does not depend on parameters that are missing here.
    """

    curvatures: Mapping[str, Array]
    centers: Mapping[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.centers.values())))


@dataclass(frozen=True)
class SharpnessProblem:
    """Weights and a batch, for one sharpness-aware gradient.

    Attributes
    ----------
    rule : SAM
        The configuration.
    parameters : mapping of name to array
        Weights, in the backend's layout and the dtype to compute in.
    examples : Examples
        The batch and its loss.
    step : int
        Optimizer step, for schedules and ``every``.
    clipping : AGC, optional
        AGC behind SAM, with the units of this problem declared; only in trajectories.
    """

    rule: SAM
    parameters: Mapping[str, Array]
    examples: Examples
    step: int = 0
    clipping: AGC | None = None


@dataclass(frozen=True)
class SharpnessOutcome:
    """A backend's answer to a :class:`SharpnessProblem`.

    Attributes
    ----------
    gradients : mapping of name to array or None
        Gradients as the optimizer receives them, in the dtype of the weights. A parameter that the
        loss does not depend on has None, or zeros if the framework has no missing gradients. Empty
        if the step is skipped.
    weights : mapping of name to array
        The weights afterwards, which must have the same bits as before.
    loss, perturbed_loss, norm : float, optional
        Clean loss of the ascent pass, loss at the perturbed weights, and norm of the ascent
        gradient (the largest, if there were several); None if the implementation does not report
        it. In a plain step only the loss is compared.
    skipped : bool
        Whether the policy for non-finite norms skips the optimizer's step.
    """

    gradients: Mapping[str, Array | None]
    weights: Mapping[str, Array]
    loss: float | None = None
    perturbed_loss: float | None = None
    norm: float | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer type of DESIGN's table of units, with sizes.

    Attributes
    ----------
    kind : str
        ``dense``, ``conv1d``, ``conv2d``, ``conv3d``, ``grouped_conv2d``, ``depthwise_conv2d``,
        ``conv_transpose1d``, ``conv_transpose2d``, ``grouped_conv_transpose2d``, ``embedding``,
        ``attention``, ``einsum``, ``lstm``, ``gru``, ``rnn``, ``bilinear``, ``hf_conv1d``,
        ``layer_norm``, ``stacked_dense``. For ``class_token``, ``temperature`` and ``unknown`` the
        layer's type is in no table; its one parameter is called ``token``, ``temperature`` or
        ``table``.
    sizes : mapping of str to int
        Sizes by axis name: ``i`` inputs and ``o`` outputs of the layer (all groups together), ``g``
        groups, and the kernel's ``w`` (1-D), ``h w`` (2-D) or ``t h w`` (3-D). Depthwise: ``c``
        channels, ``m`` multiplier. Embedding: ``v d``. Attention: ``i`` and ``o`` (both ``h * d``),
        ``h`` heads of ``d``. Einsum: ``i`` inputs to ``h d`` outputs (``...i,ihd->...hd``).
        Recurrent: ``o`` is the hidden size. Bilinear: ``i j o``. Layer norm: ``o``. Stacked:
        ``l`` layers of ``i o``. Class token: shape ``1 1 d``. Temperature: ``h 1 1``. Unknown:
        ``a b c``.
    """

    kind: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Optimizer:
    """SGD, defined so that it means the same in every framework.

    ``sgd``: ``u = g + weight_decay * w`` (if coupled), ``m = momentum * m + u``,
    ``w -= lr * (u + momentum * m if nesterov else m)``; decoupled decay subtracts
    ``lr * weight_decay * w`` (the weights before the step) as well.
    """

    lr: float
    name: Literal["sgd"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False


@dataclass(frozen=True)
class SharpnessTask:
    """Training with SAM, AGC (if asked for) and an optimizer.

    Attributes
    ----------
    problem : SharpnessProblem
        Initial weights and rules; its examples are the first batch.
    optimizer : Optimizer
        The optimizer behind them.
    batches : sequence of Examples
        One for each step; steps are counted from 0.
    restart : int, optional
        Number of steps after which everything that training needs is saved as the framework does
        it, and training goes on from there with new objects (SAM-13).
    """

    problem: SharpnessProblem
    optimizer: Optimizer
    batches: Sequence[Examples]
    restart: int | None = None


@dataclass(frozen=True)
class TrainingTask:
    """Training of the suite's small convolutional classifier on real images.

    The network, in the order of its parameters; weights are given out-first, ``(o, i, h, w)``:
    ``conv1`` (3x3, stride 1, zero padding 1 on every side), SiLU (``x * sigmoid(x)``), ``conv2``
    (3x3, stride 2, zero padding 1 on every side), SiLU, mean over height and width, ``head``
    (dense). Each layer has ``weight`` and ``bias``. The loss is the mean softmax cross-entropy.

    The activation is SiLU because its slope is continuous. With ReLU, rounding decides which pixels
    near zero count, so that two right implementations drift apart.

    Attributes
    ----------
    rule : AGC
        The configuration, on the names ``conv1.weight``, ``conv1.bias``, ... , ``head.bias``.
    optimizer : Optimizer
        The optimizer behind AGC.
    weights : mapping of name to array of float32
        Initial weights, out-first.
    batches : sequence of (images, labels)
        float32 images of shape ``(n, channels, height, width)`` and int64 labels; one batch a step.
    sharpness : SAM, optional
        SAM in front of AGC and the optimizer, without micro-batches; a batch consists of its images
        and its labels. A backend without SAM raises :class:`Unsupported`.
    """

    rule: AGC
    optimizer: Optimizer
    weights: Mapping[str, Array]
    batches: Sequence[tuple[Array, Array]]
    sharpness: SAM | None = None


@dataclass(frozen=True)
class TrainStep:
    """One step of a :class:`TrainingTask`, under its names and in its layout (out-first).

    Attributes
    ----------
    loss : float
        Mean loss of the batch before the step; with SAM the clean loss, of the ascent pass.
    before, gradients, clipped, after : mapping of name to array
        Weights before the step, raw gradients (with SAM those at the perturbed weights), gradients
        as the optimizer received them, and weights after the step.
    plan : Plan, optional
        The plan that the step was clipped by, under the task's names; its units are in the
        framework's own layout.
    perturbed, restored : mapping of name to array, optional
        With SAM: the weights as the descent pass saw them, and as the optimizer saw them (SAM-3).
    """

    loss: float
    before: Mapping[str, Array]
    gradients: Mapping[str, Array]
    clipped: Mapping[str, Array]
    after: Mapping[str, Array]
    plan: Plan | None = None
    perturbed: Mapping[str, Array] | None = None
    restored: Mapping[str, Array] | None = None


@dataclass(frozen=True)
class ModelProblem:
    """An NFNet with given parameters on a batch.

    The activation is ``gelu``, weight standardisation has DeepMind's epsilon, and there is no
    dropout.

    Attributes
    ----------
    variant : str or Variant
        As :func:`agc.nfnet.variant` takes it.
    parameters : mapping of name to array
        Every parameter by canonical name, in the neutral layout (:mod:`agc.nfnet`) and in the dtype
        to compute in (float32, float64, or ml_dtypes' bfloat16).
    images : array, shape (n, height, width, 3)
        In the same dtype.
    labels : array of int64, shape (n,)
        Classes.
    smoothing : float
        Label smoothing of the loss, which is the mean cross-entropy over the batch.
    stochastic_depth : float, optional
        None for evaluation mode. A rate for training mode.
    outputs : bool
        Whether a forward pass returns the blocks' outputs and the signals besides the logits.
    """

    variant: str | Variant
    parameters: Mapping[str, Array]
    images: Array
    labels: Array
    smoothing: float = 0.1
    stochastic_depth: float | None = None
    outputs: bool = False

    @property
    def dtype(self) -> str:
        """Name of the dtype to compute in."""
        return str(self.images.dtype.name)


@dataclass(frozen=True)
class ModelForward:
    """Results of a forward pass of a :class:`ModelProblem`.

    Attributes
    ----------
    logits : array, shape (n, classes)
    outputs : mapping of name to array, shape (n, h, w, c)
        After the stem and after each block: ``"stem"``, ``"stages.0.0"`` and so on.
    signals : mapping of str to array
        ``"avg_sq_mean"``, ``"avg_var"`` and ``"res_avg_var"``, as
        :class:`agc.reference.nfnet.NFNetPass` describes them.
    """

    logits: Array
    outputs: Mapping[str, Array] = field(default_factory=dict)
    signals: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelGradients:
    """Results of a backward pass of a :class:`ModelProblem`.

    Attributes
    ----------
    loss : float
    gradients, clipped : mapping of name to array
        By canonical name, in the neutral layout; ``clipped`` by ``AGC.profile("deepmind")``.
    plan : Plan
        The plan that they were clipped by, under canonical names; its units are in the framework's
        own layout.
    """

    loss: float
    gradients: Mapping[str, Array]
    clipped: Mapping[str, Array]
    plan: Plan


@dataclass(frozen=True)
class ModelRecipe:
    """How to train the model of a :class:`ModelProblem`, on the same batch in every step.

    Attributes
    ----------
    optimizer : {"nfnet", "sgd"}
        ``nfnet``: the adapter's ``sgd_nfnet`` with its defaults (``AGC.profile("deepmind")``,
        Nesterov momentum 0.9, coupled weight decay 2e-5 of matrices and kernels). ``sgd``: AGC with
        the same profile in front of the framework's own SGD, without Nesterov and decay.
    rates : sequence of float
        The learning rate of each step; for ``sgd`` always the same.
    momentum : float
        Momentum of ``sgd``.
    """

    optimizer: Literal["nfnet", "sgd"]
    rates: Sequence[float]
    momentum: float = 0.875


@dataclass(frozen=True)
class ModelStep:
    """One step of a :class:`ModelRecipe`.

    Attributes
    ----------
    loss : float
        Before the step.
    parameters : mapping of name to array
        After the step, by canonical name, in the neutral layout.
    """

    loss: float
    parameters: Mapping[str, Array]


class Backend:
    """Base class of conformance backends; override the methods that your implementation supports.

    Parameters
    ----------
    device : str, default "cpu"
        ``"cpu"``, ``"cuda"`` or ``"tpu"``. Raise :class:`Unavailable` if the machine has none.

    Attributes
    ----------
    name : str
        Name in reports.
    layout : {"torch", "flax", "keras"}
        Axis order in which the suite hands over each layer type's weights.
    dtypes : frozenset of str
        Dtypes the implementation takes.
    paths : tuple of str
        Scenarios that clip by other code than :meth:`clip` does, or by other programs: what is to
        be as accurate in float32 is asked of each, and the report shows their errors (AGC-3).
    """

    name: ClassVar[str] = "unnamed"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32"})
    paths: ClassVar[tuple[str, ...]] = ()

    def __init__(self, device: str = "cpu") -> None:
        if device != "cpu":
            raise Unavailable(f"{self.name} runs on the CPU only, not on {device!r}")
        self.device = device

    def versions(self) -> dict[str, str]:
        """Return package name to version, for the report."""
        return {}

    def device_name(self) -> str:
        """Return the hardware's own name, for the report."""
        return self.device

    def clip(self, problem: Problem) -> Outcome:
        """Clip a problem's gradients.

        Errors of :mod:`agc.errors` are expected where AGC defines them.
        """
        raise Unsupported(f"{self.name} does not clip")

    def layer_plan(self, layer: Layer, rule: AGC) -> Plan:
        """Build the framework's own layer and return the plan made for it."""
        raise Unsupported(f"{self.name} makes no plans")

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Gradient]]
    ) -> list[Mapping[str, Array]]:
        """Return the weights after each step, clipping inside the framework's optimizer.

        ``problem.parameters`` are the initial weights; ``gradients`` are the raw gradients, one
        mapping for each step. Steps are counted from 0.
        """
        raise Unsupported(f"{self.name} has no optimizer")

    # -- AGC in the settings of real training: the outcome is what the optimizer receives ---------

    def scenario_optimizer(self, problem: Problem) -> Outcome:
        """Clip through the wrapped optimizer's own step rather than by the plain function."""
        raise Unsupported(f"{self.name} has no optimizer")

    def scenario_idle(self, problem: Problem) -> Outcome:
        """Clip through the optimizer's step, after a step without any gradient (AGC-5)."""
        raise Unsupported(f"{self.name} has no optimizer")

    def scenario_accumulate(
        self, problem: Problem, micro: Sequence[Mapping[str, Gradient]]
    ) -> Outcome:
        """Clip the mean of the gradients of micro-batches (AGC-7).

        ``problem.gradients`` is that mean.
        """
        raise Unsupported(f"{self.name} does not accumulate")

    def scenario_unscale(self, problem: Problem, scale: float) -> Outcome:
        """Undo loss scaling by the framework's own scaler, then clip (AGC-7).

        ``problem.gradients`` are multiplied by ``scale``, a power of two.
        """
        raise Unsupported(f"{self.name} has no loss scaler")

    def scenario_compiled(self, problem: Problem) -> Outcome:
        """Clip inside a compiled step (``torch.compile``, ``jax.jit``, ``tf.function``)."""
        raise Unsupported(f"{self.name} does not compile")

    def scenario_sharded(self, problem: Problem, shards: int) -> Outcome:
        """Split every parameter whose first axis ``shards`` divides over that many devices (AGC-8).

        The outcome is gathered.
        """
        raise Unsupported(f"{self.name} does not shard")

    # -- SAM ---------------------------------------------------------------------------------------

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute a sharpness-aware gradient.

        Errors of :mod:`agc.errors` are expected where SAM defines them.
        """
        raise Unsupported(f"{self.name} has no SAM")

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Return the weights after each step of a task, by the framework's own optimizer."""
        raise Unsupported(f"{self.name} has no SAM in front of an optimizer")

    def sharpen_compiled(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute inside a compiled step (``torch.compile``, ``jax.jit``, ``tf.function``)."""
        raise Unsupported(f"{self.name} does not compile SAM")

    def sharpen_scaled(self, problem: SharpnessProblem, scale: float) -> SharpnessOutcome:
        """Compute under loss scaling.

        The loss is multiplied by ``scale``, a power of two, before it is differentiated; the
        gradients are those that the optimizer receives, without the scale.
        """
        raise Unsupported(f"{self.name} has no loss scaler with SAM")

    def sharpen_replicas(self, problem: SharpnessProblem, replicas: int) -> SharpnessOutcome:
        """Compute on data-parallel replicas (SAM-9).

        Each replica has an equal part of the batch, in order.
        """
        raise Unsupported(f"{self.name} has no replicas with SAM")

    def sharpen_stale(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute with an old gradient on every parameter, which the loop never clears (SAM-4)."""
        raise Unsupported(f"{self.name} keeps no gradients with SAM")

    def sharpen_fixed(
        self, problem: SharpnessProblem, frozen: Sequence[str], absent: Sequence[str]
    ) -> SharpnessOutcome:
        """Compute with parameters that do not train (SAM-4).

        Those in ``frozen`` are not trainable, and those in ``absent`` are not in the optimizer. All
        of them have a gradient from before.
        """
        raise Unsupported(f"{self.name} has no fixed parameters with SAM")

    def sharpen_stateful(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Compute with a loss that is multiplied by a state of the forward pass (SAM-12).

        The state stands for normalisation statistics: it is a number, 1 at first, and every forward
        pass doubles it. The outcome is that of the second of two steps from the same weights, in
        which the number is 2.
        """
        raise Unsupported(f"{self.name} has no state in the forward pass")

    # -- training and NFNets -----------------------------------------------------------------------

    def train(self, task: TrainingTask) -> Iterator[TrainStep]:
        """Train on real images, yielding every step."""
        raise Unsupported(f"{self.name} does not train")

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run an NFNet forward."""
        raise Unsupported(f"{self.name} has no NFNets")

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run an NFNet forward and backward, in evaluation mode, and clip its gradients."""
        raise Unsupported(f"{self.name} has no NFNets")

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Train an NFNet, in evaluation mode, yielding every step."""
        raise Unsupported(f"{self.name} has no NFNets")

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Return a training of a recipe on this device, as :class:`agc.training.Trainer` (level 5).

        It may be given a state more than once, and must then forget the one before.
        """
        raise Unsupported(f"{self.name} does not train recipes")

    def processes(self, count: int) -> AbstractContextManager[Callable[[Recipe, Launch], Trainer]]:
        """Start processes of this machine that train together, and end them.

        What is given is as :meth:`trainer`, and trains on all of them: it takes whole batches, of
        which each process has an equal, contiguous part
        (:func:`agc_conformance.training.processes.started`).
        """
        raise Unsupported(f"{self.name} trains in one process")

    def elsewhere(self) -> Callable[[Recipe, Launch], Trainer]:
        """Return what makes the trainers of :meth:`trainer` in another process, which is killed.

        Pickle sends it there, so it is a function of a module, or a ``functools.partial`` of one
        (:func:`agc_conformance.training.processes.anew`).
        """
        raise Unsupported(f"{self.name} is not started in another process")
