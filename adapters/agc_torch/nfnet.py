"""NFNets (arXiv:2102.06171) and NF-ResNets (arXiv:2101.08692) in PyTorch.

The shared facts are in :mod:`agc.nfnet`; this file is their PyTorch code, from the smallest part to
the whole: convolution, activation, squeeze and excite, stem, block, model. Images are
``(n, c, h, w)``, in either memory format. Parameters are called by their canonical names, so the
model's ``state_dict`` has them too, in PyTorch's layout; :mod:`agc_torch.weights` translates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from agc.errors import DTypeError, ParameterError, ShapeError
from agc.nfnet import (
    ALPHA,
    GAMMAS,
    HEAD,
    WS_EPS,
    Block,
    Conv,
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
    same_padding,
    stem,
)
from agc_torch import fused
from agc_torch.fused import order_of

__all__ = ["NFNet", "nfnet"]

_FUNCTIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu6": F.relu6,
    "elu": F.elu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda x: -F.logsigmoid(-x),  # PyTorch's own is the identity above 20
    "soft_sign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "identity": lambda x: x,
}
_REUSABLE: Final = ("gelu", "gelu_erf", "silu")
"""Functions whose result is new, and not needed for the gradient: it can be written to."""


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
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
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
    device, dtype
        Where and how parameters are stored, as in any PyTorch layer; ``device="meta"`` stores none.

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
    >>> model = nfnet("tiny").eval()
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
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
        device=device,
        dtype=dtype,
    )


class SameConv2d(nn.Conv2d):  # type: ignore[misc]
    """A convolution with a bias that pads as XLA's SAME: even axes under stride 2 at their end."""

    def __init__(self, conv: Conv, **factory: Any) -> None:
        super().__init__(
            conv.inputs, conv.outputs, conv.kernel, conv.stride, groups=conv.groups, **factory
        )
        self.conv = conv

    def reset_parameters(self) -> None:
        """Leave the numbers to :meth:`NFNet.reset_parameters`."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images of shape (n, inputs, h, w)."""
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a given weight."""
        kernel, stride = self.conv.kernel, self.conv.stride
        top, bottom = same_padding(x.shape[2], kernel, stride)
        left, right = same_padding(x.shape[3], kernel, stride)
        if top == bottom and left == right:
            return F.conv2d(x, weight, self.bias, stride, (top, left), groups=self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, weight, self.bias, stride, groups=self.groups)


_FILTER: Final = (1, 2, 3)
"""Axes of a filter; a weight has one filter for each output."""


def _standardise(weight: Tensor, gain: Tensor, ws_eps: WsEps) -> Tensor:
    centred = weight - weight.mean(_FILTER, keepdim=True)
    squared_norm = centred.square().sum(_FILTER, keepdim=True)
    scale = _scale(squared_norm, centred[0].numel(), ws_eps)
    return centred * (gain.view(-1, 1, 1, 1) * scale)


def _standardise_in_bfloat16(weight: Tensor, gain: Tensor, ws_eps: WsEps) -> Tensor:
    weight, gain = _rounded(weight), _rounded(gain)
    variance, mean = torch.var_mean(weight, _FILTER, correction=0, keepdim=True)
    squared_norm = weight[0].numel() * _rounded(variance)
    scale = _rounded(gain.view(-1, 1, 1, 1) * _scale(squared_norm, weight[0].numel(), ws_eps))
    return (weight * scale - _rounded(_rounded(mean) * scale)).bfloat16()


def _rounded(x: Tensor) -> Tensor:
    """Return a bfloat16, as its gradient will be, for computations in float32."""
    return x.bfloat16().float()


def _scale(squared_norm: Tensor, fan_in: int, ws_eps: WsEps) -> Tensor:
    """Return what makes the norm of a filter 1."""
    eps = WS_EPS[ws_eps]
    if ws_eps == "deepmind":
        return squared_norm.clamp(min=eps).rsqrt()
    return (squared_norm + fan_in * eps).rsqrt()


class _Fused(torch.autograd.Function):  # type: ignore[misc]
    """A formula and its gradient by kernels of our own: one pass over the weights each way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, ws_eps: WsEps, ws_dtype: WsDtype) -> Tensor:
        ctx.how = ws_eps, ws_dtype
        ctx.save_for_backward(weight, gain)
        return fused.standardise(weight, gain, ws_eps, ws_dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, gain = ctx.saved_tensors
        if torch.is_grad_enabled() or not fused.has_memory(gradient):
            return *_derive(weight, gain, gradient, *ctx.how), None, None
        return *fused.standardise_back(weight, gain, gradient, *ctx.how), None, None


def _derive(
    weight: Tensor, gain: Tensor, gradient: Tensor, ws_eps: WsEps, ws_dtype: WsDtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of the formula, which have gradients themselves if these are recorded."""
    record = torch.is_grad_enabled()
    formula = _standardise_in_bfloat16 if ws_dtype == "bfloat16" else _standardise
    with torch.enable_grad():
        result = formula(weight, gain, ws_eps)
    with_respect_to = [x for x in (weight, gain) if x.requires_grad]
    gradients = iter(torch.autograd.grad(result, with_respect_to, gradient, create_graph=record))
    ours, gains = (next(gradients) if x.requires_grad else None for x in (weight, gain))
    return ours, gains


class _Standardise(torch.autograd.Function):  # type: ignore[misc]
    """The formula and its gradient by fused kernels: two passes over the weights each way.

    A filter is a row of layer norm, normalised by ``r = 1 / std``; what is left is to scale rows by
    ``s / r``. A filter below the floor of epsilon is scaled by a constant ``s``, so that its
    gradient is ``a s (g - mean(g))`` with the gain ``a``, without what normalisation takes off
    along the filter.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, ws_eps: WsEps) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(weight)
        # The floor only guards filters of zero variance; `factor` applies DeepMind's.
        eps = _LEAST if ws_eps == "deepmind" else WS_EPS[ws_eps]
        out, mean, r = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
        factor, _ = _Standardise.factor(r, rows.shape[1], ws_eps)
        return _filters(out.mul_(factor * gain[:, None]), weight), mean, r

    @staticmethod
    def factor(r: Tensor, fan_in: int, ws_eps: WsEps) -> tuple[Tensor, Tensor]:
        """Return ``s / r`` of every filter, and whether the filter is below the floor."""
        plain = torch.full_like(r, fan_in**-0.5)
        if ws_eps != "deepmind":
            return plain, torch.zeros_like(r, dtype=torch.bool)
        low = fan_in / r.square() < WS_EPS[ws_eps]
        return torch.where(low, WS_EPS[ws_eps] ** -0.5 / r, plain), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, WsEps], output: Any) -> None:
        weight, gain, ctx.ws_eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(weight, gain, mean, r)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        weight, gain, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return *_derive(weight, gain, gradient, ctx.ws_eps, "float32"), None
        rows, g = _rows(weight), _rows(gradient, weight)
        factor, low = _Standardise.factor(r, rows.shape[1], ctx.ws_eps)
        scale = factor * gain[:, None]
        # As batch norm of one image with a channel for each filter, whose kernel adds up along
        # filters too.
        for_rows, along, _ = torch.ops.aten.native_batch_norm_backward(
            g[None], rows[None], scale[:, 0], None, None, mean[:, 0], r[:, 0], True, 0.0, _WANTED
        )
        for_rows = for_rows[0]
        if g.device.type != "cpu" or low.any():
            back = low * scale * along[:, None] * r.square() / rows.shape[1]
            for_rows = torch.addcmul(for_rows, rows - mean, back)
        return _filters(for_rows, weight), along * factor[:, 0], None


_WANTED: Final = [True, True, False]
"""Gradients that are asked for: of rows and of their scale, not of a bias."""
_LEAST: Final = 1e-30
"""A variance that float32 can hold, far below any that matters."""


def _rows(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return filters as rows, in the order of a weight's memory."""
    if order_of(tensor if like is None else like) == torch.channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


def _filters(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows as filters with a weight's shape and memory order."""
    if order_of(weight) == torch.channels_last:
        outputs, inputs, *kernel = weight.shape
        return rows.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
    return rows.view_as(weight)


def _computed_in(x: Tensor) -> torch.dtype:
    """Return what a convolution of images computes in."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


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
    **factory
        ``device`` and ``dtype``.

    Attributes
    ----------
    weight : Parameter, shape (outputs, inputs / groups, kernel, kernel)
    gain, bias : Parameter, shape (outputs,)
        A gain is a vector, hence one unit of AGC (AGC-5).
    """

    def __init__(
        self, conv: Conv, ws_eps: WsEps, ws_dtype: WsDtype = "float32", **factory: Any
    ) -> None:
        super().__init__(conv, **factory)
        self.ws_eps, self.ws_dtype = ws_eps, ws_dtype
        self.gain = nn.Parameter(torch.empty(conv.outputs, **factory))

    def standardised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the standardised weight: computed in at least float32, in the weight's dtype.

        Both are bfloat16 if ``ws_dtype`` is and ``dtype``, what the convolution computes in, too.
        """
        weight, gain = self.weight, self.gain
        ws_dtype: WsDtype = self.ws_dtype if dtype == torch.bfloat16 else "float32"
        if fused.standardises(weight, gain, self.ws_eps, ws_dtype):
            run = _Fused.apply if torch.is_grad_enabled() else fused.standardise
            return run(weight, gain, self.ws_eps, ws_dtype)
        if ws_dtype == "bfloat16":
            return _standardise_in_bfloat16(weight, gain, self.ws_eps)
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight, gain = weight.float(), gain.float()
        if torch.compiler.is_compiling():  # a compiler fuses the formula and its gradient by itself
            result = _standardise(weight, gain, self.ws_eps)
        else:
            run = _Standardise.apply if torch.is_grad_enabled() else _Standardise.forward
            result, *_ = run(weight, gain, self.ws_eps)
        return result.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images of shape (n, inputs, h, w)."""
        return self.convolve(x, self.standardised(_computed_in(x)))

    def folded(self) -> SameConv2d:
        """Return the plain convolution that gives the same outputs."""
        plain = SameConv2d(self.conv, device="meta")
        plain.weight = nn.Parameter(self.standardised().detach(), requires_grad=False)
        plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain

    def normalised(self) -> NormalisedConv2d:
        """Return a convolution with the same weight and batch normalisation."""
        twin = NormalisedConv2d(self.conv, device=self.weight.device, dtype=self.weight.dtype)
        twin.weight = nn.Parameter(self.weight.detach().clone())
        twin.train(self.training)
        return twin


class NormalisedConv2d(SameConv2d):
    """A convolution, and batch normalisation instead of a standardised weight and a bias."""

    def __init__(self, conv: Conv, **factory: Any) -> None:
        super().__init__(conv, bias=False, **factory)
        self.norm = nn.BatchNorm2d(conv.outputs, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images of shape (n, inputs, h, w), and normalise over them."""
        return self.norm(super().forward(x))


class Dense(nn.Linear):  # type: ignore[misc]
    """A dense layer whose numbers are left to :meth:`NFNet.reset_parameters`."""

    def reset_parameters(self) -> None:
        """Leave the numbers to :meth:`NFNet.reset_parameters`."""


class Activation(nn.Module):  # type: ignore[misc]
    """A function times the constant that keeps the variance of N(0, 1)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Return the scaled function of ``x``, times ``beta``."""
        result, factor = _FUNCTIONS[self.name](x), GAMMAS[self.name] * beta
        return result.mul_(factor) if self.name in _REUSABLE else result * factor

    def extra_repr(self) -> str:
        """Return the name."""
        return self.name


class SqueezeExcite(nn.Module):  # type: ignore[misc]
    """Gates between 0 and 2, one a channel and image, from the channels' means."""

    def __init__(self, block: Block, **factory: Any) -> None:
        super().__init__()
        self.fc0 = Dense(block.outputs, block.squeezed, **factory)
        self.fc1 = Dense(block.squeezed, block.outputs, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return gates of shape (n, c, 1, 1) for images of shape (n, c, h, w)."""
        # ReLU, without a factor, is what the released weights were trained with; the paper says
        # GELU.
        hidden = F.relu(self.fc0(x.mean((2, 3))))
        return 2 * torch.sigmoid(self.fc1(hidden))[:, :, None, None]


class Stem(nn.Module):  # type: ignore[misc]
    """Four convolutions, a quarter of the size; no activation after the last."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        conv0, conv1, conv2, conv3 = stem(options.variant, options.in_channels)
        self.conv0 = WSConv2d(conv0, options.ws_eps, options.ws_dtype, **factory)
        self.conv1 = WSConv2d(conv1, options.ws_eps, options.ws_dtype, **factory)
        self.conv2 = WSConv2d(conv2, options.ws_eps, options.ws_dtype, **factory)
        self.conv3 = WSConv2d(conv3, options.ws_eps, options.ws_dtype, **factory)
        self.activation = Activation(options.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Take images of shape (n, c, h, w) to (n, widths[0] / 2, h / 4, w / 4)."""
        x = self.activation(self.conv0(x))
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        return self.conv3(x)


class ResNetStem(nn.Module):  # type: ignore[misc]
    """A convolution of 7x7 pixels and a maximum of 3x3, a quarter of the size."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        (conv0,) = stem(options.variant, options.in_channels)
        self.conv0 = WSConv2d(conv0, options.ws_eps, options.ws_dtype, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Take images of shape (n, c, h, w) to (n, widths[0] / 4, h / 4, w / 4)."""
        x = self.conv0(x)
        # SAME: an even axis is padded at its end only, which ceil_mode does.
        before = [same_padding(size, 3, 2)[0] for size in x.shape[2:]]
        return F.max_pool2d(x, 3, 2, before, ceil_mode=True)


class NFBlock(nn.Module):  # type: ignore[misc]
    """A residual block without normalisation."""

    def __init__(self, block: Block, options: Options, **factory: Any) -> None:
        super().__init__()
        self.block = block
        self.drop_rate = options.stochastic_depth * block.stochastic_depth
        convs = {
            conv.name: WSConv2d(conv, options.ws_eps, options.ws_dtype, **factory)
            for conv in block.convs
        }
        self.conv0 = convs["conv0"]
        self.conv1 = convs["conv1"]
        self.conv1b = convs.get("conv1b")
        self.conv2 = convs["conv2"]
        self.shortcut = convs.get("shortcut")
        self.se = SqueezeExcite(block, **factory) if block.squeezed else None
        self.skip_gain = nn.Parameter(torch.empty((), **factory))
        self.activation = Activation(options.activation)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Take images of shape (n, inputs, h, w) to (n, outputs, h / stride, w / stride).

        ``keep`` is :attr:`agc.nfnet.Masks.stochastic_depth`, which is drawn if None.
        """
        residual, shortcut = self.branches(x)
        factor = self.skip_gain * ALPHA
        # A mask of images times the gain, so that the residual branch is multiplied once.
        if keep is not None:
            factor = factor * keep[:, self.block.index, None, None, None]
        elif self.training and self.drop_rate > 0:
            factor = factor * self.kept(len(residual), residual.device)
        return self.join(residual, shortcut, factor)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual branch after its gates, and the shortcut."""
        out = self.activation(x, self.block.beta)
        shortcut = x
        if self.shortcut is not None:
            shortcut = out
            if self.block.pools:
                shortcut = F.avg_pool2d(out, 2, ceil_mode=True, count_include_pad=False)
            shortcut = self.shortcut(shortcut)
        out = self.conv0(out)
        out = self.conv1(self.activation(out))
        if self.conv1b is not None:
            out = self.conv1b(self.activation(out))
        out = self.conv2(self.activation(out))
        return out if self.se is None else self.se(out) * out, shortcut

    def kept(self, images: int, device: torch.device) -> Tensor:
        """Draw stochastic depth: which images keep the residual branch."""
        uniform = torch.rand((images, 1, 1, 1), dtype=torch.float32, device=device)
        return 1 - self.drop_rate + uniform >= 1

    def join(self, residual: Tensor, shortcut: Tensor, factor: Tensor) -> Tensor:
        """Add the residual branch to the shortcut, times a factor for all images or for each."""
        return torch.addcmul(shortcut, residual, factor.to(residual.dtype))


class Chain(nn.Sequential):  # type: ignore[misc]
    """The blocks of a stage, or the stages."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Go through them in order, with the mask of all blocks."""
        for part in self:
            x = part(x, keep)
        return x


class NFNet(nn.Module):  # type: ignore[misc]
    """A normalisation-free network; made by :func:`nfnet`.

    Parameters
    ----------
    options : Options
        What to build.
    device, dtype
        Where and how parameters are stored.

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.options = options
        self.agc_head = HEAD
        resnet = options.variant.family == "NF-ResNet"
        self.stem = (ResNetStem if resnet else Stem)(options, **factory)
        stages: list[list[NFBlock]] = [[] for _ in options.variant.depths]
        for block in blocks(options.variant):
            stages[block.stage].append(NFBlock(block, options, **factory))
        self.stages = Chain(*(Chain(*stage) for stage in stages))
        last = final_conv(options.variant)
        self.final_conv = (
            None if last is None else WSConv2d(last, options.ws_eps, options.ws_dtype, **factory)
        )
        self.activation = Activation(options.activation)
        self.head = Dense(features(options.variant), options.num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as DeepMind's code does, also after ``to_empty``."""
        named = dict(self.named_parameters())
        options = self.options
        for spec in parameters(options.variant, options.num_classes, options.in_channels):
            tensor, initial = named[spec.name], spec.initial
            match initial.distribution:
                case "constant":
                    nn.init.constant_(tensor, initial.value)
                case "normal":
                    nn.init.normal_(tensor, std=initial.value)
                case "truncated":
                    bound = 2 * initial.value
                    nn.init.trunc_normal_(tensor, std=initial.value, a=-bound, b=bound)

    def forward(self, x: Tensor, *, masks: Masks | None = None) -> Tensor:
        """Return logits.

        Parameters
        ----------
        x : Tensor, shape (n, in_channels, h, w)
            Normalised images of any size.
        masks : Masks, optional
            What stochastic depth and dropout keep, for training mode: arrays, or tensors on any
            device. They are drawn if None.

        Returns
        -------
        Tensor, shape (n, num_classes)

        Raises
        ------
        ShapeError, DTypeError
            If these are not such images, or not masks of them.
        ConfigError
            If there are masks in evaluation mode, or not as :class:`agc.nfnet.Masks`.
        """
        self._check(x)
        keep, dropout = check_masks(
            masks,
            self.options.variant,
            x.shape[0],
            convert=lambda mask: torch.as_tensor(mask, device=x.device),
            boolean=torch.bool,
            training=self.training,
        )
        pooled = self._pool(self._finish(self.stages(self.stem(x), keep)))
        rate = self.options.dropout
        if dropout is not None:
            return self.head(pooled * dropout.to(pooled.dtype) / (1 - rate))
        return self.head(F.dropout(pooled, rate, self.training))

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Return what comes out of each part, for the images that :meth:`forward` takes.

        Returns
        -------
        dict of str to Tensor
            ``"stem"`` and ``"stages.0"`` to ``"stages.3"``, a quarter to a thirty-second of the
            size, an NFNet's ``"final_conv"`` after its activation, and ``"pooled"`` of shape
            (n, features), which is what the classifier is given.
        """
        self._check(x)
        outputs = {}
        x = outputs["stem"] = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = outputs[f"stages.{number}"] = stage(x)
        x = self._finish(x)
        if self.final_conv is not None:
            outputs["final_conv"] = x
        outputs["pooled"] = self._pool(x)
        return outputs

    def signals(self, x: Tensor) -> dict[str, Tensor]:
        """Return how signals propagate, for the images that :meth:`forward` takes.

        Returns
        -------
        dict of str to Tensor
            ``"avg_sq_mean"`` and ``"avg_var"``, shape (blocks + 1,): squared mean and biased
            variance of each channel over images and pixels, averaged over channels, after the stem
            and each block. ``"res_avg_var"``, shape (blocks,): the same variance of each residual
            branch after its gates. Stochastic depth is off. float32, or float64 for float64.
        """
        self._check(x)
        residuals = []
        with torch.no_grad():
            outputs = [_moments(x := self.stem(x))]
            for stage in self.stages:
                for block in stage:
                    residual, shortcut = block.branches(x)
                    residuals.append(_moments(residual)[1])
                    outputs.append(
                        _moments(x := block.join(residual, shortcut, block.skip_gain * ALPHA))
                    )
        means, variances = zip(*outputs, strict=True)
        return {
            "avg_sq_mean": torch.stack(means),
            "avg_var": torch.stack(variances),
            "res_avg_var": torch.stack(residuals),
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
        ``torch.nn.BatchNorm2d`` as it is by default: epsilon 1e-5, and running statistics that take
        a tenth of each batch's; of its variance the unbiased one.
        """
        twin = self._with_convs(WSConv2d.normalised)
        for module in twin.modules():
            if isinstance(module, NFBlock):
                module.block = replace(module.block, variance=1.0)
        return twin

    def fold(self) -> NFNet:
        """Return a copy for inference, in which weight standardisation is done once and for all.

        Returns
        -------
        NFNet
            In evaluation mode, with plain convolutions and without gains; its parameters are
            frozen. Outputs are the same up to rounding.

        Raises
        ------
        ParameterError
            If the model is folded or batch-normalised.
        """
        folded = self._with_convs(WSConv2d.folded)
        folded.eval().requires_grad_(False)
        return folded

    def _with_convs(self, change: Callable[[WSConv2d], SameConv2d]) -> NFNet:
        """Return a copy with other convolutions."""
        if not any(isinstance(module, WSConv2d) for module in self.modules()):
            raise ParameterError(
                "the model has no standardised weights: it is folded or batch-normalised; "
                "use the model that it was made from"
            )
        changed: NFNet = copy.deepcopy(self)
        for parent in list(changed.modules()):
            for name, child in parent.named_children():
                if isinstance(child, WSConv2d):
                    setattr(parent, name, change(child))
        return changed

    def _finish(self, x: Tensor) -> Tensor:
        return self.activation(x if self.final_conv is None else self.final_conv(x))

    def _pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def _check(self, x: Tensor) -> None:
        channels = self.options.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            last = x.dim() == 4 and x.shape[-1] == channels
            hint = "; permute(0, 3, 1, 2) puts the channels second" if last else ""
            raise ShapeError(
                f"images must have the shape (n, {channels}, height, width), got {tuple(x.shape)}{hint}; "
                "nfnet(..., in_channels=...) makes a model for other channels"
            )
        if not x.is_floating_point():
            raise DTypeError(
                f"images must be normalised floating point numbers, got {x.dtype}; "
                "convert them, subtract the mean and divide by the standard deviation"
            )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean.square().mean(), variance.mean()
