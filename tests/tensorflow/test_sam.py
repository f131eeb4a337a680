"""SAM in fit and in loops, and the failures of other code."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import product

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L  # noqa: N812
from keras.optimizers import SGD

import agc_tensorflow
from agc.config import AGC, SAM
from agc.errors import ConfigError, MissingGradientError, NonFiniteError, SelectorError
from agc.reference import sharpness_aware_gradients
from agc.schedule import Schedule
from agc_tensorflow.sam import SharpnessAwareModel, sam_value_and_gradients
from agc_tensorflow.verify import verify_sam
from tests.contract.sam import SamFunctionContract, VerifyContract
from tests.tensorflow.driver import WRAPPERS, TensorFlowDriver


class TestSam(SamFunctionContract):
    driver = TensorFlowDriver()
    batch_cure = r"give batch=\(inputs, targets\)"
    step_cure = r"give step=optimizer\.iterations"


@pytest.mark.parametrize(
    "batch", [{"x": np.ones(3)}, tf.ones(3), (tf.ones(3), tf.ones(()))], ids=repr
)
def test_what_is_no_batch(batch):
    variable = keras.Variable([1.0])
    with pytest.raises(ConfigError, match=r"^batch(\[1\])? (must be|has no)"):
        sam_value_and_gradients(lambda *_: variable[0], [variable], SAM(), batch=batch)


class TestVerify(VerifyContract):
    driver = TensorFlowDriver()


# Models, data, and training

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # Keras adds up in float32


def net(extra=(), regularizer=None):
    """Return a model, for :func:`data`, with these layers in the middle."""
    keras.utils.set_random_seed(0)
    inner = L.Dense(8, "tanh", name="inner", kernel_regularizer=regularizer)
    outer = L.Dense(3, name="outer")
    model = keras.Sequential([keras.Input((6,)), inner, *extra, outer], name="net")
    rng = np.random.default_rng(0)
    for v in [*inner.trainable_variables, *outer.trainable_variables]:
        v.assign(0.5 * rng.normal(size=v.shape))
    return model


def data(n=20):
    rng = np.random.default_rng(7)
    return rng.normal(size=(n, 6)), rng.integers(0, 3, n)


def stack(*makers, shape=(4,), batch_size=None):
    """Return a model of new layers, for :func:`images` or :func:`sequences`."""
    layers = [maker() for maker in makers]
    return keras.Sequential([keras.Input(shape, batch_size=batch_size), *layers])


def dense(n, **options):
    return lambda: L.Dense(n, **options)


def images(*shape):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(16, *shape, 4)), rng.normal(size=(16, 2))
    return x.astype("float32"), y.astype("float32")


def sequences():
    return images(3)


def train(
    build,
    batch,
    rule=None,
    *,
    optimizer=lambda: SGD(0.1),
    loss="mse",
    metrics=None,
    epochs=2,
    batch_size=8,
    sample_weight=None,
    strategy=None,
    jit_compile=False,
    **options,
):
    """Train a new model, with SAM or without, and return it and the history."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    with nullcontext() if strategy is None else strategy.scope():
        model = build()
        trained = model if rule is None else SharpnessAwareModel(model, rule)
        trained.compile(optimizer(), loss, metrics=metrics, jit_compile=jit_compile, **options)
        history = trained.fit(
            *batch,
            epochs=epochs,
            batch_size=batch_size,
            sample_weight=sample_weight,
            shuffle=False,
            verbose=0,
        )
    return model, history.history


def train_net(rule, build=net, *, batch=None, **options):
    """Take steps with the whole batch, by default one with the learning rate 1."""
    defaults = {"optimizer": partial(SGD, 1.0), "loss": LOSS, "epochs": 1, "batch_size": 20}
    return train(build, batch or data(), rule, **(defaults | options))


def everything(model):
    """Return all numbers that training may change, those that Keras does not list too."""
    values = list(model.variables)
    for layer in model._flatten_layers():
        values += keras.tree.flatten(getattr(layer, "states", None) or [])
        values += [v for v in vars(layer).values() if isinstance(v, tf.Variable)]
        values += getattr(layer, "hidden", [])
    return [np.array(value) for value in values]


def check_arrays(found, expected, rtol=1e-5, atol=1e-6):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


check_same = partial(check_arrays, rtol=0, atol=0)


def check_history(found, expected, rtol=1e-4):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-6, err_msg=name)


def check_trains_as_without_sam(build, batch, *rules, **options):
    """With a vanishing perturbation nothing may differ from the bare model's own training."""
    bare, expected = train(build, batch, **options)
    bare = everything(bare)
    for rule in rules or [SAM(rho=1e-12)]:
        model, history = train(build, batch, rule, **options)
        check_arrays(everything(model), bare)
        np.testing.assert_allclose(history.pop("sharpness"), [0, 0], atol=1e-6)
        assert set(history) == set(expected)
        check_history(history, expected, rtol=1e-5)


def by_reference(model, rule):
    """Return the reference's gradient of the model's loss on the whole batch."""
    twin = keras.models.clone_model(model)

    def gradients(point, part):
        for v, w in zip(twin.trainable_variables, point.values(), strict=True):
            v.assign(w)
        with tf.GradientTape() as tape:
            loss = LOSS(part[1], twin(part[0], training=True)) + sum(twin.losses)
        found = tape.gradient(loss, [v.value for v in twin.trainable_variables])
        return float(loss), {n: np.asarray(g) for n, g in zip(point, found, strict=True)}

    weights = {v.path: np.asarray(v) for v in model.trainable_variables}
    return sharpness_aware_gradients(gradients, weights, data(), rule)


modes = pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
modes_of_fit = pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, {}, {"jit_compile": True}], ids=["eager", "graph", "xla"]
)
run_or_trace = pytest.mark.parametrize(
    "wrap", [WRAPPERS["eager"], WRAPPERS["graph"]], ids=["eager", "graph"]
)

# What fit does


def test_saved_and_loaded_it_goes_on_as_if_never_stopped(tmp_path):
    rule = SAM(rho=Schedule([(0, 0.2), (10, 0.05)]))
    wrapped = SharpnessAwareModel(net(), rule)
    wrapped.compile(SGD(0.1, momentum=0.9), LOSS)

    def fit(model):
        model.fit(*data(), batch_size=20, epochs=3, shuffle=False, verbose=0)

    fit(wrapped)
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.rule == rule
    fit(wrapped), fit(loaded)
    check_same(loaded.trainable_variables, wrapped.trainable_variables)


def test_statistics_of_a_fraction_come_from_the_whole_batch():
    def build():
        return stack(L.BatchNormalization, dense(2))

    rule = SAM(rho=1.0, fraction=0.5)
    model, _ = train(build, images(), rule, epochs=1, batch_size=16, run_eagerly=True)
    twin = build()
    twin(images()[0], training=True)
    check_arrays(model.non_trainable_variables, twin.non_trainable_variables)


class TestNonFinite:
    def train(self, rule, **options):
        """Train on an infinity; return the model, whose weights must not move."""
        x, y = data()
        x[0, 0] = np.inf
        model, _ = train_net(rule, batch=(x, y), **options)
        check_same(model.get_weights(), net().get_weights())
        return model

    @modes_of_fit
    def test_skip_step(self, options):
        assert int(self.train(SAM(), **options).optimizer.iterations) == 0

    def test_a_loss_scaler_skips_and_lowers_its_scale(self):
        def scaler():
            return keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=1024.0)

        assert float(self.train(SAM(), optimizer=scaler).optimizer.dynamic_scale) == 512.0

    def test_raise(self):
        with pytest.raises(NonFiniteError, match="norm of the ascent gradient is"):
            self.train(SAM(nonfinite="raise"), run_eagerly=True)
        with pytest.raises(ConfigError, match="use run_eagerly=True"):
            self.train(SAM(nonfinite="raise"))


def test_a_loss_scale_changes_no_eps():
    def scaled():
        return keras.optimizers.LossScaleOptimizer(SGD(1.0), initial_scale=1024.0)

    rule = SAM(rho=0.5, eps=0.5)
    found, expected = (train_net(rule, **given)[0] for given in ({"optimizer": scaled}, {}))
    check_arrays(found.get_weights(), expected.get_weights())


def test_patterns_are_compared_with_the_names_that_agc_uses():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(2, name="head")])
    assert inner.trainable_variables[0].path != "head/kernel"  # Keras numbers its models
    plan = agc_tensorflow.plan(inner, AGC(exclude=["head.bias"]))
    assert list(plan.decisions()) == ["head.kernel", "head.bias"]
    model = SharpnessAwareModel(inner, SAM(exclude=["head.bias"]))
    assert agc_tensorflow.plan(model, AGC(exclude=["head.bias"])) == plan
    inner.agc_head = "head"
    assert agc_tensorflow.plan(model, AGC(exclude=["@head"])).count == 0
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(*images(), verbose=0)


class TestErrors:
    def test_loss(self):
        v = keras.Variable(np.ones(3))
        with pytest.raises(ConfigError, match=r"a scalar, got the shape \(3,\); take its mean"):
            sam_value_and_gradients(lambda: v**2, [v], SAM())
        with pytest.raises(
            ConfigError, match=r"returned None; its last line must be 'return loss'"
        ):
            sam_value_and_gradients(lambda: None, [v], SAM())

    def test_model(self):
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got AGC"):
            SharpnessAwareModel(keras.Sequential(), AGC())
        with pytest.raises(ConfigError, match=r"model must be a keras\.Model, got 5"):
            SharpnessAwareModel(5, SAM())

    def test_variables(self):
        with pytest.raises(ConfigError, match="is not a Keras variable"):
            sam_value_and_gradients(lambda: 0.0, [tf.Variable(1.0)], SAM())
        with pytest.raises(MissingGradientError, match="no perturbed variable has a gradient"):
            sam_value_and_gradients(lambda: tf.constant(1.0), [keras.Variable(1.0)], SAM())


class Counted(L.Layer):
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

    def train(self, extra, epochs, **options):
        def build():
            return net(regularizer=keras.regularizers.L2(0.1), extra=[extra()])

        rule = SAM(rho=0.3, every=2, microbatches=2, fraction=0.5)
        optimizer = partial(SGD, 0.1, momentum=0.9)
        return train_net(
            rule, build, optimizer=optimizer, metrics=["accuracy"], epochs=epochs, **options
        )

    def test_in_graphs_equals_eager(self):
        eager, expected = self.train(L.BatchNormalization, 5, run_eagerly=True)
        for jit in (False, True):
            model, history = self.train(L.BatchNormalization, 5, jit_compile=jit)
            check_arrays(model.variables, eager.variables, rtol=2e-5)
            check_history(history, expected)
            assert [value != 0 for value in history["sharpness"]] == [1, 0, 1, 0, 1]

    @modes
    def test_plain_steps_take_one_pass(self, eager):
        model, _ = self.train(Counted, 2, run_eagerly=eager)
        assert model.layers[1].runs == 2 * 2 + 1

    def test_on_replicas(self, mirrored):
        rule = SAM(rho=0.3, every=2, scope="global")
        options = {"optimizer": partial(SGD, 0.5), "epochs": 3}
        alone, expected = train_net(rule, **options)
        model, history = train_net(rule, strategy=mirrored, **options)
        with pytest.raises(ConfigError, match="on several replicas needs run_eagerly=True"):
            train_net(SAM(every=2, fraction=0.5), strategy=mirrored)
        check_arrays(model.trainable_variables, alone.trainable_variables)
        check_history(history, {"sharpness": expected["sharpness"]})
        assert history["sharpness"][1] == pytest.approx(0, abs=1e-6)


class Adds(L.Layer):
    """Adds losses of several kinds."""

    def call(self, inputs):
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        self.add_loss([keras.ops.mean(keras.ops.abs(inputs)), keras.ops.mean(inputs)])
        return inputs


class TestLossesThatLayersAdd:
    RULE = SAM(rho=0.1, microbatches=3, fraction=0.5)

    def model(self, activity=True):
        layers = [L.ActivityRegularization(l2=0.2)] if activity else []
        return net(regularizer=keras.regularizers.L2(0.3), extra=[*layers, Adds()])

    @modes_of_fit
    def test_fit_takes_the_reference_step(self, options):
        start = self.model()
        expected = by_reference(start, self.RULE)
        gradients = expected.gradients.values()
        moved = [
            np.asarray(v) - g for v, g in zip(start.trainable_variables, gradients, strict=True)
        ]
        model, history = train_net(self.RULE, self.model, **options)
        check_arrays(model.trainable_variables, moved)
        sharpness = expected.perturbed_loss - expected.loss
        assert history["loss"][0] == pytest.approx(expected.loss, rel=1e-5)
        assert history["sharpness"][0] == pytest.approx(sharpness, rel=1e-3)

    @run_or_trace
    def test_in_a_loop(self, wrap):
        model = self.model()
        expected = by_reference(model, self.RULE)

        @wrap
        def compute(*batch):
            def loss(x, y):
                return LOSS(y, model(x, training=True)) + sum(model.losses)

            return sam_value_and_gradients(loss, model.trainable_variables, self.RULE, batch=batch)

        loss, gradients = compute(*map(tf.constant, data()))
        assert float(loss) == pytest.approx(expected.loss, rel=1e-6)
        check_arrays(gradients, expected.gradients.values())

    @modes
    def test_alone_and_nested(self, eager):
        def build():
            return stack(lambda: stack(dense(3), Adds), dense(2), Adds)

        check_trains_as_without_sam(build, images(), loss=None, run_eagerly=eager)

    def test_on_replicas(self, mirrored):
        def build():  # before 3.14 Keras summed activity losses over a replica's share of the batch
            return self.model(activity=False)

        rule = SAM(rho=0.3, scope="global")
        alone, expected = train_net(rule, build)
        model, history = train_net(rule, build, strategy=mirrored)
        check_arrays(model.trainable_variables, alone.trainable_variables)
        check_history(history, expected)


class Own(keras.Model):
    """Has a loss, metrics and reports of its own."""

    def __init__(self):
        super().__init__()
        self.dense = L.Dense(2)
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
    def test_loss_and_metrics(self, eager):
        rules = [SAM(rho=1e-12), SAM(rho=1e-12, microbatches=2), SAM(rho=1e-12, every=2)]
        check_trains_as_without_sam(Own, images(), *rules, metrics=["mae"], run_eagerly=eager)

    def two_outputs(self):
        inputs = keras.Input((4,))
        hidden = L.Dense(3, "relu")(inputs)
        return keras.Model(inputs, {n: L.Dense(2, name=n)(hidden) for n in ("a", "b")})

    def test_reports_of_a_fraction_come_from_the_clean_pass(self):
        (x, y), own, two = images(), Own(), self.two_outputs()

        def report(model, loss, y):
            wrapped = SharpnessAwareModel(model, SAM(rho=5.0, fraction=0.5))
            wrapped.compile("sgd", loss, metrics=None if model is two else ["mae"])
            return wrapped.train_on_batch(x, y, return_dict=True)

        away, outputs = own(x[:8]) - y[:8], two(x[:8])
        mae = np.mean(np.abs(away))
        loss = np.mean(np.square(away)) + mae
        check_history(report(own, "mse", y), {"loss": loss, "mine": loss, "mae": mae})
        losses = {f"{n}_loss": np.mean(np.square(z - y[:8])) for n, z in outputs.items()}
        check_history(report(two, {"a": "mse", "b": "mse"}, {"a": y, "b": y}), losses)

    def test_two_outputs(self):
        x, y = images()
        check_trains_as_without_sam(
            self.two_outputs,
            (x, {"a": y, "b": -y}),
            loss={"a": "mse", "b": "mae"},
            loss_weights={"a": 1.0, "b": 0.3},
            metrics={"a": ["mae"], "b": ["mse"]},
            sample_weight={"a": np.arange(16.0) / 16, "b": np.ones(16)},
        )

    def test_training_is_said_only_to_a_model_that_asks(self):
        class Silent(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense, self.dropout = L.Dense(2), L.Dropout(0.5)

            def call(self, inputs):
                return self.dropout(self.dense(inputs))

        check_trains_as_without_sam(Silent, images())

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
        result = wrapped.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
        assert result == {"tested": pytest.approx(float(tf.reduce_mean(model(x))), rel=1e-5)}

    def test_the_inner_compile_is_replaced(self):
        (x, y), model = images(), stack(dense(2))
        model.compile("adam", "mae")
        wrapped = SharpnessAwareModel(model, SAM(rho=1e-12))
        wrapped.compile(SGD(0.0), "mse")
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


class OwnStep(keras.Model):
    """Trains a model in a step of its own, with SAM or with a tape; another one stays as it is."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.fixed = stack(dense(5), L.BatchNormalization, dense(4))
        self.model = stack(dense(5), lambda: L.Dropout(0.5), Adds, dense(2))
        self.built = True

    def train_step(self, data):
        x, y = data
        variables = self.model.trainable_variables

        def loss():
            away = y - self.model(self.fixed(x, training=True), training=True)
            return tf.reduce_mean(away**2) + sum(self.model.losses)

        if self.rule is None:
            with tf.GradientTape() as tape:
                value = loss()
            gradients = tape.gradient(value, variables)
        else:
            value, gradients = sam_value_and_gradients(loss, variables, self.rule, model=self.model)
        self.optimizer.apply(gradients, variables)
        return {"loss": value}


@modes
def test_in_a_step_of_ones_own(eager):
    (bare, expected), (model, history) = (
        train(partial(OwnStep, rule), images(), run_eagerly=eager)
        for rule in (None, SAM(rho=1e-12))
    )
    check_arrays(everything(model), everything(bare))
    check_history(history, expected)


class Unseeded(L.Layer):
    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs))


class Seeds(L.Layer):
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


class Counters(L.Layer):
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


class MovingMean(L.Layer):
    """Uses its state right after it has changed it: no gradient flows through a variable's
    value.
    """

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, initializer="zeros")

    def call(self, inputs):
        self.mean.assign(0.5 * self.mean + 0.5 * keras.ops.mean(inputs, (0, 1)))
        return inputs - self.mean


class NoisyCell(L.Layer):
    """Draws random numbers inside the loop over time."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout = L.Dense(3, "tanh"), L.Dropout(0.5)
        self.state_size = 3

    def build(self, shape):
        self.dense.build((shape[0], shape[1] + 3))
        self.built = True

    def call(self, inputs, states, training=False):
        hidden = self.dense(keras.ops.concatenate([inputs, states[0]], -1))
        hidden = self.dropout(hidden, training=training)
        return hidden, [hidden]


def noisy_cell():
    return L.RNN(NoisyCell())


def cells():
    layers = [L.LSTMCell(4, dropout=0.3), L.GRUCell(3)]
    return L.RNN(layers, stateful=True, return_sequences=True)


def twice():
    norm = L.BatchNormalization()
    return stack(lambda: norm, lambda: norm, shape=(3, 4))


STATES = {
    "recurrent": [
        lambda: L.LSTM(4, stateful=True, return_sequences=True),
        lambda: L.Bidirectional(L.GRU(3, stateful=True, return_sequences=True, dropout=0.3)),
        cells,
        noisy_cell,
    ],
    "others": [
        lambda: L.GaussianNoise(1.0),
        lambda: L.SpatialDropout1D(0.3),
        Unseeded,
        Seeds,
        lambda: L.TimeDistributed(L.BatchNormalization()),
        twice,
        dense(4),
        MovingMean,
        Counters,
    ],
}


class TestEveryState:
    """Both passes start from the same state, and it moves on once (SAM-12)."""

    def check(self, makers, *rules, **options):
        def build():
            return stack(*makers, L.Flatten, dense(2), shape=(3, 4), batch_size=8)

        check_trains_as_without_sam(build, sequences(), *rules, **options)

    @modes
    @pytest.mark.parametrize("kind", STATES)
    def test_is_the_same_in_both_passes(self, kind, eager):
        self.check(STATES[kind], run_eagerly=eager)

    @pytest.mark.parametrize("options", [{"jit_compile": True}, {"steps_per_execution": 2}])
    def test_however_it_is_compiled(self, options):
        self.check([noisy_cell, Unseeded], **options)

    def test_in_every_step_of_every_second(self):
        self.check([cells, Unseeded], SAM(rho=1e-12, every=2))

    @run_or_trace
    def test_in_a_loop_of_ones_own(self, wrap):
        x = sequences()[0][:8]
        rnn = L.LSTM(4, stateful=True)
        rnn.build(x.shape)
        counter = tf.Variable(0)
        seen = []

        def loss():
            counter.assign_add(1)
            noisy = rnn(x) + keras.random.normal((8, 4))
            seen.append(tf.reduce_sum(noisy * tf.cast(counter, tf.float32)))
            return seen[-1]

        @wrap
        def compute():
            seen.clear()
            sam_value_and_gradients(loss, rnn.trainable_variables, SAM(rho=1e-12), state=[counter])
            return list(seen)

        first, second = compute()
        third, _ = compute()
        assert float(first) == pytest.approx(float(second), rel=1e-5)
        assert float(third) != pytest.approx(float(first), rel=1e-3)
        assert int(counter) == 2
        states = [np.asarray(v) for v in rnn.states]
        rnn.reset_state()
        rnn(x), rnn(x)
        check_arrays(states, rnn.states)

    def test_nothing_is_written_if_the_second_pass_fails(self):
        model, (x, _) = stack(dense(3), L.BatchNormalization), images()
        before, kernel = everything(model), model.layers[0].kernel
        seen = []

        def loss():
            seen.append(np.asarray(tf.convert_to_tensor(kernel)))
            assert np.array_equal(kernel._value.numpy(), before[0])
            value = tf.reduce_mean(model(x, training=True) ** 2)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return value

        with pytest.raises(KeyboardInterrupt):
            sam_value_and_gradients(loss, model.trainable_variables, SAM())
        assert not np.array_equal(*seen)
        check_same(everything(model), before)


class Normalised(L.Layer):
    """Writes to its own weight before it uses it."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, inputs):
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.square(self.kernel), 0, keepdims=True))
        self.kernel.assign(self.kernel / norm)
        return keras.ops.matmul(inputs, self.kernel)


class TestLayersThatWriteTheirOwnWeights:
    @modes
    def test_train_as_without_sam(self, eager):
        def build():
            return stack(Normalised, lambda: L.SpectralNormalization(L.Dense(3)), dense(2))

        rules = [SAM(rho=1e-12), SAM(rho=1e-12, fraction=0.999)]
        check_trains_as_without_sam(build, images(), *rules, run_eagerly=eager)

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


class Kernel(L.Layer):
    """Reads its weight as Keras' own layers do."""

    def build(self, shape):
        self.kernel = keras.Variable(np.ones((shape[-1], 2), "float32"), name="kernel")

    def call(self, inputs):
        return tf.matmul(inputs, self.kernel)


class Compiled(Kernel):
    def build(self, shape):
        super().build(shape)
        self.product = tf.function(lambda inputs: tf.matmul(inputs, self.kernel))

    def call(self, inputs):
        return self.product(inputs)


def rematerialised():
    # The regulariser alone would give the kernel a gradient in both passes.
    with keras.RematScope(mode="full"):
        return L.Dense(2, kernel_regularizer="l2")


class Differentiated(Kernel):
    def call(self, inputs):
        @tf.custom_gradient
        def product(inputs):
            def gradient(upstream, variables=()):
                back = tf.matmul(upstream, self.kernel, transpose_b=True)
                return back, [tf.matmul(inputs, upstream, transpose_a=True) for _ in variables]

            return tf.matmul(inputs, self.kernel), gradient

        return product(inputs)


class PastKeras(Kernel):
    def call(self, inputs):
        return tf.matmul(inputs, self.kernel._value)


class Arguments(Kernel):
    """Reads its kernel in every way in which it is seen."""

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


class Blind(Kernel):
    """Reads its kernel without a gradient, all but."""

    def call(self, inputs):
        return tf.matmul(inputs, tf.stop_gradient(self.kernel.value)) + 0 * self.kernel[0]


class TestWeightsReadAroundKeras:
    """What would not see the perturbation is an error, not a plain step (SAM-15)."""

    @pytest.mark.parametrize(
        ("layer", "eager"),
        [*product((Compiled, Differentiated, PastKeras), (True, False)), (rematerialised, True)],
    )
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

        check_trains_as_without_sam(build, sequences(), run_eagerly=True)

    @modes
    def test_what_reads_values_is_right(self, eager):
        check_trains_as_without_sam(lambda: stack(Arguments), images(), run_eagerly=eager)

    @pytest.mark.parametrize("reader", [Arguments, Blind])
    def test_the_probe_sees_lost_gradients(self, reader):
        x, _ = images()
        layer = reader()
        layer.build(x.shape)

        def gradients_of(watched):
            def loss():
                watched()
                return tf.reduce_sum(layer(x) ** 2)

            return sam_value_and_gradients(loss, [layer.kernel], SAM(rho=0.05))[1]

        def exact_loss():
            return tf.reduce_sum(Arguments.call(layer, x) ** 2)

        seen = verify_sam(gradients_of, exact_loss, [layer.kernel])
        assert seen.ok == (reader is Arguments)
        assert (seen.gradient_error > 0.1) == (reader is Blind)

    def test_mixed_precision(self):
        x = tf.cast(images()[0], "bfloat16")
        layer = L.Dense(2, dtype="mixed_bfloat16")
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

        check_trains_as_without_sam(build, images())

    def test_scales_of_float8_are_not_perturbed(self):
        def build():
            model = stack(dense(3), dense(2))
            for layer in model.layers:
                layer.quantize("float8")
            return model

        check_trains_as_without_sam(build, images())  # Keras has no eager float8
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

        check_same(*compute())


class TestUnbuilt:
    @modes
    def test_fit_builds(self, eager):
        def build():
            layers = [L.Dense(5), L.Dropout(0.5), L.BatchNormalization(), L.Dense(2)]
            return keras.Sequential(layers)

        check_trains_as_without_sam(build, images(), metrics=["mae"], run_eagerly=eager)

    def test_several_inputs(self):
        class Sum(keras.Model):
            def __init__(self):
                super().__init__()
                self.one, self.two = L.Dense(2), L.Dense(2)

            def call(self, inputs):
                return self.one(inputs["a"]) + self.two(inputs["b"])

        x, y = images()
        check_trains_as_without_sam(Sum, ({"a": x, "b": -x}, y))

    def named(self):
        return keras.Sequential([L.Dense(5, name="body"), L.Dense(2, name="head")])

    def test_patterns_are_checked_then(self):
        train(self.named, images(), SAM(only=["head.*"]))
        with pytest.raises(SelectorError, match=r"'hat\.\*' matches no parameter.*head\.kernel"):
            train(self.named, images(), SAM(only=["hat.*"]))

    def test_on_replicas(self, mirrored):
        _, history = train(self.named, images(), SAM(), metrics=["mae"], strategy=mirrored)
        assert set(history) == {"loss", "mae", "sharpness"}


class TestThePerturbedSet:
    """It is selected, trainable now, and has a gradient (SAM-4)."""

    def norm(self, rule, frozen=None):
        """Return the norm of the gradient of a model where something is frozen."""
        (x, y), model = data(), net()
        variables = [v for layer in model.layers for v in layer._trainable_variables]
        if frozen is not None:
            frozen(model).trainable = False

        def loss():
            return LOSS(y, model(x, training=True))

        stats = sam_value_and_gradients(loss, variables, rule, return_stats=True)[2]
        return float(stats.norm)

    def test_frozen_variables_are_not_in_it(self):
        layer = self.norm(SAM(), frozen=lambda model: model.get_layer("inner"))
        kernel = self.norm(SAM(), frozen=lambda model: model.get_layer("inner").kernel)
        assert layer == pytest.approx(self.norm(SAM(only=["outer.*"])), rel=1e-6)
        assert kernel == pytest.approx(self.norm(SAM(exclude=["inner.kernel"])), rel=1e-6)

    def test_frozen_after_compile(self):
        def fit(early):
            model = net()
            model.get_layer("inner").trainable = not early
            wrapped = SharpnessAwareModel(model, SAM(rho=0.5))
            wrapped.compile(SGD(0.1), LOSS, run_eagerly=True)
            if not early:
                wrapped.optimizer.build(model.trainable_variables)
                model.get_layer("inner").trainable = False
            wrapped.fit(*data(), batch_size=20, shuffle=False, verbose=0)
            return model.get_weights()

        check_same(fit(False), fit(True))

    def test_patterns_may_name_what_is_frozen(self):
        def build():
            model = net()
            model.get_layer("outer").trainable = False
            return model

        model, _ = train_net(SAM(exclude=["outer.*"]), build)
        assert len(model.trainable_variables) == 2

    @run_or_trace
    def test_a_gradient_in_one_pass_only(self, wrap):
        a, b = (keras.Variable(np.ones(2), dtype="float64") for _ in range(2))

        @wrap
        def compute():
            runs = []

            def loss():
                runs.append(1)
                both = tf.reduce_sum(a**2)
                return both + tf.reduce_sum(b**2) if len(runs) == 1 else both

            return sam_value_and_gradients(loss, [a, b], SAM(rho=1.0))[1]

        g, none = compute()
        assert none is None
        np.testing.assert_allclose(g, 2 * (1 + np.full(2, 0.5)))

    @run_or_trace
    def test_tables_have_sparse_gradients_and_unused_variables_none(self, wrap):
        table, unused = L.Embedding(5, 3, dtype="float64"), keras.Variable(np.ones(2))
        table.build()

        def compute(rule, step):
            def loss():
                return tf.reduce_sum(table(tf.constant([1, 1, 3])) ** 2)

            variables = [unused, table.embeddings]
            none, gradient = sam_value_and_gradients(loss, variables, rule, step=step)[1]
            assert none is None
            # Inside a graph a step that may be plain has no sparse gradient.
            assert isinstance(gradient, tf.IndexedSlices) or rule.every == 2
            return tf.convert_to_tensor(gradient)

        w = np.asarray(table.embeddings)
        count = np.array([0, 2, 0, 1, 0])[:, None]
        plain = 2 * count * w
        perturbed = 2 * count * (w + 0.1 * plain / np.linalg.norm(plain))
        steps = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
        sometimes = wrap(lambda step: compute(SAM(rho=0.1, every=2), step))
        np.testing.assert_allclose(wrap(lambda: compute(SAM(rho=0.1), None))(), perturbed)
        np.testing.assert_allclose(sometimes(steps[0]), perturbed)
        np.testing.assert_allclose(sometimes(steps[1]), plain)
