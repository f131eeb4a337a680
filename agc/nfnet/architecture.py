"""Convolutions and blocks of NFNets and NF-ResNets: sizes, strides, expected variances.

Both families have the same blocks: activation times ``beta``, convolutions with activations between
them, a skip gain. What an NF-ResNet (arXiv:2101.08692) has otherwise is here, by ``family``, and
follows DeepMind's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agc.nfnet.variants import ALPHA, STEM, Family, Variant
from agc.nfnet.variants import variant as _variant

__all__ = ["Block", "Conv", "blocks", "features", "final_conv", "same_padding", "stem"]


@dataclass(frozen=True)
class Conv:
    """A weight-standardised convolution: square kernel, SAME padding, with a gain and a bias."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight in the neutral layout."""
        return (self.kernel, self.kernel, self.inputs // self.groups, self.outputs)


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes
    ----------
    index : int
        Place in the whole network, from 0.
    stage, place : int
        Stage, and place in the stage; the name is ``stages.{stage}.{place}``.
    inputs, middle, outputs : int
        Channels at the start, in the bottleneck, and at the end.
    groups : int
        Of the 3x3 convolutions.
    stride : int
        1 or 2.
    variance : float
        Expected variance of what comes in, at initialisation.
    stochastic_depth : float
        This block's share, ``index / blocks``, of the model's rate of stochastic depth.
    family : {"NFNet", "NF-ResNet"}
        That of the variant.
    """

    index: int
    stage: int
    place: int
    inputs: int
    middle: int
    outputs: int
    groups: int
    stride: int
    variance: float
    stochastic_depth: float
    family: Family = "NFNet"

    @property
    def name(self) -> str:
        """Canonical name."""
        return f"stages.{self.stage}.{self.place}"

    @property
    def beta(self) -> float:
        """Multiplier that gives the input variance 1. The papers' beta is its inverse."""
        return 1 / math.sqrt(self.variance)

    @property
    def projects(self) -> bool:
        """Whether the shortcut has a convolution."""
        return self.stride > 1 or self.inputs != self.outputs

    @property
    def pools(self) -> bool:
        """Whether an average of 2x2 pixels has the shortcut's stride, not its convolution."""
        return self.stride > 1 and self.family == "NFNet"

    @property
    def squeezed(self) -> int:
        """Channels inside squeeze and excite; 0 if the block has none."""
        return max(1, self.outputs // 2) if self.family == "NFNet" else 0

    @property
    def convs(self) -> tuple[Conv, ...]:
        """Convolutions by name within the block: conv0, conv1, NFNets' conv1b, conv2, shortcut."""
        i, m, o, g = self.inputs, self.middle, self.outputs, self.groups
        convs = [Conv("conv0", i, m, 1), Conv("conv1", m, m, 3, self.stride, g)]
        if self.family == "NFNet":
            convs.append(Conv("conv1b", m, m, 3, 1, g))
        convs.append(Conv("conv2", m, o, 1))
        if self.projects:
            convs.append(Conv("shortcut", i, o, 1, 1 if self.pools else self.stride))
        return tuple(convs)


def stem(variant: str | Variant, in_channels: int = 3) -> tuple[Conv, ...]:
    """Return the convolutions that images go through first.

    An NFNet has four, with activations between them. An NF-ResNet has one, and then the maximum of
    3x3 pixels with stride 2, padded as SAME with what is never the maximum.
    """
    sizes = _variant(variant)
    if sizes.family == "NF-ResNet":
        return (Conv("stem.conv0", in_channels, sizes.widths[0] // 4, 7, 2),)
    outputs = (*STEM, sizes.widths[0] // 2)
    inputs = (in_channels, *outputs)
    strides = (2, 1, 1, 2)
    return tuple(Conv(f"stem.conv{k}", inputs[k], outputs[k], 3, strides[k]) for k in range(4))


def blocks(variant: str | Variant) -> tuple[Block, ...]:
    """Return all blocks in order, with their sizes and expected variances.

    The variance is 1 before the first block. Each block adds ``ALPHA ** 2``; the first of a stage
    starts again from 1, because its shortcut comes after the scaling.
    """
    sizes = _variant(variant)
    total = sum(sizes.depths)
    built: list[Block] = []
    inputs, variance = stem(sizes)[-1].outputs, 1.0
    for stage, (depth, width) in enumerate(zip(sizes.depths, sizes.widths, strict=True)):
        if sizes.family == "NFNet":
            groups = width // 2 // sizes.group_width
            middle = groups * sizes.group_width
        else:
            groups, middle = 1, width // 4
        for place in range(depth):
            index = len(built)
            built.append(
                Block(
                    index=index,
                    stage=stage,
                    place=place,
                    inputs=inputs,
                    middle=middle,
                    outputs=width,
                    groups=groups,
                    stride=2 if stage > 0 and place == 0 else 1,
                    variance=variance,
                    stochastic_depth=index / total,
                    family=sizes.family,
                )
            )
            inputs = width
            variance = (1.0 if place == 0 else variance) + ALPHA**2
    return tuple(built)


def final_conv(variant: str | Variant) -> Conv | None:
    """Return the convolution after the last block; None for an NF-ResNet."""
    sizes = _variant(variant)
    if sizes.family == "NF-ResNet":
        return None
    return Conv("final_conv", sizes.widths[-1], 2 * sizes.widths[-1], 1)


def features(variant: str | Variant) -> int:
    """Return how many features the classifier is given."""
    last = final_conv(variant)
    return _variant(variant).widths[-1] if last is None else last.outputs


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis that give ``ceil(size / stride)`` outputs (XLA's SAME).

    With kernel 3 and stride 2, an even axis has (0, 1) and an odd one (1, 1).
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
