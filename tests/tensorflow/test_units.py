"""Units of every layer type, names of parameters, the registry, and what is refused."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import agc_tensorflow
from agc import AGC, SAM, Units
from agc.errors import (
    AmbiguousUnitsError,
    ParameterError,
    SelectorError,
    UnitsError,
    UnitsWarning,
)
from agc_tensorflow import units as units_of
from agc_tensorflow.layers import TABLE as LAYER_TABLE


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(LAYER_TABLE._by_class)
    yield
    LAYER_TABLE._by_class.clear()
    LAYER_TABLE._by_class.update(before)


def built(layer: Any, *shape: int) -> Any:
    layer.build((None, *shape))
    return layer


def attention(cls: Any, *sizes: int) -> Any:
    layer = cls(*sizes)
    layer(tf.zeros((1, 2, 6)), tf.zeros((1, 2, 6)))
    return layer


HEADS = {
    "query.kernel": ("i h d -> h d", 6),
    "query.bias": ("... ->", 1),
    "key.kernel": ("i h d -> h d", 6),
    "key.bias": ("... ->", 1),
    "value.kernel": ("i h d -> h d", 6),
    "value.bias": ("... ->", 1),
    "attention_output.kernel": ("h d o -> o", 6),
    "attention_output.bias": ("... ->", 1),
}


def recurrent(units: int, gates: int, prefix: str = "") -> dict[str, tuple[str, int]]:
    return {
        f"{prefix}kernel": ("i o -> o", gates * units),
        f"{prefix}recurrent_kernel": ("i o -> o", gates * units),
        f"{prefix}bias": ("o ->", 1),
    }


def lora(layer: Any) -> Any:
    layer.enable_lora(2)
    return layer


CONV = ("... i o -> o", 6)
TABLE: dict[str, tuple[Callable[[], Any], dict[str, tuple[str, int]]]] = {
    "Dense": (
        lambda: built(layers.Dense(6), 4),
        {"kernel": ("i o -> o", 6), "bias": ("o ->", 1)},
    ),
    "Dense 1->C": (lambda: built(layers.Dense(6, use_bias=False), 1), {"kernel": ("i o -> o", 6)}),
    "Dense LoRA": (
        lambda: lora(built(layers.Dense(6, use_bias=False), 4)),
        {"kernel": ("i o -> o", 6), "lora_kernel_a": ("... i o -> o", 2), "lora_kernel_b": CONV},
    ),
    "EinsumDense": (
        lambda: built(layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), 5, 4),
        {"kernel": ("i h d -> h d", 6), "bias": ("... ->", 1)},
    ),
    "EinsumDense, per group": (
        lambda: built(layers.EinsumDense("abc,bcd->abd", (3, 6)), 3, 4),
        {"kernel": ("g i o -> g o", 18)},
    ),
    "EinsumDense, ellipsis": (
        lambda: built(layers.EinsumDense("...x,yx->...y", 6), 3, 4),
        {"kernel": ("o i -> o", 6)},
    ),
    "EinsumDense, gain": (
        lambda: built(layers.EinsumDense("abc,bc->abc", (3, 4)), 3, 4),
        {"kernel": ("... ->", 1)},
    ),
    "Conv1D": (
        lambda: built(layers.Conv1D(6, 3), 9, 4),
        {"kernel": CONV, "bias": ("o ->", 1)},
    ),
    "Conv2D": (lambda: built(layers.Conv2D(6, 3, use_bias=False), 9, 9, 4), {"kernel": CONV}),
    "Conv2D, groups": (
        lambda: built(layers.Conv2D(6, 3, groups=2, use_bias=False), 9, 9, 4),
        {"kernel": CONV},
    ),
    "Conv3D": (lambda: built(layers.Conv3D(6, 2, use_bias=False), 9, 9, 9, 4), {"kernel": CONV}),
    "Conv1DTranspose": (
        lambda: built(layers.Conv1DTranspose(6, 3, use_bias=False), 9, 4),
        {"kernel": ("... o i -> o", 6)},
    ),
    "Conv2DTranspose": (
        lambda: built(layers.Conv2DTranspose(6, 3, use_bias=False), 9, 9, 4),
        {"kernel": ("... o i -> o", 6)},
    ),
    "Conv3DTranspose": (
        lambda: built(layers.Conv3DTranspose(6, 2, use_bias=False), 9, 9, 9, 4),
        {"kernel": ("... o i -> o", 6)},
    ),
    "DepthwiseConv1D": (
        lambda: built(layers.DepthwiseConv1D(3, depth_multiplier=2), 9, 4),
        {"kernel": ("... c m -> c m", 8), "bias": ("o ->", 1)},
    ),
    "DepthwiseConv2D": (
        lambda: built(layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), 9, 9, 4),
        {"kernel": ("... c m -> c m", 8)},
    ),
    "SeparableConv1D": (
        lambda: built(layers.SeparableConv1D(6, 3, depth_multiplier=2), 9, 4),
        {
            "depthwise_kernel": ("... c m -> c m", 8),
            "pointwise_kernel": CONV,
            "bias": ("o ->", 1),
        },
    ),
    "SeparableConv2D": (
        lambda: built(layers.SeparableConv2D(6, 3, use_bias=False), 9, 9, 4),
        {"depthwise_kernel": ("... c m -> c m", 4), "pointwise_kernel": CONV},
    ),
    "Embedding": (lambda: built(layers.Embedding(7, 4)), {"embeddings": ("v d -> v", 7)}),
    "MultiHeadAttention": (lambda: attention(layers.MultiHeadAttention, 2, 3), HEADS),
    "GroupQueryAttention": (
        lambda: attention(layers.GroupQueryAttention, 3, 4, 1),
        {
            "query.kernel": ("i h d -> h d", 12),
            "query.bias": ("... ->", 1),
            "key.kernel": ("i h d -> h d", 3),
            "key.bias": ("... ->", 1),
            "value.kernel": ("i h d -> h d", 3),
            "value.bias": ("... ->", 1),
            "attention_output.kernel": ("h d o -> o", 6),
            "attention_output.bias": ("... ->", 1),
        },
    ),
    "LSTM": (lambda: built(layers.LSTM(3), 2, 4), recurrent(3, 4, "lstm_cell.")),
    "GRU": (
        lambda: built(layers.GRU(3), 2, 4),
        {**recurrent(3, 3, "gru_cell."), "gru_cell.bias": ("s o -> s", 2)},
    ),
    "GRU, one bias": (
        lambda: built(layers.GRU(3, reset_after=False), 2, 4),
        recurrent(3, 3, "gru_cell."),
    ),
    "SimpleRNN": (
        lambda: built(layers.SimpleRNN(3), 2, 4),
        recurrent(3, 1, "simple_rnn_cell."),
    ),
    "ConvLSTM2D": (
        lambda: built(layers.ConvLSTM2D(3, 2), 2, 9, 9, 4),
        {
            "conv_lstm_cell.kernel": ("... i o -> o", 12),
            "conv_lstm_cell.recurrent_kernel": ("... i o -> o", 12),
            "conv_lstm_cell.bias": ("o ->", 1),
        },
    ),
    "Bidirectional": (
        lambda: built(layers.Bidirectional(layers.LSTM(3, name="lstm")), 2, 4),
        {
            **recurrent(3, 4, "forward_lstm.lstm_cell."),
            **recurrent(3, 4, "backward_lstm.lstm_cell."),
        },
    ),
    "TimeDistributed": (
        lambda: built(layers.TimeDistributed(layers.Conv1D(6, 3, name="conv")), 2, 9, 4),
        {"conv.kernel": CONV, "conv.bias": ("o ->", 1)},
    ),
    "BatchNormalization": (
        lambda: built(layers.BatchNormalization(), 4),
        {"gamma": ("o ->", 1), "beta": ("o ->", 1)},
    ),
    "LayerNormalization, two axes": (
        lambda: built(layers.LayerNormalization(axis=(-2, -1)), 3, 4),
        {"gamma": ("... ->", 1), "beta": ("... ->", 1)},
    ),
    "GroupNormalization": (
        lambda: built(layers.GroupNormalization(2), 4),
        {"gamma": ("o ->", 1), "beta": ("o ->", 1)},
    ),
    "PReLU": (lambda: built(layers.PReLU(), 3, 4, 5), {"alpha": ("... ->", 1)}),
    "SpectralNormalization": (
        lambda: built(layers.SpectralNormalization(layers.Conv2D(6, 3, name="conv")), 9, 9, 4),
        {"conv.kernel": CONV, "conv.bias": ("o ->", 1)},
    ),
}


@pytest.mark.parametrize("row", TABLE)
def test_units_of_layer(row):
    make, want = TABLE[row]
    plan = agc_tensorflow.plan(make(), AGC())
    assert {e.name for e in plan} == set(want)
    for name, (pattern, count) in want.items():
        shape = plan[name].shape
        assert plan[name].count == count, name
        assert plan[name].axes.reduce == Units(pattern).bind(shape).reduce, name


@lru_cache(maxsize=1)
def measure() -> Any:
    """Return the module that computes units without the table of layer types."""
    path = Path(__file__).parents[2] / "docs" / "models" / "keras.py"
    spec = importlib.util.spec_from_file_location("units_by_computing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


COMPUTED: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "Dense": (lambda: layers.Dense(6), (4,), 1),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        (5, 4),
        1,
    ),
    "EinsumDense, per group": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 6)), (3, 4), 1),
    "EinsumDense, out first": (lambda: layers.EinsumDense("...x,yx->...y", 6), (3, 4), 1),
    "EinsumDense, gain": (lambda: layers.EinsumDense("abc,bc->abc", (3, 4)), (3, 4), 1),
    "Conv1D": (lambda: layers.Conv1D(6, 3), (9, 4), 1),
    "Conv2D, groups": (lambda: layers.Conv2D(6, 3, groups=2), (9, 9, 4), 1),
    "Conv3D": (lambda: layers.Conv3D(6, 2), (3, 3, 3, 4), 1),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(6, 3), (9, 4), 1),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(6, 3), (9, 9, 4), 1),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(6, 2), (3, 3, 3, 4), 1),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4), 1),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 4), 1),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(6, 3), (9, 4), 2),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2), (9, 9, 4), 2),
    "Embedding": (lambda: layers.Embedding(7, 4), (5,), 1),
    "GroupQueryAttention": (lambda: layers.GroupQueryAttention(3, 4, 2), (2, 6), 4),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), (2, 6), 4),
    "LSTM": (lambda: layers.LSTM(3), (2, 4), 2),
    "GRU": (lambda: layers.GRU(3, reset_after=False), (2, 4), 2),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), (2, 4), 2),
    "Bidirectional": (lambda: layers.Bidirectional(layers.SimpleRNN(3)), (2, 4), 4),
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(3, 2), (2, 9, 4), 2),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(6)), (2, 4), 1),
    "LayerNormalization": (lambda: layers.LayerNormalization(axis=(-2, -1)), (3, 4), 1),
    "PReLU": (lambda: layers.PReLU(alpha_initializer="ones"), (3, 4), 1),
}


@pytest.mark.parametrize("row", COMPUTED)
def test_units_are_what_feeds_one_output(row):
    """Derivatives of the layer itself say so; they know nothing of the table of layer types."""
    make, shape, checked = COMPUTED[row]
    layer = make()
    random = np.random.RandomState(0)
    x = random.randint(0, 7, (2, *shape)) if row == "Embedding" else random.randn(2, *shape)
    x = tf.constant(x, tf.int32 if row == "Embedding" else tf.float32)
    arguments = (x, x) if "HeadAttention" in row or "Query" in row else (x,)
    layer(*arguments)
    found = measure().measure(layer, lambda: layer(*arguments))
    assert found.complete
    assert found.wrong == {}
    assert found.checked == checked


def test_computing_units_sees_a_wrong_table(registry):
    agc_tensorflow.register_units(layers.Dense, {"kernel": "i o -> i"})
    layer = built(layers.Dense(6), 4)
    found = measure().measure(layer, lambda: layer(tf.ones((2, 4))))
    assert set(found.wrong) == {"kernel"}


def test_model_names_leave_the_model_out():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="dense")], name="enc")
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(3, name="head")])
    names = ["enc.dense.kernel", "enc.dense.bias", "head.kernel", "head.bias"]
    assert [entry.name for entry in agc_tensorflow.plan(model, AGC())] == names
    inputs = keras.Input((4,))
    functional = keras.Model(inputs, layers.Dense(3, name="head")(inner(inputs)))
    assert list(units_of(functional)) == names


class Net(keras.Model):
    """Two layers of one name, a weight of its own, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(4, name="block") for _ in range(2)]
        self.twice = layers.Dense(4, name="twice", use_bias=False)
        self.again = self.twice
        self.gain = self.add_weight(shape=(4,), name="gain")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.again(self.twice(x)) * self.gain


def test_same_names_get_numbers_and_shared_layers_come_once():
    net = Net()
    net(tf.zeros((1, 4)))
    assert list(units_of(net)) == [
        "gain",
        "block.kernel",
        "block.bias",
        "block_1.kernel",
        "block_1.bias",
        "twice.kernel",
    ]


def test_frozen_parameters_stay_in_the_plan_and_statistics_do_not_come_in():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="a"), layers.BatchNormalization(name="norm")]
    )
    model.get_layer("a").trainable = False
    plan = agc_tensorflow.plan(model, AGC(exclude=["a.*"]))
    assert [entry.name for entry in plan] == ["a.kernel", "a.bias", "norm.gamma", "norm.beta"]


def test_tf_module_is_named_by_attributes():
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.zeros((3, 4)))
            self.steps = tf.Variable(0, trainable=False)
            self.parts = [Table(), {"key": tf.Variable(tf.zeros(3))}]
            self.dense = built(layers.Dense(2, use_bias=False), 3)

    class Table(tf.Module):
        def __init__(self):
            super().__init__()
            self.table = tf.Variable(tf.zeros((2, 3, 4)))

    module = Module()
    with pytest.raises(AmbiguousUnitsError, match=r"'parts.0.table' of Table"):
        agc_tensorflow.plan(module, AGC())
    plan = agc_tensorflow.plan(module, AGC(units={"*.table": "a b c -> a", "w": "i o -> o"}))
    counts = {entry.name: entry.count for entry in plan}
    assert counts == {"dense.kernel": 2, "parts.0.table": 2, "parts.1.key": 1, "w": 4}


def test_matrices_without_a_model_follow_the_layout_and_say_so():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="body"), layers.Dense(2, name="head")]
    )
    with pytest.warns(
        UnitsWarning, match=r"2 parameter\(s\).*'body.kernel' \(3, 4\).*Give the model"
    ):
        plan = agc_tensorflow.plan(model.trainable_variables, AGC())
    counts = {entry.name: (entry.count, entry.source) for entry in plan}
    assert counts == {
        "body.kernel": (4, "layout"),
        "body.bias": (1, "vector"),
        "head.kernel": (2, "layout"),
        "head.bias": (1, "vector"),
    }
    with pytest.warns(UnitsWarning, match="'a.w'"):
        pairs = agc_tensorflow.plan([("a/w", tf.Variable(tf.zeros((2, 3))))], AGC())
    assert pairs["a.w"].count == 3
    named = agc_tensorflow.plan({"w": tf.Variable(tf.zeros((2, 3)))}, AGC(units={"w": "o i -> o"}))
    assert (named["w"].count, named["w"].source) == (2, "rule")


def test_kernels_without_a_model_are_all_named_in_one_error():
    """Rank says nothing of a kernel: depthwise and transposed ones have the rank of a
    convolution's.
    """
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.DepthwiseConv2D(3, name="dw"),
            layers.Conv2DTranspose(5, 2, name="up"),
        ]
    )
    variables = model.trainable_variables
    gradients = [tf.ones_like(variable) for variable in variables]
    wrapped = agc_tensorflow.AdaptiveGradClip("adam", AGC())
    for call in (
        lambda: agc_tensorflow.adaptive_clip_gradients(gradients, variables, AGC()),
        lambda: wrapped.build(variables),
    ):
        with pytest.raises(AmbiguousUnitsError, match=r"Give the model: model=model; or") as caught:
            call()
        assert "dw.kernel" in str(caught.value)
        assert "up.kernel" in str(caught.value)
    plan = agc_tensorflow.plan(model, AGC())
    assert [entry.count for entry in plan] == [3, 1, 5, 1]
    assert {entry.source for entry in plan} == {"layer", "vector"}


def test_one_layer_keeps_its_name_among_plain_variables():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2, name="head")(inputs))
    plan = agc_tensorflow.plan(model.trainable_variables, AGC(units={"head.kernel": "i o -> o"}))
    assert [entry.name for entry in plan] == ["head.kernel", "head.bias"]


def test_variables_without_a_name_and_of_one_name():
    variables = [
        *[tf.Variable([1.0, 2.0]) for _ in range(2)],
        *[keras.Variable(np.ones(2), dtype="float32", name="v") for _ in range(2)],
    ]
    plan = agc_tensorflow.plan(variables, AGC())
    assert [entry.name for entry in plan] == ["Variable", "Variable_1", "v", "v_1"]


def test_frozen_parameters_are_marked():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="a")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="b")])
    inner.trainable = False
    model.layers[1].bias.trainable = False
    for given in (model, model.weights):
        rule = AGC() if given is model else AGC(units={"*kernel": "i o -> o"})
        plan = agc_tensorflow.plan(given, rule)
        assert [entry.inactive for entry in plan] == ["frozen", "frozen", None, "frozen"]
        assert plan.count == 2
    inner.trainable = True
    assert agc_tensorflow.plan(model, AGC()).count == 5 + 1 + 2


def of_keras_2(*bases: type) -> Any:
    """Return something whose class says that it is from Keras 2, which need not be installed."""
    made = type("Sequential", bases, {"__module__": "tf_keras.src.engine.sequential"})
    return type("Own", (made,), {})()


def test_keras_2_is_refused_everywhere():
    model = of_keras_2(tf.Module)
    holder = tf.Module()
    holder.part = model
    kernel = tf.Variable(tf.ones((2, 3)))
    for call in (
        lambda: agc_tensorflow.plan(model, AGC()),
        lambda: agc_tensorflow.plan(holder, AGC()),
        lambda: agc_tensorflow.plan([model], AGC()),
        lambda: units_of(model),
        lambda: agc_tensorflow.adaptive_clip_gradients([kernel], [kernel], AGC(), model=model),
        lambda: agc_tensorflow.AdaptiveGradClip("sgd", AGC(), model=model),
        lambda: agc_tensorflow.AdaptiveGradClip(of_keras_2(object), AGC()),
        lambda: agc_tensorflow.SharpnessAwareModel(model, SAM()),
    ):
        with pytest.raises(
            ParameterError, match=r"Own is made by Keras 2 \(tf_keras\).*use Keras 3"
        ):
            call()


HUB = {
    "layers.modeling.position_embedding.PositionEmbedding": [("embeddings", (5, 4), 5)],
    "models.vit_det.vit_layers.AddPositionalEmbedding": [("pos_embed", (1, 2, 3, 4), 6)],
    "models.mixtral.mixtral_decoder.MixtralMoeExperts": [
        ("expert_feedforward_gate_dense", (2, 3, 4), 8)
    ],
    "models.gpt_oss.gpt_oss_decoder.GptOssExperts": [
        ("gate_up_proj", (2, 3, 4), 8),
        ("gate_up_proj_bias", (2, 4), 2),
    ],
    "models.xlnet.xlnet_encoder.XLNetEncoder": [
        ("content_attention_bias", (2, 3), 1),
        ("segment_encoding", (2, 3, 4), 6),
    ],
}


@pytest.mark.parametrize("path", HUB)
def test_layers_of_keras_hub_are_known_by_their_class(path):
    module, _, name = f"keras_hub.src.{path}".rpartition(".")
    layer = type(name, (layers.Layer,), {"__module__": module})()
    for weight, shape, _ in HUB[path]:
        layer.add_weight(shape=shape, name=weight)
    layer.built = True
    plan = agc_tensorflow.plan(layer, AGC())
    assert {e.name: e.count for e in plan} == {name: count for name, _, count in HUB[path]}
    assert {entry.source for entry in plan} == {"layer"}


def test_rank_3_without_a_known_layer_is_ambiguous():
    class Own(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(2, 3, 4), name="table")

    layer = built(Own(name="own"), 3)
    with pytest.raises(AmbiguousUnitsError, match=r"'table' of Own 'own' with shape \(2, 3, 4\)"):
        agc_tensorflow.plan(layer, AGC())
    assert agc_tensorflow.plan(layer, AGC(exclude=["table"]))["table"].excluded
    assert units_of(layer) == {"table": None}


def test_register_units(registry):
    class Own(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(2, 3, 4), name="table")

    class Heir(Own):
        pass

    agc_tensorflow.register_units(Own, {"tab*": "a b c -> a c"})
    assert agc_tensorflow.plan(built(Heir(), 3), AGC())["table"].count == 8
    agc_tensorflow.register_units(Heir, lambda layer: {"table": f"a b=3 c -> {layer.axis}"})
    heir = built(Heir(), 3)
    heir.axis = "b"
    assert agc_tensorflow.plan(heir, AGC())["table"].count == 3
    path = f"{Heir.__module__}.{Heir.__qualname__}"
    agc_tensorflow.register_units(path, {"table": "... ->"})
    assert agc_tensorflow.plan(heir, AGC())["table"].count == 1


def test_registering_again_reaches_a_model_that_was_planned(registry):
    layer = built(layers.Dense(2, use_bias=False), 3)
    gradient = [tf.ones((3, 2))]

    def units() -> int:
        _, stats = agc_tensorflow.adaptive_clip_gradients(
            gradient, layer.trainable_variables, AGC(), model=layer, return_stats=True
        )
        return stats.total().units

    assert units() == 2
    agc_tensorflow.register_units(layers.Dense, {"kernel": "i o -> i"})
    assert units() == 3


@pytest.mark.parametrize(
    ("units", "error"), [(3, ParameterError), ({"kernel": "i o -> x"}, UnitsError)]
)
def test_register_units_refuses(units, error, registry):
    with pytest.raises(error):
        agc_tensorflow.register_units(layers.Dense, units)


def test_registered_units_that_do_not_fit_name_the_parameter(registry):
    agc_tensorflow.register_units(layers.Dense, {"kernel": "a b c -> a"})
    with pytest.raises(UnitsError, match=r"parameter 'kernel'.*\(3, 2\)"):
        agc_tensorflow.plan(built(layers.Dense(2), 3), AGC())


def test_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(3)], name="late")
    with pytest.raises(ParameterError, match=r"'late' is not built.*model.build\(input_shape\)"):
        agc_tensorflow.plan(model, AGC())


def test_pattern_that_matches_nothing_lists_the_names():
    model = built(layers.Dense(3), 4)
    with pytest.raises(SelectorError, match=r"'fc.\*' matches no parameter.*kernel, bias"):
        agc_tensorflow.plan(model, AGC(exclude=["fc.*"]))


def test_two_variables_of_one_name_are_refused():
    pairs = [("w", tf.Variable(tf.zeros(2))), ("w", tf.Variable(tf.zeros(3)))]
    with pytest.raises(ParameterError, match="two parameters are called 'w'"):
        agc_tensorflow.plan(pairs, AGC())


def test_model_declares_its_head():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.Dense(2, name="fc")])
    model.agc_head = "fc"
    plan = agc_tensorflow.plan(model, AGC.profile("deepmind"))
    assert {e.name for e in plan if e.excluded} == {"fc.kernel"}
    plan = agc_tensorflow.plan(model, AGC.profile("paper"))
    assert {e.name for e in plan if e.excluded} == {"fc.kernel", "fc.bias"}


def test_plan_is_the_same_in_eager_and_after_training():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    before = agc_tensorflow.plan(model, AGC())
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0)
    assert agc_tensorflow.plan(model, AGC()) == before


@pytest.mark.parametrize("module", ["units", "layers", "clip", "optimizer"])
def test_examples_in_docstrings(module, registry):
    found = doctest.testmod(importlib.import_module(f"agc_tensorflow.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
