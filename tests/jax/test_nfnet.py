"""The model against DeepMind's golden values, and what a Flax user expects of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.test_util import check_grads

import agc_jax
from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, DTypeError, ShapeError
from agc.reference.nfnet import NFNet
from agc_conformance.nfnets.golden import GOLDEN, LIMITS, SMOOTHING
from agc_jax.nfnet import NFBlock, SameConv2d, WSConv2d

pytestmark = pytest.mark.usefixtures("quick")

EXACT, SINGLE = LIMITS["float64"], LIMITS["float32"]


SHALLOW = core.Variant(  # quick to compile: one block for each stage of tiny
    "shallow", (1, 1, 1, 1), 0.0, 32, 32, (32, 64, 96, 96), 8, 10
)


@pytest.fixture(autouse=True)
def double_precision():
    """All of this is compared in float64; arrays of other dtypes keep theirs."""
    with jax.enable_x64(True):
        yield


@cache
def drawn(variant: Any, classes: int, channels: int) -> Mapping[str, Any]:
    return core.seeded_parameters(variant, classes, channels)


def abstract(variant: Any, *arguments: Any, **options: Any) -> Any:
    """A model of shapes."""
    return nnx.eval_shape(lambda: agc_jax.nfnet(variant, *arguments, rngs=nnx.Rngs(0), **options))


def blank(leaf: Any) -> jax.Array:
    """What is quicker to make than initial values."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))


def seeded(variant: Any = "tiny", param_dtype: Any = jnp.float64, **options: Any) -> Any:
    """A model in evaluation mode with the parameters that every framework can make."""
    graph, state = nnx.split(abstract(variant, param_dtype=param_dtype, **options))
    model = nnx.merge(graph, jax.tree.map(blank, state))
    model.eval()
    found = model.options
    agc_jax.from_neutral(model, drawn(variant, found.num_classes, found.in_channels))
    return model


def batch(*sizes: int, dtype: Any = jnp.float64, **options: int) -> tuple[jax.Array, jax.Array]:
    images, labels = core.seeded_batch(*sizes, **options)
    return jnp.asarray(images, dtype), jnp.asarray(labels)


def loss_and_logits(model: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    logits = model(images)
    wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(wanted, SMOOTHING)).mean()
    return loss, logits


run = nnx.jit(lambda model, images: model(images))
signals = nnx.jit(lambda model, images: model.signals(images))


@nnx.jit
def everything(model: Any, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """Loss, logits, gradients, features and signals in one program, most of which they share."""
    derive = nnx.value_and_grad(loss_and_logits, has_aux=True)
    (loss, logits), gradients = derive(model, images, labels)
    return {
        "loss": loss,
        "logits": logits,
        "gradients": gradients,
        "features": model.features(images),
        "signals": model.signals(images),
    }


def values_of(tree: Any) -> dict[str, jax.Array]:
    """Arrays of a model or of an ``nnx.State``, by name."""
    state = nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


@cache
def exact(variant: str) -> dict[str, Any]:
    golden = GOLDEN[variant]
    before = jax.config.read("jax_disable_most_optimizations")
    if variant == "F0":  # takes longer to run than to compile
        jax.config.update("jax_disable_most_optimizations", False)
    with jax.enable_x64(True):
        found = everything(seeded(variant), *batch(golden.batch, golden.pixels))
    jax.config.update("jax_disable_most_optimizations", before)
    return {**found, "gradients": values_of(found["gradients"])}


def norm(arrays: Any) -> float:
    return math.sqrt(sum(float(jnp.square(array).sum()) for array in arrays))


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def close(found: Any, expected: Any, limit: float) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() <= limit


# Golden values


@pytest.mark.parametrize("variant", GOLDEN)
def test_golden_values(variant, check_golden):
    found = exact(variant)
    check_golden(
        variant,
        logits=np.asarray(found["logits"]),
        loss=float(found["loss"]),
        pooled=found["features"]["pooled"],
        signals=found["signals"],
        gradients=found["gradients"],
        parameters=drawn(variant, len(found["logits"][0]), 3),
    )


def test_single_precision(check_single):
    expected = exact("tiny")
    images, labels = batch(2, 32, dtype=jnp.float32)
    found = everything(seeded(param_dtype=jnp.float32), images, labels)
    gradients = values_of(found["gradients"])
    assert found["logits"].dtype == gradients["stem.conv0.gain"].dtype == jnp.float32
    check_single(
        (found["logits"], float(found["loss"]), gradients),
        (expected["logits"], expected["loss"], expected["gradients"]),
    )


def test_bfloat16():
    limit, expected = LIMITS["bfloat16"], exact("tiny")
    images, labels = batch(2, 32)

    whole = seeded(param_dtype=jnp.bfloat16)
    logits = run(whole, images.astype(jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    close(logits, expected["logits"], limit.logits)
    wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)
    loss = optax.softmax_cross_entropy(logits.astype(jnp.float32), wanted).mean()
    assert abs(float(loss) - float(expected["loss"])) < limit.loss

    mixed = seeded(param_dtype=jnp.float32, dtype=jnp.bfloat16)
    close(run(mixed, images), expected["logits"], limit.logits)

    for model, stored in ((whole, jnp.bfloat16), (mixed, jnp.float32)):
        given = images.astype(stored)
        found = jax.eval_shape(lambda m, x=given: everything(m, x, labels), model)
        assert {leaf.dtype for leaf in found["features"].values()} == {jnp.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in found["signals"].values()} == {jnp.dtype(jnp.float32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(found["gradients"])} == {jnp.dtype(stored)}
        convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, WSConv2d)]
        weights = [nnx.eval_shape(lambda conv: conv.standardised(), conv) for conv in convs[:3]]
        assert {weight.dtype for weight in weights} == {jnp.dtype(stored)}


def test_the_dtype_is_that_of_images_and_parameters():
    def computed(images: Any, **options: Any) -> Any:
        model = abstract(SHALLOW, **options)
        shape = jax.ShapeDtypeStruct((1, 8, 8, 3), images)
        return nnx.eval_shape(lambda model, x: model(x), model, shape).dtype

    assert computed(jnp.float32) == jnp.float32
    assert computed(jnp.bfloat16) == jnp.float32
    assert computed(jnp.float64) == jnp.float64
    assert computed(jnp.float32, dtype=jnp.bfloat16) == jnp.bfloat16
    assert computed(jnp.float32, param_dtype=jnp.bfloat16) == jnp.float32
    assert computed(jnp.bfloat16, param_dtype=jnp.bfloat16) == jnp.bfloat16


@pytest.mark.parametrize(
    ("variant", "images", "height", "width"),
    [("tiny", 2, 45, 38), (SHALLOW, 1, 50, 33), (SHALLOW, 1, 64, 64), (SHALLOW, 3, 7, 1)],
)
def test_sizes(variant, images, height, width):
    """Odd and even, where padding and pooling differ from other frameworks' own, and one image alone."""
    model = seeded(variant)
    x, _ = batch(images, height, width)
    exact = NFNet(variant, agc_jax.to_neutral(model))(np.asarray(x))
    close(run(model, x), exact.logits, EXACT.logits)


# Weight standardisation


def random(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.float64)


def conv_and_images(**changes: Any) -> tuple[Any, jax.Array]:
    sizes = {"inputs": 6, "outputs": 8, "kernel": 3, "stride": 2, "groups": 2, **changes}
    conv = WSConv2d(core.Conv("conv", **sizes), "deepmind", jnp.float64)
    for number, leaf in enumerate((conv.weight, conv.gain, conv.bias)):
        leaf[...] = random(number, *leaf.shape) + 0.3
    return conv, random(9, 2, 9, 12, sizes["inputs"])


def test_filters_have_mean_0_and_the_norm_of_their_gain():
    conv, _ = conv_and_images()
    weight = conv.standardised()
    np.testing.assert_allclose(weight.mean((0, 1, 2)), np.zeros(8), atol=1e-15)
    norms = jnp.sqrt(jnp.square(weight).sum((0, 1, 2)))
    np.testing.assert_allclose(norms, jnp.abs(conv.gain[...]), rtol=1e-12)


def test_epsilon_is_a_floor():
    conv, _ = conv_and_images()
    weight = 1e-5 * conv.weight[...]
    conv.weight[...] = weight = weight.at[..., 0].set(3.0)  # no variance at all
    centred, gain = weight - weight.mean((0, 1, 2)), conv.gain[...]
    np.testing.assert_allclose(conv.standardised(), 100 * gain * centred, rtol=1e-12)
    conv.ws_eps = "timm"
    expected = gain * centred / jnp.sqrt(27 * (weight.var((0, 1, 2)) + 1e-5))
    np.testing.assert_allclose(conv.standardised(), expected, rtol=1e-12)


@pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
def test_gradients_of_the_convolution(ws_eps):
    conv, images = conv_and_images()
    conv.ws_eps = ws_eps
    conv.weight[...] = conv.weight[...].at[..., 1].multiply(1e-4)  # below the floor
    graph, state = nnx.split(conv)
    check_grads(
        lambda state: nnx.merge(graph, state)(images), (state,), 2, ["rev"], 1e-3, 1e-3, 1e-7
    )


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 2), (3, 7), (2, 8)])
def test_grouped_convolutions_with_stride(groups, size):
    conv, _ = conv_and_images(outputs=6, groups=groups)
    images = random(5, 1, size, size + 1, 6)
    weight = conv.standardised()
    rows = (0 if size % 2 == 0 else 1, 1)  # an even axis is padded at its end only
    columns = (0 if (size + 1) % 2 == 0 else 1, 1)
    names = ("NHWC", "HWIO", "NHWC")
    parts = [
        lax.conv_general_dilated(x, w, (2, 2), (rows, columns), dimension_numbers=names)
        for x, w in zip(jnp.split(images, groups, 3), jnp.split(weight, groups, 3), strict=True)
    ]
    expected = jnp.concatenate(parts, -1) + conv.bias[...]
    assert expected.shape[1:3] == (math.ceil(size / 2), math.ceil((size + 1) / 2))
    np.testing.assert_allclose(conv(images), expected, rtol=1e-12, atol=1e-14)


def test_half_precision_is_standardised_in_single():
    conv, _ = conv_and_images()
    wide = WSConv2d(conv.conv, "deepmind")
    for name in ("weight", "gain", "bias"):
        half = getattr(conv, name)[...].astype(jnp.bfloat16)
        setattr(conv, name, nnx.Param(half))
        setattr(wide, name, nnx.Param(half.astype(jnp.float32)))
    assert conv.standardised().dtype == jnp.bfloat16
    assert jnp.array_equal(conv.standardised(), wide.standardised().astype(jnp.bfloat16))


# The options


@pytest.mark.parametrize("activation", core.GAMMAS)
def test_activations_keep_the_variance(activation):
    noise = random(0, 200_000)
    scaled = abstract("tiny", activation=activation).activation(noise)
    assert float(scaled.std()) == pytest.approx(1, abs=0.01)


def test_gelu_has_two_forms():
    x = jnp.linspace(-3, 3, 13)
    tanh, erf = (abstract("tiny", activation=name).activation(x) for name in ("gelu", "gelu_erf"))
    expected = 1.7015043497085571 * 0.5 * x * (1 + lax.erf(x / 2**0.5))
    np.testing.assert_allclose(erf, expected, rtol=1e-12)
    assert 1e-5 < float(jnp.abs(tanh - erf).max()) < 1e-3


def test_options_change_the_outputs():
    images, _ = batch(1, 50, 33)
    base = run(seeded(SHALLOW), images)
    for options in ({"activation": "gelu_erf"}, {"ws_eps": "timm"}, {"activation": "relu"}):
        assert 1e-5 < relative(run(seeded(SHALLOW, **options), images), base) < 2
    gray = abstract("tiny", in_channels=1, num_classes=7)
    found = nnx.eval_shape(lambda model, x: model(x), gray, jnp.zeros((2, 32, 32, 1)))
    assert found.shape == (2, 7)


def test_dropout():
    model = seeded(SHALLOW, stochastic_depth=0, dropout=0.4)
    model.head.weight = nnx.Param(jnp.eye(192))  # shows what the classifier is given
    model.head.bias = nnx.Param(jnp.zeros(192))
    image, _ = batch(1, 16)
    images = jnp.broadcast_to(image, (200, 16, 16, 3))
    pooled = run(model, images)
    model.train()
    found = run(model, images)
    kept = found != 0
    assert float(kept.mean()) == pytest.approx(0.6, abs=0.02)
    np.testing.assert_allclose(found[kept], pooled[kept] / 0.6, rtol=1e-9)
    assert not jnp.array_equal(run(model, images), found)  # other numbers in every call
    still = nnx.jit(lambda model, x: model(x, deterministic=True))(model, images)
    assert jnp.array_equal(still, pooled)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_stochastic_depth_is_drawn_for_each_image_and_not_rescaled(dtype):
    block = seeded(SHALLOW, dtype, stochastic_depth=0.5).stages[3][0]
    assert block.drop_rate == pytest.approx(0.5 * 3 / 4)
    x = random(0, 1, 2, 2, 96).astype(dtype)
    call = nnx.jit(lambda block, x: block(x))
    kept = call(block, x)[0]
    off = call(nnx.view(block, deterministic=False), x[:0])
    assert off.shape == (0, 1, 1, 96)
    _, shortcut = nnx.jit(lambda block, x: block.branches(x))(block, x)
    block.train()
    rows = call(block, jnp.broadcast_to(x, (1000, 2, 2, 96)))
    assert rows.dtype == dtype
    rows, shortcut, kept = (np.asarray(a, np.float64) for a in (rows, shortcut, kept))
    distance = [[np.abs(row - to).max() for to in (shortcut[0], kept)] for row in rows[:50]]
    limit = 1e-12 if dtype == jnp.float64 else 0.05
    assert all(min(pair) <= limit < max(pair) for pair in distance)
    dropped = np.abs(rows - shortcut).max((1, 2, 3)) <= limit
    assert float(dropped.mean()) == pytest.approx(0.5 * 3 / 4, abs=0.05)


def test_rates_of_stochastic_depth():
    for variant in ("tiny", "F1"):
        model = abstract(variant)
        found = [m for _, m in nnx.iter_modules(model) if isinstance(m, NFBlock)]
        rates = {m.block.index: m.drop_rate for m in found}
        assert rates == pytest.approx({i: 0.25 * i / len(found) for i in range(len(found))})


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
        agc_jax.nfnet(variant, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("method", ["__call__", "features", "signals"])
def test_bad_images(method):
    call = getattr(abstract("tiny"), method)
    message = r"\(n, height, width, 3\), got \(2, 3, 32, 32\); transpose"
    with pytest.raises(ShapeError, match=message):
        call(jnp.zeros((2, 3, 32, 32)))
    with pytest.raises(ShapeError, match=r"got \(2, 32, 32, 1\); nfnet\(\.\.\., in_channels="):
        call(jnp.zeros((2, 32, 32, 1)))
    with pytest.raises(DTypeError, match=r"got uint8; convert them"):
        call(jnp.zeros((2, 32, 32, 3), jnp.uint8))


# Parameters


@pytest.mark.parametrize("variant", core.VARIANTS)
def test_parameters_have_the_canonical_names(variant):
    found = agc_jax.units(abstract(variant))
    shapes = {name: found.shape(name) for name in found}
    assert shapes == {spec.name: spec.shape for spec in core.parameters(variant)}


def test_parameters_are_drawn_anew():
    model = agc_jax.nfnet(SHALLOW, 4, rngs=nnx.Rngs(2), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in values_of(model).values()} == {jnp.dtype(jnp.bfloat16)}
    model.reset_parameters(nnx.Rngs(3))
    before = values_of(model)
    model.reset_parameters(nnx.Rngs(3))
    again = values_of(model)
    assert all(np.array_equal(again[name], value) for name, value in before.items())
    model.reset_parameters(nnx.Rngs(4))
    again = values_of(model)
    weights = {spec.name for spec in core.parameters(SHALLOW) if len(spec.shape) > 1}
    assert {n for n, v in before.items() if not np.array_equal(again[n], v)} == weights


def test_initial_values():
    values = values_of(agc_jax.nfnet("tiny", rngs=nnx.Rngs(0)))
    normal, truncated = [], []
    for spec in core.parameters("tiny"):
        value = np.asarray(values[spec.name])
        match spec.kind:
            case "conv":
                normal.append(value.flatten() * spec.fan_in**0.5)
            case "se":
                truncated.append(value.flatten() * spec.fan_in**0.5)
            case "head":
                assert value.std() == pytest.approx(0.01, rel=0.05)
            case kind:
                assert (value == (1 if kind == "gain" else 0)).all()
    for array in normal:
        assert array.std() == pytest.approx(1, abs=4 / array.size**0.5)
    assert np.concatenate(normal).std() == pytest.approx(1, rel=5e-3)
    assert np.abs(np.concatenate(normal)).max() > 4  # not truncated
    assert np.concatenate(truncated).std() == pytest.approx(0.8796, rel=5e-3)
    assert np.abs(np.concatenate(truncated)).max() <= 2 + 1e-5
    firsts = {float(array[0]) for array in normal + truncated}
    assert len(firsts) == len(normal) + len(truncated)  # each tensor has its own numbers


def test_identity_at_the_start():
    """With skip gains of 0, a block without projection returns what it is given."""
    model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    model.eval()
    x = random(0, 2, 4, 4, 96).astype(jnp.float32)
    assert jnp.array_equal(model.stages[2][1](x), x)


def test_signals_at_the_start():
    expected = [0.916, 0.917, *2 * [0.217], *6 * [0.044], *3 * [0.007]]
    for seed in (0, 1):
        model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(seed))
        images = random(seed, 16, 64, 64, 3).astype(jnp.float32)
        found = signals(model, images)
        np.testing.assert_allclose(found["avg_var"], expected, rtol=0.25)
        assert float(found["avg_sq_mean"].max()) < 0.01
        assert found["res_avg_var"].shape == (12,)


def test_plan():
    model = agc_jax.nfnet("tiny", rngs=nnx.Rngs(0))
    plan = agc_jax.plan(model, AGC.profile("deepmind"))
    assert plan.count == 4855
    assert [entry.name for entry in plan if not entry.clipped] == ["head.weight"]
    neutral = {
        spec.name: (spec.units.bind(spec.shape).count, 0.01, not spec.clipped)
        for spec in core.parameters("tiny")
    }
    assert plan.decisions() == neutral
    assert agc_jax.plan(abstract("tiny"), AGC.profile("deepmind")).decisions() == neutral
    assert agc_jax.plan(model, AGC(exclude=["@head.weight"])).decisions() == neutral
    paper = agc_jax.plan(model, AGC.profile("paper"))
    assert {entry.name for entry in paper if entry.excluded} == {"head.weight", "head.bias"}


# Uses


def test_features():
    found = exact("tiny")
    shapes = {name: value.shape for name, value in found["features"].items()}
    assert shapes == {
        "stem": (2, 8, 8, 16),
        "stages.0": (2, 8, 8, 32),
        "stages.1": (2, 4, 4, 64),
        "stages.2": (2, 2, 2, 96),
        "stages.3": (2, 1, 1, 96),
        "final_conv": (2, 1, 1, 192),
        "pooled": (2, 192),
    }
    close(seeded().head(found["features"]["pooled"]), found["logits"], EXACT.logits)
    after = found["features"]["stages.2"].var((0, 1, 2)).mean()
    np.testing.assert_allclose(found["signals"]["avg_var"][9], after)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float64, EXACT), (jnp.float32, SINGLE)])
def test_fold(dtype, limit):
    model = seeded(SHALLOW, dtype)
    model.train()
    folded = model.fold()
    images, _ = batch(1, 50, 33, dtype=dtype)
    before = run(folded, images)
    assert not model.stages[0][0].deterministic
    model.eval()
    close(before, run(model, images), limit.logits)
    kinds = {type(m) for _, m in nnx.iter_modules(folded)}
    assert SameConv2d in kinds
    assert WSConv2d not in kinds
    gains = {spec.name for spec in core.parameters(SHALLOW) if spec.kind == "gain"}
    assert values_of(model).keys() - values_of(folded).keys() == gains
    nnx.update(model, jax.tree.map(blank, nnx.state(model, nnx.Param)))
    assert np.array_equal(run(folded, images), before)  # nothing is shared


def test_states():
    """What plain JAX sees: a tree, which goes through ``jax.jit`` and into another model."""
    model = seeded(SHALLOW)
    images, _ = batch(1, 50, 33)
    graph, state = nnx.split(model)
    merged = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    assert np.array_equal(merged, run(model, images))
    other = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    nnx.update(other, jax.tree.map(blank, nnx.state(other, nnx.Param)))
    nnx.update(other, nnx.state(model, nnx.Param))
    values = values_of(other)
    assert all(np.array_equal(values[name], value) for name, value in values_of(model).items())


@pytest.mark.parametrize("folded", [False, True])
def test_export(folded):
    """A program for any number of images, with its weights inside."""
    model = seeded(SHALLOW, jnp.float32)
    images, _ = batch(2, 50, 33, dtype=jnp.float32)
    given = model.fold() if folded else model
    shape = jax.export.symbolic_shape("n, 50, 33, 3")
    program = jax.export.export(jax.jit(given))(jax.ShapeDtypeStruct(shape, jnp.float32))
    loaded = jax.export.deserialize(program.serialize())
    for count in (1, 2):
        expected = run(model, images[:count])
        close(jax.jit(loaded.call)(images[:count]), expected, SINGLE.logits)


def test_linen():
    """The bridge of Flax makes a Linen module of it, with parameters of the same names."""
    linen = nnx.bridge.to_linen(agc_jax.nfnet, SHALLOW, dropout=0.5, param_dtype=jnp.float64)
    images, _ = batch(1, 50, 33)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda keys: linen.init(keys, images, deterministic=True), keys)
    assert set(shapes) == {"params"}

    model = seeded(SHALLOW)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(params) == jax.tree.structure(shapes["params"])
    apply = jax.jit(linen.apply, static_argnames="deterministic")
    found = apply({"params": params}, images, deterministic=True)
    close(found, run(model, images), EXACT.logits)
    first, second = (
        apply({"params": params}, images, deterministic=False, rngs={"dropout": jax.random.key(k)})
        for k in range(2)
    )
    assert relative(first, second) > 1e-3

    tx = agc_jax.sgd_nfnet(abstract(SHALLOW), 0.1)
    state = tx.init(params)
    gradients = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    plan = agc_jax.plan(model, AGC.profile("deepmind"))
    assert int(agc_jax.stats(state).units) == plan.count
    assert jax.tree.structure(updates) == jax.tree.structure(params)

    nnx.update(model, jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params))  # and back
    values = values_of(model)
    assert all(
        np.array_equal(values[name], np.asarray(value) + 1)
        for name, value in values_of(seeded(SHALLOW)).items()
    )
