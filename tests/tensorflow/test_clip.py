"""Clipping by hand: what is peculiar to tapes, graphs and variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc import AGC
from agc.errors import ConfigError, DTypeError, ParameterError, ShapeError
from agc.reference import Stats
from agc_tensorflow import adaptive_clip_gradients
from agc_tensorflow.norms import sum_of_squares
from agc_tensorflow.views import Fold
from benchmarks.shapes import declared, nfnet_f0, out_last
from tests.contract.clip import ClipContract, SparseContract, VectorsContract
from tests.tensorflow.driver import TensorFlowDriver

MATRIX = AGC(units={"w": "i o -> o"})


class TestClip(ClipContract):
    driver = TensorFlowDriver()


class TestSparse(SparseContract):
    driver = TensorFlowDriver()


class TestVectors(VectorsContract):
    driver = TensorFlowDriver()


# Policies


def test_policy_raise_under_xla_says_what_to_do():
    variable = tf.Variable([1.0], name="w")

    @tf.function(jit_compile=True, autograph=False)
    def step(gradient):
        return adaptive_clip_gradients([gradient], [variable], AGC(nonfinite="raise"))

    with pytest.raises(ConfigError, match=r"jit_compile=False"):
        step(tf.constant([1.0]))


def test_policy_raise_in_a_graph_raises_when_it_runs_before_anything_is_written():
    variable = tf.Variable([1.0, 2.0], name="bad")

    @tf.function(autograph=False)
    def step(gradient):
        [clipped] = adaptive_clip_gradients([gradient], [variable], AGC(nonfinite="raise"))
        variable.assign_sub(clipped)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"NonFiniteError(.|\n)*bad"):
        step(tf.constant([math.nan, 1.0]))
    assert variable.numpy().tolist() == [1.0, 2.0]


# Row-sparse gradients


def test_sparse_rows_come_once_in_their_dtype():
    table = tf.Variable(tf.ones((9, 2), tf.float16), name="t")
    gradient = tf.IndexedSlices(tf.ones((3, 2), tf.float16), tf.constant([5, 2, 5], tf.int64))
    [got] = adaptive_clip_gradients([gradient], [table], AGC(units={"t": "v d -> v"}))
    assert got.indices.numpy().tolist() == [5, 2]
    assert got.values.dtype == tf.float16
    assert got.indices.dtype == tf.int64


def test_gradients_of_a_tape():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Embedding(20, 4, name="table"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="head"),
        ]
    )
    unused = keras.layers.Dense(2, name="unused")
    unused.build((None, 3))
    variables = [*model.trainable_variables, *unused.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.constant([[1, 2, 3, 4, 5, 1]])) ** 2)
    gradients = tape.gradient(loss, variables)
    rule = AGC(units={"*.embeddings": "v d -> v", "*kernel": "i o -> o"})
    clipped, stats = adaptive_clip_gradients(gradients, variables, rule, return_stats=True)
    assert isinstance(clipped[0], tf.IndexedSlices)
    assert clipped[3:] == [None, None]
    head = {"sequential.head.kernel", "sequential.head.bias"}
    assert set(stats.parameters()) == {"sequential.table.embeddings", *head}
    by_model = adaptive_clip_gradients(gradients[:3], variables[:3], AGC(), model=model)
    assert (by_model[0].values.numpy() == clipped[0].values.numpy()).all()
    assert (by_model[1].numpy() == clipped[1].numpy()).all()


# Graphs


@pytest.mark.parametrize("jit", [False, True])
def test_a_graph_has_fewer_operations_than_that_of_clipnorm(jit):
    shapes = nfnet_f0()
    variables = [tf.Variable(tf.zeros(out_last(*item)), name=item[0]) for item in shapes.items()]
    gradients = [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]
    rule = AGC(units=declared(shapes, "... i o -> o"))

    def operations(clip: Callable[[Any], Any]) -> int:
        """Count what is traced: the operations of a graph, and those of its functions once."""
        traced = tf.function(clip, autograph=False, jit_compile=jit)
        graph = traced.get_concrete_function(gradients).graph.as_graph_def()
        return len(graph.node) + sum(len(body.node_def) for body in graph.library.function)

    clipnorm = operations(keras.optimizers.SGD(clipnorm=1.0)._clip_gradients)
    assert operations(lambda g: adaptive_clip_gradients(g, variables, rule)) < clipnorm


# Rows are cut otherwise under XLA, long ones too, and these lengths leave a rest, one run, or none.
@pytest.mark.parametrize("length", [31, 32, 512, 768, 1000, 3000])
def test_norms_of_compiled_rows_are_accurate(length):
    shape = 1024, length
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    # In these rows a sum in float32 that has met the 1 loses every other square.
    array[::2] = 2.0**-12.5
    array[::2, 0] = 1
    wanted = np.square(array.astype(np.float64)).sum(1)
    compiled = tf.function(
        lambda x: sum_of_squares(x, Fold(shape, (1,)), wide=False), jit_compile=True
    )
    for sums in (
        compiled(array),
        sum_of_squares(tf.constant(array), Fold(shape, (1,)), wide=False),
    ):
        np.testing.assert_allclose(np.sqrt(sums), np.sqrt(wanted), rtol=2.0**-22)


# Schedules


def test_schedule_that_returns_nonsense():
    variable = tf.Variable([3.0], name="w")
    with pytest.raises(ConfigError, match=r"'w'.*returned -1.0"):
        adaptive_clip_gradients([variable], [variable], AGC(clipping=lambda step: -1.0))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_nonsense_inside_a_graph_is_seen_under_every_policy(value, jit):
    """Zeros would look like training that has converged."""
    rule = AGC(clipping={"w": lambda step: value, "*": 0.1}, nonfinite="zero")
    variables = [tf.Variable([3.0], name="w"), tf.Variable([3.0], name="v")]

    @tf.function(autograph=False, jit_compile=jit)
    def step(at):
        return adaptive_clip_gradients([tf.constant([9.0])] * 2, variables, rule, step=at)

    w, v = step(tf.constant(1))
    assert np.isnan(w.numpy()).all()
    assert v.numpy() == pytest.approx(0.3)


def test_one_variable_without_a_list():
    variable = tf.Variable([3.0], name="w")
    with pytest.raises(ParameterError, match="give sequences of gradients and variables"):
        adaptive_clip_gradients(tf.constant([9.0]), variable, AGC())
    with pytest.raises(ParameterError, match="a variable was given twice"):
        adaptive_clip_gradients([tf.constant([9.0])] * 2, [variable] * 2, AGC())


@pytest.mark.parametrize("model", [None, 5.0, "x"])
def test_a_model_is_not(model):
    with pytest.raises(ParameterError, match=r"a model is a Keras layer, a tf\.Module, a mapping"):
        agc_tensorflow.plan(model, AGC())


def test_switched_off_and_excluded_gradients_are_passed_on():
    a, b = tf.Variable([3.0], name="a"), tf.Variable(tf.ones((9, 5)), name="b")
    gradients = [tf.constant([9.0]), tf.IndexedSlices(tf.ones((1, 5)), tf.constant([4]))]
    rule = AGC(clipping={"a": None, "*": 0.1}, exclude=["b"])
    clipped, stats = adaptive_clip_gradients(gradients, [a, b], rule, return_stats=True)
    assert clipped[0] is gradients[0]
    assert clipped[1] is gradients[1]
    assert stats.total() == Stats(0, 0, 0, 0.0, 1.0)
    assert stats.parameters() == {}


def test_a_model_finds_its_variables_in_any_order():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    kernel, bias = model.trainable_variables
    gradients = {"kernel": tf.ones((4, 3)), "bias": tf.ones(3)}
    there = adaptive_clip_gradients(list(gradients.values()), [kernel, bias], AGC(), model=model)
    back = adaptive_clip_gradients(
        [gradients["bias"], gradients["kernel"].numpy()], [bias.value, kernel], AGC(), model=model
    )
    assert (there[0].numpy() == back[1].numpy()).all()
    assert (there[1].numpy() == back[0].numpy()).all()


class TestRefuses:
    w = property(lambda self: tf.Variable(tf.ones((2, 3)), name="w"))

    def test_shape_of_sparse_rows(self):
        gradient = tf.IndexedSlices(tf.ones((1, 4)), tf.constant([0]))
        with pytest.raises(ShapeError, match=r"'w' has shape \(2, 3\), its gradient \(2, 4\)"):
            adaptive_clip_gradients([gradient], [self.w], MATRIX)

    def test_integer_weight(self):
        weight = tf.Variable(tf.ones((2, 3), tf.int32), name="w")
        with pytest.raises(DTypeError, match="'w': the weight has dtype int32"):
            adaptive_clip_gradients([tf.ones((2, 3))], [weight], MATRIX)

    def test_number_of_gradients(self):
        with pytest.raises(ParameterError, match="2 gradients were given for 1 variables"):
            adaptive_clip_gradients([None, tf.ones((2, 3))], [self.w], MATRIX)

    def test_variable_of_another_model(self):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        with pytest.raises(ParameterError, match=r"'w' of shape \(2, 3\) is not a parameter"):
            adaptive_clip_gradients([tf.ones((2, 3))], [self.w], AGC(), model=model)
