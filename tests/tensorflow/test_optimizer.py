"""AdaptiveGradClip: every optimizer, compile and fit, saving, accumulation, loss scaling,
distribution.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers

import agc_tensorflow
from agc import AGC, SAM, Schedule
from agc.errors import ConfigError, FormatError, NonFiniteError, ParameterError, SelectorError
from agc.reference import Stats
from agc_tensorflow import AdaptiveGradClip, adaptive_clip_gradients

RULE = AGC(clipping=0.02)
MATRICES = {"a": "i o -> o", "c": "i o -> o"}
PLAIN = AGC(clipping=0.02, units=MATRICES)
"""A rule for :func:`variables`."""
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(batches: int = 4) -> tuple[Any, Any]:
    random = np.random.RandomState(0)
    return random.randn(8 * batches, 6).astype("float32"), random.randint(0, 3, 8 * batches)


def network() -> Any:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh", name="body"),
            layers.Dense(3, name="head"),
        ]
    )


def with_network(inner: Any, rule: AGC = RULE) -> tuple[Any, AdaptiveGradClip]:
    model = network()
    return model, AdaptiveGradClip(inner, rule, model=model)


def with_table() -> Any:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Embedding(50, 4, name="table"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ]
    )


def fit(model: Any, optimizer: Any, *, epochs: int = 1, batches: int = 4, **options: Any) -> Any:
    model.compile(optimizer, LOSS, **options)
    return model.fit(*data(batches), batch_size=8, epochs=epochs, verbose=0, shuffle=False)


def weights_of(model: Any) -> list[Any]:
    return [np.array(weight) for weight in model.get_weights()]


def same(left: list[Any], right: list[Any], tolerance: float = 0.0) -> bool:
    return len(left) == len(right) and all(
        np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True)
    )


def variables() -> list[Any]:
    random = np.random.RandomState(1)
    shapes = {"a": (6, 5), "b": (5,), "c": (5, 3)}
    return [
        keras.Variable(random.randn(*shape), dtype="float32", name=name)
        for name, shape in shapes.items()
    ]


def gradients(step: int = 0) -> list[Any]:
    random = np.random.RandomState(10 + step)
    return [tf.constant(random.randn(*shape), tf.float32) for shape in ((6, 5), (5,), (5, 3))]


def by_hand(given: list[Any], rate: float = 0.1) -> list[Any]:
    """Return variables after a step of SGD with gradients that are clipped by hand."""
    after = variables()
    optimizers.SGD(rate).apply(adaptive_clip_gradients(given, after, PLAIN), after)
    return after


def equal(left: list[Any], right: list[Any], tolerance: float = 0.0) -> bool:
    """Compare variables."""
    return same([v.numpy() for v in left], [v.numpy() for v in right], tolerance)


OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "SGD, decay": lambda: optimizers.SGD(0.1, weight_decay=0.3),
    "SGD, clipnorm": lambda: optimizers.SGD(0.1, clipnorm=0.01),
    "SGD, clipvalue": lambda: optimizers.SGD(0.1, clipvalue=0.001),
    "SGD, global_clipnorm": lambda: optimizers.SGD(0.1, global_clipnorm=0.01),
    "SGD, average": lambda: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
    "SGD, schedule": lambda: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "AdamW, decay": lambda: optimizers.AdamW(0.1, weight_decay=0.3),
}
OTHERS = ["Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adafactor", "Nadam", "Ftrl"]
OTHERS += ["Lion", "Lamb"]
# Before Keras 3.13, Muon takes no variable of TensorFlow's.
if int(keras.__version__.split(".")[1]) >= 13:
    OTHERS += ["Muon"]


def optimizer_of(name: str) -> Any:
    return OPTIMIZERS[name]() if name in OPTIMIZERS else getattr(optimizers, name)(0.1)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_optimizer_receives_clipped_gradients(name):
    """The wrapped optimizer does what the bare one does with gradients clipped by hand."""
    bare, expected = optimizer_of(name), variables()
    wrapped, inside = AdaptiveGradClip(optimizer_of(name), PLAIN), variables()
    for step in range(3):
        clipped = adaptive_clip_gradients(gradients(step), expected, PLAIN)
        bare.apply(clipped, expected)
        wrapped.apply(gradients(step), inside)
    assert wrapped.stats().total().clipped > 0
    assert equal(inside, expected)
    assert not any(equal([v], [start]) for v, start in zip(inside, variables(), strict=True))
    assert len(wrapped.variables) == len(bare.variables)
    assert int(wrapped.iterations) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro", [1, 2], ids=["each batch", "mean of two"])
def test_fit(mode, micro):
    """As by hand: the mean of batches is clipped, once, with the weights before decay; the schedule
    counts updates.
    """
    rule = AGC(clipping=Schedule([(0, 0.02), (8, 0.1)]), exclude=["head.*"])
    options = {"gradient_accumulation_steps": 2} if micro == 2 else {"weight_decay": 0.1}
    model, expected = network(), network()
    expected.set_weights(model.get_weights())
    optimizer = AdaptiveGradClip(optimizers.SGD(0.5, **options), rule, model=model)
    history = fit(model, optimizer, epochs=2, **MODES[mode])
    sgd = optimizers.SGD(0.5, weight_decay=options.get("weight_decay"))
    batches = list(zip(*(np.split(array, 4 // micro) for array in data()), strict=True))
    for step, (x, y) in enumerate(2 * batches):
        with tf.GradientTape() as tape:
            loss = LOSS(y, expected(x))
        trained = expected.trainable_variables
        given = tape.gradient(loss, trained)
        sgd.apply(adaptive_clip_gradients(given, trained, rule, model=expected, step=step), trained)
    assert same(weights_of(model), weights_of(expected), 1e-5)
    assert history.history["loss"][1] < history.history["loss"][0]
    stats = optimizer.stats()
    assert set(stats.parameters()) == {"body.kernel", "body.bias"}
    assert stats.total().units == 6
    assert int(optimizer.iterations) == 2 * len(batches)
    assert optimizer.plan == agc_tensorflow.plan(model, rule)


@pytest.mark.parametrize("sharp", [False, True])
def test_a_step_is_traced_once(sharp):
    """Variables made in it would have it traced again."""
    model, optimizer = with_network(optimizers.SGD(0.1, momentum=0.9))
    calls, call = [], model.call
    model.call = lambda *args, **options: calls.append(1) or call(*args, **options)
    fit(agc_tensorflow.SharpnessAwareModel(model, SAM()) if sharp else model, optimizer)
    assert len(calls) == 1 + sharp


def test_embeddings_stay_sparse_in_fit():
    tokens = np.array([[1, 2, 3, 1, 1, 9]] * 4 + [[30, 2, 3, 1, 1, 31]] * 4)
    results = []
    for options in MODES.values():
        keras.utils.set_random_seed(0)
        model = with_table()
        before = weights_of(model)[0]
        optimizer = AdaptiveGradClip(optimizers.SGD(0.5), RULE, model=model)
        model.compile(optimizer, LOSS, **options)
        model.fit(tokens, np.array([0, 1] * 4), batch_size=8, verbose=0)
        results.append(weights_of(model))
        assert optimizer.stats().parameters()["table.embeddings"].units == 6
        changed = np.flatnonzero((results[-1][0] != before).any(axis=1))
        assert changed.tolist() == [1, 2, 3, 9, 30, 31]
    assert same(results[0], results[1], 1e-6)
    assert same(results[0], results[2], 1e-6)


class TestLossScale:
    def test_policy_raise_leaves_a_skipped_step_to_the_scaler(self):
        wrapped = AdaptiveGradClip("sgd", AGC(nonfinite="raise", units=MATRICES))
        inside, bad = variables(), gradients()
        bad[1] *= np.inf
        with pytest.raises(NonFiniteError, match="'b'"):
            wrapped.apply(bad, inside)
        scaler = optimizers.LossScaleOptimizer(wrapped, initial_scale=1024.0)
        scaler.apply(bad, inside)
        assert float(scaler.dynamic_scale) == 512
        assert equal(inside, variables())

    def test_fixed_scale_of_the_inner_optimizer(self):
        wrapped = AdaptiveGradClip(optimizers.SGD(0.1, loss_scale_factor=8.0), PLAIN)
        assert float(wrapped.scale_loss(tf.constant(2.0))) == 16
        inside = variables()
        wrapped.apply([8 * gradient for gradient in gradients()], inside)
        assert equal(inside, by_hand(gradients()))

    def test_mixed_precision_wraps_by_itself(self):
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            model, wrapped = with_network(optimizers.SGD(0.5))
            history = fit(model, wrapped, epochs=2)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)
        assert model.optimizer.inner_optimizer is wrapped
        assert wrapped.stats().total().clipped > 0
        assert history.history["loss"][1] < history.history["loss"][0]

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scale"])
    def test_mirrored_strategy_equals_one_device(self, scaled, mirrored):
        """Two replicas reduce their gradients before AGC, so nothing differs from one device."""
        results = []
        for scope in (tf.distribute.get_strategy(), mirrored):
            keras.utils.set_random_seed(0)
            with scope.scope():
                model = with_table()
                inner = optimizers.SGD(0.5, momentum=0.9, weight_decay=0.1)
                wrapped = AdaptiveGradClip(inner, RULE, model=model)
                outer = optimizers.LossScaleOptimizer(wrapped) if scaled else wrapped
                model.compile(outer, LOSS, jit_compile=False)
            x, y = data()
            model.fit(np.abs(4 * x).astype(int) % 9, y, batch_size=8, verbose=0, shuffle=False)
            results.append((weights_of(model), wrapped.stats().total()))
        (one, one_stats), (two, two_stats) = results
        assert same(one, two, 1e-6)
        assert (one_stats.units, one_stats.clipped) == (two_stats.units, two_stats.clipped)
        assert one_stats.max_ratio == pytest.approx(two_stats.max_ratio, rel=1e-4)


def test_a_loop_of_ones_own_on_replicas_equals_one_device(mirrored):
    """In strategy.run the optimizer reduces, then AGC clips, as documented."""
    x, y = data(1)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    results = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = network()
            wrapped = AdaptiveGradClip(optimizers.SGD(0.5), AGC(clipping=0.02), model=model)
            wrapped.build(model.trainable_variables)

        def step(x, y, model=model, wrapped=wrapped):
            with tf.GradientTape() as tape:
                losses = entropy(y, model(x, training=True))
                loss = tf.nn.compute_average_loss(losses, global_batch_size=8)
            wrapped.apply(tape.gradient(loss, model.trainable_variables))

        run = tf.function(lambda x, y, step=step, on=strategy: on.run(step, (x, y)))
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        for batch in strategy.experimental_distribute_dataset(batches):
            run(*batch)
        results.append((weights_of(model), wrapped.stats().total().clipped))
    (one, clipped), (two, clipped_there) = results
    assert same(one, two, 1e-6)
    assert clipped == clipped_there > 0


def test_settings_are_the_inner_optimizers():
    inner = optimizers.AdamW(0.1, beta_1=0.7, weight_decay=0.25, use_ema=True)
    wrapped = AdaptiveGradClip(inner, RULE, name="clipped")
    assert (wrapped.name, wrapped.beta_1, wrapped.weight_decay) == ("clipped", 0.7, 0.25)
    wrapped.weight_decay = wrapped.learning_rate = 0.5
    assert inner.weight_decay == float(inner.learning_rate) == 0.5
    wrapped.learning_rate = optimizers.schedules.ExponentialDecay(0.25, 1, 0.5)
    assert float(inner.learning_rate) == float(wrapped.learning_rate) == 0.25
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = wrapped.nothing_like_it


def test_exclude_from_weight_decay():
    wrapped, inside = AdaptiveGradClip(optimizers.SGD(0.0, weight_decay=0.5), PLAIN), variables()
    wrapped.learning_rate = 1e-3
    wrapped.exclude_from_weight_decay(var_names=["a"])
    wrapped.apply([tf.zeros_like(v) for v in inside], inside)
    changed = [(v.numpy() != s.numpy()).any() for v, s in zip(inside, variables(), strict=True)]
    assert changed == [False, True, True]


def test_moving_average_is_kept_and_taken():
    results = []
    for wrap in (False, True):
        keras.utils.set_random_seed(0)
        model = network()
        optimizer: Any = optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
        if wrap:
            optimizer = AdaptiveGradClip(optimizer, AGC(clipping=1e6), model=model)
        model.compile(optimizer, LOSS, jit_compile=False)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        model.fit(*data(), epochs=2, verbose=0, shuffle=False, callbacks=[swap])
        results.append(weights_of(model))
    assert same(*results)


class Types(keras.Model):
    """Layers of many types, whose automatic names are others every time they are made."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mix, self.rnn = layers.MultiHeadAttention(2, 3), layers.GRU(4)

    def call(self, x):
        x = x[..., None]
        return self.rnn(self.mix(x, x))


class Squares(keras.Model):
    """Layers of one shape, whose automatic names are others every time they are made."""

    each = None

    def __init__(self, **options):
        super().__init__(**options)
        self.parts = [layers.Dense(4, name=self.each) for _ in range(3)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Triplets(Squares):
    each = "triplet"


def functional() -> Any:
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)], name="inner")
    return keras.Model(inputs, layers.Dense(4)(inner(layers.Dense(4)(inputs))), name="inner")


def part(name: str, *after: Any) -> Any:
    own = [layers.Dense(4, name="first"), layers.Dense(4), layers.Dense(4)]
    return keras.Sequential([keras.Input((4,)), *own, *after], name=name)


def with_parts() -> Any:
    """Return models inside a model, whose names Keras leaves out when it loads them."""
    inputs = keras.Input((4,))
    return keras.Model(inputs, part("outer", part("inner"))(part("before")(inputs)))


def saved(model: Any, folder: Path) -> Any:
    """Return what is loaded of a model that is saved."""
    model.save(folder / "model.keras")
    own = {"Types": Types, "Squares": Squares, "Triplets": Triplets}
    return keras.models.load_model(folder / "model.keras", custom_objects=own)


NAMES_DIFFER = {
    "sequential": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)]),
    "nested, of its part's name": functional,
    "models inside": with_parts,
    "a backbone": lambda: keras.Sequential([part("backbone"), layers.Dense(4, name="head")]),
    "subclassed": Squares,
    "three of one name": Triplets,
    "types": Types,
}


class TestSaving:
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scale"])
    def test_resumed_training_equals_uninterrupted(self, scaled, tmp_path):
        rule = AGC(clipping=Schedule([(0, 0.02), (8, 0.1)]), exclude=["head.bias"])
        model = network()
        wrapped = AdaptiveGradClip(
            optimizers.SGD(optimizers.schedules.ExponentialDecay(0.5, 2, 0.9), momentum=0.9),
            rule,
            model=model,
        )
        fit(model, optimizers.LossScaleOptimizer(wrapped) if scaled else wrapped)
        loaded = saved(model, tmp_path)
        model.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        found = loaded.optimizer.inner_optimizer if scaled else loaded.optimizer
        assert isinstance(found, AdaptiveGradClip)
        assert found.rule == rule
        assert found.plan == wrapped.plan
        assert int(found.iterations) == 4
        loaded.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        assert same(weights_of(model), weights_of(loaded))
        assert found.stats().parameters() == wrapped.stats().parameters()

    @pytest.mark.parametrize("when", ["before save", "before compile", "compiled again"])
    def test_layers_frozen_on_the_way(self, when, tmp_path):
        model, wrapped = with_network(optimizers.SGD(0.5))
        if when == "before compile":
            model.get_layer("body").trainable = False
            model.compile(wrapped, LOSS)
        else:
            fit(model, wrapped)
            model.get_layer("body").trainable = False
        if when == "compiled again":
            fit(model, wrapped)
        loaded = saved(model, tmp_path)
        assert loaded.optimizer.plan == wrapped.plan
        before = weights_of(loaded)
        loaded.fit(*data(), batch_size=8, verbose=0)
        assert set(loaded.optimizer.stats().parameters()) == {"head.kernel", "head.bias"}
        assert same(before[:2], weights_of(loaded)[:2])
        assert saved(loaded, tmp_path).optimizer.plan == wrapped.plan

    @pytest.mark.parametrize("given", [True, False], ids=["model", "no model"])
    def test_other_layers_frozen_than_the_optimizer_was_built_with(self, given, tmp_path):
        square = {"use_bias": False, "activation": "tanh"}
        model = keras.Sequential(
            [keras.Input((6,)), *(layers.Dense(6, name=name, **square) for name in "abc")]
        )
        model.get_layer("c").trainable = False
        rule = AGC(clipping=1e-6, exclude=["c.*"] if given else [], units={"*.kernel": "i o -> o"})
        wrapped = AdaptiveGradClip(optimizers.SGD(0.5), rule, model=model if given else None)
        model.compile(wrapped, "mse")
        x = data()[0]
        model.fit(x, x, verbose=0)
        model.get_layer("a").trainable = False
        model.get_layer("c").trainable = True
        if not given:  # nobody has said what c is
            with pytest.raises(ParameterError, match=r"saved plan is for 2 variables.*b/kernel"):
                saved(model, tmp_path)
            return
        loaded = saved(model, tmp_path)
        loaded.fit(x, x, verbose=0)
        assert set(loaded.optimizer.stats().parameters()) == {"b.kernel"}

    def test_parts_of_a_multi_optimizer(self, tmp_path):
        if not hasattr(optimizers, "MultiOptimizer"):
            assert int(keras.__version__.split(".")[1]) < 14  # an older Keras lacks it
            return
        model = network()
        rule = AGC(clipping={"head.*": 0.001, "*": 0.02})
        parts = [
            AdaptiveGradClip(inner, rule, model=model)
            for inner in (optimizers.SGD(0.1, momentum=0.9), optimizers.Adam(0.1))
        ]
        each = optimizers.OptimizerMap(parts[0], {".*head.*": parts[1]})
        fit(model, optimizers.MultiOptimizer(each), jit_compile=False)
        loaded = saved(model, tmp_path)
        reasons = [entry.inactive for entry in parts[1].plan]
        assert reasons == ["not in the optimizer", "not in the optimizer", None, None]
        for one in (model, loaded):
            one.fit(*data(), batch_size=8, verbose=0, shuffle=False)
        assert same(weights_of(model), weights_of(loaded))
        heads = {"head.kernel", "head.bias"}
        assert heads in [set(o.stats().parameters()) for o in loaded.optimizer.optimizers]

    @pytest.mark.parametrize("kind", NAMES_DIFFER)
    def test_pairing_by_names(self, kind, tmp_path):
        """Each parameter has a threshold of its own, and each is found again."""
        model = NAMES_DIFFER[kind]()
        model(tf.zeros((1, 4)))
        names = [entry.name for entry in agc_tensorflow.plan(model, AGC())]
        rule = AGC(clipping={name: 10.0 ** -(2 + at) for at, name in enumerate(names)})
        wrapped = AdaptiveGradClip(optimizers.SGD(0.5), rule, model=model)
        model.compile(wrapped, "mse", jit_compile=False)
        x = data()[0][:, :4]
        model.fit(x, x, verbose=0)
        for _ in range(2):
            layers.Dense(2)  # takes a name, so that automatic names differ
        loaded = saved(model, tmp_path)
        assert loaded.optimizer.plan == wrapped.plan
        assert same(weights_of(loaded), weights_of(model))
        for one in (model, loaded):
            one.fit(x, x, verbose=0, shuffle=False)
        assert same(weights_of(model), weights_of(loaded))
        assert loaded.optimizer.stats().parameters() == wrapped.stats().parameters()

    def test_renamed_layers_of_which_some_are_missing(self):
        """A wrong pairing is refused where it matters, and has no effect elsewhere."""

        def square(*names: str) -> Any:
            given = [layers.Dense(4, name=name, use_bias=False) for name in names]
            return keras.Sequential([keras.Input((4,)), *given], name="net")

        model = square("dense", "dense_1", "dense_2")
        rules = (AGC(exclude=["dense_2.*"]), AGC())
        model.layers[0].trainable = False
        for rule in rules:
            config = AdaptiveGradClip("sgd", rule, model=model).get_config()
            loaded = AdaptiveGradClip.from_config(config)
            variables = square("dense_3", "dense_4", "dense_5").trainable_variables
            refusal = pytest.raises(ParameterError, match=r"cannot be told .*compile=False")
            with refusal if rule.exclude else nullcontext():
                loaded.build(variables[:2])
            loaded = AdaptiveGradClip.from_config(config)
            loaded.build(variables)  # all of them: their order tells
            stats = [entry.name for entry in loaded._hook.entries]
            assert stats == ["dense.kernel", "dense_1.kernel", "dense_2.kernel"]

    def test_config_round_trip(self):
        model = network()
        rule = AGC(
            clipping={"body.*": Schedule([(0, 0.1)]), "*": None},
            units={"head.kernel": "i o -> i"},
            nonfinite="zero",
        )
        wrapped = AdaptiveGradClip(optimizers.Adam(0.25, beta_1=0.7), rule, model=model)
        config = keras.saving.serialize_keras_object(wrapped)
        again = keras.saving.deserialize_keras_object(config)
        assert again.rule == rule
        assert again.plan == wrapped.plan
        assert again.inner_optimizer.get_config() == wrapped.inner_optimizer.get_config()
        assert keras.saving.serialize_keras_object(again) == config
        again.build(model.trainable_variables)
        damaged = {**wrapped.get_config(), "plan": wrapped.plan.to_dict()}
        with pytest.raises(FormatError, match=r"'built' is missing.*compile=False"):
            AdaptiveGradClip.from_config(damaged)
        wrong = keras.saving.deserialize_keras_object(config)
        with pytest.raises(
            ParameterError, match=r"plan is for 4 variables.*3 that the.*model=model"
        ):
            wrong.build(variables())

    def test_config_without_a_model(self):
        wrapped = AdaptiveGradClip("sgd", PLAIN)
        again = AdaptiveGradClip.from_config(wrapped.get_config())
        assert again.rule == PLAIN
        again.apply(gradients(), variables())
        assert again.stats().total().clipped > 0

    def test_callable_threshold_cannot_be_saved(self):
        wrapped = AdaptiveGradClip("sgd", AGC(clipping=lambda step: 0.1))
        with pytest.raises(ConfigError, match=r"agc.Schedule"):
            wrapped.get_config()

    def test_copy(self):
        wrapped = copy.deepcopy(AdaptiveGradClip(optimizers.SGD(0.25), RULE, model=network()))
        assert wrapped.rule == RULE
        assert len(wrapped.plan) == 4
        assert float(wrapped.learning_rate) == 0.25
        wrapped.build(network().trainable_variables)

    def test_checkpoint_of_tensorflow(self, tmp_path):
        inside, wrapped = variables(), AdaptiveGradClip(optimizers.SGD(0.1, momentum=0.9), PLAIN)
        wrapped.apply(gradients(), inside)
        path = tf.train.Checkpoint(optimizer=wrapped).save(str(tmp_path / "state"))
        want = [np.array(v) for v in wrapped.variables]
        wrapped.apply(gradients(1), inside)
        tf.train.Checkpoint(optimizer=wrapped).restore(path).assert_existing_objects_matched()
        assert same([np.array(v) for v in wrapped.variables], want)


class TestRefuses:
    def test_variables_that_are_not_the_models(self):
        inner = optimizers.SGD(0.1)
        inner.build(variables())
        wrapped = AdaptiveGradClip("sgd", RULE, model=network())
        for call in (
            lambda: wrapped.build(variables()),
            lambda: AdaptiveGradClip(inner, RULE, model=network()),
        ):
            with pytest.raises(ParameterError, match=r"'a' of shape \(6, 5\) is not a parameter"):
                call()

    def test_no_gradients(self):
        """As in Keras."""
        wrapped = AdaptiveGradClip("sgd", PLAIN)
        for optimizer in (optimizers.SGD(), wrapped):
            with pytest.raises(ValueError, match="No gradients provided for any variable"):
                optimizer.apply([None] * 3, variables())
            optimizer.apply([], variables())
        assert wrapped.stats().total().units == 0

    def test_what_it_cannot_wrap(self):
        inner = optimizers.SGD(0.1)
        wrapped = AdaptiveGradClip(inner, RULE)
        refused = [
            (3, "keras.optimizers.Optimizer or its name, got 3"),
            (wrapped, "clipped by AGC already"),
            (inner, "clipped by AGC already"),
            (
                optimizers.LossScaleOptimizer(optimizers.SGD(0.1)),
                r"LossScaleOptimizer\(AdaptiveGradClip\(inner",
            ),
        ]
        if hasattr(optimizers, "MultiOptimizer"):  # which an older Keras lacks
            each = optimizers.OptimizerMap(optimizers.SGD(0.1))
            refused += [(optimizers.MultiOptimizer(each), "wrap each optimizer inside")]
        for optimizer, message in refused:
            with pytest.raises(ConfigError, match=message):
                AdaptiveGradClip(optimizer, RULE)

    def test_plan_and_statistics_before_build(self):
        wrapped = AdaptiveGradClip("sgd", RULE)
        with pytest.raises(ParameterError, match=r"model=model"):
            _ = wrapped.plan
        assert wrapped.stats().total() == Stats(0, 0, 0, 0.0, 1.0)
        assert wrapped.stats().parameters() == {}


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_a_variable_without_a_gradient_is_left_alone():
    wrapped, inside = AdaptiveGradClip("sgd", PLAIN), variables()
    given = gradients()
    given[1] = None
    wrapped.apply(given, inside)
    assert (inside[1].numpy() == variables()[1].numpy()).all()
    assert set(wrapped.stats().parameters()) == {"a", "c"}


def test_frozen_layers_and_head_of_the_model():
    model = network()
    model.agc_head = "head"
    model.get_layer("body").trainable = False
    wrapped = AdaptiveGradClip("sgd", AGC.profile("deepmind", unit_rule="declared"), model=model)
    fit(model, wrapped)
    assert {e.name for e in wrapped.plan if e.excluded} == {"head.kernel"}
    assert set(wrapped.stats().parameters()) == {"head.bias"}


def test_optimizer_that_is_built_already():
    model = network()
    inner = optimizers.SGD(0.1, momentum=0.9)
    inner.build(model.trainable_variables)
    wrapped = AdaptiveGradClip(inner, RULE, model=model)
    assert wrapped.built
    wrapped.apply([tf.ones_like(v) for v in model.trainable_variables])
    assert wrapped.stats().total().clipped == 10


def largest_change(model: Any, optimizer: Any) -> Any:
    """Compile and take a step; return the weights' largest change."""
    before = weights_of(model)
    fit(model, optimizer, batches=1, run_eagerly=True)
    return max(np.abs(a - b).max() for a, b in zip(before, weights_of(model), strict=True))


def centred(gradient: Any) -> Any:
    if len(gradient.shape) > 1:
        gradient -= tf.reduce_mean(gradient, 0, keepdims=True)
    return gradient


class Centralized(optimizers.SGD):
    """Gradient centralisation, as it is passed around: in ``apply_gradients``."""

    calls = 0

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        type(self).calls += 1
        pairs = [(centred(gradient), variable) for gradient, variable in grads_and_vars]
        return super().apply_gradients(pairs, *args, **kwargs)


class TestOverriddenMethods:
    """What the inner optimizer overrides acts as it does without the wrapper, and so does AGC."""

    def test_apply_gradients(self):
        inside, wrapped = variables(), AdaptiveGradClip(Centralized(0.1), PLAIN)
        result = wrapped.apply_gradients(zip(gradients(), inside, strict=True))
        assert int(result) == 1
        assert equal(inside, by_hand([centred(gradient) for gradient in gradients()]))
        assert wrapped.stats().total().clipped > 0

    @pytest.mark.parametrize("mode", ["eager", "graph"])
    def test_apply_gradients_in_fit(self, mode):
        Centralized.calls = 0
        model, wrapped = with_network(Centralized(0.1))
        fit(model, wrapped, **MODES[mode])
        assert Centralized.calls == (4 if mode == "eager" else Centralized.calls) > 0
        assert wrapped.stats().total().clipped > 0

    @pytest.mark.parametrize("method", ["apply", "update_step", "_clip_gradients"])
    def test_others(self, method):
        def doubled(self, first, *rest):
            first = [2 * g for g in first] if isinstance(first, (list, tuple)) else 2 * first
            return getattr(super(own, self), method)(first, *rest)

        own = type("Doubled", (optimizers.SGD,), {method: doubled})
        inside, wrapped = variables(), AdaptiveGradClip(own(0.1), PLAIN)
        before = 2 if method == "apply" else 1
        wrapped.apply(gradients(), inside)
        given = [before * gradient for gradient in gradients()]
        assert equal(inside, by_hand(given, 0.2 / before), 1e-6)
        assert wrapped.stats().total().clipped > 0

    def test_final_values(self):
        class Own(optimizers.SGD):
            def finalize_variable_values(self, var_list):
                for variable in var_list:
                    variable.assign(tf.zeros_like(variable))

        model = network()
        fit(model, AdaptiveGradClip(Own(0.1), RULE, model=model))
        assert all((weight == 0).all() for weight in weights_of(model))

    def test_accumulation_of_its_own(self):
        """Batches in which nothing is updated do not look like updates without AGC."""

        class Own(optimizers.SGD):
            held = None

            def apply(self, grads, trainable_variables=None):
                if self.held is None:
                    self.held = grads
                    return
                super().apply([a + b for a, b in zip(self.held, grads, strict=True)])

        wrapped, inside = AdaptiveGradClip(Own(0.1), PLAIN), variables()
        wrapped.apply(gradients(), inside)
        assert wrapped.stats().total().units == 0
        wrapped.apply(gradients(1), inside)
        assert wrapped.stats().total().clipped > 0

    @pytest.mark.parametrize("mode", ["eager", "graph"])
    def test_what_goes_past_agc_is_refused_and_undone(self, mode):
        class Own(optimizers.SGD):
            def apply(self, grads, trainable_variables=None):
                self.iterations.assign_add(1)
                for gradient, variable in zip(grads, trainable_variables, strict=True):
                    variable.assign_sub(gradient)

        model = network()
        before = weights_of(model)
        wrapped = AdaptiveGradClip(Own(0.1), RULE, model=model)
        with pytest.raises(ConfigError, match=r"Own updates its variables without Keras'"):
            fit(model, wrapped, **MODES[mode])
        assert same(weights_of(model), before)
        assert int(wrapped.iterations) == 0


class TestDetach:
    def test_it_clips_no_more_and_keeps_its_state(self):
        inside, expected = variables(), variables()
        wrapped = AdaptiveGradClip(optimizers.SGD(0.1, momentum=0.9), PLAIN)
        bare = optimizers.SGD(0.1, momentum=0.9)
        wrapped.apply(gradients(), inside)
        bare.apply(adaptive_clip_gradients(gradients(), expected, PLAIN), expected)
        inner = wrapped.detach()
        inner.apply(gradients(1))
        bare.apply(gradients(1))
        assert equal(inside, expected)
        assert int(inner.iterations) == 2
        with pytest.raises(ConfigError, match="was detached from this AdaptiveGradClip"):
            wrapped.apply(gradients(2))
        assert wrapped.detach() is inner
        again = AdaptiveGradClip(inner, PLAIN)
        again.apply(gradients(2))
        assert again.stats().total().clipped > 0

    def test_the_inner_optimizer_by_itself_goes_on_clipping_until_then(self):
        model, wrapped = with_network(optimizers.SGD(100.0), AGC(clipping=1e-9))
        assert largest_change(model, wrapped.inner_optimizer) < 1e-3
        assert largest_change(model, wrapped.detach()) > 0.1


def test_an_optimizer_that_could_not_be_wrapped_can_be_wrapped():
    """A failed attempt leaves nothing behind."""
    inner, model = optimizers.SGD(100.0), network()
    with pytest.raises(SelectorError):
        AdaptiveGradClip(inner, AGC(exclude=["nothing"]), model=model)
    assert AdaptiveGradClip(inner, RULE, model=model).inner_optimizer is inner


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pattern", "units"), [("n d -> d", 6), ("... ->", 1)])
def test_row_sparse_gradients_of_other_units(pattern, units, mode):
    class Positions(layers.Layer):
        def __init__(self, looks_up):
            super().__init__(name="p")
            self.looks_up = looks_up

        def build(self, shape):
            self.table = self.add_weight(shape=(9, shape[-1]), name="table")

        def call(self, x):
            table = self.table.value
            return x + (tf.gather(table, [0, 2]) if self.looks_up else tf.eye(9)[:3:2] @ table)

    results = []
    for looks_up in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((2, 6)), Positions(looks_up), layers.Flatten(), layers.Dense(3)]
        )
        rule = AGC(clipping=1e-4, units={"p.table": pattern})
        wrapped = AdaptiveGradClip(optimizers.SGD(0.5), rule, model=model)
        model.compile(wrapped, LOSS, **MODES[mode])
        before = weights_of(model)[0]
        model.fit(np.ones((8, 2, 6)), np.zeros(8), verbose=0, batch_size=8)
        assert wrapped.stats().parameters()["p.table"].units == units
        results.append(weights_of(model)[0] - before)
    assert np.flatnonzero(results[0].any(axis=1)).tolist() == [0, 2]
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_plan_marks_what_the_optimizer_does_not_have():
    model, wrapped = with_network(optimizers.SGD(0.1))
    assert wrapped.plan.count == 10
    wrapped.build(model.get_layer("head").trainable_variables)
    reasons = {entry.name: entry.inactive for entry in wrapped.plan}
    assert reasons["body.kernel"] == "not in the optimizer"
    assert reasons["head.kernel"] is None
    assert wrapped.plan.count == 4
    model.get_layer("head").trainable = False
    assert wrapped.plan["head.kernel"].inactive == "frozen"


def test_variables_made_after_the_optimizer_say_so():
    model, wrapped = with_network(optimizers.SGD(0.1))
    model.get_layer("body").enable_lora(2)
    with pytest.raises(ParameterError, match=r"lora_kernel_a.*was made after AdaptiveGradClip"):
        fit(model, wrapped)
    wrapped = AdaptiveGradClip(optimizers.SGD(0.1), RULE, model=model)
    fit(model, wrapped)
    assert wrapped.stats().parameters()["body.lora_kernel_a"].units == 2
    assert wrapped.plan["body.kernel"].inactive == "frozen"


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_quantized_layers(kind):
    model = network()
    model.get_layer("body").quantize(kind)
    if kind == "int8":
        model.get_layer("body").enable_lora(2)
    wrapped = AdaptiveGradClip(optimizers.SGD(0.1), RULE, model=model)
    fit(model, wrapped, jit_compile=False)
    kernels = {"int8": {"body.lora_kernel_a", "body.lora_kernel_b"}, "float8": {"body.kernel"}}
    found = set(wrapped.stats().parameters())
    assert found == kernels[kind] | {"body.bias", "head.kernel", "head.bias"}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "loss scale"])
def test_the_logs_of_an_epoch_have_the_telemetry(scaled):
    model, wrapped = with_network(optimizers.SGD(0.1))
    model.compile(optimizers.LossScaleOptimizer(wrapped) if scaled else wrapped, LOSS)
    logger = agc_tensorflow.AGCLogger(parameters=True)
    logger.set_model(model)
    wrapped.build(model.trainable_variables)
    logs = {"loss": 1.0}
    logger.on_epoch_end(0, logs)
    assert logs == {"loss": 1.0} | wrapped.stats().to_dict()
    model.compile("sgd", LOSS)
    with pytest.raises(ConfigError, match="compiled with AdaptiveGradClip, got SGD"):
        logger.on_epoch_end(0, {})
