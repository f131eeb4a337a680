"""Clipping by hand, against the float64 reference: modes, dtypes, layouts, policies, sparsity,
telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import agc_tensorflow
from agc import AGC, SAM, Schedule, Units
from agc.errors import (
    AmbiguousUnitsError,
    ConfigError,
    DTypeError,
    MissingGradientError,
    NonFiniteError,
    ParameterError,
    ShapeError,
    UnitsError,
)
from agc.reference import RowSparse, Stats, adaptive_clip, clip_units
from agc_tensorflow import adaptive_clip_gradients, plan

Array = npt.NDArray[Any]

MODES = ("eager", "graph", "xla")


def run(mode: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function eagerly, inside a tf.function, or compiled by XLA."""
    if mode == "eager":
        return function(*arguments)
    compiled = tf.function(function, jit_compile=mode == "xla", autograph=False)
    return compiled.get_concrete_function(*arguments)(*arguments)


def clip(mode: str, weight: Any, gradient: Any, rule: AGC, **options: Any) -> Any:
    """Clip one parameter called "w"; a matrix stores its outputs last."""
    if len(np.shape(weight)) == 2 and not rule.units:
        rule = replace(rule, units={"w": "i o -> o"})
    variable = tf.Variable(weight, name="w")
    return run(mode, lambda g: adaptive_clip_gradients([g], [variable], rule, **options), gradient)


def ulp_error(got: Any, want: Array, dtype: str = "float32") -> float:
    """Largest difference in units in the last place of a real dtype, `want` being exact."""
    got = np.asarray(got)
    if np.iscomplexobj(got):
        return max(ulp_error(got.real, want.real, dtype), ulp_error(got.imag, want.imag, dtype))
    bits, low = {
        "float16": (11, -14),
        "bfloat16": (8, -126),
        "float32": (24, -126),
        "float64": (53, -1022),
    }[dtype]
    exponent = np.maximum(np.frexp(np.abs(want))[1], low + 1)
    return float(np.max(np.abs(got.astype(np.float64) - want) / np.ldexp(1.0, exponent - bits)))


def heterogeneous(seed: int, *shape: int) -> Array:
    """Random numbers whose scale differs along every axis, so that a wrong axis shows."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape)
    for axis, size in enumerate(shape):
        scale = np.exp2(random.uniform(-3, 3, size))
        values *= scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return values


LAYOUTS = {
    "scalar": ((), "... ->"),
    "vector": ((7,), "... ->"),
    "each element": ((7,), "o -> o"),
    "dense": ((6, 5), "i o -> o"),
    "each of more": ((19,), "o -> o"),
    "dense 1->C": ((1, 5), "i o -> o"),
    "dense 1->C, more": ((1, 10), "i o -> o"),
    "conv": ((3, 3, 4, 5), "... i o -> o"),
    "transposed": ((3, 3, 5, 4), "... o i -> o"),
    "depthwise": ((3, 3, 4, 2), "... c m -> c m"),
    "embedding": ((9, 4), "v d -> v"),
    "stacked": ((2, 6, 5), "l i o -> l o"),
    "split": ((6, 5, 3), "(g=2 i) o ... -> g o"),
    "middle": ((4, 5, 3), "a b c -> b"),
    "rank 6": ((2, 3, 2, 2, 3, 4), "... i o -> o"),
    "bias of heads": ((3, 4), "... ->"),
    "large": ((64, 300), "i o -> o"),
    "large, odd": ((63, 301), "i o -> o"),
    "large, first": ((301, 64), "v d -> v"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, mode):
    shape, pattern = LAYOUTS[layout]
    weight = heterogeneous(1, *shape).astype(np.float32)
    gradient = heterogeneous(2, *shape).astype(np.float32)
    rule = AGC(clipping=0.5, units={"w": pattern})
    [got], stats = clip(mode, weight, tf.constant(gradient), rule, return_stats=True)
    want = clip_units(gradient, weight, Units(pattern), clipping=0.5)
    assert got.shape == shape
    assert ulp_error(got, want.gradient) <= 4
    assert stats.total().clipped == want.clipped.sum() > 0
    assert stats.total().units == want.scale.size


DTYPES = [
    ("float16", "float16", 1),
    ("bfloat16", "bfloat16", 1),
    ("float32", "float32", 4),
    ("float64", "float64", 6),
    ("complex64", "complex64", 4),
    ("complex128", "complex128", 6),
    ("float16", "float32", 1),
    ("bfloat16", "float32", 1),
    ("float32", "bfloat16", 4),
    ("float32", "float64", 4),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("gradient_dtype", "weight_dtype", "limit"), DTYPES)
def test_dtype(gradient_dtype, weight_dtype, limit, mode):
    def make(seed: int, dtype: str) -> tf.Tensor:
        values = heterogeneous(seed, 30, 40)
        if "complex" in dtype:
            values = values + 1j * heterogeneous(seed + 10, 30, 40)
        return tf.cast(tf.constant(values), dtype)

    weight, gradient = make(1, weight_dtype), make(2, gradient_dtype)
    [got] = clip(mode, weight, gradient, AGC(clipping=0.3))
    # Contiguous units, so that NumPy adds the reference up in pairs: its own error counts in
    # float64.
    want = clip_units(
        gradient.numpy().T.copy(), weight.numpy().T.copy(), Units("o i -> o"), clipping=0.3
    ).gradient.T
    assert got.dtype == gradient_dtype
    real = {"complex64": "float32", "complex128": "float64"}.get(gradient_dtype, gradient_dtype)
    assert ulp_error(got.numpy(), want, real) <= limit


def adversarial(kind: str, seed: int, fan_in: int, units: int) -> Array:
    random = np.random.default_rng(seed)
    values = random.uniform(0.5, 1, (fan_in, units))
    if kind == "one value":
        values = np.repeat(random.uniform(0.5, 2, (1, units)), fan_in, 0)
    elif kind == "one large":
        values[0] = random.uniform(3, 1000, units)
    elif kind == "heterogeneous":
        values = random.standard_normal((fan_in, units))
        values *= np.exp(3 * random.standard_normal((fan_in, units)))
    return values.astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fan_in", [27, 1152, 4608, 4607])
def test_accuracy(fan_in, mode):
    kinds = ("positive", "one value", "one large", "heterogeneous")
    weight, gradient = (
        np.concatenate([adversarial(kind, seed, fan_in, 200) for kind in kinds], 1)
        for seed in (1, 2)
    )
    [got] = clip(mode, weight, tf.constant(gradient), AGC())
    want = clip_units(gradient, weight, Units("i o -> o"))
    assert want.clipped.mean() > 0.9
    assert ulp_error(got, want.gradient) <= 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
def test_what_is_not_clipped_keeps_its_bits(share, mode):
    shape = (100, 400)
    gradient = heterogeneous(1, *shape).astype(np.float32)
    gradient[0], gradient[1], gradient[2] = 1e-40, -0.0, -1e-45  # TensorFlow flushes subnormals
    clipped = np.arange(400) < 400 * share
    weight = np.where(clipped, 1e-3, 1e9) * np.ones(shape, np.float32)
    [got] = clip(mode, weight.astype(np.float32), tf.constant(gradient), AGC())
    same = (got.numpy().view(np.int32) == gradient.view(np.int32)).all(axis=0)
    assert (same == ~clipped).all()


@pytest.mark.parametrize("mode", MODES)
def test_tie_is_not_clipped(mode):
    weight = np.array([[6.0, 3.0], [8.0, 4.0]], np.float32)
    gradient = np.array([[3.0, 1.5], [4.0, np.nextafter(np.float32(2), np.float32(3))]], np.float32)
    [got] = clip(mode, weight, tf.constant(gradient), AGC(clipping=0.5))
    assert (got.numpy()[:, 0] == gradient[:, 0]).all()
    assert got.numpy()[1, 1] < gradient[1, 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clipping", [0.5, Schedule([(0, 0.5)])], ids=["number", "schedule"])
def test_tiny_limits_see_tiny_gradients(clipping, mode):
    weight = np.zeros((20, 2), np.float32)
    weight[:, 1] = 1e-25
    gradient = np.full((20, 2), 1e-24, np.float32)  # their squares are 0 in float32
    rule = AGC(clipping=clipping, eps=0)
    [got] = clip(mode, weight, tf.constant(gradient), rule)
    want = clip_units(gradient, weight, Units("i o -> o"), clipping=0.5, eps=0).gradient
    assert (got.numpy()[:, 0] == 0).all()
    assert ulp_error(got, want) <= 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize("shape", [(4, 6), (200, 300)], ids=["small", "large"])
def test_nonfinite(shape, policy, mode):
    weight = np.abs(heterogeneous(1, *shape)).astype(np.float32) + 1
    gradient = heterogeneous(2, *shape).astype(np.float32)
    gradient[0, 0], gradient[1, 1], gradient[2, 2], weight[3, 3] = np.nan, np.inf, -np.inf, np.nan
    rule = AGC(nonfinite=policy)
    [got], stats = clip(mode, weight, tf.constant(gradient), rule, return_stats=True)
    want = clip_units(gradient, weight, Units("i o -> o"), nonfinite=policy)
    poisoned = got.numpy()[:, :4]
    assert np.isnan(poisoned).all() if policy == "propagate" else (poisoned == 0).all()
    assert ulp_error(got.numpy()[:, 4:], want.gradient[:, 4:]) <= 4
    assert stats.total().nonfinite == 4
    assert math.isfinite(stats.total().max_ratio)


@pytest.mark.parametrize("mode", MODES)
def test_nonfinite_raise_passes_finite_gradients(mode):
    rule = AGC(nonfinite="raise")
    if mode == "xla":
        with pytest.raises(ConfigError, match=r"jit_compile=False"):
            clip(mode, [[3.0]], tf.constant([[1.0]]), rule)
        return
    [got] = clip(mode, [[3.0]], tf.constant([[1.0]]), rule)
    assert got.numpy() == pytest.approx(0.03)


def test_nonfinite_raise_eager_names_the_parameter():
    variables = {"good": tf.Variable([1.0]), "bad": tf.Variable([1.0])}
    gradients = [tf.constant([1.0]), tf.constant([math.inf])]
    with pytest.raises(NonFiniteError, match=r"parameters 'bad' have units.*AGC-4"):
        adaptive_clip_gradients(
            gradients, list(variables.values()), AGC(nonfinite="raise"), model=variables
        )


def test_nonfinite_raise_in_a_graph_raises_when_it_runs_before_anything_is_written():
    variable = tf.Variable([1.0, 2.0], name="bad")

    @tf.function(autograph=False)
    def step(gradient):
        [clipped] = adaptive_clip_gradients([gradient], [variable], AGC(nonfinite="raise"))
        variable.assign_sub(clipped)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"NonFiniteError(.|\n)*bad"):
        step(tf.constant([math.nan, 1.0]))
    assert variable.numpy().tolist() == [1.0, 2.0]


SPARSE = {
    "rows": ([4, 1, 7], "v d -> v"),
    "duplicates": ([4, 1, 4, 4], "v d -> v"),
    "whole": ([4, 1, 4], "... ->"),
    "none": ([], "v d -> v"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SPARSE)
def test_sparse(case, mode):
    rows, pattern = SPARSE[case]
    weight = heterogeneous(1, 9, 5).astype(np.float32)
    weight[0] = np.nan  # a row that nothing touches
    if pattern == "... ->":
        weight[0] = 0
    values = heterogeneous(2, len(rows), 5).astype(np.float32)
    table = tf.Variable(weight, name="table")
    dense = tf.Variable([3.0, 4.0], name="dense")
    rule = AGC(units={"table": pattern})

    def both(values: tf.Tensor, indices: tf.Tensor) -> Any:
        return adaptive_clip_gradients(
            [tf.IndexedSlices(values, indices, tf.constant([9, 5])), tf.constant([1.0, 0.0])],
            [table, dense],
            rule,
            return_stats=True,
        )

    (got, other), stats = run(mode, both, tf.constant(values), tf.constant(rows, tf.int32))
    want = adaptive_clip(
        {"table": weight, "dense": np.array([3.0, 4.0])},
        {"table": RowSparse(np.array(rows, int), values, (9, 5)), "dense": np.array([1.0, 0.0])},
        plan({"table": table, "dense": dense}, rule),
        rule,
    )
    assert isinstance(got, tf.IndexedSlices)
    assert set(got.indices.numpy()) == set(rows)
    clipped = RowSparse(got.indices.numpy(), got.values.numpy(), (9, 5)).to_dense()
    assert ulp_error(clipped, want.gradients["table"].to_dense()) <= 4
    assert ulp_error(other, want.gradients["dense"]) <= 4
    assert stats.total().units == want.total.units
    assert stats.total().clipped == want.total.clipped
    assert stats.total().nonfinite == 0


def test_sparse_rows_come_once_in_their_dtype():
    table = tf.Variable(tf.ones((9, 2), tf.float16), name="t")
    gradient = tf.IndexedSlices(tf.ones((3, 2), tf.float16), tf.constant([5, 2, 5], tf.int64))
    [got] = adaptive_clip_gradients([gradient], [table], AGC(units={"t": "v d -> v"}))
    assert got.indices.numpy().tolist() == [5, 2]
    assert got.values.dtype == tf.float16
    assert got.indices.dtype == tf.int64


def test_sparse_columns_are_refused():
    table = tf.Variable(tf.ones((9, 5)), name="t")
    gradient = tf.IndexedSlices(tf.ones((1, 5)), tf.constant([4]))
    with pytest.raises(UnitsError, match=r"'t'.*row-sparse.*give the model.*'v d -> v'"):
        adaptive_clip_gradients([gradient], [table], AGC(units={"t": "i o -> o"}))
    [kept] = adaptive_clip_gradients([gradient], [table], AGC(exclude=["t"]))
    assert kept is gradient


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


@pytest.mark.parametrize("mode", MODES)
def test_schedule(mode):
    rule = AGC(
        clipping={"a": Schedule([(2, 0.1), (4, 0.3), (8, 0.2)]), "b": lambda step: 0.01, "*": 0.05}
    )
    names = ("a", "b", "c")
    weights = {name: np.array([3.0, 4.0], np.float32) for name in names}
    variables = {name: tf.Variable(weights[name]) for name in names}

    def at(step: tf.Tensor) -> Any:
        gradients = [tf.constant([9.0, 1.0])] * 3
        return adaptive_clip_gradients(
            gradients, list(variables.values()), rule, model=variables, step=step
        )

    step_function = (
        at if mode == "eager" else tf.function(at, jit_compile=mode == "xla", autograph=False)
    )
    for step in range(10):
        want = adaptive_clip(
            weights,
            dict.fromkeys(names, np.array([9.0, 1.0])),
            plan(variables, rule),
            rule,
            step=step,
        )
        for name, got in zip(names, step_function(tf.constant(step, tf.int64)), strict=True):
            assert ulp_error(got, want.gradients[name]) <= 4, (step, name)


def test_schedule_of_tensors_inside_a_graph():
    rule = AGC(clipping=lambda step: 0.5 / (1.0 + tf.cast(step, tf.float32)))
    [got] = clip("graph", [3.0, 4.0], tf.constant([9.0, 0.0]), rule, step=tf.constant(1))
    assert got.numpy()[0] == pytest.approx(0.25 * 5)


def test_schedule_that_returns_nonsense():
    rule = AGC(clipping=lambda step: -1.0)
    with pytest.raises(ConfigError, match=r"'w'.*returned -1.0"):
        clip("eager", [3.0], tf.constant([9.0]), rule, step=tf.constant(1))
    variable = tf.Variable([3.0], name="w")

    @tf.function(autograph=False)
    def step(at):
        return adaptive_clip_gradients([tf.constant([9.0])], [variable], rule, step=at)

    assert np.isnan(step(tf.constant(1))[0].numpy()).all()


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


@pytest.mark.parametrize("rule", [None, 0.01, {"clipping": 0.01}, SAM()])
def test_a_rule_is_an_agc(rule):
    variable = tf.Variable([3.0], name="w")
    with pytest.raises(ConfigError, match=r"rule must be an agc\.AGC, got"):
        adaptive_clip_gradients([tf.constant([9.0])], [variable], rule)
    with pytest.raises(ConfigError, match=r"rule must be an agc\.AGC, got"):
        agc_tensorflow.plan([variable], rule)


@pytest.mark.parametrize("model", [None, 5.0, "x"])
def test_a_model_is_not(model):
    with pytest.raises(ParameterError, match=r"a model is a Keras layer, a tf\.Module, a mapping"):
        agc_tensorflow.plan(model, AGC())


def test_switched_off_and_excluded_gradients_are_passed_on():
    a, b = tf.Variable([3.0], name="a"), tf.Variable([3.0], name="b")
    gradients = [tf.constant([9.0]), tf.constant([9.0])]
    rule = AGC(clipping={"a": None, "*": 0.1}, exclude=["b"])
    clipped, stats = adaptive_clip_gradients(gradients, [a, b], rule, return_stats=True)
    assert clipped[0] is gradients[0]
    assert clipped[1] is gradients[1]
    assert stats.total() == Stats(0, 0, 0, 0.0, 1.0)
    assert stats.parameters() == {}


@pytest.mark.parametrize("mode", MODES)
def test_statistics(mode):
    weights = {"a": heterogeneous(1, 20, 30), "b": heterogeneous(2, 300, 100), "c": np.ones(3)}
    gradients = {"a": heterogeneous(3, 20, 30), "b": heterogeneous(4, 300, 100), "c": None}
    gradients["a"][0, 0] = np.nan
    variables = {name: tf.Variable(w.astype(np.float32)) for name, w in weights.items()}
    rule = AGC(clipping=0.7, units={"a": "i o -> o", "b": "i o -> o"})
    given = [None if g is None else tf.constant(g.astype(np.float32)) for g in gradients.values()]

    def both(*dense: tf.Tensor) -> Any:
        return adaptive_clip_gradients(
            [*dense, None], list(variables.values()), rule, model=variables, return_stats=True
        )

    _, stats = run(mode, both, *given[:2])
    want = adaptive_clip(
        {name: v.numpy() for name, v in variables.items()},
        {name: None if g is None else g.numpy() for name, g in zip(weights, given, strict=True)},
        plan(variables, rule),
        rule,
    )
    assert set(stats.parameters()) == {"a", "b"}
    for name, one in {**stats.parameters(), "total": stats.total()}.items():
        reference = want.total if name == "total" else want.stats[name]
        assert (one.units, one.clipped, one.nonfinite) == (
            reference.units,
            reference.clipped,
            reference.nonfinite,
        )
        assert one.max_ratio == pytest.approx(reference.max_ratio, rel=1e-6)
        assert one.min_scale == pytest.approx(reference.min_scale, rel=1e-6)


@pytest.mark.parametrize("profile", ["deepmind", "optax", "timm", "pytorch_optimizer", "dreamerv3"])
def test_profile(profile):
    shapes = {"conv": (3, 3, 4, 5), "dense": (6, 5), "one": (1, 5), "bias": (5,)}
    weights = {
        n: heterogeneous(i, *s).astype(np.float32) for i, (n, s) in enumerate(shapes.items())
    }
    gradients = {n: heterogeneous(9, *s).astype(np.float32) for n, s in shapes.items()}
    variables = {name: tf.Variable(w) for name, w in weights.items()}
    rule = AGC.profile(profile, **({"exclude": ["dense"]} if profile == "deepmind" else {}))
    got = adaptive_clip_gradients(
        [tf.constant(g) for g in gradients.values()],
        list(variables.values()),
        rule,
        model=variables,
    )
    want = adaptive_clip(weights, gradients, plan(variables, rule), rule)
    for name, one in zip(shapes, got, strict=True):
        assert ulp_error(one, want.gradients[name]) <= 4, name


def test_empty_and_scalar_parameters():
    empty, scalar = tf.Variable(tf.zeros((0, 3)), name="e"), tf.Variable(2.0, name="s")
    got = adaptive_clip_gradients([tf.zeros((0, 3)), tf.constant(1.0)], [empty, scalar], AGC())
    assert got[0].shape == (0, 3)
    assert got[1].shape == ()
    assert float(got[1]) == pytest.approx(0.02)


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


MATRIX = AGC(units={"w": "i o -> o"})


class TestRefuses:
    w = property(lambda self: tf.Variable(tf.ones((2, 3)), name="w"))

    def test_no_gradients(self):
        with pytest.raises(MissingGradientError, match="no parameter has a gradient"):
            adaptive_clip_gradients([None], [self.w], MATRIX)

    def test_shape(self):
        with pytest.raises(ShapeError, match=r"'w' has shape \(2, 3\), its gradient \(3, 2\)"):
            adaptive_clip_gradients([tf.ones((3, 2))], [self.w], MATRIX)

    def test_shape_that_would_broadcast(self):
        with pytest.raises(ShapeError, match=r"gradient \(3,\)"):
            adaptive_clip_gradients([tf.ones(3)], [self.w], MATRIX)

    def test_shape_of_sparse_rows(self):
        gradient = tf.IndexedSlices(tf.ones((1, 4)), tf.constant([0]))
        with pytest.raises(ShapeError, match=r"'w' has shape \(2, 3\), its gradient \(2, 4\)"):
            adaptive_clip_gradients([gradient], [self.w], MATRIX)

    @pytest.mark.parametrize("dtype", ["int32", "bool"])
    def test_integer_gradient(self, dtype):
        with pytest.raises(DTypeError, match=f"'w': the gradient has dtype {dtype}"):
            adaptive_clip_gradients([tf.cast(tf.ones((2, 3)), dtype)], [self.w], MATRIX)

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

    def test_rank_3(self):
        weight = tf.Variable(tf.ones((2, 3, 4)), name="cube")
        with pytest.raises(AmbiguousUnitsError, match="'cube' with shape"):
            adaptive_clip_gradients([tf.ones((2, 3, 4))], [weight], AGC())


floats = st.floats(-100, 100, width=32)
matrices = st.integers(1, 6).flatmap(
    lambda o: st.lists(st.lists(floats, min_size=o, max_size=o), min_size=1, max_size=6)
)


@settings(max_examples=40, deadline=None)
@given(gradient=matrices, power=st.integers(-8, 8), seed=st.integers(0, 99))
def test_properties(gradient, power, seed):
    g = np.array(gradient, np.float32)
    w = np.random.default_rng(seed).standard_normal(g.shape).astype(np.float32)
    rule = AGC(clipping=0.25, eps=1e-6)
    [got] = clip("eager", w, tf.constant(g), rule)
    want = clip_units(g, w, Units("i o -> o"), clipping=0.25, eps=1e-6)
    before, after = (np.linalg.norm(x.astype(np.float64), axis=0) for x in (g, got.numpy()))
    assert (after <= before).all(), "a norm grew"
    assert (after <= np.maximum(want.limit[0], before * ~want.clipped[0]) * (1 + 1e-6)).all()
    assert (np.sign(got.numpy()) * np.sign(g) >= 0).all(), "a direction changed"
    # Units are independent: permuting them permutes the result.
    order = np.random.default_rng(seed).permutation(g.shape[1])
    [permuted] = clip("eager", w[:, order], tf.constant(g[:, order]), rule)
    assert (permuted.numpy() == got.numpy()[:, order]).all()
    # Powers of two scale exactly.
    factor = np.float32(2.0**power)
    scaled_rule = AGC(clipping=0.25, eps=1e-6 * 2.0**power)
    [scaled] = clip("eager", w * factor, tf.constant(g * factor), scaled_rule)
    normal = np.abs(got.numpy()) > 1e-30
    assert (scaled.numpy() == got.numpy() * factor)[normal].all()
