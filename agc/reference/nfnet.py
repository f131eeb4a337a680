r"""The executable definition of NFNets and NF-ResNets: forward and backward in float64 NumPy.

Written to be read. Sources: Brock, De, Smith, Simonyan, arXiv:2102.06171; Brock, De, Smith,
arXiv:2101.08692; and the code released with them where that differs. The sizes, constants and names
are those of :mod:`agc.nfnet`; parameters are in the neutral layout, and images are
``(n, h, w, c)``.

Every part returns its output together with the function that takes a gradient back through it. Such
a function returns the gradient of the part's input and leaves those of its parameters in
:attr:`NFNet.gradients`, so that reading a part from top to bottom shows the formula and then its
derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agc.errors import ConfigError, ShapeError
from agc.nfnet import (
    ALPHA,
    GAMMAS,
    HEAD,
    WS_EPS,
    Block,
    Conv,
    Masks,
    Variant,
    WsDtype,
    blocks,
    check_arrays,
    check_masks,
    final_conv,
    parameters,
    same_padding,
    stem,
)
from agc.nfnet import variant as find_variant

__all__ = ["NFNet", "NFNetPass", "smoothed_cross_entropy"]

Array = npt.NDArray[np.float64]
Back = Callable[[Array], Array]


@dataclass
class NFNetPass:
    """Results of a forward pass of an :class:`NFNet`.

    Attributes
    ----------
    logits : array, shape (n, classes)
    pooled : array, shape (n, features)
        What the classifier is given.
    outputs : dict of str to array
        After the stem and after each block, by canonical name: ``"stem"``, ``"stages.0.0"`` and so
        on.
    signals : dict of str to array
        ``"avg_sq_mean"`` and ``"avg_var"``, shape (blocks + 1,): squared mean and biased variance
        of each channel over images and pixels, averaged over channels, after the stem and each
        block. ``"res_avg_var"``, shape (blocks,): the same variance of each residual branch after
        its gates.
    backward : callable
        Takes the gradient of the logits, returns that of every parameter by canonical name.
    """

    logits: Array
    pooled: Array
    outputs: dict[str, Array]
    signals: dict[str, Array]
    backward: Callable[[Array], dict[str, Array]] = field(repr=False)


class NFNet:
    """An NFNet with tanh-GELU or an NF-ResNet with ReLU, as DeepMind standardises weights.

    It draws nothing.

    Parameters
    ----------
    variant : str or Variant
        As :func:`agc.nfnet.variant` takes it.
    arrays : mapping of str to array
        Every parameter by canonical name, in the neutral layout. The number of classes and of image
        channels are taken from them.
    dropout : float, optional
        Rate before the classifier, which rescales what a mask keeps; the variant's if None.
    ws_dtype : {"float32", "bfloat16"}
        ``bfloat16`` rounds in :meth:`standardise` what is a bfloat16 there; ``float32`` rounds
        nothing, as all else here.

    Attributes
    ----------
    parameters : dict of str to float64 array
    gradients : dict of str to float64 array
        Those of the last ``backward`` of any pass.

    Raises
    ------
    ParameterError
        If these are not the variant's parameters.
    ConfigError
        If its activation is another one.

    Examples
    --------
    >>> from agc.nfnet import seeded_batch, seeded_parameters
    >>> images, labels = seeded_batch(2, 32)
    >>> done = NFNet("tiny", seeded_parameters("tiny"))(images)
    >>> round(smoothed_cross_entropy(done.logits, labels)[0], 12)
    2.280224321275
    """

    def __init__(
        self,
        variant: str | Variant,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        dropout: float | None = None,
        ws_dtype: WsDtype = "float32",
    ) -> None:
        self.variant = find_variant(variant)
        self.ws_dtype = ws_dtype
        if self.variant.activation not in ("gelu", "relu"):
            raise ConfigError(
                "the reference has the activations gelu and relu, "
                f"not {self.variant.activation!r} of {self.variant.name}"
            )
        self.dropout = self.variant.dropout if dropout is None else dropout
        bias = arrays.get(f"{HEAD}.bias")
        classes = None if bias is None or bias.ndim != 1 else bias.shape[0]
        first = arrays.get("stem.conv0.weight")
        self.channels = 3 if first is None or first.ndim != 4 else first.shape[2]
        check_arrays(parameters(self.variant, classes, self.channels), arrays)
        self.parameters = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        self.gradients: dict[str, Array] = {}

    # -- the whole ------------------------------------------------------------------------------

    def __call__(self, images: npt.NDArray[Any], masks: Masks | None = None) -> NFNetPass:
        """Return what a forward pass finds.

        Parameters
        ----------
        images : array, shape (n, h, w, channels)
            Of any size.
        masks : Masks, optional
            What stochastic depth and dropout keep. All is kept where there is no mask, as in
            evaluation.

        Raises
        ------
        ShapeError
            If these are not such images, or not masks of them.
        """
        if images.ndim != 4 or images.shape[3] != self.channels:
            raise ShapeError(f"images: shape {images.shape} is not (n, h, w, {self.channels})")
        masks = check_masks(masks, self.variant, len(images), convert=np.asarray)
        outputs: dict[str, Array] = {}
        residuals: list[Array] = []
        backs: list[Back] = []
        x, back = self.stem(np.asarray(images, np.float64))
        outputs["stem"] = x
        backs.append(back)
        for block in blocks(self.variant):
            keep = np.ones(len(images))
            if masks.stochastic_depth is not None:
                keep = np.asarray(masks.stochastic_depth[:, block.index], np.float64)
            x, residual, back = self.block(block, x, keep)
            outputs[block.name] = x
            residuals.append(residual)
            backs.append(back)
        pooled, back = self.finish(x)
        backs.append(back)
        if masks.dropout is not None:
            pooled, back = self.drop(pooled, masks.dropout)
            backs.append(back)
        logits, back = self.dense(HEAD, pooled)
        backs.append(back)

        def backward(gradient: Array) -> dict[str, Array]:
            for step in reversed(backs):
                gradient = step(gradient)
            return dict(self.gradients)  # which the next pass overwrites

        moments = [_moments(value) for value in outputs.values()]
        signals = {
            "avg_sq_mean": np.array([mean for mean, _ in moments]),
            "avg_var": np.array([variance for _, variance in moments]),
            "res_avg_var": np.array([_moments(value)[1] for value in residuals]),
        }
        return NFNetPass(logits, pooled, outputs, signals, backward)

    def stem(self, x: Array) -> tuple[Array, Back]:
        """Apply an NFNet's convolutions and activations, or an NF-ResNet's one and the maximum."""
        backs: list[Back] = []
        for place, conv in enumerate(stem(self.variant, self.channels)):
            if place:
                x, back = self.activate(x)
                backs.append(back)
            x, back = self.convolve(conv.name, conv, x)
            backs.append(back)
        if self.variant.family == "NF-ResNet":
            x, back = self.maximum(x)
            backs.append(back)
        return x, _chain(backs)

    def block(self, block: Block, x: Array, keep: Array) -> tuple[Array, Array, Back]:
        """Return a block's output, its residual branch after the gates, and the way back."""
        active, back_active = self.activate(x, self.beta(block))
        shortcut = x
        back_shortcut: Back = _identity
        if block.projects:
            pooled, back_pool = self.pool(active) if block.pools else (active, _identity)
            conv = block.convs[-1]
            shortcut, back_conv = self.convolve(f"{block.name}.shortcut", conv, pooled)
            back_shortcut = _chain([back_pool, back_conv])

        branch, backs = active, []
        for place, conv in enumerate(block.convs[:-1] if block.projects else block.convs):
            if place:
                branch, back = self.activate(branch)
                backs.append(back)
            branch, back = self.convolve(f"{block.name}.{conv.name}", conv, branch)
            backs.append(back)
        residual, back = self.gate(block, branch) if block.squeezed else (branch, _identity)
        back_branch = _chain([*backs, back])

        name = f"{block.name}.skip_gain"
        gain, share = self.parameters[name], keep[:, None, None, None]
        out = residual * share * gain * ALPHA + shortcut

        def backward(d: Array) -> Array:
            self.gradients[name] = np.asarray(np.sum(d * residual * share) * ALPHA)
            d_active = back_branch(d * share * gain * ALPHA)
            if block.projects:
                return back_active(d_active + back_shortcut(d))
            return back_active(d_active) + d

        return out, residual, backward

    def finish(self, x: Array) -> tuple[Array, Back]:
        """Apply an NFNet's last convolution, the activation, and the mean over pixels."""
        last = final_conv(self.variant)
        back_conv: Back = _identity
        if last is not None:
            x, back_conv = self.convolve("final_conv", last, x)
        x, back_active = self.activate(x)
        shape = x.shape

        def back_mean(d: Array) -> Array:
            return np.broadcast_to(d[:, None, None] / (shape[1] * shape[2]), shape)

        return x.mean((1, 2)), _chain([back_conv, back_active, back_mean])

    def drop(self, x: Array, keep: npt.NDArray[Any]) -> tuple[Array, Back]:
        """Set features to 0, and divide those that are kept by their share."""
        factor = keep / (1 - self.dropout)
        return x * factor, lambda d: d * factor

    # -- its parts ------------------------------------------------------------------------------

    def convolve(self, name: str, conv: Conv, x: Array) -> tuple[Array, Back]:
        """Convolve with a standardised weight, zeros around the image, and add a bias."""
        weight, back_weight = self.standardise(
            self.parameters[f"{name}.weight"], self.parameters[f"{name}.gain"]
        )
        n, height, width, _ = x.shape
        rows = self.padding(height, conv.kernel, conv.stride)
        columns = self.padding(width, conv.kernel, conv.stride)
        padded = np.pad(x, ((0, 0), rows, columns, (0, 0)))
        h, w = ((s - conv.kernel) // conv.stride + 1 for s in padded.shape[1:3])
        # One matrix product for each place (i, j) in the kernel and each group.
        places = [
            (
                i,
                j,
                np.s_[
                    :, i : i + h * conv.stride : conv.stride, j : j + w * conv.stride : conv.stride
                ],
            )
            for i in range(conv.kernel)
            for j in range(conv.kernel)
        ]
        kernels = _by_group(weight, conv.groups)  # (kernel, kernel, groups, inputs, outputs)
        out = np.zeros((conv.groups, n * h * w, conv.outputs // conv.groups))
        for i, j, window in places:
            out += _by_group(padded[window].reshape(-1, conv.inputs), conv.groups) @ kernels[i, j]

        def backward(d: Array) -> Array:
            self.gradients[f"{name}.bias"] = d.sum((0, 1, 2))
            d_out = _by_group(d.reshape(-1, conv.outputs), conv.groups)
            d_padded, d_kernels = np.zeros_like(padded), np.empty_like(kernels)
            for i, j, window in places:
                seen = _by_group(padded[window].reshape(-1, conv.inputs), conv.groups)
                d_kernels[i, j] = seen.swapaxes(1, 2) @ d_out
                back = d_out @ kernels[i, j].swapaxes(1, 2)
                d_padded[window] += _ungroup(back).reshape(n, h, w, conv.inputs)
            d_weight, d_gain = back_weight(_ungroup(d_kernels))
            self.gradients[f"{name}.weight"] = d_weight
            self.gradients[f"{name}.gain"] = d_gain
            return d_padded[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width]

        bias = self.parameters[f"{name}.bias"]
        return _ungroup(out).reshape(n, h, w, conv.outputs) + bias, backward

    def standardise(
        self, weight: Array, gain: Array
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """Give each filter the mean 0 and, times its gain, the norm 1; its norm has a floor.

        In bfloat16 that is DeepMind's ``weight * scale - mean * scale``, where weight, gain, mean,
        variance, scale, the second product and the result are rounded to bfloat16, and so are
        their gradients in a framework. Sums, and all else in between, are at least float32. What
        is returned as the gradient is that of the rounded weight and gain, itself not rounded.
        """
        axes = (0, 1, 2)
        if self.ws_dtype == "bfloat16":
            weight, gain = _to_bfloat16(weight), _to_bfloat16(gain)
        centred = weight - weight.mean(axes)
        squared_norm = np.sum(centred**2, axes)  # the number of weights times their biased variance
        scale = 1 / np.sqrt(np.maximum(squared_norm, WS_EPS["deepmind"]))
        depends = squared_norm > WS_EPS["deepmind"]

        def backward(d: Array) -> tuple[Array, Array]:
            along = np.sum(d * centred, axes)
            d_centred = gain * scale * (d - depends * scale**2 * along * centred)
            return d_centred - d_centred.mean(axes), scale * along

        if self.ws_dtype == "bfloat16":
            fan_in = math.prod(weight.shape[:3])
            floored = np.maximum(fan_in * _to_bfloat16(squared_norm / fan_in), WS_EPS["deepmind"])
            factor = _to_bfloat16(gain / np.sqrt(floored))
            shift = _to_bfloat16(_to_bfloat16(weight.mean(axes)) * factor)
            return _to_bfloat16(weight * factor - shift), backward
        return centred * scale * gain, backward

    def gate(self, block: Block, x: Array) -> tuple[Array, Back]:
        """Squeeze and excite: multiply each channel by a gate between 0 and 2."""
        hidden, back_0 = self.dense(f"{block.name}.se.fc0", x.mean((1, 2)))
        hidden, slope = self.squeezed_function(hidden)
        logits, back_1 = self.dense(f"{block.name}.se.fc1", hidden)
        sigmoid = 1 / (1 + np.exp(-logits))
        gates = 2 * sigmoid

        def backward(d: Array) -> Array:
            d_logits = np.sum(d * x, (1, 2)) * 2 * sigmoid * (1 - sigmoid)
            d_mean = back_0(back_1(d_logits) * slope)
            pixels = x.shape[1] * x.shape[2]
            d_x: Array = d * gates[:, None, None] + d_mean[:, None, None] / pixels
            return d_x

        return x * gates[:, None, None], backward

    def dense(self, name: str, x: Array) -> tuple[Array, Back]:
        """Apply a dense layer."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]

        def backward(d: Array) -> Array:
            self.gradients[f"{name}.weight"] = x.T @ d
            self.gradients[f"{name}.bias"] = d.sum(0)
            d_x: Array = d @ weight.T
            return d_x

        return x @ weight + bias, backward

    def activate(self, x: Array, beta: float = 1.0) -> tuple[Array, Back]:
        """Apply the activation, times the constant that keeps the variance, times ``beta``."""
        value, slope = self.function(x)
        factor = self.gamma() * beta
        return factor * value, lambda d: d * factor * slope

    def pool(self, x: Array) -> tuple[Array, Back]:
        """Average windows of 2x2 pixels; at an odd edge, those that are there."""
        _, height, width, _ = x.shape
        edge = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))

        def windows(values: Array) -> Array:
            padded = np.pad(values, edge)
            _, h, w, c = padded.shape
            return padded.reshape(-1, h // 2, 2, w // 2, 2, c)

        counts = windows(np.ones((1, height, width, 1))).sum((2, 4))

        def backward(d: Array) -> Array:
            wide: Array = (d / counts).repeat(2, 1).repeat(2, 2)
            return wide[:, :height, :width]

        return windows(x).sum((2, 4)) / counts, backward

    def maximum(self, x: Array) -> tuple[Array, Back]:
        """Take the maximum of 3x3 pixels with stride 2, of those that are there."""
        n, height, width, c = x.shape
        rows, columns = self.padding(height, 3, 2), self.padding(width, 3, 2)
        padded = np.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
        windows = windows.reshape(*windows.shape[:4], 9)
        largest = windows.argmax(-1)
        _, h, w, _ = largest.shape
        image, row, column, channel = np.ogrid[:n, :h, :w, :c]
        source = (image, 2 * row + largest // 3, 2 * column + largest % 3, channel)

        def backward(d: Array) -> Array:
            d_padded = np.zeros_like(padded)
            np.add.at(d_padded, source, d)
            return d_padded[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width]

        return padded[source], backward

    # -- formulas that ports get wrong ----------------------------------------------------------

    def padding(self, size: int, kernel: int, stride: int) -> tuple[int, int]:
        """Return how many zeros stand before and after an axis."""
        return same_padding(size, kernel, stride)

    def function(self, x: Array) -> tuple[Array, Array]:
        """Return GELU in its tanh form, or an NF-ResNet's ReLU, and its slope."""
        if self.variant.activation == "relu":
            return self.squeezed_function(x)
        root, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = np.tanh(root * (x + cubic * x**3))
        inner = root * (1 + 3 * cubic * x**2)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner

    def gamma(self) -> float:
        """Return the activation's constant: a literal, estimated by sampling."""
        return GAMMAS[self.variant.activation]

    def squeezed_function(self, x: Array) -> tuple[Array, Array]:
        """Return the activation of squeeze and excite, ReLU without a constant, and its slope."""
        return np.maximum(x, 0), np.where(x > 0, 1.0, 0.0)

    def beta(self, block: Block) -> float:
        """Return what makes the variance that a block expects 1."""
        return block.beta


def smoothed_cross_entropy(
    logits: Array, labels: npt.NDArray[np.int64], smoothing: float = 0.1
) -> tuple[float, Array]:
    """Return the mean cross-entropy with label smoothing, and its gradient for the logits.

    Parameters
    ----------
    logits : array, shape (n, classes)
    labels : array of int, shape (n,)
        From 0 to classes - 1.
    smoothing : float
        Share of each target that is spread over all classes, the right one too.
    """
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    targets = np.full(logits.shape, smoothing / logits.shape[1])
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    loss = -np.sum(targets * log_probabilities) / len(labels)
    return float(loss), (np.exp(log_probabilities) - targets) / len(labels)


def _chain(backs: list[Back]) -> Back:
    def backward(d: Array) -> Array:
        for back in reversed(backs):
            d = back(d)
        return d

    return backward


def _to_bfloat16(x: Array) -> Array:
    """Round to the 8 significant bits of bfloat16, whose range is float32's."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def _identity(d: Array) -> Array:
    return d


def _by_group(x: Array, groups: int) -> Array:
    """Split the last axis into groups, and put those before the last but one."""
    return np.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, -3)


def _ungroup(x: Array) -> Array:
    x = np.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def _moments(x: Array) -> tuple[float, float]:
    return float((x.mean((0, 1, 2)) ** 2).mean()), float(x.var((0, 1, 2)).mean())
