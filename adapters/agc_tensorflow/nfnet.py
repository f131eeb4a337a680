"""NFNets (arXiv:2102.06171) and NF-ResNets (arXiv:2101.08692) in TensorFlow and Keras 3.

The shared facts are in :mod:`agc.nfnet`; this file is their TensorFlow code, from the smallest part
to the whole: convolution, activation, squeeze and excite, stem, block, model. Images are
``(n, h, w, c)``. Parameters are called by their canonical names and have the neutral layout;
:mod:`agc_tensorflow.weights` reads and writes them.

Constants are Python floats, which take the dtype of the tensor that they meet. ``tf.cast`` of a
float, and ``tf.nn.gelu``, go through float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import keras
import tensorflow as tf

from agc.errors import DTypeError, ParameterError, ShapeError
from agc.nfnet import (
    ALPHA,
    GAMMAS,
    HEAD,
    WS_EPS,
    Block,
    Conv,
    Kind,
    Masks,
    Options,
    ParameterSpec,
    Variant,
    WsDtype,
    WsEps,
    blocks,
    check_masks,
    features,
    final_conv,
    options,
    stem,
)
from agc_tensorflow.devices import splits_groups
from agc_tensorflow.units import named_variables, register_units

__all__ = ["NFNet", "nfnet"]


def _gelu(x: tf.Tensor) -> tf.Tensor:
    slope = math.sqrt(2 / math.pi)
    return 0.5 * x * (1 + tf.tanh(x * (slope + slope * 0.044715 * tf.square(x))))


_FUNCTIONS: Final[Mapping[str, Callable[[tf.Tensor], tf.Tensor]]] = {
    "gelu": _gelu,
    "gelu_erf": lambda x: 0.5 * x * (1 + tf.math.erf(math.sqrt(0.5) * x)),
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "relu6": tf.nn.relu6,
    "elu": tf.nn.elu,
    "celu": tf.nn.elu,  # the same, because alpha is 1
    "leaky_relu": lambda x: tf.maximum(x, 0.01 * x),  # TensorFlow's own slope is in float32
    "selu": tf.nn.selu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "softplus": tf.nn.softplus,
    "soft_sign": tf.nn.softsign,
    "log_sigmoid": tf.math.log_sigmoid,
    "identity": lambda x: x,
}


def nfnet(
    variant: str | Variant,
    num_classes: int | None = None,
    *,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    in_channels: int = 3,
    activation: str | None = None,
    ws_eps: WsEps = "deepmind",
    ws_dtype: WsDtype = "float32",
    dtype: Any = None,
    name: str | None = None,
) -> NFNet:
    """Return an NFNet or NF-ResNet with the initial values of DeepMind's code.

    Parameters
    ----------
    variant : str or Variant
        ``"F0"`` to ``"F7"``, the wider ``"F0+"`` to ``"F7+"``, ``"NF-ResNet-50"`` and so on, or
        ``"tiny"`` for tests and first steps: a name in :data:`agc.nfnet.VARIANTS`.
    num_classes : int, optional
        The variant's own if None: 1000, and 10 for ``tiny``.
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
    dtype : str or keras.DTypePolicy, optional
        As in any Keras layer: ``"float64"``, ``"mixed_bfloat16"`` and so on; Keras' global policy
        if None.
    name : str, optional
        The model's name.

    Returns
    -------
    NFNet
        Built, for images of any size.

    Raises
    ------
    ConfigError
        If a value is not allowed; for an unknown variant the message lists those there are.

    Examples
    --------
    >>> model = nfnet("tiny")
    >>> model(tf.zeros((2, 32, 32, 3))).shape
    TensorShape([2, 10])
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
        dtype=dtype,
        name=name,
    )


class _Layer(keras.layers.Layer):  # type: ignore[misc]
    """A layer whose variables keep their stored dtype until the layer itself casts them."""

    def add(self, name: str, shape: tuple[int, ...], kind: Kind) -> Any:
        """Add a parameter that starts as :class:`agc.nfnet.ParameterSpec` says."""
        initial = ParameterSpec(name, shape, kind, haiku="").initial
        match initial.distribution:
            case "constant":
                initializer = keras.initializers.Constant(initial.value)
            case "normal":
                initializer = keras.initializers.RandomNormal(0.0, initial.value)
            case "truncated":
                initializer = keras.initializers.TruncatedNormal(0.0, initial.value)
        return self.add_weight(shape=shape, initializer=initializer, autocast=False, name=name)


class SameConv2D(_Layer):
    """A convolution with a bias that pads as XLA's SAME: even axes under stride 2 at their end."""

    def __init__(self, conv: Conv, *, biased: bool = True, **layer: Any) -> None:
        super().__init__(name=conv.name.rpartition(".")[2], **layer)
        self.conv = conv
        self.biased = biased

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        self.weight = self.add("weight", self.conv.shape, "conv")
        self.bias = self.add("bias", (self.conv.outputs,), "bias") if self.biased else None

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Convolve images of shape (n, h, w, inputs)."""
        return self.convolve(x, self.weight)

    def convolve(self, x: tf.Tensor, weight: Any) -> tf.Tensor:
        """Convolve with a given weight."""
        weight, stride, groups = tf.cast(weight, x.dtype), self.conv.stride, self.conv.groups
        if groups == 1 or not splits_groups():
            x = tf.nn.conv2d(x, weight, stride, "SAME")
        else:
            pairs = zip(tf.split(x, groups, 3), tf.split(weight, groups, 3), strict=True)
            x = tf.concat([tf.nn.conv2d(group, w, stride, "SAME") for group, w in pairs], 3)
        return x if self.bias is None else x + tf.cast(self.bias, x.dtype)


_FILTER: Final = (0, 1, 2)  # the axes of a filter, of which a weight has one for each output


def _standardise(weight: tf.Tensor, gain: tf.Tensor, ws_eps: WsEps) -> tf.Tensor:
    centred = weight - tf.reduce_mean(weight, _FILTER)
    squared_norm = tf.reduce_sum(tf.square(centred), _FILTER)
    return centred * (gain * _scale(squared_norm, math.prod(weight.shape[:3]), ws_eps))


def _standardise_in_bfloat16(weight: tf.Tensor, gain: tf.Tensor, ws_eps: WsEps) -> tf.Tensor:
    weight, gain = _rounded(weight), _rounded(gain)
    fan_in = math.prod(weight.shape[:3])
    mean, variance = tf.nn.moments(weight, _FILTER)
    scale = _rounded(gain * _scale(fan_in * _rounded(variance), fan_in, ws_eps))
    return tf.cast(weight * scale - _rounded(_rounded(mean) * scale), tf.bfloat16)


def _rounded(x: Any) -> tf.Tensor:
    """Return a bfloat16, as its gradient will be, for computations in float32."""
    return tf.cast(tf.cast(x, tf.bfloat16), tf.float32)


def _scale(squared_norm: tf.Tensor, fan_in: int, ws_eps: WsEps) -> tf.Tensor:
    """Return what makes the norm of a filter 1."""
    eps = WS_EPS[ws_eps]
    if ws_eps == "deepmind":
        return tf.math.rsqrt(tf.maximum(squared_norm, eps))
    return tf.math.rsqrt(squared_norm + fan_in * eps)


class WSConv2D(SameConv2D):
    """A convolution with a standardised weight: a filter has mean 0 and its gain as norm.

    Parameters
    ----------
    conv : Conv
        Sizes, stride and groups.
    ws_eps : {"deepmind", "timm"}
        See :data:`agc.nfnet.WS_EPS`.
    ws_dtype : {"float32", "bfloat16"}
        See :class:`agc.nfnet.Options`.
    **layer
        ``dtype``.

    Attributes
    ----------
    weight : Variable, shape (kernel, kernel, inputs / groups, outputs)
    gain, bias : Variable, shape (outputs,)
        A gain is a vector, hence one unit of AGC (AGC-5).
    """

    def __init__(
        self, conv: Conv, ws_eps: WsEps, ws_dtype: WsDtype = "float32", **layer: Any
    ) -> None:
        super().__init__(conv, **layer)
        self.ws_eps: WsEps = ws_eps
        self.ws_dtype: WsDtype = ws_dtype

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        super().build(_input_shape)
        self.gain = self.add("gain", (self.conv.outputs,), "gain")

    def standardised(self, dtype: Any = None) -> tf.Tensor:
        """Return the standardised weight: computed in at least float32, in the weight's dtype.

        Both are bfloat16 if ``ws_dtype`` is and ``dtype``, what the convolution computes in, too.
        """
        if self.ws_dtype == "bfloat16" and dtype == tf.bfloat16:
            return _standardise_in_bfloat16(self.weight, self.gain, self.ws_eps)
        stored = tf.as_dtype(self.variable_dtype)
        at_least = tf.float32 if stored in (tf.bfloat16, tf.float16) else stored
        weight, gain = tf.cast(self.weight, at_least), tf.cast(self.gain, at_least)
        return tf.cast(_standardise(weight, gain, self.ws_eps), stored)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Convolve images of shape (n, h, w, inputs)."""
        return self.convolve(x, self.standardised(x.dtype))


class NormalisedConv2D(SameConv2D):
    """A convolution, and batch normalisation instead of a standardised weight and a bias."""

    def __init__(self, conv: Conv, **layer: Any) -> None:
        super().__init__(conv, biased=False, **layer)
        # PyTorch's epsilon and momentum; Keras calls the share that is kept momentum.
        self.norm = keras.layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, name="norm", **layer
        )

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        super().build(_input_shape)
        self.norm.build((None, None, None, self.conv.outputs))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Convolve images of shape (n, h, w, inputs), and normalise over them."""
        return self.norm(super().call(x))


class Dense(_Layer):
    """A dense layer."""

    def __init__(self, name: str, inputs: int, outputs: int, kind: Kind, **layer: Any) -> None:
        super().__init__(name=name, **layer)
        self.shape, self.kind = (inputs, outputs), kind

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        self.weight = self.add("weight", self.shape, self.kind)
        self.bias = self.add("bias", self.shape[1:], "bias")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Take vectors of shape (n, inputs) to (n, outputs)."""
        return tf.matmul(x, tf.cast(self.weight, x.dtype)) + tf.cast(self.bias, x.dtype)


register_units(SameConv2D, {"weight": "h w i o -> o"})
register_units(Dense, {"weight": "i o -> o"})


class Activation:
    """A function times the constant that keeps the variance of N(0, 1)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: tf.Tensor, beta: float = 1.0) -> tf.Tensor:
        """Return the scaled function of ``x``, times ``beta``."""
        return _FUNCTIONS[self.name](x) * (GAMMAS[self.name] * beta)


class SqueezeExcite(_Layer):
    """Gates between 0 and 2, one a channel and image, from the channels' means."""

    def __init__(self, block: Block, **layer: Any) -> None:
        super().__init__(name="se", **layer)
        self.fc0 = Dense("fc0", block.outputs, block.squeezed, "se", **layer)
        self.fc1 = Dense("fc1", block.squeezed, block.outputs, "se", **layer)

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        _build(self.fc0, self.fc1)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return gates of shape (n, 1, 1, c) for images of shape (n, h, w, c)."""
        # ReLU, without a factor, is what the released weights were trained with; the paper says
        # GELU.
        hidden = tf.nn.relu(self.fc0(tf.reduce_mean(x, (1, 2))))
        return 2 * tf.sigmoid(self.fc1(hidden))[:, None, None, :]


class Stem(_Layer):
    """Four convolutions, a quarter of the size; no activation after the last."""

    def __init__(self, options: Options, convolution: Callable[[Conv], SameConv2D], **layer: Any):
        super().__init__(name="stem", **layer)
        conv0, conv1, conv2, conv3 = stem(options.variant, options.in_channels)
        self.conv0 = convolution(conv0)
        self.conv1 = convolution(conv1)
        self.conv2 = convolution(conv2)
        self.conv3 = convolution(conv3)
        self.activation = Activation(options.activation)

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        _build(self.conv0, self.conv1, self.conv2, self.conv3)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Take images of shape (n, h, w, c) to (n, h / 4, w / 4, widths[0] / 2)."""
        x = self.activation(self.conv0(x))
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        return self.conv3(x)


class ResNetStem(_Layer):
    """A convolution of 7x7 pixels and a maximum of 3x3, a quarter of the size."""

    def __init__(self, options: Options, convolution: Callable[[Conv], SameConv2D], **layer: Any):
        super().__init__(name="stem", **layer)
        (conv0,) = stem(options.variant, options.in_channels)
        self.conv0 = convolution(conv0)

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        _build(self.conv0)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Take images of shape (n, h, w, c) to (n, h / 4, w / 4, widths[0] / 4)."""
        return tf.nn.max_pool2d(self.conv0(x), 3, 2, "SAME")


class NFBlock(_Layer):
    """A residual block without normalisation."""

    def __init__(
        self,
        block: Block,
        options: Options,
        convolution: Callable[[Conv], SameConv2D],
        **layer: Any,
    ) -> None:
        super().__init__(name=str(block.place), **layer)
        self.block = block
        self.drop_rate = options.stochastic_depth * block.stochastic_depth
        convs = {conv.name: convolution(conv) for conv in block.convs}
        self.conv0 = convs["conv0"]
        self.conv1 = convs["conv1"]
        self.conv1b = convs.get("conv1b")
        self.conv2 = convs["conv2"]
        self.shortcut = convs.get("shortcut")
        self.se = SqueezeExcite(block, **layer) if block.squeezed else None
        self.activation = Activation(options.activation)
        self.seed = keras.random.SeedGenerator() if self.drop_rate > 0 else None

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        _build(self.conv0, self.conv1, self.conv1b, self.conv2, self.shortcut, self.se)
        self.skip_gain = self.add("skip_gain", (), "skip_gain")

    def call(
        self, x: tf.Tensor, training: bool = False, keep: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Take images of shape (n, h, w, inputs) to (n, h / stride, w / stride, outputs).

        ``keep`` is :attr:`agc.nfnet.Masks.stochastic_depth`, which is drawn if None.
        """
        residual, shortcut = self.branches(x)
        if keep is not None:
            column = tf.reshape(keep[:, self.block.index], (tf.shape(residual)[0], 1, 1, 1))
            residual = residual * tf.cast(column, residual.dtype)
        elif training and self.drop_rate > 0:
            residual = residual * self.kept(residual)
        return self.join(residual, shortcut)

    def branches(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the residual branch after its gates, and the shortcut."""
        out = self.activation(x, self.block.beta)
        shortcut = x
        if self.shortcut is not None:
            shortcut = out
            if self.block.pools:
                shortcut = tf.nn.avg_pool2d(out, 2, 2, "SAME")
            shortcut = self.shortcut(shortcut)
        out = self.conv0(out)
        out = self.conv1(self.activation(out))
        if self.conv1b is not None:
            out = self.conv1b(self.activation(out))
        out = self.conv2(self.activation(out))
        return out if self.se is None else self.se(out) * out, shortcut

    def kept(self, residual: tf.Tensor) -> tf.Tensor:
        """Draw stochastic depth: 1 for images that keep the residual branch, 0 for the others."""
        shape = (tf.shape(residual)[0], 1, 1, 1)
        uniform = keras.random.uniform(shape, dtype="float32", seed=self.seed)
        return tf.cast(tf.floor(1 - self.drop_rate + uniform), residual.dtype)

    def join(self, residual: tf.Tensor, shortcut: tf.Tensor) -> tf.Tensor:
        """Add the residual branch to the shortcut."""
        return shortcut + residual * tf.cast(self.skip_gain * ALPHA, residual.dtype)


class Stage(_Layer):
    """Blocks of one width."""

    def __init__(self, name: str, blocks: list[NFBlock], **layer: Any) -> None:
        super().__init__(name=name, **layer)
        self.blocks = blocks

    def build(self, _input_shape: Any) -> None:
        """Create the variables."""
        _build(*self.blocks)

    def call(
        self, x: tf.Tensor, training: bool = False, keep: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Go through the blocks, with the mask of all blocks of the model."""
        for block in self.blocks:
            x = block(x, training=training, keep=keep)
        return x


@keras.saving.register_keras_serializable(package="agc")
class NFNet(keras.Model):  # type: ignore[misc]
    """A normalisation-free network; made by :func:`nfnet`.

    Parameters
    ----------
    options : Options
        What to build.
    folded : bool
        Whether convolutions are plain ones; see :meth:`fold`.
    normalised : bool
        Whether convolutions are plain ones, each with batch normalisation behind it; see
        :meth:`batch_normalised`.
    **layer
        ``dtype``, ``name`` and ``trainable``, as in any Keras model.

    Attributes
    ----------
    options : Options
        What it was built from.
    folded, normalised : bool
        Whether convolutions are plain ones, and whether batch normalisation is behind them.
    agc_head : str
        The classifier, for ``@head`` in a rule (AGC-6).
    """

    def __init__(
        self,
        options: Options,
        *,
        folded: bool = False,
        normalised: bool = False,
        trainable: bool = True,
        **layer: Any,
    ) -> None:
        super().__init__(**layer)
        inner = {"dtype": self.dtype_policy}

        def convolution(conv: Conv) -> SameConv2D:
            if normalised:
                return NormalisedConv2D(conv, **inner)
            if folded:
                return SameConv2D(conv, **inner)
            return WSConv2D(conv, options.ws_eps, options.ws_dtype, **inner)

        self.options = options
        self.folded = folded
        self.normalised = normalised
        self.agc_head = HEAD
        resnet = options.variant.family == "NF-ResNet"
        self.stem = (ResNetStem if resnet else Stem)(options, convolution, **inner)
        stages: list[list[NFBlock]] = [[] for _ in options.variant.depths]
        for block in blocks(options.variant):
            block = dataclasses.replace(block, variance=1.0) if normalised else block
            stages[block.stage].append(NFBlock(block, options, convolution, **inner))
        self.stages = [Stage(f"stages.{s}", stage, **inner) for s, stage in enumerate(stages)]
        last = final_conv(options.variant)
        self.final_conv = None if last is None else convolution(last)
        self.activation = Activation(options.activation)
        self.dropout = keras.layers.Dropout(options.dropout, **inner)
        self.head = Dense(HEAD, features(options.variant), options.num_classes, "head", **inner)
        self.build((None, None, None, options.in_channels))
        self.trainable = trainable

    def build(self, _input_shape: Any) -> None:
        """Create the variables; this has happened when the model is there."""
        if not self.built:
            _build(self.stem, *self.stages, self.final_conv, self.head)

    def call(self, x: tf.Tensor, training: bool = False, masks: Masks | None = None) -> tf.Tensor:
        """Return logits.

        Parameters
        ----------
        x : tensor, shape (n, h, w, in_channels)
            Normalised images of any size.
        training : bool
            Whether dropout and stochastic depth are on.
        masks : Masks, optional
            What these keep, with ``training=True``. They are drawn if None.

        Returns
        -------
        tensor, shape (n, num_classes)

        Raises
        ------
        ShapeError, DTypeError
            If these are not such images, or not masks of them.
        ConfigError
            If there are masks without ``training``, or not as :class:`agc.nfnet.Masks`.
        """
        x = self._check(x)
        keep, dropout = check_masks(
            masks,
            self.options.variant,
            x.shape[0],
            convert=tf.convert_to_tensor,
            boolean=tf.bool,
            training=training,
        )
        if keep is not None:  # a graph may not know its shape
            keep = tf.ensure_shape(keep, (x.shape[0], sum(self.options.variant.depths)))
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, training=training, keep=keep)
        pooled = self._pool(self._finish(x))
        if dropout is not None:
            kept = tf.cast(tf.reshape(dropout, tf.shape(pooled)), pooled.dtype)
            return self.head(pooled * kept / (1 - self.options.dropout))
        return self.head(self.dropout(pooled, training=training))

    def features(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return what comes out of each part, for the images that :meth:`call` takes.

        Returns
        -------
        dict of str to tensor
            ``"stem"`` and ``"stages.0"`` to ``"stages.3"``, a quarter to a thirty-second of the
            size, an NFNet's ``"final_conv"`` after its activation, and ``"pooled"`` of shape
            (n, features), which is what the classifier is given. Dropout and stochastic depth are
            off.
        """
        x = self._check(x)
        outputs = {}
        x = outputs["stem"] = self.stem(x)
        for stage in self.stages:
            x = outputs[stage.name] = stage(x, training=False)
        x = self._finish(x)
        if self.final_conv is not None:
            outputs["final_conv"] = x
        outputs["pooled"] = self._pool(x)
        return outputs

    def signals(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return how signals propagate, for the images that :meth:`call` takes.

        Returns
        -------
        dict of str to tensor
            ``"avg_sq_mean"`` and ``"avg_var"``, shape (blocks + 1,): squared mean and biased
            variance of each channel over images and pixels, averaged over channels, after the stem
            and each block. ``"res_avg_var"``, shape (blocks,): the same variance of each residual
            branch after its gates. Stochastic depth is off. float32, or float64 for float64.
        """
        x = self._check(x)
        residuals = []
        outputs = [_moments(x := self.stem(x))]
        for stage in self.stages:
            for block in stage.blocks:
                residual, shortcut = block.branches(x)
                residuals.append(_moments(residual)[1])
                outputs.append(_moments(x := block.join(residual, shortcut)))
        means, variances = zip(*outputs, strict=True)
        return {
            "avg_sq_mean": tf.stack(means),
            "avg_var": tf.stack(variances),
            "res_avg_var": tf.stack(residuals),
        }

    def batch_normalised(self) -> NFNet:
        """Return the twin that normalises, for comparisons of speed and of training.

        Returns
        -------
        NFNet
            With the same weights, and batch normalisation (``norm``) after each convolution instead
            of standardised weights, biases and expected variances; all else is the same,
            activations with their constants and skip gains too. It can be saved as any model, but
            has no canonical names.

        Raises
        ------
        ParameterError
            If the model is folded or batch-normalised.

        Notes
        -----
        ``keras.layers.BatchNormalization`` with PyTorch's constants: epsilon 1e-5, and moving
        statistics that take a tenth of each batch's; of its variance the biased one, where PyTorch
        takes the unbiased one.
        """
        check_standardised(self)
        twin = NFNet(
            self.options, normalised=True, trainable=self.trainable, dtype=self.dtype_policy
        )
        own = named_variables(self)
        for name, variable in named_variables(twin).items():
            if name in own:
                variable.assign(own[name])
        return twin

    def fold(self) -> NFNet:
        """Return a copy for inference, in which weight standardisation is done once and for all.

        Returns
        -------
        NFNet
            With plain convolutions and without gains; its parameters are frozen. Outputs are the
            same up to rounding. It can be saved and exported as any model.

        Raises
        ------
        ParameterError
            If the model is folded or batch-normalised.
        """
        check_standardised(self)
        folded = NFNet(self.options, folded=True, trainable=False, dtype=self.dtype_policy)
        convs = [layer for layer in self._flatten_layers() if isinstance(layer, WSConv2D)]
        standardised = {id(conv.weight): conv.standardised() for conv in convs}
        own = named_variables(self)
        for name, variable in named_variables(folded).items():
            variable.assign(standardised.get(id(own[name]), own[name]))
        return folded

    def get_config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` builds the same model from."""
        options = dataclasses.asdict(self.options)
        # As one text, since Keras takes a text that is the name of a class for the class.
        options["variant"] = json.dumps(options["variant"])
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "folded": self.folded,
            "normalised": self.normalised,
            "options": options,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NFNet:
        """Build a model from :meth:`get_config`'s data."""
        config = dict(config)
        data = keras.saving.deserialize_keras_object(config.pop("options"))
        variant = json.loads(data.pop("variant"))
        for field in ("depths", "widths"):
            variant[field] = tuple(variant[field])
        dtype = keras.dtype_policies.deserialize(config.pop("dtype"))
        return cls(Options(variant=Variant(**variant), **data), dtype=dtype, **config)

    def _finish(self, x: tf.Tensor) -> tf.Tensor:
        return self.activation(x if self.final_conv is None else self.final_conv(x))

    def _pool(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(x, (1, 2))

    def _check(self, x: tf.Tensor) -> tf.Tensor:
        x = tf.convert_to_tensor(x)
        channels = self.options.in_channels
        if x.shape.rank != 4 or x.shape[3] != channels:
            channels_first = x.shape.rank == 4 and x.shape[1] == channels
            hint = (
                "; tf.transpose(x, (0, 2, 3, 1)) puts the channels last" if channels_first else ""
            )
            raise ShapeError(
                f"images must have the shape (n, height, width, {channels}), got {tuple(x.shape)}{hint}; "
                "nfnet(..., in_channels=...) makes a model for other channels"
            )
        if not x.dtype.is_floating:
            raise DTypeError(
                f"images must be normalised floating point numbers, got {x.dtype.name}; "
                "convert them, subtract the mean and divide by the standard deviation"
            )
        return x


def check_standardised(model: NFNet) -> None:
    """Raise ParameterError if a model has no standardised weights."""
    if model.folded or model.normalised:
        what = "folded" if model.folded else "batch-normalised"
        raise ParameterError(
            f"the model has no standardised weights: it is {what}; use the model that it was made from"
        )


def _build(*layers: _Layer | None) -> None:
    for layer in layers:
        if layer is not None:
            layer.build(None)


def _moments(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(x, (0, 1, 2))
    return tf.reduce_mean(tf.square(mean)), tf.reduce_mean(variance)
