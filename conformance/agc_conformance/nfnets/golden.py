"""Expected numbers of models with the seeded parameters and images of :mod:`agc.nfnet`.

The numbers were computed by DeepMind's own code in float64: evaluation mode, cross-entropy with
label smoothing 0.1, mean over the batch. The suite and the tests of the adapters compare with them,
within :data:`LIMITS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GOLDEN", "LIMITS", "OPTIMIZER", "SMOOTHING", "Golden", "Limits", "OptimizerStep"]

SMOOTHING: Final = 0.1
"""Label smoothing of the loss; written again, so that a slip in the recipe shows."""


@dataclass(frozen=True)
class Golden:
    """Numbers of one model on one batch, rounded to the digits that are written here.

    Attributes
    ----------
    batch, pixels : int
        Arguments of :func:`agc.nfnet.seeded_batch`.
    loss : float
    logits : tuple of tuple of float
        The first logits of each image.
    logits_sum, logits_norm, pooled_norm : float
        Sum of all logits; L2 norms of the logits and of the classifier's input.
    avg_var : tuple of float
        Signal metric after the stem and after each block.
    res_avg_var : dict of int to float
        Signal metric of some blocks' residual branches.
    gradients : dict of str to float
        L2 norms of some gradients, by canonical name.
    gradient_norm, parameter_norm : float
        L2 norms of all gradients and of all parameters together.
    """

    batch: int
    pixels: int
    loss: float
    logits: tuple[tuple[float, ...], ...]
    logits_sum: float
    logits_norm: float
    pooled_norm: float
    avg_var: tuple[float, ...]
    res_avg_var: dict[int, float]
    gradients: dict[str, float]
    gradient_norm: float
    parameter_norm: float


# fmt: off
GOLDEN: Final[dict[str, Golden]] = {
    "tiny": Golden(
        batch=2,
        pixels=32,
        loss=2.280224321275,
        logits=(
            (-0.011253912838, -0.000617584215, -0.006398171822, 0.022522036783, 0.102384765925),
            (-0.008933657389, 0.006935150998, 0.013014072770),
        ),
        logits_sum=0.256024728268,
        logits_norm=0.222182062423,
        pooled_norm=2.341518348753,
        avg_var=(
            0.898226231, 0.961263868, 0.251583842, 0.251417121, 0.044723350, 0.044680111, 0.044599561,
            0.044658866, 0.044738718, 0.044756228, 0.005236639, 0.005238114, 0.005235962,
        ),
        res_avg_var={0: 0.921323208, 5: 0.003581131, 11: 0.000022106},
        gradients={
            "stem.conv0.weight": 6.041064459437e-02,
            "stem.conv3.gain": 2.633910255337e-02,
            "stages.0.0.skip_gain": 2.761519124380e-03,
            "stages.2.0.shortcut.weight": 7.442918613726e-02,
            "stages.2.2.conv1b.weight": 1.811492719626e-03,
            "stages.3.0.se.fc1.weight": 9.526214421880e-05,
            "final_conv.bias": 6.490642612078e-02,
            "head.weight": 9.685029207706e-01,
            "head.bias": 5.639553983273e-01,
        },
        gradient_norm=1.182767901060,
        parameter_norm=89.021062479,
    ),
    "F0": Golden(
        batch=2,
        pixels=64,
        loss=6.852357725787,
        logits=(
            (0.023837507149, 0.079920447140, 0.109191004808, 0.071714124712, 0.032390560450),
            (0.037328175839, 0.046002536928, 0.091395561432),
        ),
        logits_sum=10.208680035993,
        logits_norm=3.814431676421,
        pooled_norm=10.186660426273,
        avg_var=(
            1.046649456, 1.049956255, 0.263122672, 0.264123448, 0.055833500, 0.056040792, 0.056213741,
            0.056402559, 0.056489027, 0.056692429, 0.008457755, 0.008458265, 0.008458126,
        ),
        res_avg_var={0: 1.023389813, 5: 0.012960751, 11: 0.001516343},
        gradients={
            "stem.conv0.weight": 1.784813553850e-01,
            "stem.conv3.gain": 1.271917404859e-01,
            "stages.0.0.skip_gain": 2.884443356162e-03,
            "stages.2.0.shortcut.weight": 8.229004213177e-01,
            "stages.2.2.conv1b.weight": 5.190723195002e-02,
            "stages.3.0.se.fc1.weight": 2.700355283178e-03,
            "final_conv.bias": 3.011986091269e-01,
            "head.weight": 4.579222656170e00,
            "head.bias": 6.356976903145e-01,
        },
        gradient_norm=5.373009923629,
        parameter_norm=336.842282731,
    ),
    "NF-ResNet-tiny": Golden(
        batch=2,
        pixels=32,
        loss=2.446630706431,
        logits=(
            (-0.099376724437, -0.146645259438, 0.109158026331, 0.124320957573, -0.123350815127),
            (0.042682483549, -0.162231941304, 0.075531138995),
        ),
        logits_sum=-0.504914874371,
        logits_norm=0.483796618576,
        pooled_norm=16.236430718589,
        avg_var=(0.366180048, 0.926356395, 0.995986632, 0.996254970, 1.012494675),
        res_avg_var={0: 0.862289296, 2: 0.536573530, 3: 0.716319925},
        gradients={
            "stem.conv0.weight": 1.336533897302e00,
            "stem.conv0.gain": 2.265748608828e-01,
            "stages.0.0.skip_gain": 6.180635734783e-03,
            "stages.0.0.shortcut.bias": 8.382867215887e-02,
            "stages.1.0.shortcut.weight": 3.783270209048e-01,
            "stages.1.1.conv1.weight": 4.313623995172e-02,
            "stages.2.0.conv0.weight": 3.759925058821e-02,
            "head.weight": 6.878470325585e00,
            "head.bias": 5.904440052201e-01,
        },
        gradient_norm=7.070284423461,
        parameter_norm=36.974899714,
    ),
}
# fmt: on


@dataclass(frozen=True)
class OptimizerStep:
    """``tiny`` after a step of DeepMind's optimizer, on the same batch every time.

    Learning rate 0.1, clipping 0.01, eps 1e-3, weight decay 2e-5, Nesterov's momentum 0.9.

    Attributes
    ----------
    loss : float
        Before the step.
    parameter_norm, distance : float
        L2 norm of all parameters together after the step, and of their difference from the start.
    skip_gain, head_bias_norm : float
        ``stages.0.0.skip_gain``, and the L2 norm of ``head.bias``.
    """

    loss: float
    parameter_norm: float
    skip_gain: float
    head_bias_norm: float
    distance: float


OPTIMIZER: Final = (
    OptimizerStep(
        2.280224321275, 89.020845453441, 0.352118580247, 1.703066642212e-01, 1.878240994762e-01
    ),
    OptimizerStep(
        2.087298547832, 89.023407928238, 0.352690896631, 1.703915263602e-01, 4.556689284263e-01
    ),
)
"""The first two steps. In the first, 254 of 4855 units are clipped."""


@dataclass(frozen=True)
class Limits:
    """How far a framework may be from the golden model, or from the same model in float64.

    Attributes
    ----------
    logits : float
        Largest error, relative to the largest logit.
    loss : float
        Absolute error of the loss.
    gradient_median, gradient, skip_gain : float
        Relative L2 errors of gradients: the median, that of any tensor but a skip gain, and that of
        a skip gain.
    trained_element, trained, trained_loss : float
        Errors of training: largest absolute error of any parameter, relative L2 error of all
        parameters together, absolute error of the loss.
    """

    logits: float
    loss: float
    gradient_median: float
    gradient: float
    skip_gain: float
    trained_element: float
    trained: float
    trained_loss: float


_INF: Final = float("inf")
LIMITS: Final[dict[str, Limits]] = {
    "float64": Limits(1e-12, 1e-11, 1e-12, 1e-11, 1e-10, 1e-12, 1e-13, 1e-12),
    "float32": Limits(1e-5, 1e-5, 1e-5, 1e-4, 1e-3, 1e-5, 1e-6, 1e-5),
    "bfloat16": Limits(1e-1, 1e-2, 1e-1, _INF, _INF, _INF, _INF, _INF),
}
"""Limits by dtype. In float32 every known mistake of a port has a larger error; in bfloat16 almost
none has. Infinity stands for numbers that are not compared."""
