"""SAM in fit and in loops, against the float64 reference and the failures of other code."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import agc_tensorflow
from agc.config import AGC, SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, SelectorError
from agc.reference import sharpness_aware_gradients
from agc.schedule import Schedule
from agc_tensorflow.sam import SharpnessAwareModel, sam_value_and_gradients
from agc_tensorflow.verify import verify_sam


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
        assert agc_tensorflow.plan(model, AGC(exclude=["head.bias"])) == plan
        inner.agc_head = "head"
        assert agc_tensorflow.plan(model, AGC(exclude=["@head"])).count == 0
        model.compile("sgd", "mse")
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)

    def test_of_variables(self):
        model = agc_tensorflow.nfnet("tiny")
        x = tf.ones((1, 32, 32, 3))

        def loss():
            return tf.reduce_mean(tf.square(model(x)))

        variables = model.trainable_variables
        names = list(agc_tensorflow.plan(variables, AGC(exclude=["*"])).decisions())
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


def images(n=16):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 2))
    return x.astype("float32"), y.astype("float32")


def sequences(n=16):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(n, 5, 4)), rng.normal(size=(n, 2))
    return x.astype("float32"), y.astype("float32")


def stack(*makers, shape=(4,), batch_size=None):
    layers = [maker() for maker in makers]
    return keras.Sequential([keras.Input(shape, batch_size=batch_size), *layers])


def dense(n, **options):
    return lambda: keras.layers.Dense(n, **options)


def everything(model):
    """All numbers that training may change, those that Keras does not list too."""
    values = list(model.variables)
    for layer in model._flatten_layers():
        values += keras.tree.flatten(getattr(layer, "states", None) or [])
        values += [v for v in vars(layer).values() if isinstance(v, tf.Variable)]
        values += getattr(layer, "hidden", [])
    return [np.array(value) for value in values]


def train(build, batch, rule=None, *, loss="mse", metrics=None, fit=None, **options):
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    model = build()
    wrapped = model if rule is None else SharpnessAwareModel(model, rule)
    wrapped.compile(keras.optimizers.SGD(0.1), loss, metrics=metrics, **options)
    x, y = batch
    history = wrapped.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0, **(fit or {}))
    return everything(model), history.history


def assert_trains_as_without_sam(build, batch, rule=None, **options):
    """With a vanishing perturbation nothing may differ from the bare model's own training."""
    want, expected = train(build, batch, **options)
    got, history = train(build, batch, rule or SAM(rho=1e-12), **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history.pop("sharpness"), [0, 0], atol=1e-6)
    assert set(history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


modes = pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])


class Adds(keras.layers.Layer):
    """Adds losses of several kinds."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        self.add_loss([keras.ops.mean(keras.ops.abs(inputs)), keras.ops.mean(inputs)])
        return inputs


class TestLossesThatLayersAdd:
    def model(self, dtype="float32", activity=True):
        regularizer = keras.regularizers.L2(0.3)
        layers = [keras.layers.ActivityRegularization(l2=0.2, dtype=dtype)] if activity else []
        return net(dtype=dtype, regularizer=regularizer, extra=[*layers, Adds(dtype=dtype)])

    @pytest.mark.parametrize(
        "options", [{"run_eagerly": True}, {}, {"jit_compile": True}], ids=["eager", "graph", "xla"]
    )
    @pytest.mark.parametrize("rule", [RULES["plain"], RULES["both"]], ids=["plain", "both"])
    def test_fit_takes_the_reference_step(self, rule, options):
        model = self.model()
        before = [np.asarray(v) for v in model.trainable_variables]
        want = by_reference(model, data(), rule)
        _, history = fit_once(rule, model=model, **options)
        for v, w, g in zip(model.trainable_variables, before, want.gradients.values(), strict=True):
            np.testing.assert_allclose(np.asarray(v), w - g, rtol=1e-5, atol=1e-6)
        assert history["loss"][0] == pytest.approx(want.loss, rel=1e-5)
        assert history["sharpness"][0] == pytest.approx(want.perturbed_loss - want.loss, rel=1e-3)

    @pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
    @pytest.mark.parametrize("rule", [RULES["plain"], RULES["both"]], ids=["plain", "both"])
    def test_in_a_loop(self, rule, graph):
        model, batch = self.model("float64"), data()
        want = by_reference(model, batch, rule)

        def compute(x, y):
            def loss(x, y):
                found = LOSS(y, model(x, training=True))
                return found + sum(tf.cast(one, tf.float64) for one in model.losses)

            return sam_value_and_gradients(loss, model.trainable_variables, rule, batch=(x, y))

        compute = tf.function(compute) if graph else compute
        loss, gradients = compute(*(tf.constant(a) for a in batch))
        assert float(loss) == pytest.approx(want.loss, rel=1e-6)
        for got, expected in zip(gradients, want.gradients.values(), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)

    @modes
    def test_alone_and_nested(self, eager):
        def build():
            return stack(lambda: stack(dense(3), Adds), dense(2), Adds)

        assert_trains_as_without_sam(build, images(), loss=None, run_eagerly=eager)

    def test_on_replicas(self, mirrored):
        rule = SAM(rho=0.3, scope="global")
        # Before 3.14 Keras summed activity losses over a replica's share of the batch.
        mean = int(keras.__version__.split(".")[1]) >= 14
        alone, one = fit_once(rule, model=self.model(activity=mean))
        with mirrored.scope():
            shared, two = fit_once(rule, model=self.model(activity=mean))
        for a, b in zip(shared.trainable_variables, alone.trainable_variables, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
        for name, values in one.items():
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


class Own(keras.Model):
    """Has a loss, metrics and reports of its own."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)
        self.mine = keras.metrics.Mean(name="mine")

    def call(self, inputs):
        return self.dense(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        loss += keras.ops.mean(keras.ops.abs(y - y_pred))
        self.mine.update_state(loss)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        found = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**found, "twice": 2 * self.mine.result()}


class TestMethodsOfTheModel:
    @modes
    @pytest.mark.parametrize(
        "rule",
        [SAM(rho=1e-12), SAM(rho=1e-12, microbatches=2), SAM(rho=1e-12, every=2)],
        ids=["plain", "microbatches", "every"],
    )
    def test_loss_and_metrics(self, rule, eager):
        assert_trains_as_without_sam(Own, images(), rule, metrics=["mae"], run_eagerly=eager)

    def test_metrics_of_a_fraction_come_from_the_clean_pass(self):
        (x, y), model = images(8), Own()
        model(x)
        want = float(
            np.mean(np.square(model(x[:4]) - y[:4])) + np.mean(np.abs(model(x[:4]) - y[:4]))
        )
        wrapped = SharpnessAwareModel(model, SAM(rho=5.0, fraction=0.5))
        wrapped.compile("sgd", "mse")
        found = wrapped.train_on_batch(x, y, return_dict=True)
        assert float(found["loss"]) == pytest.approx(want, rel=1e-5)
        assert float(found["mine"]) == pytest.approx(want, rel=1e-5)

    def two_outputs(self):
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(3, "relu")(inputs)
        return keras.Model(inputs, {n: keras.layers.Dense(2, name=n)(hidden) for n in ("a", "b")})

    def test_losses_of_outputs_come_from_the_clean_pass(self):
        (x, y), model = images(8), self.two_outputs()
        want = {f"{n}_loss": np.mean(np.square(model(x[:4])[n] - y[:4])) for n in ("a", "b")}
        wrapped = SharpnessAwareModel(model, SAM(rho=5.0, fraction=0.5))
        wrapped.compile("sgd", {"a": "mse", "b": "mse"})
        found = wrapped.train_on_batch(x, {"a": y, "b": y}, return_dict=True)
        for name, value in want.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-5)

    def test_two_outputs(self):
        def fit(rule):
            keras.utils.set_random_seed(0)
            model = self.two_outputs()
            wrapped = model if rule is None else SharpnessAwareModel(model, rule)
            wrapped.compile(
                keras.optimizers.SGD(0.1),
                {"a": "mse", "b": "mae"},
                loss_weights={"a": 1.0, "b": 0.3},
                metrics={"a": ["mae"], "b": ["mse"]},
            )
            x, y = images()
            weights = {"a": np.arange(16.0) / 16, "b": np.ones(16)}
            history = wrapped.fit(
                x, {"a": y, "b": -y}, sample_weight=weights, batch_size=8, shuffle=False, verbose=0
            )
            return model.get_weights(), history.history

        (want, expected), (got, history) = fit(None), fit(SAM(rho=1e-12))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert history.pop("sharpness") == [pytest.approx(0, abs=1e-6)]
        assert set(history) == set(expected) >= {"a_loss", "b_loss", "a_mae", "b_mse"}
        for name, values in expected.items():
            assert history[name] == pytest.approx(values, rel=1e-5)

    def test_training_is_said_only_to_a_model_that_asks(self):
        class Silent(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense, self.dropout = keras.layers.Dense(2), keras.layers.Dropout(0.5)

            def call(self, inputs):
                return self.dropout(self.dense(inputs))

        assert_trains_as_without_sam(Silent, images())

    def test_evaluation_and_prediction(self):
        class Steps(Own):
            def test_step(self, data):
                return {"tested": tf.reduce_mean(self(data[0]))}

            def predict_step(self, data):
                return 7 * self(data[0] if isinstance(data, tuple) else data)

        (x, y), model = images(), Steps()
        wrapped = SharpnessAwareModel(model, SAM())
        wrapped.compile("sgd", "mse")
        wrapped.fit(x, y, verbose=0)
        np.testing.assert_allclose(wrapped.predict(x, verbose=0), 7 * model(x), rtol=1e-5)
        (tested,) = wrapped.evaluate(x, y, batch_size=16, verbose=0, return_dict=True).items()
        assert tested[0] == "tested"
        assert float(tested[1]) == pytest.approx(float(tf.reduce_mean(model(x))), rel=1e-5)

    def test_the_inner_compile_is_replaced(self):
        (x, y), model = images(), stack(dense(2))
        model.compile("adam", "mae")
        wrapped = SharpnessAwareModel(model, SAM(rho=1e-12))
        wrapped.compile(keras.optimizers.SGD(0.0), "mse")
        history = wrapped.fit(x, y, verbose=0).history
        assert history["loss"][0] == pytest.approx(np.mean(np.square(model(x) - y)), rel=1e-5)
        assert wrapped.optimizer is model.optimizer

    def test_a_step_of_its_own_is_refused(self):
        class Stepping(Own):
            def train_step(self, data):
                return super().train_step(data)

        with pytest.raises(ConfigError, match=r"train_step of its own.*sam_value_and_gradients"):
            SharpnessAwareModel(Stepping(), SAM())
        model = stack(dense(2))
        model.make_train_function = lambda force=False: None
        with pytest.raises(ConfigError, match="make_train_function of its own"):
            SharpnessAwareModel(model, SAM())
        with pytest.raises(ConfigError, match=r"aware already; wrap its inner model"):
            SharpnessAwareModel(SharpnessAwareModel(stack(dense(2)), SAM()), SAM())


class Adversaries(keras.Model):
    """Two models, two optimizers, a step of its own; with SAM or with a tape."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.maker = stack(dense(5), L.BatchNormalization, dense(4), shape=(3,))
        self.judge = stack(dense(5), lambda: L.Dropout(0.5), Adds, dense(1))
        self.built = True

    def compile(self):
        super().compile()
        self.optimizers = [keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)]

    def train_step(self, data):
        noise = keras.random.normal((8, 3), seed=3)

        def judging():
            fake, real = self.maker(noise, training=True), data
            scores = self.judge(tf.concat([fake, real], 0), training=True)
            return tf.reduce_mean(scores[:8]) - tf.reduce_mean(scores[8:]) + sum(self.judge.losses)

        def making():
            return -tf.reduce_mean(self.judge(self.maker(noise, training=True), training=True))

        losses = {}
        for loss, model, optimizer in zip(
            (judging, making), (self.judge, self.maker), self.optimizers, strict=True
        ):
            variables = model.trainable_variables
            if self.rule is None:
                with tf.GradientTape() as tape:
                    losses[loss.__name__] = loss()
                gradients = tape.gradient(losses[loss.__name__], variables)
            else:
                found = sam_value_and_gradients(loss, variables, self.rule, model=model)
                losses[loss.__name__], gradients = found
            optimizer.apply(gradients, variables)
        return losses


@pytest.fixture
def reads_and_writes_in_order():
    """In this pass of TensorFlow's, a read and a write of one variable may change places.

    The tape alone, without SAM, then reads the judge's weights now and then before they are
    updated.
    """
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options({"dependency_optimization": True})


@modes
@pytest.mark.usefixtures("reads_and_writes_in_order")
def test_in_a_step_of_ones_own(eager):
    def fit(rule):
        keras.utils.set_random_seed(0)
        model = Adversaries(rule)
        model.compile()
        model.run_eagerly = eager
        history = model.fit(images()[0], batch_size=8, epochs=2, shuffle=False, verbose=0)
        return everything(model), history.history

    (want, expected), (got, history) = fit(None), fit(SAM(rho=1e-12))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert history == {name: pytest.approx(values, rel=1e-4) for name, values in expected.items()}


class Unseeded(keras.layers.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs))


class Seeds(keras.layers.Layer):
    """Keeps generators where Keras looks for them, and where it does not."""

    def __init__(self):
        super().__init__()
        listed = {"a": keras.random.SeedGenerator(2)}
        self.several, self.named = [keras.random.SeedGenerator(1)], listed
        hidden = keras.random.SeedGenerator(3)
        self.draw = lambda shape: keras.random.normal(shape, seed=hidden)

    def call(self, inputs):
        shape = keras.ops.shape(inputs)
        seeds = [self.several[0], self.named["a"]]
        return inputs + sum(keras.random.normal(shape, seed=s) for s in seeds) + self.draw(shape)


class Counters(keras.layers.Layer):
    """Counts in Keras' variables, where Keras does not look, and in TensorFlow's."""

    def __init__(self):
        super().__init__()
        hidden = keras.Variable(0.0, trainable=False)
        self.read = lambda: hidden
        self.count = tf.Variable(0.0, trainable=False)
        self.generator = tf.random.Generator.from_seed(1)
        self.metric = keras.metrics.Mean(name="seen")

    @property
    def hidden(self):
        return [self.read(), self.metric.total, self.generator.state]

    def call(self, inputs):
        self.read().assign_add(1.0)
        self.count.assign_add(1.0)
        self.metric.update_state(inputs)
        noise = self.generator.normal(tf.shape(inputs))
        return inputs * (1 + 0.1 * self.read().value + 0.1 * self.count) + noise


class MovingMean(keras.layers.Layer):
    """Uses its state right after it has changed it: no gradient flows through a variable's
    value.
    """

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, initializer="zeros")

    def call(self, inputs):
        self.mean.assign(0.5 * self.mean + 0.5 * keras.ops.mean(inputs, (0, 1)))
        return inputs - self.mean


class NoisyCell(keras.layers.Layer):
    """Draws random numbers inside the loop over time."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout = keras.layers.Dense(3, "tanh"), keras.layers.Dropout(0.5)
        self.state_size = 3

    def build(self, shape):
        self.dense.build((shape[0], shape[1] + 3))
        self.built = True

    def call(self, inputs, states, training=False):
        hidden = self.dense(keras.ops.concatenate([inputs, states[0]], -1))
        hidden = self.dropout(hidden, training=training)
        return hidden, [hidden]


L = keras.layers
STATES = {
    "LSTM": lambda: L.LSTM(4, stateful=True),
    "GRU": lambda: L.GRU(4, stateful=True, dropout=0.3),
    "Bidirectional": lambda: L.Bidirectional(L.SimpleRNN(3, stateful=True)),
    "cells": lambda: L.RNN([L.LSTMCell(4, dropout=0.3), L.GRUCell(3)], stateful=True),
    "noisy cell": lambda: L.RNN(NoisyCell()),
    "unseeded": Unseeded,
    "seeds": Seeds,
    "counters": Counters,
    "moving mean": lambda: stack(dense(4), MovingMean, shape=(5, 4)),
    "noise": lambda: stack(
        lambda: L.GaussianNoise(1.0),
        lambda: L.GaussianDropout(0.3),
        lambda: L.AlphaDropout(0.3),
        lambda: L.SpatialDropout1D(0.3),
        shape=(5, 4),
    ),
    "time": lambda: L.TimeDistributed(L.BatchNormalization()),
    "twice": lambda: (lambda norm: stack(lambda: norm, lambda: norm, shape=(5, 4)))(
        L.BatchNormalization()
    ),
}


class TestEveryState:
    """Both passes start from the same state, and it moves on once (SAM-12)."""

    @modes
    @pytest.mark.parametrize("kind", STATES)
    def test_is_the_same_in_both_passes(self, kind, eager):
        def build():
            return stack(STATES[kind], L.Flatten, dense(2), shape=(5, 4), batch_size=8)

        assert_trains_as_without_sam(build, sequences(), run_eagerly=eager)

    @pytest.mark.parametrize("kind", ["noisy cell", "unseeded"])
    def test_under_xla(self, kind):
        def build():
            return stack(STATES[kind], L.Flatten, dense(2), shape=(5, 4), batch_size=8)

        assert_trains_as_without_sam(build, sequences(), jit_compile=True)

    def test_with_several_steps_per_execution(self):
        def build():
            return stack(STATES["noisy cell"], Unseeded, dense(2), shape=(5, 4), batch_size=8)

        assert_trains_as_without_sam(build, sequences(), steps_per_execution=2)

    @modes
    def test_in_every_step_of_every_second(self, eager):
        def build():
            return stack(STATES["cells"], Unseeded, dense(2), shape=(5, 4), batch_size=8)

        rule = SAM(rho=1e-12, every=2)
        assert_trains_as_without_sam(build, sequences(), rule, run_eagerly=eager)

    @modes
    def test_in_a_loop_of_ones_own(self, eager):
        x, _ = sequences(8)
        rnn = L.LSTM(4, stateful=True)
        rnn.build(x.shape)
        counter = tf.Variable(0)
        seen = []

        def loss():
            counter.assign_add(1)
            noisy = rnn(x) + keras.random.normal((8, 4))
            found = tf.reduce_sum(noisy * tf.cast(counter, tf.float32))
            seen.append(found)
            return found

        def compute():
            seen.clear()
            sam_value_and_gradients(loss, rnn.trainable_variables, SAM(rho=1e-12), state=[counter])
            return list(seen)

        compute = compute if eager else tf.function(compute)
        first, second = compute()
        third, _ = compute()
        assert float(first) == pytest.approx(float(second), rel=1e-5)
        assert float(third) != pytest.approx(float(first), rel=1e-3)
        assert int(counter) == 2
        states = [np.asarray(v) for v in rnn.states]
        rnn.reset_state()
        rnn(x), rnn(x)
        for got, want in zip(states, rnn.states, strict=True):
            np.testing.assert_allclose(got, np.asarray(want), rtol=1e-5)

    def test_nothing_is_written_if_the_second_pass_fails(self):
        model, (x, _) = stack(dense(3), L.BatchNormalization), images()
        before = everything(model)
        runs = []

        def loss():
            runs.append(model(x, training=True))
            if len(runs) == 2:
                raise KeyboardInterrupt
            return tf.reduce_mean(runs[0] ** 2)

        with pytest.raises(KeyboardInterrupt):
            sam_value_and_gradients(loss, model.trainable_variables, SAM())
        for a, b in zip(everything(model), before, strict=True):
            np.testing.assert_array_equal(a, b)


class Normalised(keras.layers.Layer):
    """Writes to its own weight before it uses it."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, inputs):
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.square(self.kernel), 0, keepdims=True))
        self.kernel.assign(self.kernel / norm)
        return keras.ops.matmul(inputs, self.kernel)


class TestLayersThatWriteTheirOwnWeights:
    @modes
    @pytest.mark.parametrize("fraction", [1.0, 0.999])
    @pytest.mark.parametrize(
        "make",
        [Normalised, lambda: L.SpectralNormalization(L.Dense(3))],
        ids=["own", "SpectralNormalization"],
    )
    def test_train_as_without_sam(self, make, fraction, eager):
        rule = SAM(rho=1e-12, fraction=fraction)
        assert_trains_as_without_sam(
            lambda: stack(make, dense(2)), images(), rule, run_eagerly=eager
        )

    def test_the_gradient_is_that_at_the_perturbed_and_normalised_weights(self):
        layer, (x, _) = Normalised(), images()
        layer.build(x.shape)
        start = np.asarray(layer.kernel)
        unit = start / np.linalg.norm(start, axis=0)

        def gradient(w):  # of sum((x w)^2), straight through the normalisation
            return 2 * x.T @ x @ (w / np.linalg.norm(w, axis=0))

        e = 0.3 * gradient(start) / np.linalg.norm(gradient(start))
        _, (found,) = sam_value_and_gradients(
            lambda: tf.reduce_sum(layer(x) ** 2), [layer.kernel], SAM(rho=0.3)
        )
        np.testing.assert_allclose(np.asarray(layer.kernel), unit, rtol=1e-5)
        np.testing.assert_allclose(found, gradient(unit + e), rtol=1e-4)

    def test_inside_a_condition_they_are_refused(self):
        class Conditional(Normalised):
            def call(self, inputs):
                def write():
                    self.kernel.assign(0.5 * self.kernel)
                    return 1.0

                return tf.cond(tf.reduce_sum(inputs) > 0, write, lambda: 1.0) * super().call(inputs)

            def compute_output_shape(self, shape):
                return (*shape[:-1], 3)

        with pytest.raises(ConfigError, match=r"kernel' of shape \(4, 3\) is assigned to inside"):
            train(lambda: stack(Conditional, dense(2)), images(), SAM())


def kernel_of(shape):
    return keras.Variable(np.ones((shape[-1], 2), "float32"), name="kernel")


class Compiled(keras.layers.Layer):
    def build(self, shape):
        self.kernel = kernel_of(shape)
        self.product = tf.function(lambda inputs: tf.matmul(inputs, self.kernel))

    def call(self, inputs):
        return self.product(inputs)


class Recomputed(keras.layers.Layer):
    def build(self, shape):
        self.kernel = kernel_of(shape)

    def call(self, inputs):
        # The regulariser alone would give the kernel a gradient in both passes.
        self.add_loss(tf.reduce_sum(self.kernel**2))
        return tf.recompute_grad(lambda inputs: tf.matmul(inputs, self.kernel))(inputs)


class Differentiated(keras.layers.Layer):
    def build(self, shape):
        self.kernel = kernel_of(shape)

    def call(self, inputs):
        @tf.custom_gradient
        def product(inputs):
            def gradient(upstream, variables=()):
                back = tf.matmul(upstream, self.kernel, transpose_b=True)
                return back, [tf.matmul(inputs, upstream, transpose_a=True) for _ in variables]

            return tf.matmul(inputs, self.kernel), gradient

        return product(inputs)


class PastKeras(keras.layers.Layer):
    def build(self, shape):
        self.kernel = kernel_of(shape)

    def call(self, inputs):
        return tf.matmul(inputs, self.kernel._value)


class Arguments(keras.layers.Layer):
    """Reads its kernel in every way in which it is seen."""

    def build(self, shape):
        self.kernel = kernel_of(shape)

    def call(self, inputs):
        @tf.custom_gradient
        def product(inputs, kernel):
            def gradient(upstream):
                back = tf.matmul(upstream, kernel, transpose_b=True)
                return back, tf.matmul(inputs, upstream, transpose_a=True)

            return tf.matmul(inputs, kernel), gradient

        looked_up = tf.nn.embedding_lookup(self.kernel, tf.constant([0]))
        return (
            product(inputs, tf.convert_to_tensor(self.kernel))
            + tf.square(self.kernel.value)[0]
            + looked_up
        )


class TestWeightsReadAroundKeras:
    """What would not see the perturbation is an error, not a plain step (SAM-15)."""

    @modes
    @pytest.mark.parametrize("layer", [Compiled, Recomputed, Differentiated, PastKeras])
    def test_is_refused(self, layer, eager):
        train(lambda: stack(layer), images(), run_eagerly=eager)  # Keras can do it
        with pytest.raises(ConfigError, match=r"kernel' of shape \(4, 2\) is read around Keras"):
            train(lambda: stack(layer), images(), SAM(), run_eagerly=eager)

    @modes
    def test_a_function_that_is_traced_in_the_second_pass_is_refused(self, eager):
        # A part of the batch has another shape than the whole, so it has a trace of its own.
        with pytest.raises(ConfigError, match="is read around Keras"):
            train(lambda: stack(Compiled), images(), SAM(fraction=0.5), run_eagerly=eager)

    def test_functions_that_libraries_make_for_one_call_are_no_harm(self):
        def build():
            return stack(
                lambda: L.TimeDistributed(L.Dense(3)),
                lambda: L.Conv1D(6, 2, groups=3),
                L.GlobalAveragePooling1D,
                dense(2),
                shape=(None, 4),
            )

        assert_trains_as_without_sam(build, sequences(), run_eagerly=True)

    def test_rematerialised_layers_are_refused(self):
        def build():
            with keras.RematScope(mode="full"):
                return stack(dense(3, kernel_regularizer="l2"), dense(2))

        with pytest.raises(ConfigError, match=r"kernel' of shape .* keras\.RematScope"):
            train(build, images(), SAM(), run_eagerly=True)

    @modes
    def test_what_reads_values_is_right(self, eager):
        assert_trains_as_without_sam(lambda: stack(Arguments), images(), run_eagerly=eager)
        x, _ = images()
        layer = Arguments()
        layer.build(x.shape)

        def loss():
            return tf.reduce_sum(layer(x) ** 2)

        found = verify_sam(
            lambda f: sam_value_and_gradients(f, [layer.kernel], SAM(rho=0.05))[1],
            loss,
            [layer.kernel],
        )
        assert found.ok

    def test_the_probe_sees_lost_gradients(self):
        class Blind(keras.layers.Layer):
            def build(self, shape):
                self.kernel = kernel_of(shape)

            def call(self, inputs):
                return tf.matmul(inputs, tf.stop_gradient(self.kernel.value)) + 0 * self.kernel[0]

        x, _ = images()
        layer, twin = Blind(), Arguments()
        layer.build(x.shape)
        twin.kernel = layer.kernel

        def gradients_of(_):
            return sam_value_and_gradients(
                lambda: tf.reduce_sum(layer(x) ** 2), [layer.kernel], SAM()
            )[1]

        assert not verify_sam(gradients_of, lambda: tf.reduce_sum(twin(x) ** 2), [layer.kernel]).ok

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_mixed_precision(self, policy):
        x = tf.cast(images()[0], policy.removeprefix("mixed_"))
        layer = keras.layers.Dense(2, dtype=policy)
        layer.build(x.shape)
        seen = []

        def loss():
            seen.append(np.asarray(tf.cast(layer(x), tf.float32)))
            return tf.reduce_mean(tf.cast(layer(x), tf.float32) ** 2)

        _, gradients = sam_value_and_gradients(loss, layer.trainable_variables, SAM(rho=1.0))
        assert not np.allclose(seen[0], seen[1])
        assert [g.dtype for g in gradients] == [tf.float32, tf.float32]

    def test_low_rank_adapters(self):
        def build():
            model = stack(dense(3), dense(2))
            model.layers[0].enable_lora(2)
            return model

        assert_trains_as_without_sam(build, images())

    def test_scales_of_float8_are_not_perturbed(self):
        def build():
            model = stack(dense(3), dense(2))
            for layer in model.layers:
                layer.quantize("float8")
            return model

        assert_trains_as_without_sam(build, images())  # Keras has no eager float8
        model, (x, y) = build(), images()
        scales = [v for v in model.trainable_variables if v.overwrite_with_gradient]

        @tf.function
        def compute():
            seen = []

            def loss():
                seen.append([tf.identity(v.value) for v in scales])
                return tf.reduce_mean((model(x, training=True) - y) ** 2)

            variables = model.trainable_variables
            sam_value_and_gradients(loss, variables, SAM(rho=1.0), model=model)
            return seen

        for a, b in zip(*compute(), strict=True):
            np.testing.assert_array_equal(a, b)


class TestUnbuilt:
    @modes
    def test_fit_builds(self, eager):
        def build():
            return keras.Sequential(
                [L.Dense(5), L.Dropout(0.5), L.BatchNormalization(), L.Dense(2)]
            )

        assert_trains_as_without_sam(build, images(), metrics=["mae"], run_eagerly=eager)

    def test_several_inputs(self):
        class Sum(keras.Model):
            def __init__(self):
                super().__init__()
                self.one, self.two = L.Dense(2), L.Dense(2)

            def call(self, inputs):
                return self.one(inputs["a"]) + self.two(inputs["b"])

        x, y = images()
        assert_trains_as_without_sam(Sum, ({"a": x, "b": -x}, y))

    def test_patterns_are_checked_then(self):
        def build():
            return keras.Sequential([L.Dense(5, name="body"), L.Dense(2, name="head")])

        train(build, images(), SAM(only=["head.*"]))
        with pytest.raises(SelectorError, match=r"'hat\.\*' matches no parameter.*head\.kernel"):
            train(build, images(), SAM(only=["hat.*"]))

    def test_on_replicas(self, mirrored):
        x, y = images()
        with mirrored.scope():
            wrapped = SharpnessAwareModel(keras.Sequential([L.Dense(5), L.Dense(2)]), SAM())
            wrapped.compile("sgd", "mse", metrics=["mae"])
        history = wrapped.fit(x, y, batch_size=8, verbose=0).history
        assert set(history) == {"loss", "mae", "sharpness"}


class TestThePerturbedSet:
    """It is selected, trainable now, and has a gradient (SAM-4)."""

    def norms(self, freeze, rule):
        model, batch = net(), data()
        freeze(model)
        variables = [v for layer in model.layers for v in layer._trainable_variables]
        _, gradients, stats = sam_value_and_gradients(
            loss_of(model), variables, rule, batch=batch, model=model, return_stats=True
        )
        return float(stats.norm), gradients

    def test_frozen_variables_are_not_in_it(self):
        def freeze(model):
            model.get_layer("inner").trainable = False

        want, _ = self.norms(lambda model: None, SAM(only=["outer.*"]))
        assert self.norms(freeze, SAM())[0] == pytest.approx(want, rel=1e-12)

        def freeze_kernel(model):
            model.get_layer("inner").kernel.trainable = False

        want, _ = self.norms(lambda model: None, SAM(exclude=["inner.kernel"]))
        assert self.norms(freeze_kernel, SAM())[0] == pytest.approx(want, rel=1e-12)

    def test_frozen_after_compile(self):
        (x, y), rule = data(), SAM(rho=0.5)

        def fit(early):
            model = net(dtype="float32")
            model.get_layer("inner").trainable = not early
            wrapped = SharpnessAwareModel(model, rule)
            wrapped.compile(keras.optimizers.SGD(0.1), LOSS32, run_eagerly=True)
            if not early:
                wrapped.optimizer.build(model.trainable_variables)
                model.get_layer("inner").trainable = False
            wrapped.fit(x, y, batch_size=20, shuffle=False, verbose=0)
            return model.get_weights()

        for a, b in zip(fit(False), fit(True), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_patterns_may_name_what_is_frozen(self):
        model = net(dtype="float32")
        model.get_layer("outer").trainable = False
        wrapped, _ = fit_once(SAM(exclude=["outer.*"]), model=model)
        assert len(wrapped.trainable_variables) == 2

    @pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
    def test_a_gradient_in_one_pass_only(self, graph):
        a, b = (keras.Variable(np.ones(2), dtype="float64") for _ in range(2))

        def compute():
            runs = []

            def loss():
                runs.append(1)
                both = tf.reduce_sum(a**2)
                return both + tf.reduce_sum(b**2) if len(runs) == 1 else both

            return sam_value_and_gradients(loss, [a, b], SAM(rho=1.0))[1]

        g, none = (tf.function(compute) if graph else compute)()
        assert none is None
        np.testing.assert_allclose(g, 2 * (1 + np.full(2, 0.5)))

    @pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
    def test_rows_of_tables_stay_sparse(self, graph):
        table = keras.layers.Embedding(50, 3, dtype="float64")
        table.build()

        def compute():
            def loss():
                return tf.reduce_sum(table(tf.constant([1, 1, 3])) ** 2)

            (g,) = sam_value_and_gradients(loss, [table.embeddings], SAM(rho=0.1))[1]
            assert isinstance(g, tf.IndexedSlices)
            return g.values

        assert (tf.function(compute) if graph else compute)().shape == (3, 3)
