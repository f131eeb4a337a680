"""SAM in fit and in loops, against the float64 reference and the failures of other code."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc.config import AGC, SAM, Schedule
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, SelectorError
from agc.reference import sharpness_aware_gradients
from agc_tensorflow.sam import SharpnessAwareModel, sam_value_and_gradients, verify_sam


def net(seed=0, dtype="float64", extra=(), regularizer=None):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(
                8, "tanh", name="inner", dtype=dtype, kernel_regularizer=regularizer
            ),
            *extra,
            keras.layers.Dense(3, name="outer", dtype=dtype),
        ],
        name="net",
    )
    rng = np.random.default_rng(seed)
    for v in model.trainable_variables:
        if v.name in ("kernel", "bias"):
            v.assign(0.5 * rng.normal(size=v.shape))
    return model


def data(n=20):
    rng = np.random.default_rng(7)
    return rng.normal(size=(n, 6)), rng.integers(0, 3, n)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


# Keras adds up losses in float32 whatever their dtype, so fit is tested in float32.
LOSS32 = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def loss_of(model):
    return lambda x, y: LOSS(y, model(x, training=True))


def by_reference(model, batch, rule, step=0, replicas=1):
    twin = keras.models.clone_model(model)

    def gradients(point, part):
        for v, w in zip(twin.trainable_variables, point.values(), strict=True):
            v.assign(w)
        with tf.GradientTape() as tape:
            loss = LOSS(part[1], twin(part[0], training=True))
            loss += sum(tf.cast(one, tf.float64) for one in twin.losses)
        found = tape.gradient(loss, [v.value for v in twin.trainable_variables])
        return float(loss), {n: np.asarray(g) for n, g in zip(point, found, strict=True)}

    weights = {v.path: np.asarray(v) for v in model.trainable_variables}
    return sharpness_aware_gradients(gradients, weights, batch, rule, step=step, replicas=replicas)


RULES = {
    "plain": SAM(rho=0.1),
    "fraction": SAM(rho=0.1, fraction=0.2),
    "microbatches": SAM(rho=0.1, microbatches=3),
    "both": SAM(rho=0.1, microbatches=3, fraction=0.5),
    "adaptive": SAM(rho=0.5, adaptive=True),
    "only": SAM(rho=0.1, only=["*outer.*"]),
    "exclude": SAM(rho=0.1, exclude=["*.bias"]),
    "schedule": SAM(rho=Schedule([(0, 0.3), (6, 0.1)])),
    "every": SAM(rho=0.1, every=2),
    "davda54": SAM.profile("davda54"),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_equal_the_reference(rule, graph):
    model, batch = net(), data()
    want = by_reference(model, batch, rule, step=3)

    def compute(x, y):
        step = tf.constant(3, tf.int64)
        return sam_value_and_gradients(
            loss_of(model),
            model.trainable_variables,
            rule,
            batch=(x, y),
            step=step,
            return_stats=True,
        )

    compute = tf.function(compute) if graph else compute
    loss, gradients, stats = compute(*(tf.constant(a) for a in batch))
    plain = not want.norms
    assert float(loss) == pytest.approx(want.loss, rel=1e-12)
    assert float(stats.perturbed_loss) == pytest.approx(want.perturbed_loss, rel=1e-12)
    assert plain or float(stats.norm) == pytest.approx(max(want.norms), rel=1e-12)
    for got, expected in zip(gradients, want.gradients.values(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-14)


def fit_once(rule, *, optimizer=None, model=None, batch=None, **compile_options):
    inner = model or net(dtype="float32")
    x, y = batch or data()
    wrapped = SharpnessAwareModel(inner, rule)
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    wrapped.compile(optimizer, LOSS32, metrics=["accuracy"], **compile_options)
    history = wrapped.fit(x, y, batch_size=len(x), epochs=1, shuffle=False, verbose=0)
    return wrapped, history.history


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, {}, {"jit_compile": True}],
    ids=["eager", "graph", "xla"],
)
@pytest.mark.parametrize(
    "rule", [SAM(rho=0.1), SAM(rho=0.1, fraction=0.2)], ids=["full", "fraction"]
)
def test_fit_takes_the_reference_step(rule, options):
    model = net(dtype="float32", regularizer=keras.regularizers.L2(0.1))
    before = [np.asarray(v) for v in model.trainable_variables]
    want = by_reference(model, data(), rule)
    _, history = fit_once(rule, model=model, **options)
    for v, w, g in zip(model.trainable_variables, before, want.gradients.values(), strict=True):
        np.testing.assert_allclose(np.asarray(v), w - g, rtol=1e-5, atol=1e-6)
    assert history["loss"][0] == pytest.approx(want.loss, rel=1e-5)
    assert history["sharpness"][0] == pytest.approx(want.perturbed_loss - want.loss, rel=1e-3)


def test_fit_learns_evaluates_and_predicts():
    x, y = data(64)
    wrapped = SharpnessAwareModel(net(dtype="float32"), SAM())
    wrapped.compile(keras.optimizers.AdamW(0.05), LOSS32, metrics=["accuracy"])
    history = wrapped.fit(x, y, epochs=20, batch_size=16, validation_data=(x, y), verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert "val_sharpness" not in history
    result = wrapped.evaluate(x, y, verbose=0, return_dict=True)
    assert set(result) == {"loss", "accuracy"}
    assert wrapped.predict(x, verbose=0).shape == (64, 3)


def test_metrics_come_from_the_clean_pass():
    model, (x, y) = net(dtype="float32"), data()
    want = np.mean(np.argmax(model(x), -1) == y)
    _, history = fit_once(SAM(rho=3.0), model=model)
    assert history["accuracy"][0] == pytest.approx(want, abs=1e-6)


def test_saved_and_loaded_it_goes_on_as_if_never_stopped(tmp_path):
    x, y = data()
    rule = SAM(rho=Schedule([(0, 0.2), (10, 0.05)]))

    def build():
        wrapped = SharpnessAwareModel(net(dtype="float32"), rule)
        wrapped.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS32)
        return wrapped

    def fit(model, epochs):
        model.fit(x, y, batch_size=20, epochs=epochs, shuffle=False, verbose=0)

    whole = build()
    fit(whole, 6)
    first = build()
    fit(first, 3)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    assert second.rule == rule
    fit(second, 3)
    for a, b in zip(whole.trainable_variables, second.trainable_variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class TestState:
    def model(self):
        return net(
            dtype="float32",
            extra=[keras.layers.BatchNormalization(name="norm"), keras.layers.Dropout(0.5, seed=1)],
        )

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_statistics_are_updated_once(self, fraction):
        model, (x, _) = self.model(), data()
        twin = keras.models.clone_model(model)
        twin.set_weights(model.get_weights())
        twin(x.astype("float32"), training=True)
        fit_once(SAM(rho=1e-6, fraction=fraction), model=model, optimizer=keras.optimizers.SGD(0.0))
        got, want = (m.get_layer("norm").moving_mean for m in (model, twin))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        assert float(tf.norm(got)) > 0

    def test_dropout_has_the_same_mask_in_both_passes_and_moves_on(self):
        model, (x, y) = self.model(), data()
        masks = []

        def loss(x, y):
            out = model.get_layer("inner")(x)
            out = model.get_layer("norm")(out, training=True)
            dropped = model.layers[2](out, training=True)
            masks.append(np.asarray(dropped) == 0)
            return LOSS(y, model.get_layer("outer")(dropped))

        for _ in range(2):
            sam_value_and_gradients(
                loss,
                model.trainable_variables,
                SAM(),
                batch=(x, y),
                state=model.non_trainable_variables,
            )
        assert np.array_equal(masks[0], masks[1])
        assert not np.array_equal(masks[1], masks[2])


class TestNonFinite:
    def fit(self, rule, **options):
        x, y = data()
        x[0, 0] = np.inf
        model = net(dtype="float32")
        before = [np.asarray(v) for v in model.trainable_variables]
        optimizer = options.pop("optimizer", None)
        wrapped, _ = fit_once(rule, model=model, batch=(x, y), optimizer=optimizer, **options)
        same = [
            np.array_equal(np.asarray(v), w)
            for v, w in zip(model.trainable_variables, before, strict=True)
        ]
        return wrapped, all(same)

    @pytest.mark.parametrize("options", [{"run_eagerly": True}, {}, {"jit_compile": True}])
    def test_skip_step(self, options):
        wrapped, same = self.fit(SAM(), **options)
        assert same
        assert int(wrapped.optimizer.iterations) == 0

    def test_a_loss_scaler_skips_and_lowers_its_scale(self):
        scaler = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=1024.0
        )
        _, same = self.fit(SAM(), optimizer=scaler)
        assert same
        assert float(scaler.dynamic_scale) == 512.0

    def test_raise(self):
        with pytest.raises(NonFiniteError, match="norm of the ascent gradient is"):
            self.fit(SAM(nonfinite="raise"), run_eagerly=True)
        with pytest.raises(ConfigError, match="use run_eagerly=True"):
            self.fit(SAM(nonfinite="raise"))

    def test_loop(self):
        x, y = data()
        x[0, 0] = np.inf
        model = net()
        _, gradients = sam_value_and_gradients(
            loss_of(model), model.trainable_variables, SAM(), batch=(x, y)
        )
        assert all(np.isnan(g).all() for g in gradients)


def test_loss_scaling_does_not_change_the_step():
    plain, scaled = net(dtype="float32"), net(dtype="float32")
    fit_once(SAM(rho=0.1), model=plain)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1024.0)
    fit_once(SAM(rho=0.1), model=scaled, optimizer=optimizer)
    for a, b in zip(plain.trainable_variables, scaled.trainable_variables, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_weights_are_never_written():
    model, batch = net(), data()
    before = [np.asarray(v) for v in model.trainable_variables]
    seen = []

    def loss(x, y):
        seen.append(np.asarray(tf.convert_to_tensor(model.trainable_variables[0])))
        assert np.array_equal(model.trainable_variables[0]._value.numpy(), before[0])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return loss_of(model)(x, y)

    with pytest.raises(KeyboardInterrupt):
        sam_value_and_gradients(loss, model.trainable_variables, SAM(), batch=batch)
    assert not np.array_equal(seen[0], seen[1])
    for v, w in zip(model.trainable_variables, before, strict=True):
        assert np.array_equal(np.asarray(v), w)


def test_embedding_and_unused_variables():
    keras.utils.set_random_seed(0)
    table = keras.layers.Embedding(5, 3, dtype="float64")
    table.build()
    unused = keras.Variable(np.ones(2), dtype="float64")

    def loss():
        return tf.reduce_sum(table(tf.constant([1, 1, 3])) ** 2)

    _, (g, none) = sam_value_and_gradients(loss, [table.embeddings, unused], SAM(rho=0.1))
    assert none is None
    w = np.asarray(table.embeddings)
    plain = 2 * np.array([0, 2, 0, 1, 0])[:, None] * w
    moved = w + 0.1 * plain / np.linalg.norm(plain)
    want = 2 * np.array([0, 2, 0, 1, 0])[:, None] * moved
    np.testing.assert_allclose(tf.convert_to_tensor(g), want, rtol=1e-6)


def test_zero_gradient_is_a_plain_step():
    v = keras.Variable(np.zeros(3), dtype="float64")
    loss, (g,) = sam_value_and_gradients(lambda: tf.reduce_sum(v.value**2), [v], SAM())
    assert float(loss) == 0
    assert np.asarray(g).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_do_not_overflow_in_low_precision(dtype):
    v = keras.Variable(np.zeros(4), dtype=dtype)
    seen = []

    def loss():
        seen.append(np.asarray(tf.cast(v.value, tf.float64)).tolist())
        return tf.reduce_sum(tf.cast(v.value, tf.float32) * 60000.0)

    sam_value_and_gradients(loss, [v], SAM(rho=1.0))
    assert seen[1] == [0.5] * 4


def test_a_norm_beyond_the_range_of_the_loss():
    v = keras.Variable(np.ones(4), dtype="float32")

    def loss():
        return tf.cast(tf.reduce_sum((v.value - 1) * 1e5), tf.float16)

    found, gradients, stats = sam_value_and_gradients(loss, [v], SAM(), return_stats=True)
    assert found.dtype == tf.float16
    assert stats.norm.dtype == tf.float32
    assert float(stats.norm) == pytest.approx(2e5)
    np.testing.assert_allclose(gradients[0], np.full(4, 1e5))


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_complex_weights_move_uphill(dtype, adaptive):
    start = np.array([[3.0, 4.0j]])
    v = keras.Variable(tf.constant(start.astype(dtype)), dtype=dtype)
    rule = SAM(rho=0.5, adaptive=adaptive)

    def loss():
        return tf.reduce_sum(tf.square(tf.abs(v.value)))

    _, gradients, stats = sam_value_and_gradients(loss, [v], rule, return_stats=True)
    scale = np.abs(start) + rule.eta if adaptive else 1
    moved = start + 0.5 * scale**2 * start / np.linalg.norm(scale * start)
    np.testing.assert_allclose(gradients[0], 2 * moved, rtol=1e-5)
    assert float(stats.perturbed_loss) == pytest.approx(np.sum(np.abs(moved) ** 2), rel=1e-5)
    assert verify_sam(lambda f: sam_value_and_gradients(f, [v], rule)[1], loss, [v]).ok


class TestNames:
    """Patterns are compared with the names that AGC uses."""

    def test_of_a_model(self):
        inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="head")])
        assert inner.trainable_variables[0].path != "head/kernel"  # Keras numbers its models
        plan = agc_tensorflow.plan(inner, AGC(exclude=["head.bias"]))
        assert list(plan.decisions()) == ["head.kernel", "head.bias"]
        model = SharpnessAwareModel(inner, SAM(exclude=["head.bias"]))
        model.compile("sgd", "mse")
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)

    def test_of_variables(self):
        model = agc_tensorflow.nfnet("tiny")
        x = tf.ones((1, 32, 32, 3))

        def loss():
            return tf.reduce_mean(tf.square(model(x)))

        variables = model.trainable_variables
        names = list(agc_tensorflow.plan(variables, AGC()).decisions())
        assert "head.weight" in names
        _, _, head = sam_value_and_gradients(
            loss, variables, SAM(only=["head.*"]), return_stats=True
        )
        _, _, rest = sam_value_and_gradients(
            loss, variables, SAM(exclude=["head.*"]), return_stats=True
        )
        _, _, whole = sam_value_and_gradients(loss, variables, SAM(), return_stats=True)
        assert float(head.norm) > 0
        assert float(head.norm) ** 2 + float(rest.norm) ** 2 == pytest.approx(
            float(whole.norm) ** 2, rel=1e-4
        )


class TestErrors:
    @pytest.mark.parametrize("rho", [-1.0, 0.0, float("nan")])
    def test_nonsense_of_a_schedule(self, rho):
        v = keras.Variable(np.ones(3))
        rule = SAM(rho=lambda step: rho)

        def run(step):
            return sam_value_and_gradients(lambda: tf.reduce_sum(v**2), [v], rule, step=step)[1][0]

        with pytest.raises(ConfigError, match="the schedule returned"):
            run(0)
        with pytest.raises(ConfigError, match="the schedule returned"):
            run(tf.constant(0))
        assert np.isnan(tf.function(run, autograph=False)(tf.constant(0))).all()

    def test_loss(self):
        v = keras.Variable(np.ones(3))
        with pytest.raises(ConfigError, match=r"a scalar, got the shape \(3,\); take its mean"):
            sam_value_and_gradients(lambda: v**2, [v], SAM())

    @pytest.mark.parametrize("rule", [None, 0.05, AGC()])
    def test_rule(self, rule):
        v = keras.Variable(1.0)
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got"):
            sam_value_and_gradients(lambda: v**2, [v], rule)
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got"):
            SharpnessAwareModel(keras.Sequential(), rule)
        with pytest.raises(ConfigError, match=r"model must be a keras\.Model, got 5"):
            SharpnessAwareModel(5, SAM())

    def test_batch(self):
        model, batch = net(), data()
        loss = loss_of(model)
        with pytest.raises(ConfigError, match=r"fraction=0.2 .* give batch=\(inputs, targets\)"):
            sam_value_and_gradients(loss, model.trainable_variables, SAM(fraction=0.2))
        with pytest.raises(ConfigError, match="microbatches=21 is more than the 20 examples"):
            sam_value_and_gradients(
                loss, model.trainable_variables, SAM(microbatches=21), batch=batch
            )

    @pytest.mark.parametrize(
        "rule", [SAM(every=2), SAM(rho=lambda step: 0.1)], ids=["every", "rho"]
    )
    def test_step_is_needed(self, rule):
        model, batch = net(), data()
        with pytest.raises(ConfigError, match=r"give step=optimizer\.iterations"):
            sam_value_and_gradients(loss_of(model), model.trainable_variables, rule, batch=batch)

    def test_variables(self):
        with pytest.raises(ConfigError, match="is not a Keras variable"):
            sam_value_and_gradients(lambda: 0.0, [tf.Variable(1.0)], SAM())
        model, batch = net(), data()
        with pytest.raises(SelectorError, match="no parameter is left to perturb"):
            sam_value_and_gradients(
                loss_of(model), model.trainable_variables, SAM(exclude=["*"]), batch=batch
            )
        v = keras.Variable(1.0)
        with pytest.raises(MissingGradientError, match="no perturbed variable has a gradient"):
            sam_value_and_gradients(lambda: tf.constant(1.0), [v], SAM())


class TestVerify:
    def test_ours(self):
        model, (x, y) = net(), data()
        variables = model.trainable_variables
        found = verify_sam(
            lambda f: sam_value_and_gradients(f, variables, SAM(rho=0.05))[1],
            lambda: loss_of(model)(x, y),
            variables,
        )
        assert found.ok
        assert found.perturbation == pytest.approx(0.05, rel=1e-9)
        assert found.cosine == pytest.approx(1, rel=1e-9)

    def test_a_plain_gradient_is_not_sam(self):
        model, (x, y) = net(), data()
        variables = model.trainable_variables

        def plain(f):
            with tf.GradientTape() as tape:
                loss = f()
            return tape.gradient(loss, [v.value for v in variables])

        found = verify_sam(plain, lambda: loss_of(model)(x, y), variables)
        assert not found.ok
        assert found.passes == 1


@pytest.mark.parametrize("scope", ["local", "global"])
def test_mirrored_replicas_equal_the_reference(scope, mirrored):
    rule = SAM(rho=0.3, scope=scope)
    want = by_reference(net(dtype="float32"), data(), rule, replicas=2)
    with mirrored.scope():
        model = net(dtype="float32")
        before = [np.asarray(v) for v in model.trainable_variables]
        wrapped = SharpnessAwareModel(model, rule)
        wrapped.compile(keras.optimizers.SGD(1.0), LOSS32)
    x, y = data()
    history = wrapped.fit(x, y, batch_size=20, epochs=1, shuffle=False, verbose=0).history
    for v, w, g in zip(model.trainable_variables, before, want.gradients.values(), strict=True):
        np.testing.assert_allclose(np.asarray(v), w - g, rtol=1e-5, atol=1e-6)
    assert history["loss"][0] == pytest.approx(want.loss, rel=1e-5)


class Counted(keras.layers.Layer):
    """Adds one to a counter whenever it is run, inside a graph too."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def call(self, inputs):
        def count():
            self.runs += 1
            return np.int64(self.runs)

        with tf.control_dependencies([tf.numpy_function(count, [], tf.int64)]):
            return tf.identity(inputs)

    def compute_output_shape(self, shape):
        return shape


class TestEvery:
    """Every k-th step perturbs; inside a graph the others must be plain there as well."""

    rules = pytest.mark.parametrize(
        "rule",
        [
            SAM(rho=0.3, every=3),
            SAM(rho=0.3, every=3, fraction=0.2),
            SAM(rho=0.3, every=3, microbatches=3),
            SAM(rho=0.3, every=2, microbatches=2, fraction=0.5),
        ],
        ids=["full", "fraction", "microbatches", "both"],
    )

    def fit(self, rule, extra, *, epochs=5, **options):
        model = net(dtype="float32", regularizer=keras.regularizers.L2(0.1), extra=extra)
        x, y = data()
        wrapped = SharpnessAwareModel(model, rule)
        wrapped.compile(
            keras.optimizers.SGD(0.1, momentum=0.9), LOSS32, metrics=["accuracy"], **options
        )
        history = wrapped.fit(x, y, batch_size=20, epochs=epochs, shuffle=False, verbose=0)
        return [np.asarray(v) for v in model.variables], history.history

    @pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
    @rules
    def test_in_a_graph_equals_eager(self, rule, jit):
        def extra():
            # XLA draws other random numbers.
            dropout = [] if jit else [keras.layers.Dropout(0.5, seed=1)]
            return [keras.layers.BatchNormalization(name="norm"), *dropout]

        want, seen = self.fit(rule, extra(), run_eagerly=True)
        got, found = self.fit(rule, extra(), jit_compile=jit)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        for name, values in seen.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
        perturbed = [step % rule.every == 0 for step in range(5)]
        assert [value != 0 for value in found["sharpness"]] == perturbed

    @pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
    @rules
    def test_plain_steps_take_one_pass(self, rule, eager):
        layer = Counted()
        self.fit(rule, [layer], epochs=rule.every, run_eagerly=eager, jit_compile=False)
        assert layer.runs == 2 * rule.microbatches + (rule.every - 1)

    def test_gradients_in_a_graph_have_the_holes_and_values_of_eager_ones(self):
        table, unused = keras.layers.Embedding(5, 2), keras.Variable(np.ones(3))
        table.build()
        variables = [unused, table.embeddings]

        def compute(step):
            def loss():
                return tf.reduce_sum(table(tf.constant([1, 1, 3])) ** 2)

            rule = SAM(rho=0.1, every=2)
            none, g = sam_value_and_gradients(loss, variables, rule, step=step)[1]
            assert none is None
            return tf.convert_to_tensor(g)

        for step in (0, 1):
            got = tf.function(compute)(tf.constant(step, tf.int64))
            np.testing.assert_allclose(got, compute(step), rtol=1e-6)
        assert not np.allclose(compute(0), compute(1))


def test_every_on_replicas(mirrored):
    rule = SAM(rho=0.3, every=2, scope="global")
    x, y = data()

    def fit(rule):
        model = net(dtype="float32")
        wrapped = SharpnessAwareModel(model, rule)
        wrapped.compile(keras.optimizers.SGD(0.5), LOSS32)
        history = wrapped.fit(x, y, batch_size=20, epochs=3, shuffle=False, verbose=0).history
        return [np.asarray(v) for v in model.trainable_variables], history

    want, one = fit(rule)
    with mirrored.scope():
        got, two = fit(rule)
        with pytest.raises(ConfigError, match="on several replicas needs run_eagerly=True"):
            fit(SAM(every=2, fraction=0.5))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two["sharpness"], one["sharpness"], rtol=1e-4, atol=1e-6)
    assert two["sharpness"][1] == pytest.approx(0, abs=1e-6)
