"""Forms of weights: what each framework's files call a tensor, and how they lay it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import numpy.typing as npt

from agc.layouts import out_first, out_first_axes, out_last
from agc.nfnet import HEAD, VARIANTS, ParameterSpec, Variant, parameters

__all__ = ["FORMAT", "FORMAT_VERSION", "FORMS", "Form", "guess", "shared_names", "sizes"]

Array = npt.NDArray[Any]

FORMAT: Final = "agc-nfnet"
"""What a file's metadata call this format."""

FORMAT_VERSION: Final = 1
"""Version of the metadata; a file of a later one is refused."""


@dataclass(frozen=True)
class Form:
    """One way to name and lay out the same tensors.

    Attributes
    ----------
    name : str
        As in ``--to``.
    rename : callable
        Parameter to its name in this form.
    outputs_first : bool
        PyTorch's layout, OIHW and OI, instead of the neutral HWIO and IO.
    as_kernels : bool
        Gains are ``(outputs, 1, 1, 1)`` and squeeze-and-excite weights 1x1 convolutions.
    suffix : str
        Of files: ``".safetensors"`` or ``".npz"``.
    """

    name: str
    rename: Callable[[ParameterSpec], str]
    outputs_first: bool = False
    as_kernels: bool = False
    suffix: str = ".safetensors"

    def spec(self, spec: ParameterSpec) -> ParameterSpec:
        """Return a parameter under the name and with the shape that it has in this form."""
        return replace(spec, name=self.rename(spec), shape=self.shape(spec))

    def shape(self, spec: ParameterSpec) -> tuple[int, ...]:
        """Return the shape that a parameter has in this form."""
        shape = spec.shape
        if self.outputs_first:
            shape = tuple(shape[axis] for axis in out_first_axes(len(shape)))
        return shape + (1,) * self._unit_axes(spec)

    def encode(self, spec: ParameterSpec, array: Array) -> Array:
        """Bring a neutral array into this form; a view."""
        array = out_first(array) if self.outputs_first else array
        return array.reshape(self.shape(spec))

    def decode(self, spec: ParameterSpec, array: Array) -> Array:
        """Bring an array of this form into the neutral one; a view."""
        array = array.reshape(array.shape[: len(spec.shape)])
        return out_last(array) if self.outputs_first else array

    def _unit_axes(self, spec: ParameterSpec) -> int:
        return {"gain": 3, "se": 2}.get(spec.kind, 0) if self.as_kernels else 0


def _canonical(spec: ParameterSpec) -> str:
    return spec.name


def _keras(spec: ParameterSpec) -> str:
    """Path of a Keras variable within its model; a stage is one layer, and so is a block in it."""
    return spec.name.replace(".", "/").replace("stages/", "stages.")


_TIMM: Final = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv3": "conv4",  # only the stem has it
    "shortcut": "downsample.conv",
    "se.fc0": "attn_last.fc1",
    "se.fc1": "attn_last.fc2",
    HEAD: "head.fc",
    "final_conv": "final_conv",
}


def _timm(spec: ParameterSpec) -> str:
    head, _, leaf = spec.name.rpartition(".")
    if leaf == "skip_gain":
        return f"{head}.skipinit_gain"
    parts = head.split(".")
    start = {"stem": 1, "stages": 3}.get(parts[0], 0)
    return ".".join([*parts[:start], _TIMM[".".join(parts[start:])], leaf])


FORMS: Final[Mapping[str, Form]] = {
    form.name: form
    for form in (
        Form("neutral", _canonical),
        Form("torch", _canonical, outputs_first=True),
        Form("flax", _canonical),
        Form("keras", _keras),
        Form("timm", _timm, outputs_first=True, as_kernels=True),
        Form("haiku", lambda spec: spec.haiku, suffix=".npz"),
    )
}
"""Every form by name; ``neutral`` and ``flax`` differ in metadata only."""


def guess(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Form, Variant]:
    """Return the form and variant that fit names and shapes best; a full check comes later.

    Raises
    ------
    KeyError
        If no name is an NFNet's in any form.
    """
    # A file of flax is one of neutral, but for its metadata.
    forms = [form for form in FORMS.values() if form.name != "flax"]
    named = {form.name: sum(name in shapes for name in shared_names(form.name)) for form in forms}
    most = max(named.values())
    if not most:
        raise KeyError("no name of an NFNet")
    forms = [form for form in forms if named[form.name] == most]
    best: tuple[tuple[int, int], Form, Variant] | None = None
    for variant in VARIANTS.values():
        for form in forms:
            expected = _shapes(form.name, variant.name)
            agree = sum(shapes.get(name) == shape for name, shape in expected.items())
            # A deeper variant matches all names too: prefer the one with fewer missing.
            score = (agree, -len(expected))
            if best is None or score > best[0]:
                best = score, form, variant
    assert best is not None
    return best[1], best[2]


@cache
def shared_names(form: str) -> frozenset[str]:
    """Return the names in a form of the parameters that all variants of a family have."""
    smallest = (*parameters("tiny"), *parameters("NF-ResNet-tiny"))
    return frozenset(FORMS[form].rename(spec) for spec in smallest)


@cache
def _shapes(form: str, variant: str) -> Mapping[str, tuple[int, ...]]:
    specs = (FORMS[form].spec(spec) for spec in parameters(variant))
    return {spec.name: spec.shape for spec in specs}


def sizes(
    form: Form, variant: Variant, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int | None, int]:
    """Return the number of classes, or None, and of channels by shape; a check comes later."""
    specs = {spec.name: spec for spec in parameters(variant)}
    bias = shapes.get(form.rename(specs["head.bias"]), ())
    kernel = shapes.get(form.rename(specs["stem.conv0.weight"]), ())
    channels = 3
    if len(kernel) == 4:
        channels = kernel[1] if form.outputs_first else kernel[2]
    return (bias[0] if math.prod(bias) and len(bias) == 1 else None), max(1, channels)
