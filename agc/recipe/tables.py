"""The tables of a recipe file, one frozen and validated dataclass each.

Every error names the field; whoever builds a table from a file puts the table's name before it. A
field whose type is one of these classes is a table within the table. What is ``None`` by default is
either absent or filled in from the model by :class:`agc.recipe.Recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from agc.checks import (
    check_choice,
    check_count,
    check_flag,
    check_not_negative,
    check_number,
    check_patterns,
    check_positive,
    check_rule,
)
from agc.config import SAM
from agc.errors import ConfigError
from agc.nfnet import (
    MOMENTUM,
    SMOOTHING,
    WEIGHT_DECAY,
    Options,
    WsDtype,
    WsEps,
    check_recipe,
    options,
)
from agc.nfnet.images import MEAN, STD
from agc.schedule import WarmupDecay

__all__ = [
    "Augment",
    "Checkpoint",
    "Crop",
    "CutMix",
    "Data",
    "Ema",
    "Evaluate",
    "Flavour",
    "Input",
    "MixUp",
    "Model",
    "Optimizer",
    "Precision",
    "RandAugment",
    "Rate",
    "RateSchedule",
    "Resize",
    "Sharpness",
    "Split",
    "Train",
    "Weights",
]

Init = Literal["random", "file"]
Head = Literal["keep", "new"]
SourceKind = Literal["idx", "folder", "npz", "rows", "synthetic", "digits"]
CropRule = Literal["tensorflow", "torchvision", "none"]
Resize = Literal["bicubic", "pillow"]
Order = Literal["mix-first", "augment-first"]
Flavour = Literal["deepmind", "clean"]
Mask = Literal["stochastic_depth", "dropout"]
DType = Literal["float32", "bfloat16", "float64"]
Weights = Literal["raw", "ema"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is trained; ``None`` is the variant's own value.

    What NF-ResNets were trained with is not published, so their recipes say all of it.

    Attributes
    ----------
    variant : str
        A name in :data:`agc.nfnet.VARIANTS`.
    num_classes, in_channels, dropout, stochastic_depth, activation, ws_eps
        As :class:`agc.nfnet.Options`.
    init : {"random", "file"}
        Where the initial weights come from; the launch names the file.
    head : {"keep", "new"}
        Whether the classifier is the file's, or drawn anew.
    """

    variant: str
    num_classes: int | None = None
    in_channels: int = 3
    dropout: float | None = None
    stochastic_depth: float | None = None
    activation: str | None = None
    ws_eps: WsEps = "deepmind"
    init: Init = "random"
    head: Head = "keep"

    def __post_init__(self) -> None:
        check_choice("init", self.init, get_args(Init))
        check_choice("head", self.head, get_args(Head))
        if self.head == "new" and self.init != "file":
            raise ConfigError('head = "new" replaces the classifier of a file: give init = "file"')
        filled = self.options()
        object.__setattr__(self, "variant", filled.variant.name)
        if filled.variant.family == "NF-ResNet":
            for name in ("num_classes", "dropout", "stochastic_depth", "activation"):
                if getattr(self, name) is None:
                    raise ConfigError(f"{name} must be given: {self.variant} has no published one")
        for name in ("num_classes", "in_channels", "activation"):
            object.__setattr__(self, name, getattr(filled, name))
        for name in ("dropout", "stochastic_depth"):
            object.__setattr__(self, name, float(getattr(filled, name)))

    def options(self) -> Options:
        """Return what the model is made from."""
        return options(
            self.variant,
            self.num_classes,
            dropout=self.dropout,
            stochastic_depth=self.stochastic_depth,
            in_channels=self.in_channels,
            activation=self.activation,
            ws_eps=self.ws_eps,
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """One set of labelled images; where it lies is said at launch.

    Attributes
    ----------
    kind : {"idx", "folder", "npz", "rows", "synthetic", "digits"}
        How it is stored; see :func:`agc.data.open_source`.
    split : str
        Which part of the data: a folder's or file's name, or the prefix of IDX files.
    images : int
        How many images it must have.
    """

    kind: SourceKind
    split: str
    images: int

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(SourceKind))
        if not isinstance(self.split, str) or not self.split:
            raise ConfigError(f"split must be a non-empty string, got {self.split!r}")
        object.__setattr__(self, "images", check_count("images", self.images))


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images to train on, and those to evaluate on."""

    train: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Which part of an image is taken in training.

    Attributes
    ----------
    rule : {"tensorflow", "torchvision", "none"}
        ``sample_distorted_bounding_box``, ``RandomResizedCrop``, or the whole image.
    area : (float, float)
        Smallest and largest area, as shares of the image.
    aspect : (float, float)
        Smallest and largest width divided by height.
    covered : float
        Smallest share of the image that TensorFlow's rule accepts.
    attempts : int
        How often a crop that does not fit is drawn again.
    margin : int
        TensorFlow's rule: if all attempts fail, or the crop is the whole image, the middle square
        of ``pixels / (pixels + margin)`` of the shorter side is taken.
    """

    rule: CropRule = "tensorflow"
    area: Sequence[float] = (0.08, 1.0)
    aspect: Sequence[float] = (3 / 4, 4 / 3)
    covered: float = 0.1
    attempts: int = 10
    margin: int = 32

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(CropRule))
        area = _pair("area", self.area)
        if not 0 < area[0] <= area[1] <= 1:
            raise ConfigError(f"area must ascend within (0, 1], got {list(area)}")
        aspect = _pair("aspect", self.aspect)
        if not 0 < aspect[0] <= aspect[1]:
            raise ConfigError(f"aspect must be two ascending numbers > 0, got {list(aspect)}")
        object.__setattr__(self, "area", area)
        object.__setattr__(self, "aspect", aspect)
        object.__setattr__(self, "covered", _share("covered", self.covered))
        object.__setattr__(self, "attempts", check_count("attempts", self.attempts))
        object.__setattr__(self, "margin", check_count("margin", self.margin, 0))


@dataclass(frozen=True, kw_only=True)
class Input:
    """How an image becomes the model's input.

    Attributes
    ----------
    train_pixels, test_pixels : int, optional
        Side of the square images; the variant's if None.
    resize : {"bicubic", "pillow"}
        TensorFlow's bicubic interpolation without antialiasing, or Pillow's with it.
    flip : bool
        Whether half of the training images are mirrored.
    mean, std : sequence of float
        Of each channel, for values from 0 to 1.
    evaluation : str
        ``"squash+32"``: both sides are resized to 32 pixels more, and the middle is cut out.
    crop : Crop
    """

    train_pixels: int | None = None
    test_pixels: int | None = None
    resize: Resize = "bicubic"
    flip: bool = True
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    evaluation: str = "squash+32"
    crop: Crop = field(default_factory=Crop)

    def __post_init__(self) -> None:
        for name in ("train_pixels", "test_pixels"):
            if getattr(self, name) is not None:
                pixels = check_count(name, getattr(self, name))
                if pixels % 4:
                    raise ConfigError(
                        f"{name} must be a multiple of the stem's stride 4, got {pixels}"
                    )
                object.__setattr__(self, name, pixels)
        check_choice("resize", self.resize, get_args(Resize))
        check_flag("flip", self.flip)
        for name, check in (("mean", check_not_negative), ("std", check_positive)):
            values = _numbers(name, getattr(self, name))
            checked = tuple(check(f"{name}[{n}]", value) for n, value in enumerate(values))
            object.__setattr__(self, name, checked)
        rule, _, margin = str(self.evaluation).partition("+")
        if rule != "squash" or not (margin.isascii() and margin.isdigit()):
            raise ConfigError(
                f'evaluation must be "squash+N" for N pixels, for example "squash+32", got {self.evaluation!r}'
            )

    @property
    def margin(self) -> int:
        """Pixels by which evaluation resizes images beyond what it cuts out."""
        return int(self.evaluation.partition("+")[2])


@dataclass(frozen=True, kw_only=True)
class MixUp:
    """Pairs of images are added with a ratio drawn from Beta(alpha, alpha).

    Attributes
    ----------
    alpha : float
        From 0.05 to 1.
    share : float
        Part of the examples that are mixed in this way.
    """

    alpha: float = 0.2
    share: float = 1.0

    def __post_init__(self) -> None:
        bounds = "a number from 0.05 to 1"
        alpha = check_number("alpha", self.alpha, bounds, lambda alpha: 0.05 <= alpha <= 1)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "share", _share("share", self.share))


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """A box of the first image of a pair is put into the second.

    Attributes
    ----------
    share : float
        Part of the examples that are mixed in this way.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", _share("share", self.share))


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """So many operations in a row, each drawn from sixteen.

    Attributes
    ----------
    layers : int
        Operations for each image.
    magnitude : float
        Strength, from 0 to 20; the published recipes have 5, 10 and 15.
    flavour : {"deepmind", "clean"}
        Whether the quirks of the published code are kept; see :mod:`agc.data.randaugment`.
    """

    layers: int = 4
    magnitude: float = 5.0
    flavour: Flavour = "deepmind"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_count("layers", self.layers))
        bounds = "a number from 0 to 20"
        value = check_number("magnitude", self.magnitude, bounds, lambda value: 0 <= value <= 20)
        object.__setattr__(self, "magnitude", value)
        check_choice("flavour", self.flavour, get_args(Flavour))


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to training images after crop, flip and resize; absent is not done.

    Attributes
    ----------
    order : {"mix-first", "augment-first"}
        Whether RandAugment sees the mixed image, as for NFNets, or the two that are mixed.
    mixup, cutmix : optional
        Shares must sum to 1 if there is one.
    randaugment : optional
    """

    order: Order = "mix-first"
    mixup: MixUp | None = None
    cutmix: CutMix | None = None
    randaugment: RandAugment | None = None

    def __post_init__(self) -> None:
        check_choice("order", self.order, get_args(Order))
        shares = [mix.share for mix in (self.mixup, self.cutmix) if mix]
        if shares and not math.isclose(sum(shares), 1):
            raise ConfigError(
                f"mixup.share and cutmix.share must sum to 1, got {' + '.join(map(str, shares))}"
            )

    @property
    def mixes(self) -> bool:
        """Whether each example is made from two images."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Size and length of the training.

    Attributes
    ----------
    batch : int
        Examples of a step, over all devices together.
    epochs : float, optional
        Length; an epoch is ``images / batch`` steps, unrounded, also where examples are mixed from
        two images. Either this or ``steps``.
    steps : int, optional
        Length.
    smoothing : float
        Label smoothing, in [0, 1).
    masks : sequence of {"stochastic_depth", "dropout"}
        Which random masks are the batch's, the same in every framework; of the others, a framework
        draws its own.
    only : sequence of str
        Name patterns of the parameters that are trained; all if empty.
    """

    batch: int
    epochs: float | None = None
    steps: int | None = None
    smoothing: float = SMOOTHING
    masks: Sequence[Mask] = ("stochastic_depth",)
    only: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", check_count("batch", self.batch))
        _one_length(self, "", ("epochs", "steps"))
        bounds = "a number in [0, 1)"
        smoothing = check_number("smoothing", self.smoothing, bounds, lambda part: 0 <= part < 1)
        object.__setattr__(self, "smoothing", smoothing)
        if isinstance(self.masks, str) or not isinstance(self.masks, Sequence):
            raise ConfigError(f"masks must be a list, got {self.masks!r}")
        for mask in self.masks:
            check_choice("masks", mask, get_args(Mask))
        object.__setattr__(self, "masks", tuple(sorted(set(self.masks))))
        object.__setattr__(self, "only", check_patterns("only", self.only))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Peak of the learning rate: ``peak``, or ``base`` for each ``per`` examples of a batch."""

    peak: float | None = None
    base: float | None = None
    per: int | None = None

    def __post_init__(self) -> None:
        scaled = self.base is not None and self.per is not None
        either = self.base is not None or self.per is not None
        if (self.peak is None) != scaled or either != scaled:
            raise ConfigError("peak must be given, or else base and per: {base = 0.1, per = 256}")
        if self.peak is not None:
            object.__setattr__(self, "peak", check_positive("peak", self.peak))
        else:
            object.__setattr__(self, "base", check_positive("base", self.base))
            object.__setattr__(self, "per", check_count("per", self.per))

    def at(self, batch: int) -> float:
        """Return the peak for a batch of this size."""
        if self.base is not None and self.per is not None:
            return self.base * batch / self.per
        assert self.peak is not None
        return self.peak


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD with Nesterov's momentum; its buffer does not contain the learning rate.

    Attributes
    ----------
    rate : Rate
    momentum : float
        In [0, 1).
    weight_decay : float
        Coupled, added after clipping; of matrices and kernels only.
    max_norm : float, optional
        Largest norm of all gradients together, after AGC and before weight decay; no limit if None.
    """

    rate: Rate
    momentum: float = MOMENTUM
    weight_decay: float = WEIGHT_DECAY
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            object.__setattr__(self, "max_norm", check_positive("max_norm", self.max_norm))
        for name in ("momentum", "weight_decay"):
            object.__setattr__(self, name, check_not_negative(name, getattr(self, name)))
        check_recipe(self.momentum, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Linear warm-up from 0, then half a cosine to ``end``.

    Attributes
    ----------
    warmup_epochs, warmup_steps : float, optional
        Length of the warm-up; may be a fraction of a step. At most one of them.
    end : float
        Rate at the end.
    """

    warmup_epochs: float | None = None
    warmup_steps: float | None = None
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_epochs is None and self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", 0.0)
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ConfigError("warmup_epochs and warmup_steps cannot both be given")
        for name in ("warmup_epochs", "warmup_steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_not_negative(name, getattr(self, name)))
        object.__setattr__(self, "end", check_not_negative("end", self.end))


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Sharpness-aware minimization and who shares a perturbation.

    In a file the fields of ``rule`` stand beside ``group``.

    Attributes
    ----------
    rule : SAM
        ``group`` takes the place of its ``scope`` and ``microbatches``.
    group : int or "batch"
        Examples, in the order of the batch, that share one perturbation; see :meth:`ascent`.
    """

    rule: SAM = field(default_factory=SAM)
    group: int | Literal["batch"] = "batch"

    def __post_init__(self) -> None:
        check_rule(self.rule, SAM)
        if self.group != "batch":
            if isinstance(self.group, str):
                raise ConfigError(f'group must be an integer or "batch", got {self.group!r}')
            object.__setattr__(self, "group", check_count("group", self.group))
        plain = SAM()
        for name in ("scope", "microbatches"):
            if getattr(self.rule, name) != getattr(plain, name):
                raise ConfigError(f"{name} is decided by group; leave it out")

    def ascent(self, batch: int) -> tuple[int, ...]:
        """Return the places in a batch whose examples give the ascent gradients.

        They are the first ``ceil(fraction * group)`` of each group, or, if the whole batch shares a
        perturbation, as many spread evenly over the batch, so that every host has its part.

        Parameters
        ----------
        batch : int
            ``train.batch``.
        """
        size = batch if self.group == "batch" else self.group
        count = math.ceil(self.rule.fraction * size)
        if self.group == "batch":
            return tuple(n * batch // count for n in range(count))
        return tuple(start + n for start in range(0, batch, size) for n in range(count))


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving average of the weights, from the initial ones on.

    Attributes
    ----------
    decay : float
        Largest decay, in [0, 1).
    warmup : bool
        Whether the decay rises: ``min(decay, (1 + step) / (10 + step))``.
    """

    decay: float = 0.99999
    warmup: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", check_not_negative("decay", self.decay))
        check_flag("warmup", self.warmup)
        WarmupDecay(decay=self.decay, warmup=self.warmup)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes.

    Attributes
    ----------
    compute : {"float32", "bfloat16", "float64"}
        Of the forward and backward pass. With float64 all else is float64 too, see :attr:`state`:
        slow, and meant for proofs that two programs compute the same. Images, targets and the
        numbers of a step are the float32 ones of the other recipes, widened.
    standardise : {"float32", "bfloat16"}
        Of weight standardisation in these passes; DeepMind's recipe has ``bfloat16``. Passes in
        float64 standardise in float64.
    """

    compute: DType = "float32"
    standardise: WsDtype = "float32"

    def __post_init__(self) -> None:
        check_choice("compute", self.compute, get_args(DType))
        check_choice("standardise", self.standardise, get_args(WsDtype))

    @property
    def state(self) -> Literal["float32", "float64"]:
        """Dtype of parameters, momentum, average, norms, loss and evaluation."""
        return "float64" if self.compute == "float64" else "float32"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When the test images are classified, besides at the end, and by which weights.

    Attributes
    ----------
    every_epochs, every_steps : optional
        One of them; every epoch if neither is given.
    weights : sequence of {"raw", "ema"}, optional
        All that there are if None.
    """

    every_epochs: float | None = None
    every_steps: int | None = None
    weights: Sequence[Weights] | None = None

    def __post_init__(self) -> None:
        if self.every_epochs is None and self.every_steps is None:
            object.__setattr__(self, "every_epochs", 1.0)
        _one_length(self, "every_", ("every_epochs", "every_steps"))
        if self.weights is not None:
            if isinstance(self.weights, str) or not isinstance(self.weights, Sequence):
                raise ConfigError(f"weights must be a list, got {self.weights!r}")
            for name in self.weights:
                check_choice("weights", name, get_args(Weights))
            if not self.weights:
                raise ConfigError('weights must name "raw", "ema" or both')
            object.__setattr__(self, "weights", tuple(sorted(set(self.weights), reverse=True)))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the state is written, and how many of the last states are kept."""

    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))


def _one_length(owner: Any, prefix: str, names: tuple[str, str]) -> None:
    """Check that a length is given in epochs or in steps, and is above 0."""
    epochs, steps = (getattr(owner, name) for name in names)
    if (epochs is None) == (steps is None):
        raise ConfigError(f"{prefix}epochs or {prefix}steps must be given, and not both")
    if epochs is not None:
        object.__setattr__(owner, names[0], check_positive(names[0], epochs))
    else:
        object.__setattr__(owner, names[1], check_count(names[1], steps))


def _share(name: str, value: Any) -> float:
    return check_number(name, value, "a number in (0, 1]", lambda share: 0 < share <= 1)


def _numbers(name: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"{name} must be a list of numbers, got {values!r}")
    return values


def _pair(name: str, values: Any) -> tuple[float, float]:
    pair = [check_number(name, value, "two finite numbers") for value in _numbers(name, values)]
    if len(pair) != 2:
        raise ConfigError(f"{name} must be two numbers, got {values!r}")
    return pair[0], pair[1]
