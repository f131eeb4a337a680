"""The reference NFNet: DeepMind's numbers, and gradients that finite differences confirm."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from agc.errors import ConfigError, ParameterError, ShapeError
from agc.nfnet import (
    VARIANTS,
    Masks,
    Variant,
    blocks,
    parameters,
    seeded_batch,
    seeded_parameters,
)
from agc.reference.nfnet import NFNet, smoothed_cross_entropy
from agc_conformance.nfnets.golden import GOLDEN
from tests.helpers import norm

SMALL = Variant("small", (1, 2), 0.0, 32, 32, (32, 64), 8, 10)


@pytest.mark.long
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    golden = GOLDEN[name]
    arrays = seeded_parameters(name)
    images, labels = seeded_batch(golden.batch, golden.pixels)
    with threadpool_limits(1):  # more threads are slower, on products this small
        found = NFNet(name, arrays)(images)
        loss, d_logits = smoothed_cross_entropy(found.logits, labels)
        gradients = found.backward(d_logits)
    assert loss == pytest.approx(golden.loss, abs=1e-12)
    for logits, want in zip(found.logits, golden.logits, strict=True):
        assert logits[: len(want)] == pytest.approx(want, abs=1e-12)
    assert found.logits.sum() == pytest.approx(golden.logits_sum, abs=1e-12)
    assert norm([found.logits]) == pytest.approx(golden.logits_norm, abs=1e-12)
    assert norm([found.pooled]) == pytest.approx(golden.pooled_norm, abs=1e-12)
    assert found.signals["avg_var"] == pytest.approx(golden.avg_var, abs=5.1e-10)
    for index, variance in golden.res_avg_var.items():
        assert found.signals["res_avg_var"][index] == pytest.approx(variance, abs=5.1e-10)
    for tensor, want in golden.gradients.items():
        assert norm([gradients[tensor]]) == pytest.approx(want, rel=1e-12)
    assert norm(gradients.values()) == pytest.approx(golden.gradient_norm, rel=1e-12)
    assert norm(arrays.values()) == pytest.approx(golden.parameter_norm, abs=1e-9)
    assert {n: g.shape for n, g in gradients.items()} == {n: a.shape for n, a in arrays.items()}


@pytest.mark.parametrize(
    "masks",
    [None, Masks(np.array([[1, 0, 1], [1, 1, 0]], bool), np.arange(256).reshape(2, 128) % 3 > 0)],
)
def test_gradients_by_finite_differences(masks):
    arrays = seeded_parameters(SMALL)
    arrays["stages.1.0.conv1.weight"][..., :7] *= 1e-3  # filters below the floor
    arrays["stages.1.1.skip_gain"] *= 0
    images, labels = seeded_batch(2, 21, 26)  # both odd and even on the way down

    def loss(changed):
        model = NFNet(SMALL, changed, dropout=0.3)
        return smoothed_cross_entropy(model(images, masks).logits, labels)

    found = NFNet(SMALL, arrays, dropout=0.3)(images, masks)
    gradients = found.backward(smoothed_cross_entropy(found.logits, labels)[1])
    random = np.random.RandomState(0)
    for name, array in arrays.items():
        direction = random.standard_normal(array.shape) * (abs(array).mean() + 1e-2)
        step = 5e-6
        ends = [loss({**arrays, name: array + sign * step * direction})[0] for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(np.sum(gradients[name] * direction), rel=1e-5, abs=3e-10), (
            name
        )


def test_stochastic_depth():
    arrays = seeded_parameters(SMALL)
    images, _ = seeded_batch(3, 20)
    model = NFNet(SMALL, arrays)

    def keeping(*last):
        return model(images, Masks(np.array([[True, True, keep] for keep in last]), None))

    full, none, mixed = model(images), keeping(0, 0, 0), keeping(1, 0, 1)
    assert np.array_equal(none.outputs["stages.1.1"], full.outputs["stages.1.0"])
    assert not np.allclose(full.logits, none.logits, rtol=1e-4)
    assert np.allclose(mixed.logits[[0, 2]], full.logits[[0, 2]], rtol=1e-13)
    assert np.allclose(mixed.logits[1], none.logits[1], rtol=1e-13)


def test_dropout():
    arrays = seeded_parameters(SMALL)
    images, _ = seeded_batch(2, 20)
    keep = np.arange(256).reshape(2, 128) % 3 > 0
    found = NFNet(SMALL, arrays, dropout=0.25)(images, Masks(None, keep))
    pooled = NFNet(SMALL, arrays)(images).pooled
    np.testing.assert_allclose(found.pooled, np.where(keep, pooled / 0.75, 0))
    want = found.pooled @ arrays["head.weight"] + arrays["head.bias"]
    np.testing.assert_allclose(found.logits, want)


def test_outputs_and_sizes():
    images, _ = seeded_batch(1, 45, 51)
    found = NFNet("tiny", seeded_parameters("tiny"))(images)
    assert list(found.outputs) == ["stem", *(block.name for block in blocks("tiny"))]
    shapes = [found.outputs[name].shape for name in ("stem", "stages.1.0", "stages.3.2")]
    assert shapes == [(1, 12, 13, 16), (1, 6, 7, 64), (1, 2, 2, 96)]
    assert found.signals["avg_var"].shape == (13,)
    assert found.signals["res_avg_var"].shape == (12,)


def by_hand(values, depths, x):
    """The network once more, as plainly as can be."""

    def act(x):
        cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 1.7015043497085571 * 0.5 * x * (1 + np.tanh(cubic))

    def conv(x, name, stride=1):
        w = values[f"{name}.weight"]
        size = w[..., 0].size
        variance = w.var((0, 1, 2))
        w = (w - w.mean((0, 1, 2))) / np.sqrt(np.maximum(size * variance, 1e-4))
        w, k = w * values[f"{name}.gain"], len(w)
        pads = [(0, 0)]
        for n in x.shape[1:3]:
            total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
            pads += [(total // 2, total - total // 2)]
        x = np.pad(x, [*pads, (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))
        windows = windows[:, ::stride, ::stride]  # n h w i k k
        groups = x.shape[-1] // w.shape[2]
        parts = [
            np.einsum("nhwikl,klio->nhwo", a, b)
            for a, b in zip(np.split(windows, groups, 3), np.split(w, groups, 3), strict=True)
        ]
        return np.concatenate(parts, -1) + values[f"{name}.bias"]

    def pool(x):
        rows = [x[:, i : i + 2].mean(1, keepdims=True) for i in range(0, x.shape[1], 2)]
        x = np.concatenate(rows, 1)
        columns = [x[:, :, i : i + 2].mean(2, keepdims=True) for i in range(0, x.shape[2], 2)]
        return np.concatenate(columns, 2)

    def dense(x, name):
        return x @ values[f"{name}.weight"] + values[f"{name}.bias"]

    for k, stride in enumerate((2, 1, 1, 2)):
        x = conv(x if k == 0 else act(x), f"stem.conv{k}", stride)
    variance = 1.0
    for stage, depth in enumerate(depths):
        for place in range(depth):
            name = f"stages.{stage}.{place}"
            stride = 2 if stage and not place else 1
            out = act(x) / math.sqrt(variance)
            if place == 0:
                x = conv(pool(out) if stride == 2 else out, f"{name}.shortcut")
            variance = (1.0 if place == 0 else variance) + 0.04
            out = conv(out, f"{name}.conv0")
            out = conv(act(out), f"{name}.conv1", stride)
            out = conv(act(out), f"{name}.conv1b")
            out = conv(act(out), f"{name}.conv2")
            gate = np.maximum(dense(out.mean((1, 2)), f"{name}.se.fc0"), 0)
            gate = 1 / (1 + np.exp(-dense(gate, f"{name}.se.fc1")))
            x = x + 0.2 * values[f"{name}.skip_gain"] * 2 * gate[:, None, None] * out
    return dense(act(conv(x, "final_conv")).mean((1, 2)), "head")


@pytest.mark.parametrize(
    ("images", "height", "width"), [(2, 32, 38), (2, 45, 51), (1, 50, 33), (1, 64, 64), (3, 7, 1)]
)
def test_sizes(images, height, width):
    """Odd and even, where padding and pooling differ from the frameworks' own, and one image
    alone.
    """
    arrays = seeded_parameters(SMALL)
    x, _ = seeded_batch(images, height, width)
    want = by_hand(arrays, SMALL.depths, x)
    np.testing.assert_allclose(NFNet(SMALL, arrays)(x).logits, want, rtol=1e-11, atol=1e-13)


def test_other_classes_channels_and_dtypes():
    arrays = seeded_parameters(SMALL, 7, 2)
    narrow = {name: array.astype(np.float32) for name, array in arrays.items()}
    images, _ = seeded_batch(2, 16, channels=2)
    logits = NFNet(SMALL, narrow)(images.astype(np.float32)).logits
    assert (logits.shape, logits.dtype) == ((2, 7), np.float64)
    assert np.allclose(logits, NFNet(SMALL, arrays)(images).logits, rtol=1e-4)


def test_bad_input():
    arrays = seeded_parameters("tiny")
    model = NFNet("tiny", arrays)
    with pytest.raises(ShapeError, match=r"\(2, 3, 32, 32\) is not \(n, h, w, 3\)"):
        model(np.zeros((2, 3, 32, 32)))
    with pytest.raises(ParameterError, match=r"1 missing: stages\.0\.0\.skip_gain"):
        NFNet("tiny", {n: a for n, a in arrays.items() if n != "stages.0.0.skip_gain"})
    with pytest.raises(ParameterError, match=r"55 of another shape: stages\.3\.0\.conv0\.weight"):
        NFNet(replace(VARIANTS["tiny"], widths=(32, 64, 96, 128)), arrays)
    assert len(parameters("tiny")) == len(model.parameters)
    with pytest.raises(ConfigError, match="gelu and relu, not 'silu' of tiny"):
        NFNet(replace(VARIANTS["tiny"], activation="silu"), arrays)


def test_gradients_stay():
    images, labels = seeded_batch(2, 16)
    found = NFNet(SMALL, seeded_parameters(SMALL))(images)
    _, d_logits = smoothed_cross_entropy(found.logits, labels)
    first = found.backward(d_logits)
    before = {name: gradient.copy() for name, gradient in first.items()}
    second = found.backward(2 * d_logits)
    for name, gradient in before.items():
        assert np.array_equal(first[name], gradient)
        assert np.allclose(second[name], 2 * gradient, rtol=1e-12, atol=1e-300)


def test_a_bias_without_axes():
    arrays = {**seeded_parameters(SMALL), "head.bias": np.array(0.0)}
    with pytest.raises(ParameterError, match=r"head\.bias \(has \(\), needs \(10,\)\)"):
        NFNet(SMALL, arrays)


def test_loss_gradient():
    random = np.random.RandomState(1)
    logits, labels = random.standard_normal((3, 5)), np.array([4, 0, 2])
    loss, gradient = smoothed_cross_entropy(logits, labels, 0.3)
    uniform = smoothed_cross_entropy(np.zeros((3, 5)), labels, 0.3)[0]
    assert uniform == pytest.approx(np.log(5))
    for place in np.ndindex(logits.shape):
        moved = logits.copy()
        moved[place] += 1e-6
        slope = (smoothed_cross_entropy(moved, labels, 0.3)[0] - loss) / 1e-6
        assert slope == pytest.approx(gradient[place], abs=1e-6)
