"""Units by layer type, names of parameters, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import agc_tensorflow
from agc import AGC, SAM, Units
from agc.errors import AmbiguousUnitsError, ParameterError, UnitsWarning
from agc_tensorflow import units as units_of
from tests.contract.units import UnitsContract
from tests.helpers import script_of_models
from tests.tensorflow.driver import TensorFlowDriver


def built(layer: Any, *shape: int) -> Any:
    layer.build((None, *shape))
    return layer


def recurrent(cell: str, bias: str = "o ->") -> dict[str, str]:
    matrices = {f"{cell}.kernel": "i o -> o", f"{cell}.recurrent_kernel": "i o -> o"}
    return {**matrices, f"{cell}.bias": bias}


def lora(layer: Any) -> Any:
    layer.enable_lora(2)
    return layer


TABLE: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "Dense LoRA": (
        lambda: lora(built(layers.Dense(6, use_bias=False), 4)),
        dict.fromkeys(("kernel", "lora_kernel_a", "lora_kernel_b"), "i o -> o"),
    ),
    "GRU": (lambda: built(layers.GRU(3), 2, 4), recurrent("gru_cell", bias="s o -> s")),
    "GRU, one bias": (
        lambda: built(layers.GRU(3, reset_after=False), 2, 4),
        recurrent("gru_cell"),
    ),
    "Bidirectional": (
        lambda: built(layers.Bidirectional(layers.LSTM(3, name="lstm")), 2, 4),
        recurrent("forward_lstm.lstm_cell") | recurrent("backward_lstm.lstm_cell"),
    ),
    "SpectralNormalization": (
        lambda: built(layers.SpectralNormalization(layers.Conv2D(6, 3, name="conv")), 9, 9, 4),
        {"conv.kernel": "h w i o -> o", "conv.bias": "o ->"},
    ),
}


@pytest.mark.parametrize("row", TABLE)
def test_units_of_layer(row):
    make, want = TABLE[row]
    plan = agc_tensorflow.plan(make(), AGC())
    assert {entry.name for entry in plan} == set(want)
    for entry in plan:
        assert entry.axes == Units(want[entry.name]).bind(entry.shape), entry.name


@pytest.fixture(scope="module")
def measure() -> Any:
    return script_of_models("keras").measure


COMPUTED: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {  # not what the suite asks
    "EinsumDense, per group": (lambda: layers.EinsumDense("abc,bcd->abd", (3, 6)), (3, 4), 1),
    "EinsumDense, out first": (lambda: layers.EinsumDense("...x,yx->...y", 6), (3, 4), 1),
    "EinsumDense, gain": (lambda: layers.EinsumDense("abc,bc->abc", (3, 4)), (3, 4), 1),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(6, 2), (3, 3, 3, 4), 1),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4), 1),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(6, 3), (9, 4), 2),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2), (9, 9, 4), 2),
    "GroupQueryAttention": (lambda: layers.GroupQueryAttention(3, 4, 2), (2, 6), 4),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), (2, 6), 4),
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(3, 2), (2, 9, 4), 2),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(6)), (2, 4), 1),
    "LayerNormalization": (lambda: layers.LayerNormalization(axis=(-2, -1)), (3, 4), 1),
    "PReLU": (lambda: layers.PReLU(alpha_initializer="ones"), (3, 4), 1),
}


@pytest.mark.parametrize("row", COMPUTED)
def test_units_are_what_feeds_one_output(measure, row):
    """Derivatives of the layer itself say so; they know nothing of the table of layer types."""
    make, shape, checked = COMPUTED[row]
    layer = make()
    random = np.random.RandomState(0)
    x = tf.constant(random.randn(2, *shape), tf.float32)
    arguments = (x, x) if "HeadAttention" in row or "Query" in row else (x,)
    layer(*arguments)
    found = measure(layer, lambda: layer(*arguments))
    assert found.complete
    assert found.wrong == {}
    assert found.checked == checked


class TestUnits(UnitsContract):
    driver = TensorFlowDriver()
    unknown = "'table' of Own 'own'"

    def test_computing_units_sees_a_wrong_table(self, measure, registry):
        agc_tensorflow.register_units(layers.Dense, {"kernel": "i o -> i"})
        layer = built(layers.Dense(6), 4)
        found = measure(layer, lambda: layer(tf.ones((2, 4))))
        assert set(found.wrong) == {"kernel"}

    def test_registering_again_reaches_a_model_that_was_planned(self, registry):
        layer = built(layers.Dense(2, use_bias=False), 3)

        def units() -> int:
            _, stats = agc_tensorflow.adaptive_clip_gradients(
                [tf.ones((3, 2))], layer.trainable_variables, AGC(), model=layer, return_stats=True
            )
            return stats.total().units

        assert units() == 2
        agc_tensorflow.register_units(layers.Dense, {"kernel": "i o -> i"})
        assert units() == 3


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


def test_frozen_parameters_are_marked_and_statistics_do_not_come_in():
    norm = layers.BatchNormalization(name="norm")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="a"), norm], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="b")])
    variables = model.trainable_variables
    inner.trainable = False
    model.layers[1].bias.trainable = False
    for given in (model, variables):
        plan = agc_tensorflow.plan(given, AGC(exclude=["*a.*"], units={"*b.kernel": "i o -> o"}))
        assert [entry.inactive for entry in plan] == [*4 * ["frozen"], None, "frozen"]
        assert plan.count == 2
    inner.trainable = True
    assert agc_tensorflow.plan(model, AGC()).count == (5 + 1) + (1 + 1) + 2


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


def test_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(3)], name="late")
    with pytest.raises(ParameterError, match=r"'late' is not built.*model.build\(input_shape\)"):
        agc_tensorflow.plan(model, AGC())


def test_two_variables_of_one_name_are_refused():
    pairs = [("w", tf.Variable(tf.zeros(2))), ("w", tf.Variable(tf.zeros(3)))]
    with pytest.raises(ParameterError, match="two parameters are called 'w'"):
        agc_tensorflow.plan(pairs, AGC())
