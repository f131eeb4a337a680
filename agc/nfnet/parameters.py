"""Every parameter of a model: names, shapes in the neutral layout, and what it means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from agc.errors import ParameterError
from agc.nfnet.architecture import Conv, blocks, features, final_conv, stem
from agc.nfnet.recipe import decays
from agc.nfnet.variants import Variant
from agc.nfnet.variants import variant as _variant
from agc.units import Units

__all__ = ["HEAD", "Initial", "Kind", "ParameterSpec", "check_arrays", "parameters"]

Kind = Literal["conv", "gain", "bias", "se", "skip_gain", "head"]

HEAD: Final = "head"
"""The classifier layer: what ``@head`` means in a rule (AGC-6)."""


@dataclass(frozen=True)
class Initial:
    """How a parameter starts.

    Attributes
    ----------
    distribution : {"constant", "normal", "truncated"}
        ``truncated`` is a normal distribution with values beyond two ``value`` drawn again.
    value : float
        The constant, or the standard deviation *before* truncation, which is not corrected for it.
    """

    distribution: Literal["constant", "normal", "truncated"]
    value: float


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its names, its shape, and what it means.

    Attributes
    ----------
    name : str
        Canonical name.
    shape : tuple of int
        In the neutral layout.
    kind : {"conv", "gain", "bias", "se", "skip_gain", "head"}
        ``conv``, ``se`` and ``head`` are weights; ``bias`` is that of any layer.
    haiku : str
        Module and leaf in DeepMind's files, such as ``"NFNet/~/stem_conv0/w"``.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    haiku: str

    @property
    def fan_in(self) -> int:
        """Weights that feed one output."""
        return math.prod(self.shape[:-1])

    @property
    def initial(self) -> Initial:
        """How the parameter starts."""
        match self.kind:
            case "conv":
                return Initial("normal", self.fan_in**-0.5)
            case "se":
                return Initial("truncated", self.fan_in**-0.5)
            case "head":
                return Initial("normal", 0.01)
            case _:
                return Initial("constant", 1.0 if self.kind == "gain" else 0.0)

    @property
    def units(self) -> Units:
        """Units in the neutral layout (AGC-5)."""
        return Units({4: "h w i o -> o", 2: "i o -> o"}.get(len(self.shape), "... ->"))

    @property
    def decays(self) -> bool:
        """Whether DeepMind's optimizer decays it: weights, and no gain or bias."""
        return decays(len(self.shape))

    @property
    def clipped(self) -> bool:
        """Whether DeepMind's optimizer clips it: all except the classifier's weight (AGC-6)."""
        return self.kind != "head"


def parameters(
    variant: str | Variant, num_classes: int | None = None, in_channels: int = 3
) -> tuple[ParameterSpec, ...]:
    """Return every parameter, in the order of the forward pass.

    Parameters
    ----------
    variant : str or Variant
        As in :func:`variant`.
    num_classes : int, optional
        The variant's own number (1000; 10 for ``tiny``) if None.
    in_channels : int
        Channels of the images.

    Examples
    --------
    >>> sum(math.prod(spec.shape) for spec in parameters("F0"))
    71489284
    """
    sizes = _variant(variant)
    specs: list[ParameterSpec] = []

    def add(name: str, shape: tuple[int, ...], kind: Kind) -> None:
        specs.append(ParameterSpec(name, shape, kind, _haiku(name, sizes)))

    def add_conv(conv: Conv, prefix: str = "") -> None:
        add(f"{prefix}{conv.name}.weight", conv.shape, "conv")
        add(f"{prefix}{conv.name}.gain", (conv.outputs,), "gain")
        add(f"{prefix}{conv.name}.bias", (conv.outputs,), "bias")

    def add_dense(name: str, inputs: int, outputs: int, kind: Kind) -> None:
        add(f"{name}.weight", (inputs, outputs), kind)
        add(f"{name}.bias", (outputs,), "bias")

    for conv in stem(sizes, in_channels):
        add_conv(conv)
    for block in blocks(sizes):
        for conv in block.convs:
            add_conv(conv, f"{block.name}.")
        if block.squeezed:
            add_dense(f"{block.name}.se.fc0", block.outputs, block.squeezed, "se")
            add_dense(f"{block.name}.se.fc1", block.squeezed, block.outputs, "se")
        add(f"{block.name}.skip_gain", (), "skip_gain")
    last = final_conv(sizes)
    if last is not None:
        add_conv(last)
    classes = sizes.num_classes if num_classes is None else num_classes
    add_dense(HEAD, features(sizes), classes, "head")
    return tuple(specs)


_HAIKU_MODULES: Final = {
    "shortcut": "conv_shortcut",
    "se.fc0": "squeeze_excite/~/linear",
    "se.fc1": "squeeze_excite/~/linear_1",
    HEAD: "linear",
}


def _haiku(name: str, sizes: Variant) -> str:
    """Name of a parameter in DeepMind's code, which numbers blocks over the whole network."""
    resnet = sizes.family == "NF-ResNet"
    prefix = "NF_ResNet/~/" if resnet else "NFNet/~/"
    if block := re.match(r"stages\.(\d+)\.(\d+)\.", name):
        index = sum(sizes.depths[: int(block[1])]) + int(block[2])
        prefix += "nf_res_block" if resnet else "nf_block"
        prefix += f"_{index}/" if index else "/"
        name = name[block.end() :]
        if name == "skip_gain":
            return prefix + name
        prefix += "~/"
    layer, _, leaf = name.rpartition(".")
    if layer in ("se.fc0", "se.fc1", HEAD):
        leaf = leaf[0]  # Haiku's dense layers have w and b, DeepMind's convolutions w and bias
    elif leaf == "weight":
        leaf = "w"
    if resnet and layer == "stem.conv0":
        layer = "initial_conv"
    return f"{prefix}{_HAIKU_MODULES.get(layer, layer.replace('.', '_'))}/{leaf}"


def check_arrays(specs: Iterable[ParameterSpec], arrays: Mapping[str, Any]) -> None:
    """Raise unless arrays are exactly the parameters: same names, same shapes, real floating point.

    Parameters
    ----------
    specs : iterable of ParameterSpec
        What the model needs.
    arrays : mapping of str to array
        By canonical name, in the neutral layout; anything with a ``shape`` and a ``dtype``.

    Raises
    ------
    ParameterError
        The message names the tensors that are missing, unknown, of another shape, or not floating
        point, up to ten of each kind.
    """
    wanted = {spec.name: spec for spec in specs}
    problems = []
    for what, names in (
        ("missing", [name for name in wanted if name not in arrays]),
        ("unknown", [name for name in arrays if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} (has {tuple(arrays[name].shape)}, needs {spec.shape})"
                for name, spec in wanted.items()
                if name in arrays and tuple(arrays[name].shape) != spec.shape
            ],
        ),
        (
            "not floating point",
            [
                f"{name} ({arrays[name].dtype})"
                for name in wanted
                if name in arrays and "float" not in _dtype_name(arrays[name])
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            problems.append(f"{len(names)} {what}: {', '.join(names[:10])}{more}")
    if problems:
        raise ParameterError(
            "these arrays are not the model's parameters. "
            + "; ".join(problems)
            + ". Is it the same variant, with the same number of classes and of image channels? "
            "For other classes, put the model's own head.weight and head.bias into the arrays"
        )


def _dtype_name(array: Any) -> str:
    # NumPy prints another byte order as '>f8', whose name is float64 too; PyTorch's dtypes have no
    # name.
    return str(getattr(array.dtype, "name", array.dtype))
