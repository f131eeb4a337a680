"""What the models of all frameworks share, against the published figures and DeepMind's own
code.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from agc import nfnet
from agc.errors import ConfigError, ParameterError

COUNTS = {  # parameters and tensors, counted by running DeepMind's code
    "F0": (71_489_284, 233),
    "F1": (132_634_256, 437),
    "F2": (193_779_228, 641),
    "F3": (254_924_200, 845),
    "F4": (316_069_172, 1049),
    "F5": (377_214_144, 1253),
    "F6": (438_359_116, 1457),
    "F7": (499_504_088, 1661),
    "F0+": (118_824_516, 233),
    "F4+": (524_954_484, 1049),
    "F7+": (829_551_960, 1661),
    "tiny": (334_086, 233),
    "NF-ResNet-tiny": (38_742, 54),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    specs = nfnet.parameters(name)
    assert (sum(math.prod(spec.shape) for spec in specs), len(specs)) == COUNTS[name]


def test_counts_by_kind():
    counts = dict.fromkeys(("conv", "gain", "bias", "se", "skip_gain", "head"), 0)
    for spec in nfnet.parameters("F0"):
        counts[spec.kind] += math.prod(spec.shape)
    assert counts == {
        "conv": 46_480_304,
        "gain": 44_912,
        "bias": 44_912 + 22_656 + 1_000,  # convolutions, squeeze-excites, classifier
        "se": 21_823_488,
        "skip_gain": 12,
        "head": 3_072_000,
    }


@pytest.mark.parametrize("name", ["F0", "F7+", "tiny", "NF-ResNet-50"])
def test_what_decays_is_what_deepmind_decides_by_name(name):
    for spec in nfnet.parameters(name):
        module, _, leaf = spec.haiku.rpartition("/")
        exempt = leaf in ("scale", "offset", "b") or "gain" in leaf or "bias" in leaf
        assert spec.decays is not exempt
        classifier = not exempt and "linear" in module and "squeeze_excite" not in module
        assert spec.clipped is not classifier


def test_depths_and_variances():
    """What the golden values of F0 do not show."""
    rates = [0.25 * block.stochastic_depth for block in nfnet.blocks("F0")]
    np.testing.assert_allclose(rates, [i / 48 for i in range(12)], rtol=1e-15)
    of_f1 = [block for block in nfnet.blocks("F1") if block.stage >= 2]
    first2, first3 = of_f1[0], of_f1[12]
    assert (first2.beta, first3.beta) == pytest.approx((0.928476691, 0.821994937), abs=5e-10)
    assert of_f1[11].variance == pytest.approx(1.44)


def test_bottlenecks_are_rounded_down_to_whole_groups():
    first = nfnet.blocks("F0+")[0]
    assert (first.outputs, first.middle, first.groups) == (384, 128, 1)
    groups = [block.groups for block in nfnet.blocks("tiny") if block.place == 0]
    assert groups == [2, 4, 6, 6]


def test_stem():
    assert [conv.outputs for conv in nfnet.stem("F0+")] == [16, 32, 64, 192]  # timm: 24, 48, 96
    assert [conv.outputs for conv in nfnet.stem("tiny", 1)] == [16, 32, 64, 16]
    assert nfnet.stem("tiny", 1)[0].shape == (3, 3, 1, 16)


def test_variants():
    assert list(nfnet.VARIANTS) == [f"F{n}{p}" for p in ("", "+") for n in range(8)] + [
        "tiny",
        "mini",
        "micro",
        *(f"NF-ResNet-{layers}" for layers in (26, 50, 101, 152, 200, 288, 600, "tiny")),
    ]
    sizes = [(v.train_pixels, v.test_pixels, v.dropout) for v in nfnet.VARIANTS.values()]
    assert sizes[:2] == sizes[8:10] == [(192, 256, 0.2), (224, 320, 0.3)]
    assert sizes[7] == (480, 608, 0.5)
    assert nfnet.variant("f3+") is nfnet.VARIANTS["F3+"]
    assert nfnet.variant("nf-resnet-50") is nfnet.VARIANTS["NF-ResNet-50"]
    assert nfnet.variant(nfnet.VARIANTS["F1"]) is nfnet.VARIANTS["F1"]


def test_resnets():
    """NF-ResNet-50 has 3 + 4 + 6 + 3 blocks of three convolutions, and four projections."""
    variant = nfnet.variant("NF-ResNet-50")
    blocks = nfnet.blocks(variant)
    assert (len(blocks), len(nfnet.parameters(variant))) == (16, 3 * (1 + 48 + 4) + 16 + 2)
    first = {b.stage: b for b in blocks if b.place == 0}
    assert [(b.inputs, b.middle, b.outputs, b.stride, b.groups) for b in first.values()] == [
        (64, 64, 256, 1, 1),
        (256, 128, 512, 2, 1),
        (512, 256, 1024, 2, 1),
        (1024, 512, 2048, 2, 1),
    ]
    assert [b.convs[-1].stride for b in first.values()] == [1, 2, 2, 2]
    assert nfnet.features(variant) == 2048
    depths = {v.name: 3 * sum(v.depths) + 2 for v in nfnet.VARIANTS.values() if v.family != "NFNet"}
    layers = {name: int(name[10:]) for name in depths if name != "NF-ResNet-tiny"}
    deep = {"NF-ResNet-288": 290, "NF-ResNet-600": 602}  # without stem and classifier
    assert {name: depths[name] for name in layers} == {**layers, **deep}


def test_haiku_names():
    resnet = {spec.name: spec.haiku for spec in nfnet.parameters("NF-ResNet-50")}
    assert resnet["stem.conv0.weight"] == "NF_ResNet/~/initial_conv/w"
    assert resnet["stages.0.0.skip_gain"] == "NF_ResNet/~/nf_res_block/skip_gain"
    assert resnet["stages.1.0.shortcut.gain"] == "NF_ResNet/~/nf_res_block_3/~/conv_shortcut/gain"
    assert resnet["head.bias"] == "NF_ResNet/~/linear/b"
    names = {spec.name: spec.haiku for spec in nfnet.parameters("F0")}
    prefix = "NFNet/~/"
    for name, haiku in {
        "stem.conv3.gain": "stem_conv3/gain",
        "stages.0.0.skip_gain": "nf_block/skip_gain",
        "stages.0.0.shortcut.weight": "nf_block/~/conv_shortcut/w",
        "stages.1.1.conv1b.bias": "nf_block_2/~/conv1b/bias",
        "stages.3.2.se.fc0.weight": "nf_block_11/~/squeeze_excite/~/linear/w",
        "stages.3.2.se.fc1.bias": "nf_block_11/~/squeeze_excite/~/linear_1/b",
        "final_conv.bias": "final_conv/bias",
        "head.weight": "linear/w",
        "head.bias": "linear/b",
    }.items():
        assert names[name] == prefix + haiku


@pytest.mark.parametrize("name", ["F0", "F3", "tiny"])
def test_names_are_a_bijection(name):
    specs = nfnet.parameters(name)
    assert len({spec.name for spec in specs}) == len({spec.haiku for spec in specs}) == len(specs)
    assert all(spec.name == spec.name.lower() for spec in specs)
    modules = {spec.haiku.rpartition("/")[0] for spec in specs}
    depth = nfnet.variant(name).depths[0]
    assert len(modules) == 94 + 84 * (depth - 1)  # how the released files are told apart


def test_initial_values():
    initial = {spec.name: spec.initial for spec in nfnet.parameters("F0")}
    assert initial["stages.1.0.conv1.weight"] == nfnet.Initial("normal", (9 * 128) ** -0.5)
    assert initial["stages.1.0.se.fc0.weight"] == nfnet.Initial("truncated", 512**-0.5)
    assert initial["head.weight"] == nfnet.Initial("normal", 0.01)
    assert initial["stem.conv0.gain"] == nfnet.Initial("constant", 1)
    zeros = ("stem.conv0.bias", "stages.0.0.skip_gain", "stages.0.0.se.fc0.bias", "head.bias")
    assert {initial[name] for name in zeros} == {nfnet.Initial("constant", 0)}


def test_units_are_declared_for_the_neutral_layout():
    counts = {}
    for spec in nfnet.parameters("tiny"):
        counts[spec.name] = spec.units.bind(spec.shape).count
        assert counts[spec.name] == (1 if len(spec.shape) < 2 else spec.shape[-1])
    assert sum(counts.values()) - counts["head.weight"] == 4855


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_same_padding(size, kernel, stride):
    before, after = nfnet.same_padding(size, kernel, stride)
    assert (size + before + after - kernel) // stride + 1 == -(-size // stride)
    assert 0 <= after - before <= 1
    if (kernel, stride) == (3, 2):
        assert (before, after) == ((1, 1) if size % 2 else (0, 1))


def test_seeded_values():
    values = nfnet.seeded_parameters("tiny")
    first = values["stem.conv0.weight"].ravel()[:3]
    np.testing.assert_allclose(first, [0.094380428674, 0.096865848106, 0.177997035107], atol=1e-12)
    assert values["stages.0.0.skip_gain"].shape == ()
    assert values["stages.0.0.skip_gain"] == pytest.approx(0.351593891613, abs=1e-12)
    images, labels = nfnet.seeded_batch(2, 32)
    assert images.shape == (2, 32, 32, 3)
    expected = [-0.204707659485, 0.478943338058, -0.519438715057]
    np.testing.assert_allclose(images.ravel()[:3], expected, atol=1e-12)
    assert labels.tolist() == [1, 4]


def test_options():
    made = nfnet.options("tiny")
    assert (made.num_classes, made.dropout, made.stochastic_depth) == (10, 0.2, 0.25)
    assert nfnet.options("F4", dropout=0.0).dropout == 0
    assert nfnet.options("F4").num_classes == 1000
    made = nfnet.options("NF-ResNet-50")
    assert (made.activation, made.dropout, made.stochastic_depth) == ("relu", 0.0, 0.1)
    assert nfnet.options("NF-ResNet-50", activation="silu").activation == "silu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "F9"}, r"'F9'; the variants are F0, F1, .* F7\+, tiny"),
        ({"name": None}, "unknown NFNet variant None"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"in_channels": 3.0}, "in_channels must be an integer"),
        ({"dropout": 1.0}, r"dropout must be a rate in \[0, 1\), got 1.0"),
        ({"stochastic_depth": -0.1}, "stochastic_depth must be a rate"),
        ({"activation": "mish"}, "unknown activation 'mish'; the activations are gelu"),
        ({"ws_eps": 1e-4}, "ws_eps must be 'deepmind' or 'timm', got 0.0001"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        nfnet.options(**{"name": "F0", **changes})


def test_bad_variants():
    tiny = nfnet.VARIANTS["tiny"]
    with pytest.raises(ConfigError, match="one number for each stage"):
        replace(tiny, depths=(1, 2))
    with pytest.raises(ConfigError, match="depths must be >= 1"):
        replace(tiny, depths=(1, 0, 1, 1))
    with pytest.raises(ConfigError, match="group_width=32"):
        replace(tiny, group_width=32)
    with pytest.raises(ConfigError, match="family must be 'NFNet' or 'NF-ResNet', got 'ResNet'"):
        replace(tiny, family="ResNet")
    with pytest.raises(ConfigError, match="widths must be >= 4"):
        replace(tiny, family="NF-ResNet", widths=(2, 4, 8, 8))


def test_arrays_are_checked():
    specs = nfnet.parameters("tiny")
    arrays = dict(nfnet.seeded_parameters("tiny"))
    nfnet.check_arrays(specs, arrays)
    del arrays["stem.conv0.gain"]
    arrays["stem.conv9.gain"] = np.zeros(3)
    arrays["head.weight"] = arrays["head.weight"].T
    arrays["head.bias"] = np.zeros(10, int)
    with pytest.raises(ParameterError) as caught:
        nfnet.check_arrays(specs, arrays)
    message = str(caught.value)
    assert "1 missing: stem.conv0.gain" in message
    assert "1 unknown: stem.conv9.gain" in message
    assert "1 of another shape: head.weight (has (10, 192), needs (192, 10))" in message
    assert "1 not floating point: head.bias (int64)" in message
    with pytest.raises(ParameterError, match=r"233 missing: .* and 223 more"):
        nfnet.check_arrays(specs, {})
