"""NFNets and NF-ResNets: the facts that the models of every framework share (arXiv:2102.06171).

The models themselves are native code in the adapters; what they must agree on is here once: the
variants, the blocks with their expected variances, the constants, and every parameter's name,
shape, meaning and initial values. The released code is the source where the paper differs from it.

*Canonical names* are dotted and lower-case; files of every framework use them::

    stem.conv0 .. stem.conv3        weight, gain, bias      3x3
    stages.S.B.conv0                weight, gain, bias      1x1, to the bottleneck
    stages.S.B.conv1, .conv1b       weight, gain, bias      3x3, grouped; conv1 has the stride
    stages.S.B.conv2                weight, gain, bias      1x1, from the bottleneck
    stages.S.B.shortcut             weight, gain, bias      1x1; only in the first block of a stage
    stages.S.B.se.fc0, .se.fc1      weight, bias            squeeze and excite
    stages.S.B.skip_gain                                    one number
    final_conv                      weight, gain, bias      1x1
    head                            weight, bias            the classifier

An NF-ResNet (arXiv:2101.08692) has the same blocks without ``conv1b`` and ``se``, the stem
``stem.conv0`` of 7x7 alone, and no ``final_conv``; its ``conv1`` is not grouped.

The *neutral layout* is that of DeepMind's files: a convolution's weight is
``(height, width, inputs / groups, outputs)``, a dense layer's ``(inputs, outputs)``, gains and
biases are ``(outputs,)``, a skip gain ``()``.
"""

from agc.nfnet.architecture import Block, Conv, blocks, features, final_conv, same_padding, stem
from agc.nfnet.masks import Masks, check_masks
from agc.nfnet.parameters import HEAD, Initial, Kind, ParameterSpec, check_arrays, parameters
from agc.nfnet.recipe import MOMENTUM, SMOOTHING, WEIGHT_DECAY, check_recipe, decays
from agc.nfnet.seeded import seeded_batch, seeded_parameters
from agc.nfnet.variants import (
    ALPHA,
    GAMMAS,
    STEM,
    STOCHASTIC_DEPTH,
    VARIANTS,
    WS_EPS,
    Family,
    Options,
    Variant,
    WsDtype,
    WsEps,
    options,
    variant,
)

__all__ = [
    "ALPHA",
    "GAMMAS",
    "HEAD",
    "MOMENTUM",
    "SMOOTHING",
    "STEM",
    "STOCHASTIC_DEPTH",
    "VARIANTS",
    "WEIGHT_DECAY",
    "WS_EPS",
    "Block",
    "Conv",
    "Family",
    "Initial",
    "Kind",
    "Masks",
    "Options",
    "ParameterSpec",
    "Variant",
    "WsDtype",
    "WsEps",
    "blocks",
    "check_arrays",
    "check_masks",
    "check_recipe",
    "decays",
    "features",
    "final_conv",
    "options",
    "parameters",
    "same_padding",
    "seeded_batch",
    "seeded_parameters",
    "stem",
    "variant",
]
