"""The models against DeepMind's golden values, and what they promise in every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, DTypeError, ParameterError, ShapeError
from agc.nfnet import Masks
from agc.reference.nfnet import NFNet, NFNetPass, smoothed_cross_entropy
from agc_conformance.nfnets.golden import GOLDEN, LIMITS, SMOOTHING, Limits
from tests.contract import Contract
from tests.contract.driver import Driver, Outputs
from tests.contract.golden import EXACT, SINGLE, check_golden
from tests.helpers import Array, close, relative

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Quick to compile, and with both kinds of blocks: the last one has no projection.
SHALLOW = core.Variant("shallow", (1, 2), 0.0, 32, 32, (16, 32), 8, 10)
# Large tensors in few blocks, so that there is much to average over.
WIDE = core.Variant("wide", (1, 1), 0.0, 32, 32, (512, 1024), 256)

# The least that has a block with projection at full and at half size.
NARROW = core.Variant("narrow", (1, 1), 0.0, 32, 32, (16, 32), 8, 10)

# Most tests take images of this size, so that a framework which compiles does so once.
SIZE = (2, 20, 27)

# Of SHALLOW on two images. Each block is kept by an image, and no two orders of the blocks agree.
MASKS = Masks(
    np.array([[True, True, False], [False, True, True]]),
    np.arange(128).reshape(2, 64) % 5 > 1,
)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def images_of(*sizes: int, dtype: Any = "float64") -> Array:
    return core.seeded_batch(*sizes)[0].astype(dtype)


@cache
def exact(driver: Driver) -> Outputs:
    """All of ``tiny`` in float64, which the golden values hold for."""
    return driver.outputs(driver.seeded(), *core.seeded_batch(2, 32))


def smooth_loss(logits: Array, labels: Array) -> float:
    """Return the cross entropy with label smoothing, in float64."""
    logits = logits.astype("float64")
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = (1 - SMOOTHING) * np.eye(logits.shape[1])[labels] + SMOOTHING / logits.shape[1]
    return float(-(target * logs).sum(1).mean())


def convolve(x: Array, w: Array, stride: int) -> Array:
    """A grouped convolution by hand, padded so that there are ``ceil(size / stride)`` outputs."""
    k, _, size, outputs = w.shape
    pads = []
    for n in x.shape[1:3]:
        total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # n h w i k k
    groups = x.shape[3] // size
    each = outputs // groups
    parts = [
        np.tensordot(
            windows[:, :, :, g * size : (g + 1) * size],
            w[:, :, :, g * each : (g + 1) * each],
            ((3, 4, 5), (2, 0, 1)),
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, 3)


def expm1_below(x: Array, scale: float = 1.0, alpha: float = 1.0) -> Array:
    return scale * np.where(x > 0, x, alpha * np.expm1(x))


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "elu": expm1_below,
    "celu": expm1_below,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "selu": lambda x: expm1_below(x, 1.0507009873554805, 1.6732632423543772),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0, x),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "identity": lambda x: x,
}


class Twin(NFNet):
    """The reference with plain convolutions, and batch normalisation that has gains and biases.

    Its statistics are those of the batch, which stay in ``seen``, unless others are given.
    """

    def __init__(
        self, variant: Any, values: Mapping[str, Array], statistics: Mapping[str, Array] | None
    ) -> None:
        super().__init__(variant, values)
        self.statistics, self.seen = statistics, {}

    def standardise(self, weight: Array, gain: Array) -> Any:
        return weight, lambda d: (d, np.zeros_like(gain))

    def convolve(self, name: str, conv: core.Conv, x: Array) -> Any:
        gain, bias = self.parameters[f"{name}.gain"], self.parameters[f"{name}.bias"]
        out, back_conv = super().convolve(name, conv, x)
        out = self.seen[name] = out - bias
        axes = (0, 1, 2)
        mean, variance = out.mean(axes), out.var(axes)
        if self.statistics is not None:
            mean, variance = self.statistics[f"{name}.mean"], self.statistics[f"{name}.variance"]
        scale = 1 / np.sqrt(variance + 1e-5)
        normal = (out - mean) * scale

        def backward(d: Array) -> Array:  # through statistics of the batch
            along = d * normal
            d_x = back_conv(gain * scale * (d - d.mean(axes) - normal * along.mean(axes)))
            self.gradients |= {f"{name}.gain": along.sum(axes), f"{name}.bias": d.sum(axes)}
            return d_x

        return normal * gain + bias, backward

    def beta(self, block: core.Block) -> float:
        return 1.0


class NFNetContract(Contract):
    def conv(
        self,
        dtype: str = "float64",
        ws_eps: str = "deepmind",
        change: Callable[[Array], object] = lambda weight: None,
        **sizes: int,
    ) -> tuple[Any, Mapping[str, Array]]:
        """Return a grouped convolution with stride 2, and what it holds after a change of its
        weight.
        """
        made = core.Conv(
            "conv", **{"inputs": 6, "outputs": 8, "kernel": 3, "stride": 2, "groups": 2, **sizes}
        )
        values = {
            "weight": normal(0, *made.shape) + 0.3,
            "gain": normal(1, made.outputs) + 0.3,
            "bias": normal(2, made.outputs) + 0.3,
        }
        change(values["weight"])
        values = {name: value.astype(dtype) for name, value in values.items()}
        return self.driver.conv(made, ws_eps, dtype, values), values

    def layers(self, model: Any, kind: str) -> list[Any]:
        return [m for m in self.driver.layers(model) if type(m).__name__.lower() == kind]

    def blocks(self, model: Any) -> list[Any]:
        return sorted(self.layers(model, "nfblock"), key=lambda block: block.block.index)

    def run(self, model: Any, *sizes: int, **options: Any) -> Array:
        return self.driver.run(model, images_of(*(sizes or SIZE)), **options)

    # Golden values

    @pytest.mark.long
    @pytest.mark.parametrize("variant", GOLDEN)
    def test_golden_values(self, variant):
        golden, model = GOLDEN[variant], self.driver.seeded(variant)
        found = self.driver.outputs(model, *core.seeded_batch(golden.batch, golden.pixels))
        check_golden(variant, found, self.driver.adapter.to_neutral(model))

    def test_single_precision(self, mode):
        images, labels = core.seeded_batch(*SIZE)
        model = self.driver.seeded(SHALLOW, "float32")
        found = self.driver.outputs(model, images.astype("float32"), labels, mode)
        assert found.logits.dtype == found.gradients["stem.conv0.gain"].dtype == "float32"
        expected = NFNet(SHALLOW, self.driver.adapter.to_neutral(model))(images)
        self.compare(found, expected, labels, SINGLE)

    def compare(self, found: Outputs, expected: NFNetPass, labels: Array, limit: Limits) -> None:
        """Compare logits, loss and gradients with those of the reference."""
        loss, gradient = smoothed_cross_entropy(expected.logits, labels)
        close(found.logits, expected.logits, limit.logits)
        assert abs(float(found.loss) - loss) <= limit.loss
        gradients = expected.backward(gradient)
        assert found.gradients.keys() == gradients.keys()
        for name, wanted in gradients.items():
            own = found.gradients[name]
            if self.driver.channels_first and own.ndim > 1:
                own = np.moveaxis(own, 0, -1)
            allowed = limit.skip_gain if name.endswith("skip_gain") else limit.gradient
            # Rounding alone makes gradients of what a norm takes off again: they are 0.
            error, size = np.linalg.norm(own - wanted), np.linalg.norm(wanted)
            assert error <= allowed * size + 1e-16, name

    @pytest.mark.parametrize(
        ("dtype", "stored"), [("bfloat16", BFLOAT16), ("mixed_bfloat16", np.dtype("float32"))]
    )
    def test_bfloat16(self, dtype, stored):
        limit = LIMITS["bfloat16"]
        images, labels = core.seeded_batch(*SIZE)
        images = images.astype(stored)
        model = self.driver.seeded(SHALLOW, dtype, dropout=0.4)
        expected = self.masked(model).logits
        with self.driver.autocast():
            logits = self.driver.run(model, images, train=True, masks=MASKS)
            found = self.driver.shapes(model, images, labels)
            convs = self.layers(model, "wsconv2d")
            weights = [self.driver.standardised(conv) for conv in convs[:3]]
        assert logits.dtype == BFLOAT16
        close(logits, expected, limit.logits)
        wanted, _ = smoothed_cross_entropy(expected, labels)
        assert abs(smooth_loss(logits, labels) - wanted) < limit.loss
        assert len(convs) == 19
        assert {feature.dtype for feature in found.features.values()} == {BFLOAT16}
        assert {signal.dtype for signal in found.signals.values()} == {np.dtype("float32")}
        assert {gradient.dtype for gradient in found.gradients.values()} == {stored}
        assert {weight.dtype for weight in weights} == {stored}

    @pytest.mark.parametrize(
        ("variant", "images", "height", "width"),
        [
            (SHALLOW, 2, 45, 38),
            (SHALLOW, 1, 50, 33),
            (SHALLOW, 1, 64, 64),
            (SHALLOW, 3, 7, 1),
            ("NF-ResNet-tiny", 1, 45, 36),
        ],
    )
    def test_sizes(self, variant, images, height, width):
        """Odd and even, where padding and pooling differ from frameworks' own, and one image
        alone.
        """
        model = self.driver.seeded(variant)
        x = images_of(images, height, width)
        expected = NFNet(variant, self.driver.adapter.to_neutral(model))(x)
        close(self.driver.run(model, x), expected.logits, EXACT.logits)

    # Weight standardisation and grouped convolutions

    def test_filters_have_mean_0_and_the_norm_of_their_gain(self):
        conv, values = self.conv()
        weight = self.driver.standardised(conv)
        np.testing.assert_allclose(weight.mean((0, 1, 2)), np.zeros(8), atol=1e-15)
        norms = np.sqrt(np.square(weight).sum((0, 1, 2)))
        np.testing.assert_allclose(norms, np.abs(values["gain"]), rtol=1e-12)

    @pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
    def test_epsilon(self, ws_eps):
        """A floor in DeepMind's form, a term in timm's."""

        def change(weight: Array) -> None:
            weight *= 1e-5
            weight[..., 0] = 3.0  # no variance at all

        conv, values = self.conv(ws_eps=ws_eps, change=change)
        gain, weight = values["gain"], values["weight"]
        expected = gain * (weight - weight.mean((0, 1, 2)))
        if ws_eps == "deepmind":
            expected *= 100
        else:
            expected /= np.sqrt(3 * 3 * 3 * (weight.var((0, 1, 2)) + 1e-5))
        np.testing.assert_allclose(self.driver.standardised(conv), expected, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
    def test_gradients_of_the_convolution(self, ws_eps):
        def change(weight: Array) -> None:
            weight[..., 1] *= 1e-4  # below the floor

        conv, _ = self.conv(ws_eps=ws_eps, change=change)
        self.driver.check_gradients(conv, normal(9, 2, 9, 12, 6))

    @pytest.mark.parametrize("groups", [1, 2, 3])
    @pytest.mark.parametrize("size", [1, 2, 7, 8])
    def test_grouped_convolutions_with_stride(self, groups, size):
        conv, values = self.conv(outputs=6, groups=groups)
        images = normal(5, 1, size, size + 1, 6)
        expected = convolve(images, self.driver.standardised(conv), 2) + values["bias"]
        assert expected.shape[1:3] == (math.ceil(size / 2), math.ceil((size + 1) / 2))
        np.testing.assert_allclose(self.driver.run(conv, images), expected, rtol=1e-12, atol=1e-13)

    def test_half_precision_is_standardised_in_single(self):
        conv, values = self.conv("bfloat16")
        wide = {name: value.astype("float32") for name, value in values.items()}
        made = core.Conv("conv", inputs=6, outputs=8, kernel=3, stride=2, groups=2)
        expected = self.driver.standardised(self.driver.conv(made, "deepmind", "float32", wide))
        found = self.driver.standardised(conv)
        assert found.dtype == BFLOAT16
        np.testing.assert_array_equal(found, expected.astype(BFLOAT16))

    @pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
    def test_standardised_in_bfloat16(self, ws_eps):
        """What is rounded where, against the reference; float32 gives other numbers."""
        sizes = {"inputs": 512, "outputs": 8, "kernel": 3, "stride": 1, "groups": 1}
        made = core.Conv("conv", **sizes)
        values = {"weight": normal(0, *made.shape) + 0.3, "gain": normal(1, 8) + 2}
        values = {name: value.astype("float32") for name, value in values.items()}
        values["bias"] = np.zeros(8, "float32")
        conv = self.driver.conv(made, ws_eps, "float32", values, ws_dtype="bfloat16")
        single = self.driver.standardised(conv)
        assert single.dtype == "float32"
        gradient = normal(2, *made.shape) + 0.3
        found, *back = self.driver.standardised_in_bfloat16(conv, gradient)
        assert found.dtype == BFLOAT16
        assert {array.dtype for array in back} == {np.dtype("float32")}
        exact, low = (
            NFNet("micro", core.seeded_parameters("micro"), ws_dtype=dtype).standardise
            for dtype in ("float32", "bfloat16")
        )
        weight, gain = (values[name].astype("float64") for name in ("weight", "gain"))
        wanted, backward = exact(weight, gain)
        assert 1e-3 < relative(found, wanted) < 1e-2
        assert relative(found, single) > 1e-3
        # That of the gain is a difference of two sums that are bfloat16 numbers, hence less exact.
        for ours, reference, limit in zip(back, backward(gradient), (1e-2, 3e-2), strict=True):
            assert 1e-4 < relative(ours, reference) < limit
        rounded, _ = low(weight, gain)
        assert np.mean(found.astype("float64") == rounded) > 0.95
        assert np.mean(single.astype(BFLOAT16) == found) < 0.9

    def test_standardisation_in_bfloat16_is_for_convolutions_in_bfloat16(self):
        logits = {}
        for dtype in ("float32", "mixed_bfloat16"):
            for ws_dtype in ("float32", "bfloat16"):
                model = self.driver.seeded(SHALLOW, dtype, ws_dtype=ws_dtype)
                images = images_of(*SIZE, dtype="float32")
                with self.driver.autocast() if dtype != "float32" else nullcontext():
                    logits[dtype, ws_dtype] = self.driver.run(model, images)
        np.testing.assert_array_equal(logits["float32", "float32"], logits["float32", "bfloat16"])
        single, low = (logits["mixed_bfloat16", ws_dtype] for ws_dtype in ("float32", "bfloat16"))
        assert low.dtype == BFLOAT16
        assert not np.array_equal(single, low)
        close(low, logits["float32", "float32"], LIMITS["bfloat16"].logits)

    # The options

    @pytest.mark.parametrize("name", core.GAMMAS)
    def test_activations(self, name):
        """They keep the variance of normal numbers, and are computed in float64 where these are."""
        noise = self.driver.activation(name, normal(0, 200_000))
        assert noise.std() == pytest.approx(1, abs=0.01)
        x = np.array([-30.0, *np.linspace(-3, 3, 13), 0.7, 21.0, 40.0])
        expected = core.GAMMAS[name] * FORMULAS[name](x)
        np.testing.assert_allclose(
            self.driver.activation(name, x), expected, rtol=1e-12, atol=1e-20
        )

    def test_gelu_has_two_forms(self):
        tanh, erf = (
            self.driver.activation(name, np.linspace(-3, 3, 13)) for name in ("gelu", "gelu_erf")
        )
        assert 1e-5 < np.abs(tanh - erf).max() < 1e-3

    def test_options_change_the_outputs(self):
        base = self.run(self.driver.seeded(SHALLOW))
        for options in ({"activation": "gelu_erf"}, {"ws_eps": "timm"}, {"activation": "relu"}):
            assert 1e-5 < relative(self.run(self.driver.seeded(SHALLOW, **options)), base) < 2
        gray = self.driver.seeded(SHALLOW, in_channels=1, num_classes=7)
        images, _ = core.seeded_batch(*SIZE, channels=1)
        assert self.driver.run(gray, images).shape == (2, 7)

    def test_dropout(self):
        """With the identity as its classifier, a model shows what the classifier is given."""
        width = {spec.name: spec.shape for spec in core.parameters(SHALLOW)}["head.weight"][0]
        options = {"stochastic_depth": 0.0, "num_classes": width}
        values = dict(core.seeded_parameters(SHALLOW, width))
        values |= {"head.weight": np.eye(width), "head.bias": np.zeros(width)}
        model = self.driver.blank(SHALLOW, dtype="float64", dropout=0.4, **options)
        self.driver.adapter.from_neutral(model, values)
        images = np.repeat(images_of(1, 8), 200, 0)
        pooled = self.driver.run(model, images)
        found = self.driver.run(model, images, train=True)
        kept = found != 0
        assert kept.mean() == pytest.approx(0.6, abs=0.02)
        np.testing.assert_allclose(found[kept], pooled[kept] / 0.6, rtol=1e-9)
        again = self.driver.run(model, images, train=True)
        assert not np.array_equal(again, found)
        np.testing.assert_array_equal(self.driver.run(model, images), pooled)

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_stochastic_depth_is_drawn_for_each_image_and_not_rescaled(self, dtype):
        model = self.driver.seeded(SHALLOW, dtype, stochastic_depth=0.5)
        block = self.blocks(model)[2]
        assert block.drop_rate == pytest.approx(0.5 * 2 / 3)
        x = normal(0, 1, 2, 2, 32).astype(dtype)
        kept = self.driver.run(block, x)[0]
        many = np.repeat(x, 1000, 0)
        rows = self.driver.run(block, many, train=True)
        assert rows.dtype == dtype
        dropped = (rows == x).all((1, 2, 3))
        assert dropped.mean() == pytest.approx(0.5 * 2 / 3, abs=0.05)
        for row in rows[~dropped]:  # a batch may be added up in another order than one image
            close(row, kept, 1e-12 if dtype == "float64" else 2e-2)
        again = (self.driver.run(block, many, train=True) == x).all((1, 2, 3))
        assert not np.array_equal(again, dropped)

    # Masks that are given

    def masked(self, model: Any) -> NFNetPass:
        """Return what SHALLOW does with the masks, in the reference."""
        values = self.driver.adapter.to_neutral(model)
        return NFNet(SHALLOW, values, dropout=model.options.dropout)(images_of(*SIZE), MASKS)

    def test_masks(self, mode):
        """Outputs and gradients are the reference's: so they are the same in every framework."""
        model = self.driver.seeded(SHALLOW, dropout=0.4)
        images, labels = core.seeded_batch(*SIZE)
        found = self.driver.outputs(model, images, labels, mode, MASKS)
        self.compare(found, self.masked(model), labels, EXACT)

    def test_what_is_given_is_not_drawn(self):
        images = images_of(16, 8)
        masks = Masks(*(np.tile(mask, (8, 1)) for mask in MASKS))

        def run(*each: Masks | None) -> list[Array]:
            options = {"dropout": 0.4, "stochastic_depth": 0.5, "dtype": "float64", "seed": 0}
            model = self.driver.nfnet(SHALLOW, **options)
            self.driver.adapter.from_neutral(model, core.seeded_parameters(SHALLOW))
            return [self.driver.run(model, images, train=True, masks=masks) for masks in each]

        first, again, drawn = run(masks, masks, None)
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(drawn, run(None)[0])  # no random number had been used up
        for part in (masks._replace(dropout=None), masks._replace(stochastic_depth=None)):
            assert relative(*run(part, part)) > 1e-3

    def test_bad_masks(self):
        model = self.driver.blank(SHALLOW)
        depth, dropout = MASKS

        def refuse(error: type[Exception], message: str, masks: Any, train: bool = True) -> None:
            with pytest.raises(error, match=message):
                self.run(model, train=train, masks=masks)

        refuse(ConfigError, r"an agc\.nfnet\.Masks\(.*\), got tuple", tuple(MASKS))
        refuse(ConfigError, "the model is in evaluation mode", MASKS, train=False)
        shape = r"masks\.stochastic_depth must have the shape \(n, blocks\), here \(2, 3\), got "
        refuse(ShapeError, shape + r"\(2, 2\)", MASKS._replace(stochastic_depth=depth[:, 1:]))
        refuse(ShapeError, shape + r"\(3,\)", Masks(depth[0], None))
        refuse(ShapeError, r"here \(2, 64\), got \(1, 64\)", Masks(None, dropout[:1]))
        rescaled = (dropout / 0.6).astype("float32")
        refuse(DTypeError, r"masks\.dropout must be bool.* got .*float32", Masks(depth, rescaled))

    @pytest.mark.parametrize(
        ("variant", "last"),
        [("tiny", 0.25), ("F1", 0.25), (SHALLOW, 0.25), ("NF-ResNet-tiny", 0.1)],
    )
    def test_rates_of_stochastic_depth(self, variant, last):
        rates = [block.drop_rate for block in self.blocks(self.driver.abstract(variant))]
        assert len(rates) == len(core.blocks(core.variant(variant)))
        np.testing.assert_allclose(rates, [last * i / len(rates) for i in range(len(rates))])

    @pytest.mark.parametrize(
        ("variant", "options", "message"),
        [
            ("F8", {}, "unknown NFNet variant 'F8'; the variants are F0, F1, "),
            ("tiny", {"num_classes": -1}, "num_classes must be"),
            ("tiny", {"activation": "swish"}, "unknown activation 'swish'"),
        ],
    )
    def test_bad_options(self, variant, options, message):
        with pytest.raises(ConfigError, match=message):
            self.driver.nfnet(variant, dtype="float32", seed=0, **options)

    @pytest.mark.parametrize("method", ["__call__", "features", "signals"])
    def test_bad_images(self, method):
        def refuse(
            error: type[Exception], message: str, *shape: int, dtype: str = "float32"
        ) -> None:
            with pytest.raises(error, match=message):
                self.driver.call(model, method, np.zeros(shape, dtype))

        model = self.driver.blank(SHALLOW)
        first, last = (2, 3, 32, 32), (2, 32, 32, 3)
        if self.driver.channels_first:
            layout, own, other, gray = "n, 3, height, width", first, last, (2, 1, 32, 32)
        else:
            layout, own, other, gray = "n, height, width, 3", last, first, (2, 32, 32, 1)
        swap = r"(permute|tf\.transpose|transpose)"
        refuse(ShapeError, rf"\({layout}\), got \({str(other)[1:-1]}\); {swap}", *other)
        refuse(ShapeError, r"got \(32, 32, 3\); nfnet", 32, 32, 3)
        refuse(ShapeError, r"got \(\); nfnet")
        refuse(ShapeError, rf"got \({str(gray)[1:-1]}\); nfnet\(\.\.\., in_channels=", *gray)
        refuse(DTypeError, r"got (torch\.)?uint8; convert them", *own, dtype="uint8")

    # Parameters

    # The smallest, by depth and width, and the other family.
    @pytest.mark.parametrize("variant", ["tiny", "F0", "F7+", "NF-ResNet-50"])
    def test_parameters_have_the_canonical_names(self, variant):
        found = self.driver.parameters(self.driver.abstract(variant))
        shapes = {name: tuple(parameter.shape) for name, parameter in found.items()}
        if self.driver.channels_first:
            shapes = {name: (*s[2:], *reversed(s[:2])) for name, s in shapes.items()}
        assert shapes == {spec.name: spec.shape for spec in core.parameters(variant)}

    def test_initial_values(self):
        def drawn(seed: int) -> Mapping[str, Array]:
            model = self.driver.nfnet(WIDE, dtype="float32", seed=seed)
            return self.driver.adapter.to_neutral(model)

        values, others = drawn(0), drawn(1)
        normal, truncated = [], []
        for spec in core.parameters(WIDE):
            value = values[spec.name]
            match spec.kind:
                case "conv":
                    normal.append(value.ravel() * spec.fan_in**0.5)
                case "se":
                    truncated.append(value.ravel() * spec.fan_in**0.5)
                case "head":
                    assert value.std() == pytest.approx(0.01, rel=0.01)
                case kind:
                    assert (value == (1 if kind == "gain" else 0)).all()
        for array in normal:
            assert array.std() == pytest.approx(1, abs=4 / array.size**0.5)
        assert np.concatenate(normal).std() == pytest.approx(1, rel=2e-3)
        assert np.abs(np.concatenate(normal)).max() > 4  # not truncated
        assert np.concatenate(truncated).std() == pytest.approx(0.8796, rel=2e-3)
        assert np.abs(np.concatenate(truncated)).max() <= 2 + 1e-5
        firsts = {float(array[0]) for array in normal + truncated}
        assert len(firsts) == len(normal) + len(truncated)  # each tensor has its own numbers
        assert relative(others["head.weight"], values["head.weight"]) > 1

    def test_identity_at_the_start(self):
        """With skip gains of 0, a block without projection returns what it is given."""
        block = self.blocks(self.driver.nfnet(SHALLOW, dtype="float32", seed=0))[2]
        x = normal(0, 2, 4, 4, 32).astype("float32")
        np.testing.assert_array_equal(self.driver.run(block, x), x)

    def test_signals_at_the_start(self):
        variances = []
        for seed in (0, 1):
            model = self.driver.nfnet("tiny", dtype="float32", seed=seed)
            found = self.driver.signals(model, normal(seed, 16, 64, 64, 3).astype("float32"))
            variances.append(found["avg_var"])
            assert float(found["avg_sq_mean"].max()) < 0.01
            assert found["res_avg_var"].shape == (12,)
        expected = [0.916, 0.917, *2 * [0.217], *6 * [0.044], *3 * [0.007]]
        np.testing.assert_allclose(np.mean(variances, 0), expected, rtol=0.25)

    def test_plan(self):
        plan_of, model = self.driver.adapter.plan, self.driver.blank("tiny")
        neutral = {
            spec.name: (spec.units.bind(spec.shape).count, 0.01, not spec.clipped)
            for spec in core.parameters("tiny")
        }
        plan = plan_of(model, AGC.profile("deepmind"))
        assert plan.count == 4855
        assert [entry.name for entry in plan if not entry.clipped] == ["head.weight"]
        assert plan.decisions() == neutral
        assert plan_of(model, AGC(exclude=["@head.weight"])).decisions() == neutral
        paper = plan_of(model, AGC.profile("paper"))
        assert {entry.name for entry in paper if entry.excluded} == {"head.weight", "head.bias"}

    # Uses

    def test_features(self):
        found, model = exact(self.driver), self.driver.seeded()
        assert {name: value.shape for name, value in found.features.items()} == {
            "stem": (2, 8, 8, 16),
            "stages.0": (2, 8, 8, 32),
            "stages.1": (2, 4, 4, 64),
            "stages.2": (2, 2, 2, 96),
            "stages.3": (2, 1, 1, 96),
            "final_conv": (2, 1, 1, 192),
            "pooled": (2, 192),
        }
        logits = self.driver.run(model.head, found.features["pooled"])
        close(logits, found.logits, EXACT.logits)
        after = found.features["stages.2"].var((0, 1, 2)).mean()
        np.testing.assert_allclose(found.signals["avg_var"][9], after)

    def test_fold(self, stored_as):
        model = self.driver.seeded(SHALLOW, stored_as)
        folded = model.fold()
        dtype = "float64" if stored_as == "float64" else "float32"
        images = images_of(*SIZE, dtype=dtype)
        limit = {"float64": EXACT.logits, "float32": SINGLE.logits}.get(stored_as, 0.0)
        before = self.driver.run(folded, images)
        close(before, self.driver.run(model, images), limit)
        assert self.layers(folded, "sameconv2d")
        assert not self.layers(folded, "wsconv2d")
        gains = {spec.name for spec in core.parameters(SHALLOW) if spec.kind == "gain"}
        names = [set(self.driver.parameters(each)) for each in (model, folded)]
        assert names[0] - names[1] == gains
        zeros = {spec.name: np.zeros(spec.shape) for spec in core.parameters(SHALLOW)}
        self.driver.adapter.from_neutral(model, zeros)
        np.testing.assert_array_equal(self.driver.run(folded, images), before)  # nothing is shared

    def test_the_batch_normalised_twin(self):
        """Its outputs, gradients and running statistics are plain batch normalisation's."""
        model = self.driver.seeded(NARROW)
        values = self.driver.adapter.to_neutral(model)
        twin = model.batch_normalised()
        norms = self.driver.norms(twin)
        initial = {"gain": 1, "bias": 0, "mean": 0, "variance": 1}
        assert len(norms) == 4 * sum(spec.kind == "conv" for spec in core.parameters(NARROW))
        assert all((norms[name] == initial[name.rpartition(".")[2]]).all() for name in norms)
        self.driver.adapter.from_neutral(model, {n: np.zeros_like(a) for n, a in values.items()})

        # Other numbers of each channel, running variances that are positive among them.
        start = {name: values.get(name, np.exp(normal(0, len(a)))) for name, a in norms.items()}
        images, labels = core.seeded_batch(*SIZE)
        masks = Masks(np.array([[True, False], [True, True]]), None)
        self.driver.set_norms(twin, start)
        reference = Twin(NARROW, values, None)
        expected = reference(images, masks)
        found = self.driver.outputs(twin, images, labels, masks=masks)
        gradients = {self.driver.canonical(name): g for name, g in found.gradients.items()}
        self.compare(replace(found, gradients=gradients), expected, labels, EXACT)
        after = self.driver.norms(twin)
        for name, out in reference.seen.items():
            count = out[..., 0].size
            share = 0.1 * (count / (count - 1) if self.driver.unbiased else 1)
            for kind, of_batch in (
                ("mean", 0.1 * out.mean((0, 1, 2))),
                ("variance", share * out.var((0, 1, 2))),
            ):
                wanted = 0.9 * start[f"{name}.{kind}"] + of_batch
                np.testing.assert_allclose(after[f"{name}.{kind}"], wanted, rtol=1e-12)
        logits = self.driver.run(twin, images)
        close(logits, Twin(NARROW, values, after)(images).logits, EXACT.logits)
        again = self.driver.norms(twin)
        assert all(np.array_equal(again[name], value) for name, value in after.items())

    @pytest.mark.parametrize("variant", [NARROW, "NF-ResNet-tiny"])
    def test_the_plan_of_the_twin(self, variant):
        """Batch normalisation has as many parameters and units as gains and biases have."""
        model = self.driver.blank(variant)
        rule, plan_of = AGC.profile("deepmind"), self.driver.adapter.plan
        plan = plan_of(model.batch_normalised(), rule).decisions()
        renamed = {self.driver.canonical(name): entry for name, entry in plan.items()}
        assert renamed == plan_of(model, rule).decisions()
        assert len(renamed) == len(plan)

    def test_no_other_model_is_made_of_a_changed_one(self):
        model, to_neutral = self.driver.blank(SHALLOW), self.driver.adapter.to_neutral
        for changed, what in (
            (model.fold(), "folded"),
            (model.batch_normalised(), "batch-normalised"),
        ):
            for use in (changed.fold, changed.batch_normalised, partial(to_neutral, changed)):
                with pytest.raises(ParameterError, match=f"it is .*{what}.*; use the model that"):
                    use()

    @pytest.mark.parametrize("folded", [False, True])
    def test_export(self, folded, tmp_path):
        """A program of its own, for any number of images, with the weights inside."""
        model = self.driver.seeded(SHALLOW, "float32")
        program = self.driver.export(model.fold() if folded else model, tmp_path)
        for sizes in self.driver.exported_sizes:
            images = images_of(*sizes, dtype="float32")
            close(program(images), self.driver.run(model, images), SINGLE.logits)
