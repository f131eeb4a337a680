"""Variants, constants and options of NFNets and NF-ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from agc.checks import check_choice, check_count, check_number
from agc.errors import ConfigError

__all__ = [
    "ALPHA",
    "GAMMAS",
    "STEM",
    "STOCHASTIC_DEPTH",
    "VARIANTS",
    "WS_EPS",
    "Family",
    "Options",
    "Variant",
    "WsDtype",
    "WsEps",
    "options",
    "variant",
]

Family = Literal["NFNet", "NF-ResNet"]
WsEps = Literal["deepmind", "timm"]
WsDtype = Literal["float32", "bfloat16"]

ALPHA: Final = 0.2
"""How much of a residual branch is added, before its skip gain."""

STOCHASTIC_DEPTH: Final = 0.25
"""Rate of stochastic depth in DeepMind's experiments; block ``i`` of ``n`` has ``i / n`` of it."""

STEM: Final = (16, 32, 64)
"""Outputs of an NFNet's first three convolutions; the fourth has half the first width."""

WS_EPS: Final[Mapping[WsEps, float]] = MappingProxyType({"deepmind": 1e-4, "timm": 1e-5})
"""Epsilon of weight standardisation, for a filter of ``N`` weights of biased variance ``var``.

``deepmind``: a floor, ``gain / sqrt(max(N * var, 1e-4))``. ``timm``: a term,
``gain / sqrt(N * (var + 1e-5))``.
"""

GAMMAS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "gelu": 1.7015043497085571,
        "gelu_erf": 1.7015043497085571,
        "relu": 1.7139588594436646,
        "silu": 1.7881293296813965,
        "relu6": 1.7131484746932983,
        "elu": 1.2716004848480225,
        "celu": 1.270926833152771,
        "leaky_relu": 1.70590341091156,
        "selu": 1.0008515119552612,
        "sigmoid": 4.803835391998291,
        "tanh": 1.5939117670059204,
        "softplus": 1.9203323125839233,
        "soft_sign": 2.338853120803833,
        "log_sigmoid": 1.9193484783172607,
        "identity": 1.0,
    }
)
"""Activation to the constant that it is multiplied by, so that N(0, 1) keeps its variance.

DeepMind estimated them by sampling, and they are copied, not computed: the exact values give other
models. ``gelu`` is the tanh form, which the released weights were trained with; ``gelu_erf`` is
timm's. ``leaky_relu`` has the slope 0.01, ``elu`` and ``celu`` have alpha 1.
"""


@dataclass(frozen=True)
class Variant:
    """What distinguishes one NFNet from another.

    Attributes
    ----------
    name : str
        Such as ``"F0"``.
    depths : tuple of int
        Blocks in each stage.
    dropout : float
        Rate before the classifier.
    train_pixels, test_pixels : int
        Side of the square images of DeepMind's recipe; the model itself takes any size.
    widths : tuple of int
        Outputs of each stage.
    group_width : int
        Channels in each group of the 3x3 convolutions.
    num_classes : int
        Classes, unless the user says otherwise.
    family : {"NFNet", "NF-ResNet"}
        ``NF-ResNet``: stem of a 7x7 convolution and a maximum, bottleneck of a quarter of the
        width, one 3x3 convolution without groups (``group_width`` means nothing), no squeeze and
        excite, a stride instead of an average in the shortcut, no last convolution (see
        :mod:`agc.nfnet.architecture`).
    activation : str
        A name in :data:`GAMMAS`, unless the user says otherwise.
    stochastic_depth : float
        Rate that the blocks' rates rise to, unless the user says otherwise.

    Raises
    ------
    ConfigError
        If there are not as many widths as depths, or a number does not fit.
    """

    name: str
    depths: tuple[int, ...]
    dropout: float
    train_pixels: int
    test_pixels: int
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    group_width: int = 128
    num_classes: int = 1000
    family: Family = "NFNet"
    activation: str = "gelu"
    stochastic_depth: float = STOCHASTIC_DEPTH

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ConfigError(
                f"Variant {self.name!r}: depths and widths must have one number for each stage, "
                f"got {self.depths} and {self.widths}"
            )
        if min(self.depths) < 1:
            raise ConfigError(f"Variant {self.name!r}: depths must be >= 1, got {self.depths}")
        if self.family not in get_args(Family):
            raise ConfigError(
                f"Variant {self.name!r}: family must be 'NFNet' or 'NF-ResNet', got {self.family!r}"
            )
        if self.family == "NF-ResNet":
            if min(self.widths) < 4:
                raise ConfigError(f"Variant {self.name!r}: widths must be >= 4, got {self.widths}")
        elif self.group_width < 1 or min(self.widths) // 2 < self.group_width:
            raise ConfigError(
                f"Variant {self.name!r}: half of each width must hold a group of "
                f"group_width={self.group_width} channels, got the widths {self.widths}"
            )


def _variants() -> dict[str, Variant]:
    dropout = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)
    pixels = (
        (192, 256),
        (224, 320),
        (256, 352),
        (320, 416),
        (384, 512),
        (416, 544),
        (448, 576),
        (480, 608),
    )
    variants = {}
    for suffix, widths in (("", (256, 512, 1536, 1536)), ("+", (384, 768, 2048, 2048))):
        for n, (rate, (train, test)) in enumerate(zip(dropout, pixels, strict=True)):
            name = f"F{n}{suffix}"
            depths = tuple(depth * (n + 1) for depth in (1, 2, 6, 3))
            variants[name] = Variant(name, depths, rate, train, test, widths)
    variants["tiny"] = Variant("tiny", (1, 2, 6, 3), 0.2, 32, 32, (32, 64, 96, 96), 8, 10)
    variants["mini"] = Variant("mini", (1, 1, 1, 1), 0.0, 16, 16, (32, 64, 96, 96), 8, 10)
    variants["micro"] = Variant("micro", (1, 1), 0.0, 16, 16, (32, 64), 8, 10)
    for layers, depths in _RESNET_DEPTHS.items():
        variant = _resnet(f"NF-ResNet-{layers}", depths, 224, (256, 512, 1024, 2048), 1000)
        variants[variant.name] = variant
    variants["NF-ResNet-tiny"] = _resnet("NF-ResNet-tiny", (1, 2, 1), 32, (32, 64, 128), 10)
    return variants


_RESNET_DEPTHS: Final = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}
"""Those of DeepMind's code; 26 is timm's."""


def _resnet(
    name: str, depths: tuple[int, ...], pixels: int, widths: tuple[int, ...], num_classes: int
) -> Variant:
    # Activation and stochastic depth are the defaults of DeepMind's class, which has none for
    # dropout; pixels and dropout are those of their base configuration.
    return Variant(
        name,
        depths,
        0.0,
        pixels,
        pixels,
        widths,
        num_classes=num_classes,
        family="NF-ResNet",
        activation="relu",
        stochastic_depth=0.1,
    )


VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType(_variants())
"""Name to variant: F0 to F7, the wider F0+ to F7+, NF-ResNets, and some for tests and first steps.

``tiny`` is F0 with narrow stages: 334,086 parameters in 233 tensors with the same names, every code
path. ``mini`` has one block in each stage, and ``micro`` two stages of one block: the least that
has both kinds of blocks, for where compiling takes longer than computing. ``NF-ResNet-tiny`` is
narrow, and has four blocks.
"""


def variant(name: str | Variant) -> Variant:
    """Return the variant of a name, whatever its case; a variant is returned as it is.

    Raises
    ------
    ConfigError
        If there is no such variant; the message lists those there are.
    """
    if isinstance(name, Variant):
        return name
    for known, candidate in VARIANTS.items():
        if isinstance(name, str) and name.lower() == known.lower():
            return candidate
    raise ConfigError(f"unknown NFNet variant {name!r}; the variants are {', '.join(VARIANTS)}")


@dataclass(frozen=True)
class Options:
    """What a model is made from; :func:`options` fills in the variant's defaults.

    Attributes
    ----------
    variant : Variant
        Depths and widths.
    num_classes : int
        Outputs of the classifier.
    dropout : float
        Rate before the classifier, in [0, 1); kept values are divided by ``1 - dropout``.
    stochastic_depth : float
        Rate that the blocks' rates rise to, in [0, 1]; what is kept is *not* rescaled.
    in_channels : int
        Channels of the images.
    activation : str
        A name in :data:`GAMMAS`.
    ws_eps : {"deepmind", "timm"}
        See :data:`WS_EPS`.
    ws_dtype : {"float32", "bfloat16"}
        ``bfloat16``: a convolution that computes in bfloat16 standardises its weight in it too, as
        :meth:`agc.reference.nfnet.NFNet.standardise` says. Otherwise in at least float32.

    Raises
    ------
    ConfigError
        If a value is not allowed.
    """

    variant: Variant
    num_classes: int
    dropout: float
    stochastic_depth: float
    in_channels: int
    activation: str
    ws_eps: WsEps
    ws_dtype: WsDtype = "float32"

    def __post_init__(self) -> None:
        for field in ("num_classes", "in_channels"):
            object.__setattr__(self, field, check_count(field, getattr(self, field)))
        check_number("dropout", self.dropout, "a rate in [0, 1)", lambda rate: 0 <= rate < 1)
        check_number(
            "stochastic_depth",
            self.stochastic_depth,
            "a rate in [0, 1]",
            lambda rate: 0 <= rate <= 1,
        )
        if self.activation not in list(GAMMAS):
            raise ConfigError(
                f"unknown activation {self.activation!r}; the activations are {', '.join(GAMMAS)}"
            )
        if self.ws_eps not in list(WS_EPS):
            raise ConfigError(f"ws_eps must be 'deepmind' or 'timm', got {self.ws_eps!r}")
        check_choice("ws_dtype", self.ws_dtype, get_args(WsDtype))


def options(
    name: str | Variant,
    num_classes: int | None = None,
    *,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    in_channels: int = 3,
    activation: str | None = None,
    ws_eps: WsEps = "deepmind",
    ws_dtype: WsDtype = "float32",
) -> Options:
    """Return checked options; None means the variant's own.

    Raises
    ------
    ConfigError
        As :func:`variant` and :class:`Options`.
    """
    chosen = variant(name)
    return Options(
        variant=chosen,
        num_classes=chosen.num_classes if num_classes is None else num_classes,
        dropout=chosen.dropout if dropout is None else dropout,
        stochastic_depth=chosen.stochastic_depth if stochastic_depth is None else stochastic_depth,
        in_channels=in_channels,
        activation=chosen.activation if activation is None else activation,
        ws_eps=ws_eps,
        ws_dtype=ws_dtype,
    )
