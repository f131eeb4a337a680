"""SAM as a value_and_grad, and the failures of other code."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import agc_jax
from agc import AGC
from agc.config import SAM
from agc.errors import ConfigError, DTypeError, ParameterError, SelectorError
from agc.schedule import Schedule
from agc_jax.sam import sam_value_and_grad
from agc_jax.verify import verify_sam
from tests.contract.sam import SamFunctionContract, VerifyContract, network, network_problem
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick", "x64")


class TestSam(SamFunctionContract):
    driver = JaxDriver()
    batch_cure = r"batch_argnums=\(1, 2\)"
    step_cure = "call with step="


def network_arrays(examples=20):
    """Return the network's weights, and a batch."""
    problem = network_problem(examples=examples)
    return jax.device_put((dict(problem.weights), *problem.batch))


loss_fn = partial(network, jnp)


def squares(w, *_):
    """Return the sum of squared magnitudes, of any tree."""
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(w))


def test_has_the_signature_of_value_and_grad():
    weights, x, y = network_arrays()
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
    weights, x, y = network_arrays()

    def with_aux(w, x, y):
        return loss_fn(w, x, y), {"w": w["outer_bias"], "n": jnp.asarray(x.shape[0])}

    rule = SAM(fraction=fraction)
    function = sam_value_and_grad(with_aux, rule, has_aux=True, batch_argnums=(1, 2))
    (_, aux), _ = function(weights, x, y)
    assert aux["n"] == 20
    assert jnp.array_equal(aux["w"], weights["outer_bias"]) == (fraction == 1)


def test_the_same_random_numbers_in_both_passes():
    seen = []

    def noisy(w, key):
        mask = jax.random.bernoulli(key, 0.5, w.shape)
        jax.debug.callback(lambda mask: seen.append(np.asarray(mask)), mask)
        return jnp.sum(mask * w**2)

    sam_value_and_grad(noisy, SAM())(jnp.ones(50), jax.random.key(3))
    jax.effects_barrier()
    first, second = seen
    assert np.array_equal(first, second)


def test_verify_of_complex_weights():
    w = {"a": jnp.array([[2j, 1 - 2j]]), "b": jnp.array([3.0, -4])}
    seen = verify_sam(lambda f: sam_value_and_grad(f, SAM()), squares, w)
    assert seen.ok
    assert seen.perturbation == pytest.approx(0.05, rel=1e-12)
    assert seen.cosine == pytest.approx(1, rel=1e-12)

    def downhill(f):
        def function(w):
            g = jax.grad(f)(w)
            return jax.value_and_grad(f)(jax.tree.map(lambda w, g: w - 0.01 * g.conj(), w, g))

        return function

    assert not verify_sam(downhill, squares, w).ok


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
    weights, x, y = network_arrays()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, 0.9, nesterov=True))
    function = sam_value_and_grad(loss_fn, SAM(rho=Schedule([(0, 0.1), (50, 0.01)]), every=2))

    def body(carry, step):
        weights, state = carry
        value, gradients = function(weights, x, y, step=step)
        updates, state = tx.update(gradients, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    run = jax.jit(partial(jax.lax.scan, body))
    _, losses = run((weights, tx.init(weights)), jnp.arange(50))
    assert losses[-1] < 0.5 * losses[0]


def test_flax_train_state_and_nnx_optimizer_agree():
    _, x, y = network_arrays()

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
        return optax.softmax_cross_entropy(nnx.merge(graph, params)(x), y).mean()

    function = sam_value_and_grad(loss, SAM(exclude=["outer.bias"]))
    before = float(loss(params, x, y))
    for _ in range(5):
        state = state.apply_gradients(grads=function(state.params, x, y)[1])
        optimizer.update(model, function(nnx.state(model, nnx.Param), x, y)[1])
    assert loss(state.params, x, y) < before
    jax.tree.map(np.testing.assert_array_equal, state.params, nnx.state(model, nnx.Param))


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
        [with_default, keyword_only, any_keyword, partial(with_default, step=1),
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

        names = inspect.signature(loss).parameters
        value, _ = sam_value_and_grad(loss, SAM())(
            jnp.ones(2), **dict.fromkeys(list(names)[1:], 1.0)
        )
        assert value == 14


def grows(tree):
    return squares(jax.tree.map(jnp.exp, tree))


class TestNames:
    """One configuration names the parameters of AGC and of SAM."""

    @staticmethod
    def trees():
        def dense(partition, *axes):
            layer = linen.Dense(3, kernel_init=partition(linen.initializers.ones_init(), axes))
            return layer.init(jax.random.key(0), jnp.ones((8, 4)))["params"]

        plain = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        return {
            "plain": plain,
            "nnx": nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param),
            "partitioned": dense(linen.with_partitioning, None, "m"),
            "logical": dense(linen.with_logical_partitioning, "i", "o"),
            "absent": {**plain, "static": None, "masked": optax.MaskedNode()},
        }

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

    @pytest.mark.parametrize(
        "inside",
        [lambda rngs: nnx.Dropout(0.5, rngs=rngs), lambda rngs: nnx.BatchNorm(4, rngs=rngs)],
        ids=["Dropout", "BatchNorm"],
    )
    def test_nnx_is_split_first(self, inside):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.linear = nnx.Linear(3, 4, rngs=rngs)
                self.other = inside(rngs)

        message = r"'other\..* = nnx\.split\(model, nnx\.Param, \.\.\.\)"
        with pytest.raises((DTypeError, ParameterError), match=message):
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
        plain = sam_value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), rule, batch_argnums=1)
        expected = plain(w, noisy)[1]
        np.testing.assert_allclose(jax.jit(function)(w, x, keys)[1], expected, rtol=1e-12)


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


RULES_OF_DEVICES = [
    SAM(rho=0.1, microbatches=4),
    SAM(rho=0.1, microbatches=3),
    SAM(rho=0.1, fraction=0.3),
    SAM(rho=0.1, microbatches=2, fraction=0.3),
    SAM(rho=0.1, every=2, microbatches=4),
]


class TestDevices:
    """A batch that is split over devices gives what it gives on one: the global scope."""

    def check(self, rule, *meshes):
        """Compare meshes, given as types of their two axes, with one device."""

        def loss(weights, x, y):
            return loss_fn(weights, x, y) + jnp.sum(weights["split"] ** 3) * jnp.mean(x)

        weights, *batch = network_arrays(32)
        weights["split"] = jnp.linspace(-1, 1, 32).reshape(8, 4)
        function = jax.jit(sam_value_and_grad(loss, rule, batch_argnums=(1, 2)))
        step = {"step": 0} if rule.every > 1 else {}
        expected = function(weights, *batch, **step)
        for kinds in meshes:
            types = tuple(jax.sharding.AxisType[kind] for kind in kinds)
            mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=types)

            def put(array, *spec, mesh=mesh):
                return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))

            placed = {name: put(array) for name, array in weights.items()}
            placed["split"] = put(weights["split"], "d", "m")
            axes = ("d", "m") if kinds[0] == kinds[1] else "d"
            answer = function(placed, *(put(array, axes) for array in batch), **step)
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), answer, expected
            )

    @pytest.mark.parametrize("rule", RULES_OF_DEVICES, ids=str)
    def test_explicit_shardings(self, rule):
        self.check(rule, ("Explicit", "Explicit"), ("Explicit", "Auto"))

    def test_automatic_shardings(self):
        self.check(SAM(rho=0.3), ("Auto", "Auto"))


class TestErrors:
    def test_raise_is_for_functions_that_are_not_traced(self):
        function = jax.jit(sam_value_and_grad(squares, SAM(nonfinite="raise")))
        message = r"use nonfinite='skip_step' with optax\.apply_if_finite"
        with pytest.raises(ConfigError, match=message):
            function(jnp.ones(1))

    def test_a_schedule_that_returns_no_number(self):
        with pytest.raises(ConfigError, match=r"rho: the schedule .* must return a number"):
            sam_value_and_grad(squares, SAM(rho=lambda step: None))(jnp.ones(3), step=0)

    def test_two_weights_of_one_name(self):
        with pytest.raises(ParameterError, match=r"two parameters are called 'a\.b'"):
            sam_value_and_grad(squares, SAM())({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})

    def test_positions(self):
        for name in ("argnums", "batch_argnums"):
            with pytest.raises(ConfigError, match=f"{name} must be positions of arguments"):
                sam_value_and_grad(squares, SAM(), **{name: "w"})
            function = sam_value_and_grad(squares, SAM(), **{name: 3})
            with pytest.raises(
                ConfigError, match=f"{name}: there is no argument 3 in a call with 1 positional"
            ):
                function(jnp.ones(2))
        with pytest.raises(ConfigError, match="argument 0 is in both"):
            sam_value_and_grad(squares, SAM(), batch_argnums=(0, 1))
        function = sam_value_and_grad(squares, SAM(), argnums=-2, batch_argnums=0)
        with pytest.raises(ConfigError, match="argument 0 is in both"):
            function(jnp.ones(2), jnp.ones(2))

    def test_integer_weights(self):
        w = {"a": jnp.ones(2), "n": jnp.ones(2, int)}
        with pytest.raises(
            DTypeError, match="parameter 'n': the weight has dtype int64; SAM needs"
        ):
            sam_value_and_grad(squares, SAM())(w)


class TestVerify(VerifyContract):
    driver = JaxDriver()

    def test_the_first_gradient_used_twice(self):
        def wrong(f):
            def function(weights, *args):
                value, first = jax.value_and_grad(f)(weights, *args)
                f(jax.tree.map(lambda w, g: w + 0.01 * g, weights, first), *args)
                return value, first

            return function

        seen = verify_sam(wrong, loss_fn, *network_arrays())
        assert not seen.ok
        assert seen.gradient_error > 1e-3

    def test_weights_that_are_written_to(self):
        def careless(f):
            def function(w):
                value, gradients = sam_value_and_grad(f, SAM())(w)
                w += 0.01
                return value, gradients

            return function

        seen = verify_sam(careless, lambda w: jnp.sum(w**3), np.ones(3))
        assert not seen.restored
        assert not seen.ok
