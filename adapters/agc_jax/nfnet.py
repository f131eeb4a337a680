"""NFNets (arXiv:2102.06171) and NF-ResNets (arXiv:2101.08692) in Flax NNX.

The shared facts are in :mod:`agc.nfnet`; this file is their JAX code, from the smallest part to the
whole: convolution, activation, squeeze and excite, stem, block, model. Images are ``(n, h, w, c)``.
Parameters are called by their canonical names, so the model's ``nnx.state`` has them too, and JAX's
layout is the neutral one; :mod:`agc_jax.weights` translates.
``flax.nnx.bridge.to_linen(nfnet, "F0")`` is the same in Flax Linen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax, nn

from agc.errors import DTypeError, ParameterError, ShapeError
from agc.nfnet import (
    ALPHA,
    GAMMAS,
    HEAD,
    WS_EPS,
    Block,
    Conv,
    Initial,
    Masks,
    Options,
    Variant,
    WsDtype,
    WsEps,
    blocks,
    check_masks,
    features,
    final_conv,
    options,
    parameters,
    stem,
)
from agc_jax.layers import register_units
from agc_jax.units import flatten

__all__ = ["NFNet", "nfnet"]

_FUNCTIONS: Final[Mapping[str, Callable[[jax.Array], jax.Array]]] = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
    "relu6": nn.relu6,
    "elu": nn.elu,
    "celu": nn.celu,
    "leaky_relu": nn.leaky_relu,
    "selu": nn.selu,
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": nn.softplus,
    "soft_sign": nn.soft_sign,
    "log_sigmoid": nn.log_sigmoid,
    "identity": lambda x: x,
}
_List: Final = getattr(nnx, "List", list)
"""A list of modules; before Flax 0.12 a module may have plain ones."""


def _undrawn(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """Return a parameter without numbers, which :meth:`NFNet.reset_parameters` draws."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.zeros((), dtype).dtype))


def nfnet(
    variant: str | Variant,
    num_classes: int | None = None,
    *,
    rngs: nnx.Rngs,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    in_channels: int = 3,
    activation: str | None = None,
    ws_eps: WsEps = "deepmind",
    ws_dtype: WsDtype = "float32",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> NFNet:
    """Return an NFNet or NF-ResNet with the initial values of DeepMind's code.

    Parameters
    ----------
    variant : str or Variant
        ``"F0"`` to ``"F7"``, the wider ``"F0+"`` to ``"F7+"``, ``"NF-ResNet-50"`` and so on, or
        ``"tiny"`` for tests and first steps: a name in :data:`agc.nfnet.VARIANTS`.
    num_classes : int, optional
        The variant's own if None: 1000, and 10 for ``tiny``.
    rngs : nnx.Rngs
        Random numbers: ``params`` for the initial values, ``dropout`` for dropout and stochastic
        depth.
    dropout : float, optional
        Rate before the classifier; the variant's own (0 to 0.5) if None.
    stochastic_depth : float, optional
        Rate that the blocks' rates rise to; the variant's own (0.25, NF-ResNets 0.1) if None. What
        is kept is not rescaled.
    in_channels : int
        Channels of the images.
    activation : str, optional
        A name in :data:`agc.nfnet.GAMMAS`: ``"gelu"`` is the tanh form, timm's weights want
        ``"gelu_erf"``. The variant's own (``"gelu"``, NF-ResNets ``"relu"``) if None.
    ws_eps : {"deepmind", "timm"}
        Whether epsilon of weight standardisation is a floor or a term (:data:`agc.nfnet.WS_EPS`).
    ws_dtype : {"float32", "bfloat16"}
        What weights of convolutions in bfloat16 are standardised in; others in at least float32.
    dtype, param_dtype
        What is computed in, and how parameters are stored, as in any Flax layer. Without ``dtype``
        it is what images and parameters promote to.

    Returns
    -------
    NFNet
        In training mode.

    Raises
    ------
    ConfigError
        If a value is not allowed; for an unknown variant the message lists those there are.

    Examples
    --------
    >>> model = nfnet("tiny", rngs=nnx.Rngs(0))
    >>> model.eval()
    >>> forward = nnx.jit(lambda model, images: model(images))
    >>> forward(model, jnp.zeros((2, 32, 32, 3))).shape
    (2, 10)

    Nothing is computed for the shapes alone:

    >>> model = nnx.eval_shape(lambda: nfnet("F7", rngs=nnx.Rngs(0)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    499504088
    """
    return NFNet(
        options(
            variant,
            num_classes,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
            in_channels=in_channels,
            activation=activation,
            ws_eps=ws_eps,
            ws_dtype=ws_dtype,
        ),
        rngs=rngs,
        dtype=dtype,
        param_dtype=param_dtype,
    )


class SameConv2d(nnx.Module):  # type: ignore[misc]
    """A convolution with a bias that pads as XLA's SAME: even axes under stride 2 at their end."""

    def __init__(self, conv: Conv, param_dtype: Any = jnp.float32, *, bias: bool = True) -> None:
        self.conv = conv
        self.weight = _undrawn(conv.shape, param_dtype)
        self.bias = _undrawn((conv.outputs,), param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images of shape (n, h, w, inputs)."""
        return self.convolve(x, self.weight[...])

    def convolve(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Convolve with a given weight, in the dtype of the images."""
        stride = self.conv.stride
        out = lax.conv_general_dilated(
            x,
            weight.astype(x.dtype),
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.conv.groups,
        )
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


_FILTER: Final = (0, 1, 2)  # the axes of a filter, of which a weight has one for each output


def _standardise(weight: jax.Array, gain: jax.Array, ws_eps: WsEps) -> jax.Array:
    """Standardise in at least float32, and return the weight's dtype."""
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    weight, gain, dtype = weight.astype(wide), gain.astype(wide), weight.dtype
    # Autodiff's gradient is good enough: XLA fuses what would be many passes over the weights.
    mean = weight.mean(_FILTER)
    squared_norm = jnp.square(weight - mean).sum(_FILTER)
    scale = gain * _scale(squared_norm, weight[..., 0].size, ws_eps)
    # The same as of the centred weight, which XLA would keep.
    return (weight * scale - mean * scale).astype(dtype)


_standardised = jax.jit(_standardise, static_argnums=2)


def _standardise_in_bfloat16(weight: jax.Array, gain: jax.Array, ws_eps: WsEps) -> jax.Array:
    weight, gain = _rounded(weight), _rounded(gain)
    fan_in = weight[..., 0].size
    mean, squared_norm = _rounded(weight.mean(_FILTER)), fan_in * _rounded(weight.var(_FILTER))
    scale = _rounded(gain * _scale(squared_norm, fan_in, ws_eps))
    return (weight * scale - _rounded(mean * scale)).astype(jnp.bfloat16)


def _rounded(x: jax.Array) -> jax.Array:
    """Return a bfloat16, as its gradient will be, for computations in float32.

    Two casts in its place XLA may leave out, as it is allowed excess precision.
    """
    return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _scale(squared_norm: jax.Array, fan_in: int, ws_eps: WsEps) -> jax.Array:
    """Return what makes the norm of a filter 1."""
    eps = WS_EPS[ws_eps]
    if ws_eps == "deepmind":
        return lax.rsqrt(jnp.maximum(squared_norm, eps))
    return lax.rsqrt(squared_norm + fan_in * eps)


class WSConv2d(SameConv2d):
    """A convolution with a standardised weight: a filter has mean 0 and its gain as norm.

    Parameters
    ----------
    conv : Conv
        Sizes, stride and groups.
    ws_eps : {"deepmind", "timm"}
        See :data:`agc.nfnet.WS_EPS`.
    ws_dtype : {"float32", "bfloat16"}
        See :class:`agc.nfnet.Options`.
    param_dtype
        How parameters are stored.

    Attributes
    ----------
    weight : nnx.Param, shape (kernel, kernel, inputs / groups, outputs)
    gain, bias : nnx.Param, shape (outputs,)
        A gain is a vector, hence one unit of AGC (AGC-5).
    """

    def __init__(
        self,
        conv: Conv,
        ws_eps: WsEps,
        ws_dtype: WsDtype = "float32",
        param_dtype: Any = jnp.float32,
    ) -> None:
        super().__init__(conv, param_dtype)
        self.ws_eps: WsEps = ws_eps
        self.ws_dtype: WsDtype = ws_dtype
        self.gain = _undrawn((conv.outputs,), param_dtype)

    def standardised(self, dtype: Any = None) -> jax.Array:
        """Return the standardised weight: computed in at least float32, in the weight's dtype.

        Both are bfloat16 if ``ws_dtype`` is and ``dtype``, what the convolution computes in, too.
        """
        if self.ws_dtype == "bfloat16" and dtype == jnp.bfloat16:
            return _standardise_in_bfloat16(self.weight[...], self.gain[...], self.ws_eps)
        return _standardise(self.weight[...], self.gain[...], self.ws_eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images of shape (n, h, w, inputs)."""
        return self.convolve(x, self.standardised(x.dtype))

    def folded(self) -> SameConv2d:
        """Return the plain convolution that gives the same outputs."""
        plain = SameConv2d(self.conv)
        plain.weight = nnx.Param(_standardised(self.weight[...], self.gain[...], self.ws_eps))
        plain.bias = self.bias
        return plain

    def normalised(self) -> NormalisedConv2d:
        """Return a convolution with the same weight and batch normalisation."""
        twin = NormalisedConv2d(self.conv, self.weight.dtype)
        twin.weight = self.weight
        return twin


class NormalisedConv2d(SameConv2d):
    """A convolution, and batch normalisation instead of a standardised weight and a bias."""

    def __init__(self, conv: Conv, param_dtype: Any = jnp.float32) -> None:
        super().__init__(conv, param_dtype, bias=False)
        # PyTorch's epsilon and momentum; Flax calls the share that is kept momentum.
        self.norm = nnx.BatchNorm(
            conv.outputs, momentum=0.9, epsilon=1e-5, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
        # Flax has float32 at first, and after a step in float64 another dtype.
        wide = jnp.promote_types(param_dtype, jnp.float32)
        self.norm.mean = nnx.BatchStat(self.norm.mean[...].astype(wide))
        self.norm.var = nnx.BatchStat(self.norm.var[...].astype(wide))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images of shape (n, h, w, inputs), and normalise over them, in their dtype."""
        return self.norm(super().__call__(x)).astype(x.dtype)


class Dense(nnx.Module):  # type: ignore[misc]
    """A dense layer whose numbers are left to :meth:`NFNet.reset_parameters`."""

    def __init__(self, inputs: int, outputs: int, param_dtype: Any = jnp.float32) -> None:
        self.weight = _undrawn((inputs, outputs), param_dtype)
        self.bias = _undrawn((outputs,), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Take (n, inputs) to (n, outputs)."""
        return x @ self.weight[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Activation(nnx.Module):  # type: ignore[misc]
    """A function times the constant that keeps the variance of N(0, 1)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: jax.Array, beta: float = 1.0) -> jax.Array:
        """Return the scaled function of ``x``, times ``beta``."""
        return _FUNCTIONS[self.name](x) * (GAMMAS[self.name] * beta)


class SqueezeExcite(nnx.Module):  # type: ignore[misc]
    """Gates between 0 and 2, one a channel and image, from the channels' means."""

    def __init__(self, block: Block, param_dtype: Any) -> None:
        self.fc0 = Dense(block.outputs, block.squeezed, param_dtype)
        self.fc1 = Dense(block.squeezed, block.outputs, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return gates of shape (n, 1, 1, c) for images of shape (n, h, w, c)."""
        # ReLU, without a factor, is what the released weights were trained with; the paper says
        # GELU.
        hidden = nn.relu(self.fc0(x.mean((1, 2))))
        return 2 * nn.sigmoid(self.fc1(hidden))[:, None, None, :]


class Stem(nnx.Module):  # type: ignore[misc]
    """Four convolutions, a quarter of the size; no activation after the last."""

    def __init__(self, options: Options, param_dtype: Any) -> None:
        conv0, conv1, conv2, conv3 = stem(options.variant, options.in_channels)
        self.conv0 = WSConv2d(conv0, options.ws_eps, options.ws_dtype, param_dtype)
        self.conv1 = WSConv2d(conv1, options.ws_eps, options.ws_dtype, param_dtype)
        self.conv2 = WSConv2d(conv2, options.ws_eps, options.ws_dtype, param_dtype)
        self.conv3 = WSConv2d(conv3, options.ws_eps, options.ws_dtype, param_dtype)
        self.activation = Activation(options.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Take images of shape (n, h, w, c) to (n, h / 4, w / 4, widths[0] / 2)."""
        x = self.activation(self.conv0(x))
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        return self.conv3(x)


class ResNetStem(nnx.Module):  # type: ignore[misc]
    """A convolution of 7x7 pixels and a maximum of 3x3, a quarter of the size."""

    def __init__(self, options: Options, param_dtype: Any) -> None:
        (conv0,) = stem(options.variant, options.in_channels)
        self.conv0 = WSConv2d(conv0, options.ws_eps, options.ws_dtype, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Take images of shape (n, h, w, c) to (n, h / 4, w / 4, widths[0] / 4)."""
        return nnx.max_pool(self.conv0(x), (3, 3), (2, 2), "SAME")


class NFBlock(nnx.Module):  # type: ignore[misc]
    """A residual block without normalisation."""

    def __init__(self, block: Block, options: Options, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.block = block
        self.drop_rate = options.stochastic_depth * block.stochastic_depth
        self.deterministic = False  # True in evaluation mode
        self.rngs = rngs["dropout"].fork()
        convs = {
            conv.name: WSConv2d(conv, options.ws_eps, options.ws_dtype, param_dtype)
            for conv in block.convs
        }
        self.conv0 = convs["conv0"]
        self.conv1 = convs["conv1"]
        self.conv1b = convs.get("conv1b")
        self.conv2 = convs["conv2"]
        self.shortcut = convs.get("shortcut")
        self.se = SqueezeExcite(block, param_dtype) if block.squeezed else None
        self.skip_gain = _undrawn((), param_dtype)
        self.activation = Activation(options.activation)

    def __call__(
        self, x: jax.Array, deterministic: bool | None = None, keep: jax.Array | None = None
    ) -> jax.Array:
        """Take images of shape (n, h, w, inputs) to (n, h / stride, w / stride, outputs).

        ``keep`` is :attr:`agc.nfnet.Masks.stochastic_depth`, which is drawn if None.
        """
        residual, shortcut = self.branches(x)
        deterministic = self.deterministic if deterministic is None else deterministic
        if keep is not None:
            residual = residual * keep[:, self.block.index, None, None, None].astype(residual.dtype)
        elif not deterministic and self.drop_rate > 0:
            residual = residual * self.kept(residual)
        return self.join(residual, shortcut)

    def branches(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the residual branch after its gates, and the shortcut."""
        out = self.activation(x, self.block.beta)
        shortcut = x
        if self.shortcut is not None:
            shortcut = out
            if self.block.pools:
                shortcut = halved(out)
            shortcut = self.shortcut(shortcut)
        out = self.conv0(out)
        out = self.conv1(self.activation(out))
        if self.conv1b is not None:
            out = self.conv1b(self.activation(out))
        out = self.conv2(self.activation(out))
        return out if self.se is None else self.se(out) * out, shortcut

    def kept(self, residual: jax.Array) -> jax.Array:
        """Draw stochastic depth: 1 for images that keep the residual branch, 0 for the others."""
        uniform = jax.random.uniform(self.rngs(), (len(residual), 1, 1, 1))
        return jnp.floor(1 - self.drop_rate + uniform).astype(residual.dtype)

    def join(self, residual: jax.Array, shortcut: jax.Array) -> jax.Array:
        """Add the residual branch to the shortcut."""
        return shortcut + residual * (self.skip_gain[...] * ALPHA).astype(residual.dtype)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switch stochastic depth off or on, for ``nnx.view``."""
        self.deterministic = self.deterministic if deterministic is None else deterministic


def halved(images: jax.Array) -> jax.Array:
    """Return means of 2x2 pixels, at odd sides of those that are there; shape (n, h, w, channels).

    No window is wider than the images: the sums that XLA then makes on CPUs are wrong in large
    arrays (jaxlib 0.10.2).
    """
    window = tuple(min(2, size) for size in images.shape[1:3])
    means = nnx.avg_pool(images, window, window, "SAME", count_include_pad=False)
    return means.astype(images.dtype)  # the pool widens half precision


class NFNet(nnx.Module):  # type: ignore[misc]
    """A normalisation-free network; made by :func:`nfnet`.

    Parameters
    ----------
    options : Options
        What to build.
    rngs : nnx.Rngs
        Random numbers.
    dtype, param_dtype
        What is computed in, and how parameters are stored.

    Attributes
    ----------
    options : Options
        What it was built from.
    agc_head : str
        The classifier, for ``@head`` in a rule (AGC-6).
    """

    def __init__(
        self,
        options: Options,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.options = options
        self.dtype = dtype
        self.agc_head = HEAD
        resnet = options.variant.family == "NF-ResNet"
        self.stem = (ResNetStem if resnet else Stem)(options, param_dtype)
        stages: list[list[NFBlock]] = [[] for _ in options.variant.depths]
        for block in blocks(options.variant):
            stages[block.stage].append(NFBlock(block, options, param_dtype, rngs))
        self.stages = _List([_List(stage) for stage in stages])
        last = final_conv(options.variant)
        self.final_conv = (
            None if last is None else WSConv2d(last, options.ws_eps, options.ws_dtype, param_dtype)
        )
        self.activation = Activation(options.activation)
        self.dropout = nnx.Dropout(options.dropout, rngs=rngs)
        self.head = Dense(features(options.variant), options.num_classes, param_dtype)
        self.reset_parameters(rngs)

    def reset_parameters(self, rngs: nnx.Rngs) -> None:
        """Draw all parameters anew, as DeepMind's code does."""
        names, leaves, structure = flatten(nnx.state(self, nnx.Param))
        places = {name: place for place, name in enumerate(names)}
        options, key = self.options, rngs["params"]()
        specs = parameters(options.variant, options.num_classes, options.in_channels)
        for number, spec in enumerate(specs):
            place = places[spec.name]
            given = jax.random.fold_in(key, number)
            leaves[place] = _draw(spec.initial, spec.shape, leaves[place].dtype, given)
        nnx.update(self, jax.tree.unflatten(structure, leaves))

    def __call__(
        self, x: jax.Array, *, masks: Masks | None = None, deterministic: bool | None = None
    ) -> jax.Array:
        """Return logits.

        Parameters
        ----------
        x : array, shape (n, h, w, in_channels)
            Normalised images of any size.
        masks : Masks, optional
            What stochastic depth and dropout keep, for training mode. They are drawn if None.
        deterministic : bool, optional
            Whether dropout and stochastic depth are off; the mode that ``train()`` and ``eval()``
            set if None.

        Returns
        -------
        array, shape (n, num_classes)

        Raises
        ------
        ShapeError, DTypeError
            If these are not such images, or not masks of them.
        ConfigError
            If there are masks in evaluation mode, or not as :class:`agc.nfnet.Masks`.
        """
        x = self._check(x)
        still = self.dropout.deterministic if deterministic is None else deterministic
        keep, dropout = check_masks(
            masks,
            self.options.variant,
            x.shape[0],
            convert=jnp.asarray,
            boolean=jnp.dtype(bool),
            training=not still,
        )
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x, deterministic, keep)
        pooled = self._pool(self._finish(x))
        if dropout is not None:
            kept = pooled * dropout.astype(pooled.dtype)
            return self.head(kept / (1 - self.options.dropout))
        return self.head(self.dropout(pooled, deterministic=deterministic))

    def features(self, x: jax.Array, *, deterministic: bool | None = None) -> dict[str, jax.Array]:
        """Return what comes out of each part, for what :meth:`__call__` takes.

        Returns
        -------
        dict of str to array
            ``"stem"`` and ``"stages.0"`` to ``"stages.3"``, a quarter to a thirty-second of the
            size, an NFNet's ``"final_conv"`` after its activation, and ``"pooled"`` of shape
            (n, features), which is what the classifier is given.
        """
        outputs = {}
        x = outputs["stem"] = self.stem(self._check(x))
        for number, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, deterministic)
            outputs[f"stages.{number}"] = x
        x = self._finish(x)
        if self.final_conv is not None:
            outputs["final_conv"] = x
        outputs["pooled"] = self._pool(x)
        return outputs

    def signals(self, x: jax.Array) -> dict[str, jax.Array]:
        """Return how signals propagate, for the images that :meth:`__call__` takes.

        Returns
        -------
        dict of str to array
            ``"avg_sq_mean"`` and ``"avg_var"``, shape (blocks + 1,): squared mean and biased
            variance of each channel over images and pixels, averaged over channels, after the stem
            and each block. ``"res_avg_var"``, shape (blocks,): the same variance of each residual
            branch after its gates. Stochastic depth is off. float32, or float64 for float64.
        """
        x = self.stem(self._check(x))
        residuals = []
        outputs = [_moments(x)]
        for stage in self.stages:
            for block in stage:
                residual, shortcut = block.branches(x)
                residuals.append(_moments(residual)[1])
                outputs.append(_moments(x := block.join(residual, shortcut)))
        means, variances = zip(*outputs, strict=True)
        return {
            "avg_sq_mean": jnp.stack(means),
            "avg_var": jnp.stack(variances),
            "res_avg_var": jnp.stack(residuals),
        }

    def batch_normalised(self) -> NFNet:
        """Return the twin that normalises, for comparisons of speed and of training.

        Returns
        -------
        NFNet
            In the same mode, with the same weights, and batch normalisation (``norm``) after each
            convolution instead of standardised weights, biases and expected variances; all else is
            the same, activations with their constants and skip gains too. It has no canonical
            names, hence no files.

        Raises
        ------
        ParameterError
            If the model is folded or batch-normalised.

        Notes
        -----
        ``flax.nnx.BatchNorm`` with PyTorch's constants: epsilon 1e-5, and running statistics
        (``nnx.BatchStat``, in at least float32) that take a tenth of each batch's; of its variance
        the biased one, where PyTorch takes the unbiased one. The statistics of the batch are used
        between ``train()`` and ``eval()``, whatever the argument ``deterministic`` is.
        """
        twin = self._with_convs(WSConv2d.normalised)
        for _, module in nnx.iter_modules(twin):
            if isinstance(module, NFBlock):
                module.block = replace(module.block, variance=1.0)
        if self.dropout.deterministic:
            twin.eval()
        return twin

    def fold(self) -> NFNet:
        """Return a copy for inference, in which weight standardisation is done once and for all.

        Returns
        -------
        NFNet
            In evaluation mode, with plain convolutions and without gains. Outputs are the same up
            to rounding. It is not for training: without standardisation, DeepMind's recipe does not
            apply.

        Raises
        ------
        ParameterError
            If the model is folded or batch-normalised.
        """
        folded = self._with_convs(WSConv2d.folded)
        folded.eval()
        return folded

    def _with_convs(self, change: Callable[[WSConv2d], SameConv2d]) -> NFNet:
        """Return a copy with other convolutions."""
        if not any(isinstance(module, WSConv2d) for _, module in nnx.iter_modules(self)):
            raise ParameterError(
                "the model has no standardised weights: it is folded or batch-normalised; "
                "use the model that it was made from"
            )
        graph, state = nnx.split(self)
        changed: NFNet = nnx.merge(graph, jax.device_put(state, may_alias=False))
        for _, parent in list(nnx.iter_modules(changed)):
            for name, child in list(vars(parent).items()):
                if isinstance(child, WSConv2d):
                    setattr(parent, name, change(child))
        return changed

    def _finish(self, x: jax.Array) -> jax.Array:
        return self.activation(x if self.final_conv is None else self.final_conv(x))

    def _pool(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2))

    def _check(self, x: jax.Array) -> jax.Array:
        """Return images in the dtype that is computed in."""
        x, channels = jnp.asarray(x), self.options.in_channels
        if x.ndim != 4 or x.shape[-1] != channels:
            second = x.ndim == 4 and x.shape[1] == channels
            hint = "; transpose(0, 2, 3, 1) puts the channels last" if second else ""
            raise ShapeError(
                f"images must have the shape (n, height, width, {channels}), got {x.shape}{hint}; "
                "nfnet(..., in_channels=...) makes a model for other channels"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise DTypeError(
                f"images must be normalised floating point numbers, got {x.dtype}; "
                "convert them, subtract the mean and divide by the standard deviation"
            )
        if self.dtype is not None:
            return x.astype(self.dtype)
        return x.astype(jnp.promote_types(x.dtype, self.head.weight[...].dtype))


def _draw(initial: Initial, shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    """Draw one parameter; in at least float32, of which half precision then has the nearest."""
    if initial.distribution == "constant":
        return jax.device_put(np.full(shape, initial.value, dtype))  # nothing to compile
    # Rounded up, because there are few powers of two to compile for, and many shapes.
    enough = 1 << (math.prod(shape) - 1).bit_length()
    drawn = _standard(initial.distribution, enough, jnp.promote_types(dtype, jnp.float32), key)
    return _shaped(shape, dtype, drawn, initial.value)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _standard(distribution: str, size: int, dtype: Any, key: jax.Array) -> jax.Array:
    if distribution == "normal":
        return jax.random.normal(key, (size,), dtype)
    return jax.random.truncated_normal(key, -2, 2, (size,), dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _shaped(shape: tuple[int, ...], dtype: Any, drawn: jax.Array, scale: float) -> jax.Array:
    return (scale * drawn[: math.prod(shape)].reshape(shape)).astype(dtype)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    variance, mean = x.var((0, 1, 2)), x.mean((0, 1, 2))
    return jnp.square(mean).mean(), variance.mean()


register_units(SameConv2d, {"weight": "h w i o -> o"})
register_units(Dense, {"weight": "i o -> o"})
