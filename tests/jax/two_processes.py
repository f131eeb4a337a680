"""Two processes of one program, run by test_processes.py.

``python two_processes.py RANK PORT FOLDER CHANGE...``: the folder has a training that goes on, of a
recipe with these changes.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    XLA_FLAGS="--xla_force_host_platform_device_count=2",
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agc_jax
from agc import AGC, SAM
from agc.data import open_source
from agc.errors import ConfigError, NonFiniteError
from agc.recipe import load_recipe
from agc.training import Launch, Training, stop_signals
from agc_jax.train import trainer
from tests.contract.training import shrink

RANK = int(sys.argv[1])
LAUNCH = Launch(
    coordinator=f"127.0.0.1:{sys.argv[2]}",
    processes=2,
    process=RANK,
    engine="fsdp",
    sharded=True,
    log_every=1,
)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {"kernel": normal(8, 4), "bias": normal(4)}
GRADIENTS = {name: 100 * value for name, value in PARAMS.items()}
X, Y = normal(16, 8), normal(16, 4)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


def placed(array, *spec, on=None):
    """Return an array of which each process has its part."""
    sharding = NamedSharding(on or mesh(), PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def split(tree):
    """Split every array along its first axis, as fully sharded parameters are."""
    return {name: placed(array, "d") for name, array in tree.items()}


def whole(tree):
    """Return trees of sharded arrays as every process has them."""
    (leaf, *_), _ = jax.tree.flatten(tree)
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return jax.tree.map(np.asarray, jax.jit(lambda tree: tree, out_shardings=everywhere)(tree))


def same_bits(tree, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), whole(tree), wanted)


def close(tree, wanted):
    """Other orders of summation move small elements by many ULP, so the largest is the measure."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(whole(tree)), jax.tree.leaves(wanted), strict=True):
        assert np.abs(a - b).max() <= 2e-7 * largest


def clip_in_every_layout():
    layouts = {"whole": (), "units": (None, "d"), "sums": ("d",), "bias": ("d",)}
    arrays = {name: ("bias" if name == "bias" else "kernel") for name in layouts}
    params, gradients = (
        {name: tree[array] for name, array in arrays.items()} for tree in (PARAMS, GRADIENTS)
    )
    rule = AGC(units={"bias": "o ->", "*": "i o -> o"})
    wanted = agc_jax.adaptive_clip_gradients(gradients, params, rule)
    for kind in (AxisType.Auto, AxisType.Explicit):
        on = mesh(kind)
        g, w = (
            {name: placed(array, *layouts[name], on=on) for name, array in tree.items()}
            for tree in (gradients, params)
        )
        clip = jax.jit(lambda g, w: agc_jax.adaptive_clip_gradients(g, w, rule))
        same_bits(clip(g, w), wanted)


def step_of_an_optimizer():
    tx = optax.chain(agc_jax.adaptive_grad_clip(AGC()), optax.sgd(0.1, 0.9, nesterov=True))

    def two_steps(gradients, params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    run = jax.jit(two_steps)
    same_bits(run(split(GRADIENTS), split(PARAMS)), run(GRADIENTS, PARAMS))


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"]) - y) ** 2)


def sharpen_sharded_parameters():
    for rule in (SAM(rho=0.05, fraction=0.5), SAM(rho=0.05, adaptive=True)):
        function = jax.jit(agc_jax.sam_value_and_grad(loss, rule, batch_argnums=(1, 2)))
        wanted = function(PARAMS, X, Y)
        close(function(split(PARAMS), placed(X, "d"), placed(Y, "d")), wanted)


def sharpen_replicas():
    """In local scope each has a perturbation of its own, as micro-batches have."""
    for scope, microbatches in (("global", 1), ("local", 4)):
        function = agc_jax.sam_value_and_grad(
            loss, SAM(rho=0.05, scope=scope), axis_name="d", batch_argnums=(1, 2)
        )
        specs = (PartitionSpec(), PartitionSpec("d"), PartitionSpec("d"))
        run = jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec())
        alone = agc_jax.sam_value_and_grad(
            loss, SAM(rho=0.05, microbatches=microbatches), batch_argnums=(1, 2)
        )
        params = {name: placed(array) for name, array in PARAMS.items()}
        answer = jax.jit(run)(params, placed(X, "d"), placed(Y, "d"))
        close(answer, jax.jit(alone)(PARAMS, X, Y))


def raise_on_all():
    rule = AGC(nonfinite="raise")
    poisoned = split({**GRADIENTS, "bias": np.full(4, np.nan, np.float32)})

    def clip(g, w):
        return agc_jax.adaptive_clip_gradients(g, w, rule)[0]

    for call, error in ((jax.jit(clip), ConfigError), (clip, NonFiniteError)):
        with pytest.raises(error):
            call(poisoned, split(PARAMS))


def train():
    """Both stop where one of them is told to, and go on."""
    jax.config.update("jax_disable_most_optimizations", True)
    assert (go_on(), go_on()) == (3, 4)
    weight = TRAINER._arrays.parameters["head.weight"]
    assert weight.addressable_data(0).size == weight.size // 4


def go_on():
    """Go on to the end, or until one process is told to stop; return the steps made."""
    sources = (open_source(RECIPE, part) for part in ("train", "test"))
    run = Training(RECIPE, TRAINER, *sources, Path(sys.argv[3]), launch=LAUNCH, resume=True)

    def told():
        if (RANK, run.made) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return stop()

    with stop_signals() as stop:
        assert run.run(told) == (run.made == 4)
    return run.made


shrink(pytest.MonkeyPatch(), widths=(32,))
RECIPE = load_recipe("conformance", sys.argv[4:])
TRAINER = trainer(RECIPE, LAUNCH)  # joins the processes
assert (jax.process_count(), jax.device_count()) == (2, 4)
for check in (
    clip_in_every_layout,
    step_of_an_optimizer,
    sharpen_sharded_parameters,
    sharpen_replicas,
    raise_on_all,
    train,
):
    check()
    print(check.__name__, flush=True)
