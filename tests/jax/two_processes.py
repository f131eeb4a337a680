"""Two processes of one program: ``python two_processes.py RANK PORT``, run by test_processes.py."""

import os
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    XLA_FLAGS="--xla_force_host_platform_device_count=2",
)

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import agc_jax
from agc import AGC
from agc.errors import ConfigError, NonFiniteError

RANK, PORT = int(sys.argv[1]), sys.argv[2]


def main() -> None:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, RANK, initialization_timeout=60)
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    gradients = {name: 100 * value for name, value in params.items()}
    wanted, _ = agc_jax.adaptive_clip_gradients(gradients, params, AGC())

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())

    def split(tree):
        sharding = NamedSharding(mesh, PartitionSpec("d"))
        return {
            name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
            for name, x in tree.items()
        }

    clip = jax.jit(lambda g, w: agc_jax.adaptive_clip_gradients(g, w, AGC())[0])
    together = jax.jit(lambda tree: tree, out_shardings=whole)(
        clip(split(gradients), split(params))
    )
    for name, value in wanted.items():
        assert np.array_equal(np.asarray(together[name]), value), name
    print(RANK, "sharded over processes: the same bits", flush=True)

    rule = AGC(nonfinite="raise")
    poisoned = {**gradients, "bias": np.full(4, np.nan, np.float32)}
    for name, call in {
        "jit": jax.jit(lambda g, w: agc_jax.adaptive_clip_gradients(g, w, rule)[0]),
        "eager": lambda g, w: agc_jax.adaptive_clip_gradients(g, w, rule)[0],
    }.items():
        try:
            call(split(poisoned), split(params))
        except (ConfigError, NonFiniteError) as error:
            print(RANK, name, type(error).__name__, flush=True)


main()
