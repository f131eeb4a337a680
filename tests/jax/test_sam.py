"""SAM as a value_and_grad, against the float64 reference and the failures of other code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import agc_jax
from agc import AGC
from agc.config import SAM
from agc.errors import ConfigError, DTypeError, NonFiniteError, ParameterError, SelectorError
from agc.reference import sharpness_aware_gradients
from agc.schedule import Schedule
from agc_jax.sam import sam_value_and_grad
from agc_jax.verify import verify_sam

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def make_weights(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"inner": {"kernel": (6, 8), "bias": (8,)}, "outer": {"kernel": (8, 3), "bias": (3,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(0.5 * rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def data(n=20):
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(n, 6))), jnp.asarray(rng.integers(0, 3, n))


def loss_fn(weights, x, y):
    hidden = jnp.tanh(x @ weights["inner"]["kernel"] + weights["inner"]["bias"])
    logits = hidden @ weights["outer"]["kernel"] + weights["outer"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


plain_value_and_grad = jax.jit(jax.value_and_grad(loss_fn))


def by_reference(weights, batch, rule, step=0, replicas=1):
    flat = {f"{a}.{b}": np.asarray(v) for a, layer in weights.items() for b, v in layer.items()}

    def gradients(point, part):
        tree = {a: {b: jnp.asarray(point[f"{a}.{b}"]) for b in weights[a]} for a in weights}
        value, grads = plain_value_and_grad(tree, *part)
        return float(value), {
            f"{a}.{b}": np.asarray(v) for a, layer in grads.items() for b, v in layer.items()
        }

    arrays = [np.asarray(array) for array in batch]
    return sharpness_aware_gradients(gradients, flat, arrays, rule, step=step, replicas=replicas)


RULES = {
    "plain": SAM(rho=0.1),
    "fraction": SAM(rho=0.1, fraction=0.2),
    "microbatches": SAM(rho=0.1, microbatches=3),
    "equal-microbatches": SAM(rho=0.1, microbatches=4),
    "both": SAM(rho=0.1, microbatches=3, fraction=0.5),
    "adaptive": SAM(rho=0.5, adaptive=True),
    "only": SAM(rho=0.1, only=["outer.*"]),
    "exclude": SAM(rho=0.1, exclude=["*.bias"]),
    "schedule": SAM(rho=Schedule([(0, 0.3), (6, 0.1)])),
    "every": SAM(rho=0.1, every=2),
    "davda54": SAM.profile("davda54"),
}


@functools.cache
def compiled(name):
    """One program for all steps."""
    return jax.jit(
        sam_value_and_grad(loss_fn, RULES[name], batch_argnums=(1, 2), return_stats=True)
    )


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", RULES)
def test_gradients_equal_the_reference(name, step):
    weights, batch = make_weights(), data()
    want = by_reference(weights, batch, RULES[name], step)
    value, gradients, stats = compiled(name)(weights, *batch, step=step)
    assert float(value) == pytest.approx(want.loss, rel=1e-13)
    assert float(stats.perturbed_loss) == pytest.approx(want.perturbed_loss, rel=1e-13)
    assert float(stats.norm) == pytest.approx(max(want.norms, default=0), rel=1e-13)
    for a, layer in gradients.items():
        for b, g in layer.items():
            np.testing.assert_allclose(g, want.gradients[f"{a}.{b}"], rtol=1e-11, atol=1e-15)


def test_has_the_signature_of_value_and_grad():
    weights, (x, y) = make_weights(), data()
    value, gradients = sam_value_and_grad(loss_fn, SAM())(weights, x, y)
    plain_value, plain = jax.value_and_grad(loss_fn)(weights, x, y)
    assert value == plain_value
    assert jax.tree.structure(gradients) == jax.tree.structure(plain)

    def two(x, weights, other):
        return loss_fn(weights, x, y) + jnp.sum(other**2), {"seen": jnp.mean(x)}

    function = sam_value_and_grad(two, SAM(), argnums=(1, 2), has_aux=True)
    (_, aux), (g, other) = function(x, weights, jnp.ones(2))
    assert aux["seen"] == jnp.mean(x)
    assert jax.tree.structure(g) == jax.tree.structure(plain)
    assert other.shape == (2,)


@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_aux_comes_from_the_clean_or_the_whole_pass(fraction):
    """Statistics at the clean weights, unless that pass saw a part of the batch only."""
    weights, (x, y) = make_weights(), data()

    def with_aux(w, x, y):
        return loss_fn(w, x, y), {"w": w["outer"]["bias"], "n": jnp.asarray(x.shape[0])}

    function = sam_value_and_grad(
        with_aux, SAM(fraction=fraction), has_aux=True, batch_argnums=(1, 2)
    )
    (_, aux), _ = function(weights, x, y)
    assert aux["n"] == 20
    assert jnp.array_equal(aux["w"], weights["outer"]["bias"]) == (fraction == 1)


def test_the_same_random_numbers_in_both_passes():
    seen = []

    def noisy(w, key):
        mask = jax.random.bernoulli(key, 0.5, w.shape)
        jax.debug.callback(lambda m: seen.append(np.asarray(m)), mask)
        return jnp.sum(mask * w**2)

    sam_value_and_grad(noisy, SAM())(jnp.ones(50), jax.random.key(3))
    jax.effects_barrier()
    assert len(seen) == 2
    assert np.array_equal(seen[0], seen[1])


def test_zero_gradient_is_a_plain_step():
    value, g = sam_value_and_grad(lambda w: jnp.sum(w**2), SAM())(jnp.zeros(3))
    assert value == 0
    assert g.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_norms_do_not_overflow_in_low_precision(dtype):
    weights = jnp.zeros(4, dtype)
    seen = []

    def linear(w):
        jax.debug.callback(lambda point: seen.append(np.asarray(point, np.float64)), w)
        return jnp.sum(w.astype(jnp.float32) * 60000.0)

    _, gradients = sam_value_and_grad(linear, SAM(rho=1.0))(weights)
    jax.effects_barrier()
    assert gradients.dtype == weights.dtype
    assert seen[-1].tolist() == [0.5] * 4


class TestNonFinite:
    @staticmethod
    def poisoned(w, x):
        return jnp.sum(w * x)

    def test_skip_step_is_nan_and_apply_if_finite_skips(self):
        weights = jnp.ones(3)
        _, g = jax.jit(sam_value_and_grad(self.poisoned, SAM()))(
            weights, jnp.array([1, jnp.inf, 1])
        )
        assert jnp.isnan(g).all()
        tx = optax.apply_if_finite(optax.sgd(0.1, 0.9), 100)
        updates, _ = tx.update(g, tx.init(weights), weights)
        assert jnp.array_equal(optax.apply_updates(weights, updates), weights)

    def test_skip_perturb_takes_the_plain_gradient(self):
        def loss(w, x):
            return jnp.sum(w * x)

        rule = SAM(fraction=0.5, nonfinite="skip_perturb")
        x = jnp.array([[jnp.inf, 1.0], [1.0, 1.0]])
        w = jnp.ones(2)
        _, g = sam_value_and_grad(lambda w, x: loss(w, x[-1]), rule, batch_argnums=1)(w, x)
        assert g.tolist() == [1, 1]

    def test_raise(self):
        function = sam_value_and_grad(self.poisoned, SAM(nonfinite="raise"))
        with pytest.raises(NonFiniteError, match="norm of the ascent gradient is inf"):
            function(jnp.ones(1), jnp.array([jnp.inf]))
        with pytest.raises(
            ConfigError, match=r"use nonfinite='skip_step' with optax\.apply_if_finite"
        ):
            jax.jit(function)(jnp.ones(1), jnp.ones(1))


def squares(w, *_):
    """Sum of squared magnitudes, of any tree."""
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(w))


class TestScheduleOfNonsense:
    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
    def test_a_known_step_raises(self, value, every):
        rule = SAM(rho=lambda step: value + 0 * step, every=every)
        for step in (4, jnp.int32(4)):
            with pytest.raises(
                ConfigError, match=r"rho: the schedule returned .* a finite number > 0"
            ):
                sam_value_and_grad(squares, rule)(jnp.ones(3), step=step)
        if every == 2:  # where nothing is perturbed
            sam_value_and_grad(squares, rule)(jnp.ones(3), step=5)

    @pytest.mark.parametrize("nonfinite", ["skip_step", "skip_perturb"])
    @pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
    def test_a_traced_step_is_nan(self, value, nonfinite):
        """Also where the gradient does not depend on the weights."""
        rule = SAM(rho=lambda step: value + 0 * step, nonfinite=nonfinite)
        function = jax.jit(sam_value_and_grad(lambda w: 2 * w.sum(), rule))
        assert jnp.isnan(function(jnp.ones(3), step=4)[1]).all()

    def test_not_a_number(self):
        with pytest.raises(ConfigError, match=r"rho: the schedule .* must return a number"):
            sam_value_and_grad(squares, SAM(rho=lambda step: None))(jnp.ones(3), step=0)


class TestComplex:
    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
    def test_moves_uphill(self, dtype, adaptive):
        w = {"a": jnp.array([[2j, 2j]], dtype), "b": jnp.array([3.0 - 4j], dtype)}
        rule = SAM(rho=0.5, adaptive=adaptive, eta=0.0)
        (value, gradients, stats) = sam_value_and_grad(squares, rule, return_stats=True)(w)
        norm = np.sqrt(4 * 33) if not adaptive else np.sqrt(2 * 8**2 + 10**2)
        grown = {k: 1 + 0.5 * (4 if adaptive and k == "a" else 1) * 2 / norm for k in w}
        assert value == 33
        assert gradients["a"].dtype == dtype
        assert stats.norm.dtype == (jnp.float32 if dtype == jnp.complex64 else jnp.float64)
        assert stats.perturbed_loss == pytest.approx(8 * grown["a"] ** 2 + 25 * grown["b"] ** 2)
        for name, array in w.items():  # as jax.grad gives them
            np.testing.assert_allclose(
                gradients[name], 2 * grown[name] * jnp.conj(array), rtol=1e-6
            )

    def test_verify(self):
        w = {"a": jnp.array([[2j, 1 - 2j]]), "b": jnp.array([3.0, -4])}
        found = verify_sam(lambda f: sam_value_and_grad(f, SAM()), squares, w)
        assert found.ok
        assert found.perturbation == pytest.approx(0.05, rel=1e-12)
        assert found.cosine == pytest.approx(1, rel=1e-12)

        def downhill(f):
            def function(w):
                g = jax.grad(f)(w)
                return jax.value_and_grad(f)(jax.tree.map(lambda w, g: w - 0.01 * g.conj(), w, g))

            return function

        assert not verify_sam(downhill, squares, w).ok


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_norm_is_wide(dtype, step):
    w = jnp.full(2, 16, dtype)

    def huge(w):  # each element fits float16, their norm does not
        return jnp.sum(w * jnp.asarray([60000, -60000], dtype))

    function = sam_value_and_grad(huge, SAM(every=2), return_stats=True)
    for run in (function, jax.jit(function)):
        norm = run(w, step=step)[2].norm
        assert norm.dtype == ("float64" if dtype == "float64" else "float32")
        assert norm == pytest.approx(0 if step else 60000 * np.sqrt(2), rel=1e-3)


def test_every_perturbed_weight_is_empty():
    w = {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}
    value, gradients, stats = sam_value_and_grad(squares, SAM(only=["a"]), return_stats=True)(w)
    assert (value, stats.norm) == (2, 0)
    assert gradients["b"].tolist() == [2, 2]


def test_python_numbers_are_weights():
    by_hand = sam_value_and_grad(squares, SAM())({"a": 2.0, "b": np.ones(2)})
    jitted = jax.jit(sam_value_and_grad(squares, SAM()))({"a": 2.0, "b": np.ones(2)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), by_hand, jitted)


def test_in_a_scan_with_optax():
    weights, (x, y) = make_weights(), data()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, 0.9, nesterov=True))
    function = sam_value_and_grad(loss_fn, SAM(rho=Schedule([(0, 0.1), (50, 0.01)]), every=2))

    def body(carry, step):
        weights, state = carry
        value, gradients = function(weights, x, y, step=step)
        updates, state = tx.update(gradients, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    run = jax.jit(functools.partial(jax.lax.scan, body))
    _, losses = run((weights, tx.init(weights)), jnp.arange(50))
    assert losses[-1] < 0.5 * losses[0]


def test_flax_train_state_and_nnx_optimizer_agree():
    from flax.training.train_state import TrainState

    x, y = data()

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(6, 8, rngs=rngs, param_dtype=jnp.float64)
            self.outer = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.outer(jnp.tanh(self.inner(x)))

    model = Net(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    state = TrainState.create(
        apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=optax.sgd(0.1, 0.9)
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

    def loss(params, x, y):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    function = sam_value_and_grad(loss, SAM(exclude=["outer.bias"]))
    before = float(loss(params, x, y))
    for _ in range(5):
        state = state.apply_gradients(grads=function(state.params, x, y)[1])
        optimizer.update(model, function(nnx.state(model, nnx.Param), x, y)[1])
    assert loss(state.params, x, y) < before
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def with_default(w, x, step=0):
    return jnp.mean((x @ w) ** 2) * (1.0 + step)


def keyword_only(w, x, *, step):
    return with_default(w, x, step)


def any_keyword(w, x, **keywords):
    return with_default(w, x, keywords["step"])


class TestStep:
    """``step=`` is the rule's and the loss's (a curriculum's, say), whichever wants it."""

    @pytest.mark.parametrize(
        "loss",
        [with_default, keyword_only, any_keyword, functools.partial(with_default, step=1),
         jax.jit(with_default)],
        ids=["default", "keyword only", "any keyword", "partial", "jit"],
    )  # fmt: skip
    @pytest.mark.parametrize("rule", [SAM(), SAM(every=2)], ids=["plain", "every"])
    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_the_loss_sees_it(self, loss, rule, transform):
        w, x = jnp.ones(4), jnp.ones((8, 4))
        value, gradients = transform(sam_value_and_grad(loss, rule))(w, x, step=3)
        assert value == jax.value_and_grad(loss)(w, x, step=3)[0] == 64
        if rule.every == 2:  # step 3 is a plain one
            np.testing.assert_allclose(gradients, jax.grad(loss)(w, x, step=3))

    @pytest.mark.parametrize("loss", [squares, lambda w: jnp.sum(w**2)], ids=["any", "one"])
    def test_a_loss_without_it_does_not(self, loss):
        value, _ = sam_value_and_grad(loss, SAM(every=2))(jnp.ones(3), step=0)
        assert value == 3

    def test_given_by_position(self):
        """Then the keyword is the rule's alone."""
        function = sam_value_and_grad(with_default, SAM(every=2))
        assert function(jnp.ones(4), jnp.ones((8, 4)), 3, step=1)[0] == 64

    def test_other_keywords_reach_the_loss(self):
        """The names of the options of sam_value_and_grad are free for the loss."""

        def loss(w, *, rule, axis_name, has_aux, argnums, batch_argnums, loss_fn, return_stats):
            options = (rule, axis_name, has_aux, argnums, batch_argnums, loss_fn, return_stats)
            return w.sum() * sum(options)

        names = (
            "rule",
            "axis_name",
            "has_aux",
            "argnums",
            "batch_argnums",
            "loss_fn",
            "return_stats",
        )
        value, _ = sam_value_and_grad(loss, SAM())(jnp.ones(2), **dict.fromkeys(names, 1.0))
        assert value == 14


def grows(tree):
    return squares(jax.tree.map(jnp.exp, tree))


class TestNames:
    """One configuration names the parameters of AGC and of SAM."""

    @staticmethod
    def trees():
        module = linen.Dense(
            3, kernel_init=linen.with_partitioning(linen.initializers.ones_init(), (None, "m"))
        )
        logical = linen.Dense(
            3,
            kernel_init=linen.with_logical_partitioning(linen.initializers.ones_init(), ("i", "o")),
        )
        x = jnp.ones((8, 4))
        return {
            "plain": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
            "nnx": nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param),
            "partitioned": module.init(jax.random.key(0), x)["params"],
            "logical": logical.init(jax.random.key(0), x)["params"],
            "absent": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "static": None,
                       "masked": optax.MaskedNode()},
        }  # fmt: skip

    @pytest.mark.parametrize("kind", ["plain", "nnx", "partitioned", "logical", "absent"])
    @pytest.mark.parametrize("prefix", ["", "0."], ids=["alone", "in a list"])
    def test_as_in_the_plan(self, kind, prefix):
        tree = [self.trees()[kind]] if prefix else self.trees()[kind]
        names = [f"{prefix}bias", f"{prefix}kernel"]
        rule = AGC(units={"*kernel": "i o -> o"})
        assert sorted(entry.name for entry in agc_jax.plan(tree, rule)) == names
        for only in names:
            (other,) = {*names} - {only}
            for rule in (SAM(rho=0.5, only=[only]), SAM(rho=0.5, exclude=[other])):
                _, gradients = sam_value_and_grad(grows, rule)(tree)
                assert jax.tree.structure(gradients) == jax.tree.structure(tree)
                plain = jax.grad(grows)(tree)
                pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(plain), strict=True)
                moved = [leaf.shape for leaf, still in pairs if bool((leaf != still).any())]
                assert moved == [(3,) if only.endswith("bias") else (4, 3)]
        with pytest.raises(SelectorError, match=r"matches no parameter; the names are: .*kernel"):
            sam_value_and_grad(squares, SAM(exclude=["*.value"]))(tree)


class TestModules:
    def test_equinox_is_partitioned_first(self):
        eqx = pytest.importorskip("equinox")
        model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
        x = jnp.ones((5, 2))
        with pytest.raises(DTypeError, match=r"'activation' is no array .* eqx\.partition\(model"):
            sam_value_and_grad(lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), SAM())(model, x)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        function = sam_value_and_grad(
            lambda p, x: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2),
            SAM(exclude=["layers.0.bias"]),
        )
        value, gradients = jax.jit(function)(params, x)
        assert jax.tree.structure(gradients) == jax.tree.structure(params)
        assert value > 0

    @pytest.mark.parametrize("inside", [nnx.Dropout, nnx.BatchNorm])
    def test_nnx_is_split_first(self, inside):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.linear = nnx.Linear(3, 4, rngs=rngs)
                self.other = (
                    inside(4, rngs=rngs) if inside is nnx.BatchNorm else inside(0.5, rngs=rngs)
                )

        with pytest.raises(
            (DTypeError, ParameterError),
            match=r"'other\..* = nnx\.split\(model, nnx\.Param, \.\.\.\)",
        ):
            sam_value_and_grad(squares, SAM())(Net(nnx.Rngs(0)))

    def test_nnx_of_weights_alone(self):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        _, gradients = sam_value_and_grad(lambda m: (m(jnp.ones((2, 3))) ** 2).sum(), SAM())(model)
        assert isinstance(gradients, nnx.Linear)

    def test_what_is_no_array(self):
        with pytest.raises(DTypeError, match=r"parameter 'f' is no array but <function"):
            sam_value_and_grad(squares, SAM())({"w": jnp.ones(2), "f": squares})


RULES_OF_PARTS = [SAM(fraction=0.5), SAM(microbatches=2), SAM(microbatches=3)]


class TestWhatIsNoBatch:
    @pytest.mark.parametrize("rule", RULES_OF_PARTS, ids=str)
    @pytest.mark.parametrize(
        "extra",
        [2.0, np.float32(2), jnp.ones(()), jax.random.key(0)],
        ids=["float", "numpy", "jax", "key"],
    )
    def test_scalars_and_keys(self, rule, extra):
        function = sam_value_and_grad(lambda w, b: (b["x"] @ w).mean(), rule, batch_argnums=1)
        with pytest.raises(
            ConfigError, match=r"argument 1, 'extra', has no first axis .* batch_argnums"
        ):
            function(jnp.ones(3), {"x": jnp.ones((6, 3)), "extra": extra})

    @pytest.mark.parametrize("rule", RULES_OF_PARTS, ids=str)
    def test_raw_keys(self, rule):
        """Two words long, they must not be taken for two examples."""
        function = sam_value_and_grad(lambda w, x, k: (x @ w).mean(), rule, batch_argnums=(1, 2))
        with pytest.raises(
            ConfigError, match=r"share their first axis, got \[2, 6\]: argument 1 has 6; "
        ):
            function(jnp.ones(3), jnp.ones((6, 3)), jax.random.PRNGKey(0))
        with pytest.raises(ConfigError, match="batch_argnums hold no array"):
            function(jnp.ones(3), {}, None)

    @pytest.mark.parametrize("rule", RULES_OF_PARTS, ids=str)
    def test_a_key_for_every_example(self, rule):
        def loss(w, x, keys):
            noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
            return jnp.mean(((x + noise) @ w) ** 2)

        w, x, keys = jnp.ones(3), jnp.ones((6, 3)), jax.random.split(jax.random.key(0), 6)
        function = sam_value_and_grad(loss, rule, batch_argnums=(1, 2))
        noisy = x + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        want = sam_value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), rule, batch_argnums=1)(
            w, noisy
        )
        np.testing.assert_allclose(jax.jit(function)(w, x, keys)[1], want[1], rtol=1e-12)


class TestDerivatives:
    """Through the whole step, as meta-learning takes them."""

    @pytest.mark.parametrize("rule", [SAM(rho=0.3), SAM(rho=0.3, adaptive=True)], ids=str)
    def test_equal_finite_differences(self, rule):
        def total(w):
            return jnp.sum(sam_value_and_grad(lambda w: jnp.sum(jnp.sin(w) ** 3), rule)(w)[1] ** 2)

        w, e = jnp.array([[0.3, -0.7], [1.1, 0.2]]), 1e-5
        slope = jax.grad(total)(w)
        shift = jnp.zeros_like(w).at[0, 1].set(e)
        difference = (total(w + shift) - total(w - shift)) / (2 * e)
        np.testing.assert_allclose(slope[0, 1], difference, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.complex128])
    def test_are_finite_where_the_gradient_is_zero(self, dtype):
        def total(w):
            gradients = sam_value_and_grad(squares, SAM(rho=0.3))(w)[1]
            return jnp.sum((gradients + w).real)

        assert jnp.isfinite(jax.grad(total)(jnp.zeros(3, dtype))).all()


def on_mesh(kinds, spec):
    kinds = tuple(jax.sharding.AxisType[kind] for kind in kinds)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)
    return lambda array, spec=spec: jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))


@pytest.mark.parametrize("kinds", [("Explicit", "Explicit"), ("Explicit", "Auto")], ids="-".join)
@pytest.mark.parametrize(
    "rule",
    [SAM(rho=0.1, microbatches=4), SAM(rho=0.1, microbatches=3), SAM(rho=0.1, fraction=0.3),
     SAM(rho=0.1, microbatches=2, fraction=0.3), SAM(rho=0.1, every=2, microbatches=4)],
    ids=str,
)  # fmt: skip
def test_a_batch_that_is_split_over_devices(kinds, rule):
    split = ("d", "m") if kinds[0] == kinds[1] else "d"
    weights, batch = make_weights() | {"split": jnp.linspace(-1, 1, 32).reshape(8, 4)}, data(32)
    put = on_mesh(kinds, (split,))

    def loss(weights, x, y):
        return loss_fn(weights, x, y) + jnp.sum(weights["split"] ** 3) * jnp.mean(x)

    function = sam_value_and_grad(loss, rule, batch_argnums=(1, 2))
    step = {"step": 0} if rule.every > 1 else {}
    want, wanted = jax.jit(function)(weights, *batch, **step)
    placed = jax.tree.map(lambda array: put(array, ()), weights)
    placed["split"] = put(weights["split"], ("d", "m"))
    value, gradients = jax.jit(function)(placed, *map(put, batch), **step)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


class TestErrors:
    def test_batch(self):
        with pytest.raises(ConfigError, match=r"fraction=0.2 .* batch_argnums=\(1, 2\)"):
            sam_value_and_grad(loss_fn, SAM(fraction=0.2))
        with pytest.raises(ConfigError, match="argument 0 is in both"):
            sam_value_and_grad(loss_fn, SAM(), batch_argnums=(0, 1))
        weights, (x, y) = make_weights(), data()
        function = sam_value_and_grad(loss_fn, SAM(microbatches=21), batch_argnums=(1, 2))
        with pytest.raises(ConfigError, match="microbatches=21 is more than the 20 examples"):
            function(weights, x, y)
        with pytest.raises(ConfigError, match=r"share their first axis, got \[19, 20\]"):
            function(weights, x, y[1:])

    @pytest.mark.parametrize(
        "rule", [SAM(every=2), SAM(rho=lambda step: 0.1)], ids=["every", "rho"]
    )
    def test_step_is_needed(self, rule):
        weights, (x, y) = make_weights(), data()
        with pytest.raises(ConfigError, match="call with step="):
            sam_value_and_grad(loss_fn, rule)(weights, x, y)

    def test_empty_set(self):
        weights, (x, y) = make_weights(), data()
        with pytest.raises(SelectorError, match="no parameter is left to perturb"):
            sam_value_and_grad(loss_fn, SAM(exclude=["*"]))(weights, x, y)
        with pytest.raises(
            SelectorError, match=r"matches no parameter; the names are: inner\.bias"
        ):
            sam_value_and_grad(loss_fn, SAM(only=["head.*"]))(weights, x, y)

    def test_two_weights_of_one_name(self):
        with pytest.raises(ParameterError, match=r"two parameters are called 'a\.b'"):
            sam_value_and_grad(squares, SAM())({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})

    @pytest.mark.parametrize("rule", [AGC(), None, 0.05, {"rho": 0.05}], ids=repr)
    def test_rule(self, rule):
        with pytest.raises(ConfigError, match=r"rule must be an agc\.SAM, got"):
            sam_value_and_grad(loss_fn, rule)

    def test_positions(self):
        for name in ("argnums", "batch_argnums"):
            with pytest.raises(ConfigError, match=f"{name} must be positions of arguments"):
                sam_value_and_grad(squares, SAM(), **{name: "w"})
            function = sam_value_and_grad(squares, SAM(), **{name: 3})
            with pytest.raises(
                ConfigError, match=f"{name}: there is no argument 3 in a call with 1 positional"
            ):
                function(jnp.ones(2))
        function = sam_value_and_grad(squares, SAM(), argnums=-2, batch_argnums=0)
        with pytest.raises(ConfigError, match="argument 0 is in both"):
            function(jnp.ones(2), jnp.ones(2))

    def test_integer_weights(self):
        w = {"a": jnp.ones(2), "n": jnp.ones(2, int)}
        with pytest.raises(
            DTypeError, match="parameter 'n': the weight has dtype int64; SAM needs"
        ):
            sam_value_and_grad(squares, SAM())(w)


class TestVerify:
    def test_ours(self):
        weights, (x, y) = make_weights(), data()
        found = verify_sam(lambda f: sam_value_and_grad(f, SAM(rho=0.05)), loss_fn, weights, x, y)
        assert found.ok
        assert found.perturbation == pytest.approx(0.05, rel=1e-12)
        assert found.cosine == pytest.approx(1, rel=1e-12)

    def test_a_plain_gradient_is_not_sam(self):
        weights, (x, y) = make_weights(), data()
        found = verify_sam(jax.value_and_grad, loss_fn, weights, x, y)
        assert not found.ok
        assert found.passes == 1

    def test_the_first_gradient_used_twice(self):
        def wrong(f):
            def function(weights, *args):
                value, first = jax.value_and_grad(f)(weights, *args)
                f(jax.tree.map(lambda w, g: w + 0.01 * g, weights, first), *args)
                return value, first

            return function

        weights, (x, y) = make_weights(), data()
        found = verify_sam(wrong, loss_fn, weights, x, y)
        assert not found.ok
        assert found.gradient_error > 1e-3

    def test_weights_that_are_written_to(self):
        def careless(f):
            def function(w):
                value, gradients = sam_value_and_grad(f, SAM())(w)
                w += 0.01
                return value, gradients

            return function

        found = verify_sam(careless, lambda w: jnp.sum(w**3), np.ones(3))
        assert not found.restored
        assert not found.ok


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_enable_x64", True)
import test_sam as t
from agc.config import SAM
from agc_jax.sam import sam_value_and_grad

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
weights, batch = t.make_weights(), t.data(32)

def check(gradients, want):
    for a, layer in gradients.items():
        for b, g in layer.items():
            np.testing.assert_allclose(g, want.gradients[f"{a}.{b}"], rtol=1e-11, atol=1e-15)

for scope in ("local", "global"):
    rule = SAM(rho=0.3, scope=scope, fraction=0.5)
    f = sam_value_and_grad(t.loss_fn, rule, batch_argnums=(1, 2), axis_name="data")
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P()))
    value, gradients = jax.jit(sharded)(weights, *batch)
    want = t.by_reference(weights, batch, rule, replicas=8)
    check(gradients, want)
    np.testing.assert_allclose(value, want.loss, rtol=1e-12)
    print("shard_map", scope)

rule = SAM(rho=0.3)
placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in batch]
_, gradients = jax.jit(sam_value_and_grad(t.loss_fn, rule))(weights, *placed)
check(gradients, t.by_reference(weights, batch, rule))
print("gspmd")
"""


def test_eight_devices():
    """Local and global scope under shard_map, and GSPMD, equal the reference's replicas."""
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["shard_map local", "shard_map global", "gspmd"]
