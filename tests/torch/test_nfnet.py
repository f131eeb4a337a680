"""The model against DeepMind's golden values, and what a PyTorch user expects of a module."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import agc_torch
from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, DTypeError, ShapeError
from agc.reference.nfnet import NFNet
from agc_conformance.nfnets.golden import GOLDEN, LIMITS, SMOOTHING
from agc_torch.nfnet import NFBlock, SameConv2d, WSConv2d

EXACT, SINGLE = LIMITS["float64"], LIMITS["float32"]


SHALLOW = core.Variant("shallow", (1, 2), 0.0, 32, 32, (16, 32), 8, 10)  # quick to compile


def seeded(variant: Any = "tiny", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model in evaluation mode with the parameters that every framework can make."""
    model = agc_torch.nfnet(variant, dtype=dtype, **options).eval()
    classes, channels = model.options.num_classes, model.options.in_channels
    agc_torch.from_neutral(model, core.seeded_parameters(variant, classes, channels))
    return model


def batch(*sizes: int, dtype: torch.dtype = torch.float64, **options: int) -> tuple[Tensor, Tensor]:
    images, labels = core.seeded_batch(*sizes, **options)
    return torch.tensor(images, dtype=dtype).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def loss_and_gradients(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.detach().square().sum()) for tensor in tensors))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected) - expected).norm() / expected.norm())


def close(found: Tensor, expected: Tensor, limit: float) -> None:
    error = (found.detach().to(expected) - expected).abs().max() / expected.abs().max()
    assert float(error) <= limit


# Golden values


@pytest.mark.parametrize("variant", GOLDEN)
def test_golden_values(variant, check_golden):
    model = seeded(variant)
    images, labels = batch(GOLDEN[variant].batch, GOLDEN[variant].pixels)
    logits, loss, gradients = loss_and_gradients(model, images, labels)
    with torch.no_grad():
        pooled = model.features(images)["pooled"]
    check_golden(
        variant,
        logits=logits.numpy(),
        loss=float(loss),
        pooled=pooled.numpy(),
        signals={name: value.numpy() for name, value in model.signals(images).items()},
        gradients={name: gradient.numpy() for name, gradient in gradients.items()},
        parameters=agc_torch.to_neutral(model),
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_single_precision(channels_last, check_single):
    images, labels = batch(2, 32)
    exact = loss_and_gradients(seeded(), images, labels)
    model, images = seeded(dtype=torch.float32), images.float()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    logits, loss, gradients = loss_and_gradients(model, images, labels)
    check_single((logits, float(loss), gradients), exact)


def test_bfloat16():
    images, labels = batch(2, 32)
    exact, exact_loss, _ = loss_and_gradients(seeded(), images, labels)
    limit = LIMITS["bfloat16"]

    whole = seeded(dtype=torch.bfloat16)
    logits, _, gradients = loss_and_gradients(whole, images.bfloat16(), labels)
    assert logits.dtype == gradients["stem.conv0.gain"].dtype == torch.bfloat16
    close(logits, exact, limit.logits)
    assert abs(float(F.cross_entropy(logits.float(), labels, label_smoothing=0.1)) - exact_loss) < (
        limit.loss
    )

    mixed = seeded(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = mixed.features(images.float())
        logits = mixed(images.float())
        weights = [m.standardised() for m in mixed.modules() if isinstance(m, WSConv2d)]
    assert {f.dtype for f in features.values()} == {logits.dtype} == {torch.bfloat16}
    assert {weight.dtype for weight in weights} == {torch.float32}
    close(logits, exact, limit.logits)


@pytest.mark.parametrize(
    ("images", "height", "width"), [(2, 32, 38), (2, 45, 51), (1, 50, 33), (1, 64, 64), (3, 7, 1)]
)
def test_sizes(images, height, width):
    """Odd and even, where SAME padding and pooling differ from PyTorch's own, and one image alone."""
    model = seeded()
    x, _ = batch(images, height, width)
    with torch.no_grad():
        exact = NFNet("tiny", agc_torch.to_neutral(model))(x.permute(0, 2, 3, 1).numpy())
        close(model(x), torch.tensor(exact.logits), EXACT.logits)


# Weight standardisation


def conv_and_images(**changes: Any) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"inputs": 6, "outputs": 8, "kernel": 3, "stride": 2, "groups": 2, **changes}
    conv = WSConv2d(core.Conv("conv", **sizes), "deepmind", dtype=torch.float64)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.3)
    return conv, torch.randn(2, sizes["inputs"], 9, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters_have_mean_0_and_the_norm_of_their_gain(memory_format):
    conv, _ = conv_and_images()
    weight = conv.to(memory_format=memory_format).standardised()
    assert weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(8).double(), atol=1e-15, rtol=0)
    torch.testing.assert_close(weight.square().sum((1, 2, 3)).sqrt(), conv.gain.abs())


def test_epsilon_is_a_floor():
    conv, _ = conv_and_images()
    size = conv.weight[0].numel()
    with torch.no_grad():
        conv.weight.mul_(1e-5)
        conv.weight[0] = 3.0  # no variance at all
    centred = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    gain = conv.gain[:, None, None, None]
    torch.testing.assert_close(conv.standardised(), 100 * gain * centred)
    conv.ws_eps = "timm"
    variance = conv.weight.var((1, 2, 3), unbiased=False, keepdim=True)
    expected = gain * centred / (size * (variance + 1e-5)).sqrt()
    torch.testing.assert_close(conv.standardised(), expected)


@pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
def test_gradients_of_the_convolution(ws_eps):
    conv, images = conv_and_images()
    conv.ws_eps = ws_eps
    with torch.no_grad():
        conv.weight[1] *= 1e-4  # below the floor

    def run(weight: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "gain": gain, "bias": bias}
        return torch.func.functional_call(conv, values, (images,))

    inputs = (conv.weight, conv.gain, conv.bias)
    assert torch.autograd.gradcheck(run, inputs, eps=1e-8, atol=1e-4)
    assert torch.autograd.gradgradcheck(run, inputs, eps=1e-8, atol=1e-3)


def test_second_gradient_of_the_gain_alone():
    conv, images = conv_and_images()
    conv.weight.requires_grad_(False)
    loss = conv(images).square().sum()
    (first,) = torch.autograd.grad(loss, conv.gain, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), conv.gain)
    # The loss is a quadratic polynomial of each gain.
    assert (second > 0).all()


def test_gradients_do_not_depend_on_the_memory_format():
    conv, images = conv_and_images()
    twin, _ = conv_and_images()
    twin = twin.to(memory_format=torch.channels_last)
    for one in (conv, twin):
        one(images).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, twin.weight.grad)
    torch.testing.assert_close(conv.gain.grad, twin.gain.grad)
    torch.testing.assert_close(conv.standardised(), twin.standardised())


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_grouped_convolutions_with_stride(groups, size):
    conv, _ = conv_and_images(outputs=6, groups=groups)
    images = torch.randn(1, 6, size, size + 1, dtype=torch.float64)
    weight, grown = conv.standardised(), F.pad(images, [1, 1, 1, 1])
    rows = slice(1 if size % 2 == 0 else 0, None)  # an even axis is padded at its end only
    columns = slice(1 if (size + 1) % 2 == 0 else 0, None)
    parts = [
        F.conv2d(x, w, stride=2)
        for x, w in zip(
            grown[:, :, rows, columns].chunk(groups, 1), weight.chunk(groups, 0), strict=True
        )
    ]
    expected = torch.cat(parts, 1) + conv.bias[:, None, None]
    assert expected.shape[2:] == (math.ceil(size / 2), math.ceil((size + 1) / 2))
    torch.testing.assert_close(conv(images), expected)


def test_half_precision_is_standardised_in_single():
    conv, _ = conv_and_images()
    exact = copy.deepcopy(conv.bfloat16()).double().standardised()
    assert torch.equal(conv.standardised(), exact.bfloat16())


# The options


@pytest.mark.parametrize("activation", core.GAMMAS)
def test_activations_keep_the_variance(activation):
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    scaled = agc_torch.nfnet("tiny", activation=activation).activation(noise)
    assert float(scaled.std()) == pytest.approx(1, abs=0.01)


def test_gelu_has_two_forms():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    tanh, erf = (
        agc_torch.nfnet("tiny", activation=name).activation(x) for name in ("gelu", "gelu_erf")
    )
    torch.testing.assert_close(erf, 1.7015043497085571 * 0.5 * x * (1 + torch.erf(x / 2**0.5)))
    assert 1e-5 < float((tanh - erf).abs().max()) < 1e-3


def test_options_change_the_outputs():
    images, _ = batch(2, 32)
    with torch.no_grad():
        base = seeded()(images)
        for options in ({"activation": "gelu_erf"}, {"ws_eps": "timm"}, {"activation": "relu"}):
            assert 1e-5 < relative(seeded(**options)(images), base) < 2
        gray = seeded(in_channels=1, num_classes=7)
        assert gray(batch(2, 32, channels=1)[0]).shape == (2, 7)


def test_dropout():
    model = seeded(stochastic_depth=0, dropout=0.4).train()
    images, _ = batch(1, 32)
    given: list[Tensor] = []
    model.head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    torch.manual_seed(0)
    with torch.no_grad():
        model(images.expand(200, 3, 32, 32))
        pooled = model.features(images)["pooled"]
    kept = given[0] != 0
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.02)
    torch.testing.assert_close(given[0][kept], (pooled / 0.6).expand_as(kept)[kept])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), seeded()(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stochastic_depth_is_drawn_for_each_image_and_not_rescaled(dtype):
    model = seeded(stochastic_depth=0.5, dtype=dtype)
    block = model.stages[3][2]
    assert block.drop_rate == pytest.approx(0.5 * 11 / 12)
    x = torch.randn(1, 96, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        kept = block.eval()(x)[0]
        torch.manual_seed(0)
        rows = block.train()(x.expand(1000, 96, 2, 2))
    dropped = [torch.equal(row, x[0]) for row in rows]
    assert sum(dropped) / 1000 == pytest.approx(0.5 * 11 / 12, abs=0.05)
    for row, is_dropped in zip(rows, dropped, strict=True):
        if not is_dropped:  # a batch may be added up in another order than one image
            torch.testing.assert_close(row, kept)
    assert model.stages[0][0].drop_rate == 0


def test_rates_of_stochastic_depth():
    for variant in ("tiny", "F1"):
        model = agc_torch.nfnet(variant, device="meta")
        rates = [m.drop_rate for m in model.modules() if isinstance(m, NFBlock)]
        np.testing.assert_allclose(rates, [0.25 * i / len(rates) for i in range(len(rates))])


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("F8", {}, "unknown NFNet variant 'F8'; the variants are F0, F1, "),
        ("tiny", {"num_classes": -1}, "num_classes must be"),
        ("tiny", {"activation": "swish"}, "unknown activation 'swish'"),
    ],
)
def test_bad_options(variant, options, message):
    with pytest.raises(ConfigError, match=message):
        agc_torch.nfnet(variant, **options)


@pytest.mark.parametrize("method", ["forward", "features", "signals"])
def test_bad_images(method):
    run = getattr(agc_torch.nfnet("tiny"), method)
    with pytest.raises(ShapeError, match=r"\(n, 3, height, width\), got \(2, 32, 32, 3\); permute"):
        run(torch.zeros(2, 32, 32, 3))
    for shape in ((32, 32, 3), ()):
        with pytest.raises(ShapeError, match=rf"got {re.escape(str(shape))}; nfnet"):
            run(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"got \(2, 1, 32, 32\); nfnet\(\.\.\., in_channels="):
        run(torch.zeros(2, 1, 32, 32))
    with pytest.raises(DTypeError, match=r"got torch\.uint8; convert them"):
        run(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


# Parameters


@pytest.mark.parametrize("variant", core.VARIANTS)
def test_parameters_have_the_canonical_names(variant):
    model = agc_torch.nfnet(variant, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {
        spec.name: (*reversed(spec.shape[-2:]), *spec.shape[:-2])
        for spec in core.parameters(variant)
    }


def test_factory_arguments():
    model = agc_torch.nfnet("tiny", 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = model.to_empty(device="cpu").float()
    torch.manual_seed(3)
    model.reset_parameters()
    torch.manual_seed(3)
    expected = agc_torch.nfnet("tiny", 4).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_initial_values():
    torch.manual_seed(0)
    model = agc_torch.nfnet("F0")
    values = dict(model.named_parameters())
    normal, truncated = [], []
    for spec in core.parameters("F0"):
        value = values[spec.name].detach()
        match spec.kind:
            case "conv":
                normal.append(value.flatten() * spec.fan_in**0.5)
            case "se":
                truncated.append(value.flatten() * spec.fan_in**0.5)
            case "head":
                assert float(value.std()) == pytest.approx(0.01, rel=0.01)
            case kind:
                assert bool((value == (1 if kind == "gain" else 0)).all())
    assert float(torch.cat(normal).std()) == pytest.approx(1, rel=1e-3)
    assert float(torch.cat(normal).abs().max()) > 4  # not truncated
    assert float(torch.cat(truncated).std()) == pytest.approx(0.8796, rel=1e-3)
    assert float(torch.cat(truncated).abs().max()) <= 2 + 1e-5


def test_identity_at_the_start():
    """With skip gains of 0, a block without projection returns what it is given."""
    model = agc_torch.nfnet("tiny").eval()
    x = torch.randn(2, 96, 4, 4)
    assert torch.equal(model.stages[2][1](x), x)


@pytest.mark.parametrize("seed", [0, 1])
def test_signals_at_the_start(seed):
    torch.manual_seed(seed)
    model = agc_torch.nfnet("tiny")
    signals = model.signals(torch.randn(16, 3, 64, 64))
    expected = [0.916, 0.917, *2 * [0.217], *6 * [0.044], *3 * [0.007]]
    np.testing.assert_allclose(signals["avg_var"], expected, rtol=0.25)
    assert float(signals["avg_sq_mean"].max()) < 0.01
    assert signals["res_avg_var"].shape == (12,)


def test_plan():
    model = agc_torch.nfnet("tiny")
    plan = agc_torch.plan(model, AGC.profile("deepmind"))
    assert plan.count == 4855
    assert [entry.name for entry in plan if not entry.clipped] == ["head.weight"]
    neutral = {
        spec.name: (spec.units.bind(spec.shape).count, 0.01, not spec.clipped)
        for spec in core.parameters("tiny")
    }
    assert plan.decisions() == neutral
    assert agc_torch.plan(model, AGC(exclude=["@head.weight"])).decisions() == neutral
    paper = agc_torch.plan(model, AGC.profile("paper"))
    assert [entry.name for entry in paper if entry.excluded] == ["head.weight", "head.bias"]


# Uses


def test_features():
    model = seeded()
    images, _ = batch(2, 64)
    with torch.no_grad():
        features = model.features(images)
        torch.testing.assert_close(model.head(features["pooled"]), model(images), rtol=0, atol=0)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "stem": (2, 16, 16, 16),
        "stages.0": (2, 32, 16, 16),
        "stages.1": (2, 64, 8, 8),
        "stages.2": (2, 96, 4, 4),
        "stages.3": (2, 96, 2, 2),
        "final_conv": (2, 192, 2, 2),
        "pooled": (2, 192),
    }
    signals = model.signals(images)["avg_var"]
    after = features["stages.2"].var((0, 2, 3), unbiased=False).mean()
    torch.testing.assert_close(signals[9], after)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_fold(dtype, limit):
    model = seeded(dtype=dtype)
    folded = model.train().fold()
    model.eval()
    images, _ = batch(2, 33, 40, dtype=dtype)
    with torch.no_grad():
        close(folded(images), model(images), limit.logits)
    kinds = {type(m) for m in folded.modules()}
    assert SameConv2d in kinds
    assert WSConv2d not in kinds
    assert not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert {*model.state_dict()} - {*folded.state_dict()} == {
        spec.name for spec in core.parameters("tiny") if spec.kind == "gain"
    }
    before = folded(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(folded(images), before)  # nothing is shared


def test_state_dict_round_trip(tmp_path):
    model = seeded(dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = agc_torch.nfnet("tiny")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    values: Mapping[str, Tensor] = other.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# What PyTorch itself warns of while it compiles.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("backend", "variant"), [("aot_eager", "tiny"), ("inductor", SHALLOW)])
def test_compile(backend, variant):
    torch.compiler.reset()
    images, labels = batch(2, 32, dtype=torch.float32)
    eager = loss_and_gradients(seeded(variant, torch.float32), images, labels)
    model = torch.compile(seeded(variant, torch.float32), backend=backend, fullgraph=True)
    found = loss_and_gradients(model, images, labels)
    close(found[0], eager[0], SINGLE.logits)
    for name, gradient in eager[2].items():
        assert relative(found[2][f"_orig_mod.{name}"], gradient) <= SINGLE.skip_gain
    plan = agc_torch.plan(model, AGC.profile("deepmind"))
    assert plan == agc_torch.plan(seeded(variant), AGC.profile("deepmind"))
    torch.compiler.reset()


@pytest.mark.parametrize("folded", [False, True])
def test_export(folded):
    model = seeded(dtype=torch.float32)
    images, _ = batch(3, 32, dtype=torch.float32)
    shapes = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    given = model.fold() if folded else model
    program = torch.export.export(given, (images,), dynamic_shapes=shapes)
    run = program.module()
    with torch.no_grad():
        for count in (3, 1):
            close(run(images[:count]), model(images[:count]), SINGLE.logits)


def test_softplus_is_exact_for_large_inputs():
    model = agc_torch.nfnet("tiny", activation="softplus", dtype=torch.float64)
    x = torch.tensor([-30.0, -1.0, 0.5, 21.0, 40.0], dtype=torch.float64)
    want = np.logaddexp(0, x.numpy()) * core.GAMMAS["softplus"]
    np.testing.assert_allclose(model.activation(x.clone()), want, rtol=1e-15)


def test_stochastic_depth_is_drawn_in_float32():
    block = agc_torch.nfnet("tiny", stochastic_depth=0.9).stages[3][2]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in which 1 - rate + uniform is off by up to 1/256
    try:
        torch.manual_seed(0)
        drawn = block.kept(torch.empty(20_000, 1, 1, 1, dtype=torch.float64))
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    want = torch.floor(1 - block.drop_rate + torch.rand(20_000, 1, 1, 1))
    assert torch.equal(drawn, want.double())
