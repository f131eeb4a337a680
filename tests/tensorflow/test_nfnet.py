"""The model against DeepMind's golden values, and what a Keras user expects of a model."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc import nfnet as core
from agc.errors import ConfigError, DTypeError, ShapeError
from agc.reference.nfnet import NFNet
from agc_conformance.nfnets.golden import GOLDEN, LIMITS, SMOOTHING
from agc_tensorflow.nfnet import Activation, SameConv2D, WSConv2D
from agc_tensorflow.units import named_variables

EXACT, SINGLE = LIMITS["float64"], LIMITS["float32"]
Array = npt.NDArray[Any]

SHALLOW = core.Variant("shallow", (1, 2), 0.0, 32, 32, (16, 32), 8, 10)  # quick to compile
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


def seeded(variant: Any = "tiny", dtype: Any = "float64", **options: Any) -> Any:
    """A model with the parameters that every framework can make."""
    model = agc_tensorflow.nfnet(variant, dtype=dtype, **options)
    classes, channels = model.options.num_classes, model.options.in_channels
    agc_tensorflow.from_neutral(model, core.seeded_parameters(variant, classes, channels))
    return model


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The seeded ``tiny`` in float64, for tests that leave it as it is."""
    return seeded()


def batch(*sizes: int, dtype: str = "float64", **options: int) -> tuple[Array, Array]:
    images, labels = core.seeded_batch(*sizes, **options)
    return images.astype(dtype), labels


def smooth_loss(labels: Array, logits: tf.Tensor) -> tf.Tensor:
    classes = logits.shape[1]
    one_hot = tf.one_hot(labels, classes, dtype=logits.dtype)
    smoothed = (1 - SMOOTHING) * one_hot + SMOOTHING / classes
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(smoothed, logits))


def loss_and_gradients(
    model: Any, images: Array, labels: Array, mode: str = "eager"
) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
    named = named_variables(model)

    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            logits = model(images)
            loss = smooth_loss(labels, logits)
        return logits, loss, tape.gradient(loss, [v.value for v in named.values()])

    logits, loss, gradients = WRAPPERS[mode](run)(tf.constant(images))
    return logits, loss, dict(zip(named, gradients, strict=True))


def norm(tensors: Any) -> float:
    squares = [np.square(np.asarray(tensor, "float64")).sum() for tensor in tensors]
    return math.sqrt(sum(squares))


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def close(found: Any, expected: Any, limit: float) -> None:
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max() / np.abs(expected).max()) <= limit


def test_close_notices_an_error():
    with pytest.raises(AssertionError):
        close([1.0, 2.0], [1.0, 2.001], 1e-4)


# Golden values


@pytest.mark.parametrize("variant", GOLDEN)
def test_golden_values(variant, check_golden):
    model = seeded(variant)
    images, labels = batch(GOLDEN[variant].batch, GOLDEN[variant].pixels)
    logits, loss, gradients = loss_and_gradients(model, images, labels)
    check_golden(
        variant,
        logits=logits.numpy(),
        loss=float(loss),
        pooled=model.features(images)["pooled"],
        signals={name: value.numpy() for name, value in model.signals(images).items()},
        gradients=gradients,
        parameters=agc_tensorflow.to_neutral(model),
    )


@pytest.fixture(scope="module")
def exact(tiny: Any) -> Any:
    """Logits, loss and gradients of ``tiny`` in float64, which the golden values hold for."""
    return loss_and_gradients(tiny, *batch(2, 32))


@pytest.mark.parametrize("mode", WRAPPERS)
def test_single_precision(mode, exact, check_single):
    images, labels = batch(2, 32, dtype="float32")
    model = seeded(dtype="float32")
    assert len(named_variables(model)) == len(exact[2]) == 233
    logits, loss, gradients = loss_and_gradients(model, images, labels, mode)
    check_single((logits, float(loss), gradients), exact)


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_double_precision_in_graphs(mode):
    images, labels = batch(2, 19, 24)
    model = seeded(SHALLOW)
    eager = loss_and_gradients(model, images, labels)
    found = loss_and_gradients(model, images, labels, mode)
    close(found[0], eager[0], EXACT.logits)
    for name, gradient in eager[2].items():
        assert relative(found[2][name], gradient) <= EXACT.skip_gain


def test_bfloat16(exact):
    images, labels = batch(2, 32, dtype="float32")
    limit = LIMITS["bfloat16"]

    logits, _, gradients = loss_and_gradients(seeded(dtype="bfloat16"), images, labels)
    assert logits.dtype == gradients["stem.conv0.gain"].dtype == tf.bfloat16
    close(logits, exact[0], limit.logits)
    assert abs(float(smooth_loss(labels, tf.cast(logits, "float32"))) - float(exact[1])) < (
        limit.loss
    )

    mixed = seeded(dtype="mixed_bfloat16")
    features = mixed.features(images)
    logits, _, gradients = loss_and_gradients(mixed, images, labels)
    weights = [m.standardised() for m in mixed._flatten_layers() if isinstance(m, WSConv2D)]
    assert {f.dtype for f in features.values()} == {logits.dtype} == {tf.bfloat16}
    assert len(weights) == 57
    assert {tensor.dtype for tensor in (*weights, *gradients.values())} == {tf.float32}
    close(logits, exact[0], limit.logits)
    errors = [relative(gradients[name], gradient) for name, gradient in exact[2].items()]
    assert statistics.median(errors) <= limit.gradient_median


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


@pytest.mark.parametrize(
    ("images", "height", "width"), [(2, 32, 38), (2, 45, 51), (1, 50, 33), (1, 64, 64), (3, 7, 1)]
)
def test_sizes(images, height, width, tiny):
    """Odd and even, where SAME padding and pooling differ from other frameworks' own, and one image alone."""
    x, _ = batch(images, height, width)
    exact = NFNet("tiny", agc_tensorflow.to_neutral(tiny))(x)
    close(tiny(x), exact.logits, EXACT.logits)


# Weight standardisation and grouped convolutions


def conv_and_images(dtype: str = "float64", **changes: Any) -> tuple[Any, tf.Tensor]:
    random = np.random.default_rng(0)
    sizes = {"inputs": 6, "outputs": 8, "kernel": 3, "stride": 2, "groups": 2, **changes}
    conv = WSConv2D(core.Conv("conv", **sizes), "deepmind", dtype=dtype)
    conv.build(None)
    for variable in conv.weights:
        variable.assign(random.standard_normal(variable.shape) + 0.3)
    return conv, tf.constant(random.standard_normal((2, 9, 12, sizes["inputs"])), dtype)


def test_filters_have_mean_0_and_the_norm_of_their_gain():
    conv, _ = conv_and_images()
    weight = conv.standardised().numpy()
    np.testing.assert_allclose(weight.mean((0, 1, 2)), np.zeros(8), atol=1e-15)
    norms = np.sqrt(np.square(weight).sum((0, 1, 2)))
    np.testing.assert_allclose(norms, np.abs(conv.gain), rtol=1e-14)


def test_epsilon_is_a_floor():
    conv, _ = conv_and_images()
    weight = 1e-5 * conv.weight.numpy()
    weight[..., 0] = 3.0  # no variance at all
    conv.weight.assign(weight)
    gain, centred = conv.gain.numpy(), weight - weight.mean((0, 1, 2))
    np.testing.assert_allclose(conv.standardised(), 100 * gain * centred, atol=1e-15)
    conv.ws_eps = "timm"
    expected = gain * centred / np.sqrt(3 * 3 * 3 * (weight.var((0, 1, 2)) + 1e-5))
    np.testing.assert_allclose(conv.standardised(), expected, atol=1e-15)


@pytest.mark.parametrize("ws_eps", ["deepmind", "timm"])
def test_gradients_of_the_convolution(ws_eps):
    conv, images = conv_and_images()
    conv.ws_eps = ws_eps
    weight = conv.weight.numpy()
    weight[..., 1] *= 1e-4  # below the floor
    conv.weight.assign(weight)
    variables = [images, *(variable.value for variable in conv.weights)]
    with tf.GradientTape() as tape:
        tape.watch(images)
        loss = tf.reduce_sum(tf.sin(conv(images)))
    gradients = tape.gradient(loss, variables)

    random = np.random.default_rng(1)
    for place, variable in enumerate(variables):
        values = variable.numpy()
        # Where weights are small, so must be the step.
        direction = np.abs(values) * random.standard_normal(values.shape)
        sums = []
        for step in (1e-6, -1e-6):
            moved = values + step * direction
            if place:
                variable.assign(moved)
            sums.append(tf.reduce_sum(tf.sin(conv(images if place else tf.constant(moved)))))
        if place:
            variable.assign(values)
        slope = float(sums[0] - sums[1]) / 2e-6
        assert slope == pytest.approx(float((gradients[place] * direction).numpy().sum()), rel=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_grouped_convolutions_with_stride(groups, size):
    conv, _ = conv_and_images(outputs=6, groups=groups)
    images = np.random.default_rng(2).standard_normal((1, size, size + 1, 6))
    expected = convolve(images, conv.standardised().numpy(), 2) + conv.bias.numpy()
    assert expected.shape[1:3] == (math.ceil(size / 2), math.ceil((size + 1) / 2))
    np.testing.assert_allclose(conv(images), expected, atol=1e-13)


@pytest.mark.parametrize("mode", WRAPPERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_gradients_of_groups_exist_on_the_cpu(dtype, mode):
    """TensorFlow's own fail in most of these cases; which ones depends on oneDNN."""

    def gradients(dtype: str, mode: str) -> Any:
        conv, images = conv_and_images(dtype)

        def run(images: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(tf.cast(conv(images), "float64")))
            return tape.gradient(loss, [variable.value for variable in conv.weights])

        return WRAPPERS[mode](run)(images)

    limit = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[dtype]
    expected = gradients("float64", "eager")
    for found, wanted in zip(gradients(dtype, mode), expected, strict=True):
        assert found.dtype == dtype
        assert relative(found, wanted) <= limit


@pytest.mark.parametrize(("mode", "expected"), [("graph", 2), ("xla", 1)])
def test_groups_are_split_only_where_they_must_be(mode, expected):
    conv, images = conv_and_images()
    graph = WRAPPERS[mode](conv.call).get_concrete_function(images).graph
    assert [op.type for op in graph.get_operations()].count("Conv2D") == expected


def test_half_precision_is_standardised_in_single():
    conv, _ = conv_and_images("bfloat16")
    other, _ = conv_and_images()
    for variable, same in zip(other.weights, conv.weights, strict=True):
        variable.assign(tf.cast(same, "float64"))
    expected = tf.cast(other.standardised(), tf.bfloat16)
    assert conv.standardised().dtype == tf.bfloat16
    np.testing.assert_array_equal(conv.standardised(), expected)


TRAINING = """
import keras
import numpy as np
import agc_tensorflow
from agc.nfnet import Variant

def train():
    keras.utils.set_random_seed(0)
    variant = Variant("shallow", (1, 2), 0.0, 32, 32, (16, 32), 8, 10)
    model = agc_tensorflow.nfnet(variant, stochastic_depth=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(agc_tensorflow.sgd_nfnet(model, 0.1), loss, jit_compile=False)
    images = np.random.RandomState(0).standard_normal((4, 32, 32, 3)).astype("float32")
    return [model.train_on_batch(images, np.arange(4)) for _ in range(3)]
"""


def test_training_with_and_without_one_dnn():
    """oneDNN is on unless the environment says otherwise, and decides which gradients TensorFlow has."""
    here: dict[str, Any] = {}
    exec(TRAINING, here)
    losses = here["train"]()
    other = "1" if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" else "0"
    run = subprocess.run(
        [sys.executable, "-c", f"{TRAINING}\nprint(*train())"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": other},
    )
    assert run.returncode == 0, run.stderr
    assert [float(loss) for loss in run.stdout.split()] == pytest.approx(losses, rel=1e-4)
    assert losses[2] < losses[0]


# The options


@pytest.mark.parametrize("activation", core.GAMMAS)
def test_activations_keep_the_variance(activation):
    noise = np.random.default_rng(0).standard_normal(200_000)
    scaled = Activation(activation)(tf.constant(noise)).numpy()
    assert scaled.std() == pytest.approx(1, abs=0.01)
    # TensorFlow's own functions may go through float32 inside.
    wide = Activation(activation)(tf.constant([0.7, -1.3], tf.float64)).numpy()
    x = np.array([0.7, -1.3])
    np.testing.assert_allclose(wide, core.GAMMAS[activation] * FORMULAS[activation](x), rtol=1e-14)


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
    "softplus": lambda x: np.log1p(np.exp(x)),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "log_sigmoid": lambda x: -np.log1p(np.exp(-x)),
    "identity": lambda x: x,
}


def test_options_change_the_outputs(tiny):
    images, _ = batch(2, 32)
    base = tiny(images)
    for options in ({"activation": "gelu_erf"}, {"ws_eps": "timm"}, {"activation": "relu"}):
        assert 1e-5 < relative(seeded(**options)(images), base) < 2
    gray = seeded(in_channels=1, num_classes=7)
    assert gray(batch(2, 32, channels=1)[0]).shape == (2, 7)


def test_dropout():
    model = seeded(stochastic_depth=0, dropout=0.4, num_classes=192)
    model.head.weight.assign(np.eye(192))  # the logits are what the classifier is given
    model.head.bias.assign(np.zeros(192))
    images, _ = batch(1, 32)
    given = model(np.repeat(images, 200, 0), training=True).numpy()
    pooled = model.features(images)["pooled"].numpy()
    kept = given != 0
    assert kept.mean() == pytest.approx(0.6, abs=0.02)
    np.testing.assert_allclose(given[kept], np.broadcast_to(pooled / 0.6, kept.shape)[kept])
    np.testing.assert_allclose(model(images), pooled, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_stochastic_depth_is_drawn_for_each_image_and_not_rescaled(dtype):
    model = seeded(stochastic_depth=0.5, dtype=dtype)
    block = model.stages[3].blocks[2]
    assert block.drop_rate == pytest.approx(0.5 * 11 / 12)
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 96))
    x = tf.cast(tf.constant(x), dtype)
    kept = block(x)[0].numpy()
    rows = block(tf.repeat(x, 1000, 0), training=True).numpy()
    dropped = [np.array_equal(row, x[0].numpy()) for row in rows]
    assert sum(dropped) / 1000 == pytest.approx(0.5 * 11 / 12, abs=0.05)
    tolerance = 1e-12 if dtype == "float64" else 2e-2
    for row, is_dropped in zip(rows, dropped, strict=True):
        if not is_dropped:  # a batch may be added up in another order than one image
            close(row, kept, tolerance)
    again = block(tf.repeat(x, 1000, 0), training=True).numpy()
    assert [np.array_equal(row, x[0].numpy()) for row in again] != dropped
    assert model.stages[0].blocks[0].drop_rate == 0


@pytest.mark.parametrize("variant", ["tiny", SHALLOW])
def test_rates_of_stochastic_depth(variant):
    model = agc_tensorflow.nfnet(variant)
    rates = [block.drop_rate for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, [0.25 * i / len(rates) for i in range(len(rates))])


def test_training_mode_reaches_the_blocks():
    model = seeded(dropout=0.0, stochastic_depth=1.0)
    images, _ = batch(2, 32)
    seeds = [block.seed for stage in model.stages for block in stage.blocks]
    assert seeds[0] is None
    before = [seed.state.numpy() for seed in seeds[1:]]
    assert relative(model(images, training=True), model(images)) > 1e-3
    after = [seed.state.numpy() for seed in seeds[1:]]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


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
        agc_tensorflow.nfnet(variant, **options)


@pytest.mark.parametrize("method", ["__call__", "features", "signals"])
def test_bad_images(method, tiny):
    run = getattr(tiny, method)
    with pytest.raises(
        ShapeError, match=r"\(n, height, width, 3\), got \(2, 3, 32, 32\); tf.transpose"
    ):
        run(np.zeros((2, 3, 32, 32)))
    with pytest.raises(ShapeError, match=r"got \(2, 32, 32, 1\); nfnet\(\.\.\., in_channels="):
        run(np.zeros((2, 32, 32, 1)))
    with pytest.raises(DTypeError, match=r"got uint8; convert them"):
        run(np.zeros((2, 32, 32, 3), "uint8"))


# Parameters


@pytest.mark.parametrize("variant", core.VARIANTS)
def test_parameters_have_the_canonical_names(variant):
    with keras.StatelessScope(initialize_variables=False):  # nothing is stored
        variables = agc_tensorflow.nfnet(variant).trainable_variables
    shapes = {v.path.split("/", 1)[1].replace("/", "."): tuple(v.shape) for v in variables}
    assert shapes == {spec.name: spec.shape for spec in core.parameters(variant)}
    assert len(variables) == len(shapes)


def test_names_are_the_same_with_the_model_and_without():
    model = agc_tensorflow.nfnet("tiny")
    for source in (model, model.trainable_variables):
        assert named_variables(source).keys() == {s.name for s in core.parameters("tiny")}


def test_initial_values():
    variant = core.Variant("wide", (1, 1), 0.0, 32, 32, (512, 1024), 256)
    model = agc_tensorflow.nfnet(variant)
    values = agc_tensorflow.to_neutral(model)
    normal, truncated = [], []
    for spec in core.parameters(variant):
        value = values[spec.name]
        match spec.kind:
            case "conv":
                normal.append(value.ravel() * spec.fan_in**0.5)
            case "se":
                truncated.append(value.ravel() * spec.fan_in**0.5)
            case "head":
                assert float(value.std()) == pytest.approx(0.01, rel=0.01)
            case kind:
                assert (value == (1 if kind == "gain" else 0)).all()
    assert np.concatenate(normal).std() == pytest.approx(1, rel=2e-3)
    assert np.abs(np.concatenate(normal)).max() > 4  # not truncated
    assert np.concatenate(truncated).std() == pytest.approx(0.8796, rel=2e-3)
    assert np.abs(np.concatenate(truncated)).max() <= 2 + 1e-5
    assert relative(agc_tensorflow.nfnet(variant).head.weight, model.head.weight) > 1


def test_identity_at_the_start():
    """With skip gains of 0, a block without projection returns what it is given."""
    model = agc_tensorflow.nfnet("tiny")
    x = tf.random.normal((2, 4, 4, 96))
    np.testing.assert_array_equal(model.stages[2].blocks[1](x), x)


@pytest.mark.parametrize("seed", [0, 1])
def test_signals_at_the_start(seed):
    keras.utils.set_random_seed(seed)
    model = agc_tensorflow.nfnet("tiny")
    signals = model.signals(tf.random.normal((16, 64, 64, 3)))
    expected = [0.916, 0.917, *2 * [0.217], *6 * [0.044], *3 * [0.007]]
    np.testing.assert_allclose(signals["avg_var"], expected, rtol=0.25)
    assert float(tf.reduce_max(signals["avg_sq_mean"])) < 0.01
    assert signals["res_avg_var"].shape == (12,)


def test_plan(tiny):
    plan = agc_tensorflow.plan(tiny, AGC.profile("deepmind"))
    assert plan.count == 4855
    assert [entry.name for entry in plan if not entry.clipped] == ["head.weight"]
    neutral = {
        spec.name: (spec.units.bind(spec.shape).count, 0.01, not spec.clipped)
        for spec in core.parameters("tiny")
    }
    assert plan.decisions() == neutral
    assert agc_tensorflow.plan(tiny, AGC(exclude=["@head.weight"])).decisions() == neutral
    paper = agc_tensorflow.plan(tiny, AGC.profile("paper"))
    assert [entry.name for entry in paper if entry.excluded] == ["head.weight", "head.bias"]


# Uses


def test_features(tiny):
    images, _ = batch(2, 64)
    features = tiny.features(images)
    np.testing.assert_array_equal(tiny.head(features["pooled"]), tiny(images))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "stem": (2, 16, 16, 16),
        "stages.0": (2, 16, 16, 32),
        "stages.1": (2, 8, 8, 64),
        "stages.2": (2, 4, 4, 96),
        "stages.3": (2, 2, 2, 96),
        "final_conv": (2, 2, 2, 192),
        "pooled": (2, 192),
    }
    signals = tiny.signals(images)["avg_var"]
    after = features["stages.2"].numpy().var((0, 1, 2)).mean()
    np.testing.assert_allclose(signals[9], after)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [("float64", 1e-12), ("float32", 1e-5), ("mixed_bfloat16", 0.0), ("bfloat16", 0.0)],
)
def test_fold(dtype, limit, tmp_path):
    model = seeded(dtype=dtype)
    folded = model.fold()
    images, _ = batch(2, 33, 40, dtype="float64" if dtype == "float64" else "float32")
    close(folded(images), model(images), limit)
    kinds = {type(layer) for layer in folded._flatten_layers()}
    assert SameConv2D in kinds
    assert WSConv2D not in kinds
    assert not folded.trainable_variables
    assert {*named_variables(model)} - {*named_variables(folded)} == {
        spec.name for spec in core.parameters("tiny") if spec.kind == "gain"
    }
    before = folded(images).numpy()
    for variable in model.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    np.testing.assert_array_equal(folded(images), before)  # nothing is shared
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    assert loaded.folded
    assert not loaded.trainable_variables
    np.testing.assert_array_equal(loaded(images), before)


def compiled(variant: Any, *, jit_compile: bool) -> Any:
    model = seeded(variant, dtype="float32", dropout=0.1)
    model.compile(
        agc_tensorflow.sgd_nfnet(model, 0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    return model


def test_compile_fit_evaluate_save_and_load(tmp_path):
    model = compiled(SHALLOW, jit_compile=False)
    images, _ = batch(10, 24, dtype="float32")
    labels = np.arange(10)
    history = model.fit(images, labels, batch_size=10, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    units = sum(entry.count for entry in model.optimizer.plan if entry.clipped)
    assert model.optimizer.stats().total().units == units
    before = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.options == model.options
    assert loaded.evaluate(images, labels, verbose=0) == pytest.approx(before, rel=1e-6)
    for found, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert loaded.optimizer.plan == model.optimizer.plan


def test_fit_compiled_by_xla():
    model = compiled(core.Variant("least", (1,), 0.0, 32, 32, (16,), 4, 10), jit_compile=True)
    images, _ = batch(10, 24, dtype="float32")
    history = model.fit(images, np.arange(10), batch_size=10, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]


def test_configuration_round_trip():
    model = agc_tensorflow.nfnet(
        SHALLOW, 7, dropout=0.3, activation="silu", ws_eps="timm", dtype="mixed_bfloat16", name="n"
    )
    other = keras.models.clone_model(model)
    assert (other.options, other.dtype_policy, other.name) == (
        model.options,
        model.dtype_policy,
        "n",
    )
    assert other.stages[0].blocks[0].conv0.dtype_policy.name == "mixed_bfloat16"


def test_in_a_functional_model(tiny):
    inputs = keras.Input((None, None, 3), dtype="float64")
    model = keras.Model(inputs, keras.layers.Softmax(dtype="float64")(tiny(inputs)))
    images, _ = batch(2, 32)
    assert model.output_shape == (None, 10)
    np.testing.assert_allclose(model(images), tf.nn.softmax(tiny(images)), rtol=1e-12)


@pytest.mark.parametrize("folded", [False, True])
def test_export(folded, tmp_path):
    model = seeded(SHALLOW, dtype="float32")
    given = model.fold() if folded else model
    given(batch(2, 16, dtype="float32")[0])  # Keras exports what has been called
    given.export(tmp_path / "saved", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved")
    for sizes in ((3, 32), (1, 20, 27)):
        images, _ = batch(*sizes, dtype="float32")
        close(served.serve(images), model(images), SINGLE.logits)
