"""Units of every layer with weights, found by differentiating what the layer computes.

A unit is the set of weights that feed one output. So two weights are in one unit if there is an
output that both feed, and which weights feed an output is read off a Jacobian: no table of layers
is needed, and none is asked. What the plan says of every weight with two or more axes is compared
with that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from scipy.sparse.csgraph import connected_components

import agc_jax
from agc import Units
from agc.selectors import canonical_name
from agc_jax.units import flatten

pytestmark = pytest.mark.usefixtures("quick")

BATCH = 2


def draw(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def filled(shapes: Any) -> Any:
    """Draw all values: no weight may be without effect because another is 0."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(random.normal(size=leaf.shape).astype(np.float32)), shapes
    )


def thrice(tree: Any, axis: int = 0) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf], axis), tree)


class Case(NamedTuple):
    """A layer, what it is called with, and what is special about it.

    ``gates`` outputs of a recurrent cell's weights are one output of the cell, and ``asks`` lists
    the weights whose units have to be declared.
    """

    build: Any
    call: Any
    gates: int = 1
    asks: str = ""


def found_units(outputs: Callable[[Any], Any], params: Any) -> dict[str, Any]:
    """Label every weight of two or more axes with the number of its unit.

    ``outputs`` returns arrays by the dotted name of the layer that computes them; each layer's own
    parameters are judged by its own outputs, as those of the layers behind it mix them.
    """
    jacobians = jax.jit(jax.jacrev(outputs))(params)
    names = [name for name, leaf in zip(*flatten(params)[:2], strict=True) if leaf is not None]
    found = {}
    for name, shape in zip(names, map(np.shape, jax.tree.leaves(params)), strict=True):
        if sum(size > 1 for size in shape) < 2 or name.rpartition(".")[2] in ("bias", "b"):
            continue  # a bias is one unit, whatever it feeds
        layer = max((one for one in jacobians if f"{name}.".startswith(one)), key=len)
        place = names.index(name)
        feeds = np.concatenate(
            [
                np.asarray(jax.tree.leaves(part)[place]).reshape(-1, int(np.prod(shape))) != 0
                for part in _parts(jacobians[layer], params)
            ]
        ).astype(np.int32)
        assert feeds.any(0).all(), f"some weights of {name} feed nothing"
        found[name] = connected_components(feeds.T @ feeds)[1].reshape(shape)
    return found


def _parts(jacobian: Any, params: Any) -> list[Any]:
    """Return the Jacobians of the arrays of an output."""
    like = jax.tree.structure(params)
    return jax.tree.leaves(jacobian, is_leaf=lambda node: jax.tree.structure(node) == like)


def by_layer(outputs: Any) -> Any:
    return outputs if isinstance(outputs, dict) else {"": outputs}


def labels(units: Units, shape: tuple[int, ...]) -> Any:
    axes = units.bind(shape)
    numbers = np.arange(axes.count).reshape(axes.unit_shape)
    return np.broadcast_to(numbers, axes.view).reshape(shape)


def compare(units: Any, found: dict[str, Any], gates: int = 1, asks: str = "") -> None:
    """Compare units with what was found."""
    undecided = [name for name in found if units[name] is None]
    assert undecided == asks.split(), f"undecided: {undecided}"
    assert found
    for name in found.keys() - undecided:
        said = labels(units[name], found[name].shape).ravel()
        right = found[name].ravel()
        both = len({*zip(said.tolist(), right.tolist(), strict=True)})
        assert both == len({*said}) == gates * len({*right}), f"{name}: {units[name]}"


# --- Flax NNX: by type; the suite has more of its layers ------------------------------------------


def on(*shape: int) -> Callable[[Any], Any]:
    """Call a layer with a random input."""
    return lambda layer: layer(draw(*shape))


def projections(*heads: int) -> Callable[[Any], Any]:
    """Call the projections of an attention layer one by one."""
    return lambda m: {
        **{f"{name}.": getattr(m, name)(draw(BATCH, 5, 6)) for name in ("query", "key", "value")},
        "out.": m.out(draw(BATCH, 5, *heads)),
    }


NNX = {
    "linear": Case(lambda r: nnx.Linear(3, 4, rngs=r), on(BATCH, 3)),
    "general": Case(
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r), on(BATCH, 2, 3)
    ),
    "batch axis": Case(lambda r: nnx.LinearGeneral(3, 4, batch_axis={0: 5}, rngs=r), on(5, 3)),
    "einsum, heads first": Case(
        lambda r: nnx.Einsum("bi,hid->bhd", (2, 3, 4), rngs=r), on(BATCH, 3)
    ),
    "einsum, out first": Case(lambda r: nnx.Einsum("bi,oi->bo", (4, 3), rngs=r), on(BATCH, 3)),
    "einsum, experts": Case(
        lambda r: nnx.Einsum("ebi,eio->ebo", (5, 3, 4), rngs=r), on(5, BATCH, 3)
    ),
    "conv2d": Case(lambda r: nnx.Conv(3, 4, (3, 2), rngs=r), on(BATCH, 4, 4, 3)),
    "transposed kernel": Case(
        lambda r: nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=r), on(1, 4, 4, 4)
    ),
    "embed": Case(lambda r: nnx.Embed(5, 3, rngs=r), lambda m: m(jnp.arange(5)).sum(-1)),
    "attention": Case(lambda r: nnx.MultiHeadAttention(2, 6, 8, rngs=r), projections(2, 4)),
    "attention, fewer keys": Case(
        lambda r: nnx.MultiHeadAttention(4, 6, 8, num_kv_heads=2, rngs=r), projections(4, 2)
    ),
    "lstm": Case(
        lambda r: nnx.LSTMCell(3, 4, rngs=r), lambda m: m((draw(2, 4), draw(1, 4)), draw(1, 3))[1]
    ),
    "gru": Case(lambda r: nnx.GRUCell(3, 4, rngs=r), lambda m: m(draw(1, 4), draw(1, 3))[1], 3),
    "weight norm": Case(
        lambda r: nnx.WeightNorm(nnx.Linear(3, 4, rngs=r), use_scale=False, rngs=r), on(BATCH, 3)
    ),
}
SUITE = ("linear", "conv2d", "embed", "gru")  # asks for these when nothing stacks them
BOTH = ("general", "batch axis", "transposed kernel", "attention")


@pytest.mark.parametrize(
    ("layer", "stacked"),
    [(name, False) for name in NNX if name not in SUITE] + [(name, True) for name in SUITE + BOTH],
)
def test_nnx(layer: str, stacked: bool) -> None:
    build, call, gates, _ = NNX[layer]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    params = thrice(filled(shapes)) if stacked else filled(shapes)

    def outputs(state: Any) -> Any:
        return by_layer(call(nnx.merge(graph, state)))

    found = found_units(jax.vmap(outputs) if stacked else outputs, params)
    compare(agc_jax.units(nnx.merge(graph, params)), found, gates)


# --- Equinox: by type ----------------------------------------------------------------------------


def equinox_projections(m: Any) -> Any:
    names = ("query_proj", "key_proj", "value_proj", "output_proj")
    return {f"{name}.": jax.vmap(getattr(m, name))(draw(BATCH, 6)) for name in names}


EQUINOX = {
    "linear": Case(lambda k: eqx.nn.Linear(3, 4, key=k), on(3)),
    "conv1d": Case(lambda k: eqx.nn.Conv1d(3, 4, 2, key=k), on(3, 5)),
    "conv2d": Case(lambda k: eqx.nn.Conv2d(3, 4, (3, 2), key=k), on(3, 4, 4)),
    "conv3d": Case(lambda k: eqx.nn.Conv3d(2, 3, 2, key=k), on(2, 3, 3, 3)),
    "grouped": Case(lambda k: eqx.nn.Conv1d(4, 6, 3, groups=2, key=k), on(4, 5)),
    "transposed": Case(lambda k: eqx.nn.ConvTranspose2d(3, 4, 3, key=k), on(3, 4, 4)),
    "transposed, grouped": Case(
        lambda k: eqx.nn.ConvTranspose1d(4, 6, 3, groups=2, key=k), on(4, 5)
    ),
    "embedding": Case(
        lambda k: eqx.nn.Embedding(5, 3, key=k), lambda m: jax.vmap(m)(jnp.arange(5)).sum(-1)
    ),
    "attention": Case(lambda k: eqx.nn.MultiheadAttention(2, 6, key=k), equinox_projections),
    "gru": Case(lambda k: eqx.nn.GRUCell(3, 4, key=k), lambda m: m(draw(3), draw(4)), 3),
    "lstm": Case(lambda k: eqx.nn.LSTMCell(3, 4, key=k), lambda m: m(draw(3), draw(2, 4)), 4),
    "weight norm": Case(lambda k: eqx.nn.WeightNorm(eqx.nn.Conv1d(3, 4, 2, key=k)), on(3, 5)),
}


@pytest.mark.parametrize(
    ("layer", "stacked"),
    [(name, False) for name in EQUINOX]
    + [(name, True) for name in ("linear", "conv2d", "transposed", "embedding", "lstm")],
)
def test_equinox(layer: str, stacked: bool) -> None:
    build, call, gates, _ = EQUINOX[layer]
    shapes, rest = eqx.partition(
        eqx.filter_eval_shape(build, jax.random.key(0)), lambda leaf: hasattr(leaf, "dtype")
    )
    params = thrice(filled(shapes)) if stacked else filled(shapes)

    def outputs(arrays: Any) -> Any:
        return by_layer(call(eqx.combine(arrays, rest)))

    found = found_units(jax.vmap(outputs) if stacked else outputs, params)
    compare(agc_jax.units(params), found, gates)


# --- Flax Linen: by leaf names -------------------------------------------------------------------


class Net(nn.Module):
    """A layer under the name that Flax gives it."""

    build: Any

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.build()(*inputs)


def carry(*shape: int) -> tuple[Any, ...]:
    return (draw(*shape), draw(*shape))


bare = {"use_bias": False}
attend: Any = {"num_heads": 2, "qkv_features": 8, "out_features": 5}
swapped = {"transpose_kernel": True}
TOKENS = draw(BATCH, 5, 6)
IMAGE = draw(1, 4, 4, 3)
LINEN = {
    "dense": Case(partial(nn.Dense, 4), [draw(BATCH, 5)]),
    "dense, no bias": Case(partial(nn.Dense, 4, **bare), [draw(BATCH, 3)]),
    "to heads": Case(partial(nn.DenseGeneral, (2, 4)), [draw(BATCH, 5)]),
    "fused": Case(partial(nn.DenseGeneral, (3, 2, 4)), [draw(BATCH, 5)]),
    "fused, no bias": Case(
        partial(nn.DenseGeneral, (3, 2, 4), **bare), [draw(BATCH, 5)], asks="DenseGeneral_0.kernel"
    ),
    "from heads": Case(partial(nn.DenseGeneral, 5, axis=(-2, -1)), [draw(BATCH, 2, 4)]),
    "einsum": Case(partial(nn.Einsum, (3, 2, 4), "...a,abc->...bc"), [draw(BATCH, 3)]),
    "einsum, heads first": Case(partial(nn.Einsum, (2, 3, 4), "...a,bac->...bc"), [draw(BATCH, 3)]),
    "einsum, no bias": Case(
        partial(nn.Einsum, (2, 3, 4), "...a,bac->...bc", **bare),
        [draw(BATCH, 3)],
        asks="Einsum_0.kernel",
    ),
    "conv1d": Case(partial(nn.Conv, 4, (3,)), [draw(1, 5, 3)]),
    "conv1d, no bias": Case(partial(nn.Conv, 4, (3,), **bare), [draw(1, 5, 3)]),
    "conv2d": Case(partial(nn.Conv, 4, (3, 2)), [IMAGE]),
    "conv2d, as many inputs": Case(partial(nn.Conv, 3, (2, 2)), [IMAGE]),
    "conv2d, no bias": Case(partial(nn.Conv, 4, (3, 3), **bare), [IMAGE]),
    "conv2d, no bias, oblong": Case(
        partial(nn.Conv, 4, (3, 2), **bare), [IMAGE], asks="Conv_0.kernel"
    ),
    "conv3d": Case(partial(nn.Conv, 3, (2, 2, 2)), [draw(1, 3, 3, 3, 2)]),
    "conv3d, no bias": Case(
        partial(nn.Conv, 3, (2, 2, 2), **bare), [draw(1, 3, 3, 3, 2)], asks="Conv_0.kernel"
    ),
    "grouped": Case(partial(nn.Conv, 6, (3,), feature_group_count=2), [draw(1, 5, 4)]),
    "transposed": Case(partial(nn.ConvTranspose, 4, (3, 3)), [IMAGE]),
    "transposed kernel": Case(partial(nn.ConvTranspose, 4, (3, 3), **swapped), [IMAGE]),
    "transposed kernel, as many inputs": Case(
        partial(nn.ConvTranspose, 3, (3, 3), **swapped), [IMAGE], asks="ConvTranspose_0.kernel"
    ),
    "transposed kernel, no bias": Case(
        partial(nn.ConvTranspose, 4, (3, 3), **swapped, **bare),
        [IMAGE],
        asks="ConvTranspose_0.kernel",
    ),
    "local": Case(partial(nn.ConvLocal, 4, (2,), padding="VALID"), [draw(1, 6, 3)]),
    "embed": Case(partial(nn.Embed, 5, 3), [np.arange(5)]),
    "attention": Case(partial(nn.MultiHeadDotProductAttention, **attend), [TOKENS]),
    "attention, no bias": Case(
        partial(nn.MultiHeadDotProductAttention, **attend, **bare), [TOKENS, draw(BATCH, 5, 7)]
    ),
    "lstm": Case(partial(nn.LSTMCell, 4), [carry(1, 4), draw(1, 3)]),
    "gru": Case(partial(nn.GRUCell, 4), [draw(1, 4), draw(1, 3)]),
    "mgu": Case(partial(nn.MGUCell, 4), [draw(1, 4), draw(1, 3)]),
    "conv lstm": Case(
        partial(nn.ConvLSTMCell, 2, (2, 2)), [carry(1, 3, 3, 2), draw(1, 3, 3, 3)], 4
    ),
}


def _is_layer(module: Any, _: str) -> bool:
    return not isinstance(module.parent, nn.RNNCellBase)  # a cell is cheaper than its parts


def linen_case(name: str) -> tuple[Any, Callable[[Any], Any]]:
    """Return parameters, and a function of them that returns what each layer computes."""
    net, inputs = Net(LINEN[name].build), LINEN[name].call

    def outputs(params: Any) -> Any:
        kept = net.apply({"params": params}, *inputs, capture_intermediates=_is_layer)[1]
        flat = traverse_util.flatten_dict(kept["intermediates"])
        return {"".join(f"{one}." for one in path[:-1]): value for path, value in flat.items()}

    return filled(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]), outputs


def per_token(outputs: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """Take the outputs of an embedding together: a unit is a row."""
    if name != "embed":
        return outputs
    return lambda params: {
        path: jax.tree.map(lambda value: value.sum(-1), found)
        for path, found in outputs(params).items()
    }


@pytest.mark.parametrize("name", LINEN)
def test_linen(name: str) -> None:
    params, outputs = linen_case(name)
    found = found_units(per_token(outputs, name), params)
    compare(agc_jax.units(params), found, LINEN[name].gates, LINEN[name].asks)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("name", "asks"),
    {
        "dense": "",
        "dense, no bias": "Dense_0.kernel",
        "to heads": "",
        "fused, no bias": "DenseGeneral_0.kernel",
        "conv2d": "",
        "conv2d, no bias": "Conv_0.kernel",
        "transposed kernel": "",
        "attention, no bias": "",
    }.items(),
)
def test_stacked_linen(name: str, asks: str, axis: int) -> None:
    params, outputs = linen_case(name)
    params = thrice(params, axis)
    compare(agc_jax.units(params), found_units(jax.vmap(outputs, axis), params), asks=asks)


# --- Haiku: by leaf names ------------------------------------------------------------------------

HAIKU = {
    "linear": Case(lambda x: hk.Linear(4)(x), draw(BATCH, 3)),
    "conv1d": Case(lambda x: hk.Conv1D(4, 3)(x), draw(1, 5, 3)),
    "conv2d": Case(lambda x: hk.Conv2D(4, (3, 2))(x), IMAGE),
    "conv2d, no bias": Case(lambda x: hk.Conv2D(4, 3, with_bias=False)(x), IMAGE),
    "conv3d": Case(lambda x: hk.Conv3D(3, 2)(x), draw(1, 3, 3, 3, 2)),
    "transposed 1d": Case(lambda x: hk.Conv1DTranspose(4, 3)(x), draw(1, 5, 3)),
    "transposed 2d": Case(lambda x: hk.Conv2DTranspose(3, 3)(x), IMAGE),
    "transposed, no bias": Case(lambda x: hk.Conv2DTranspose(4, 3, with_bias=False)(x), IMAGE),
    "depthwise": Case(lambda x: hk.DepthwiseConv2D(2, 3)(x), IMAGE),
    "separable": Case(
        lambda x: hk.SeparableDepthwiseConv2D(2, 3)(x),
        IMAGE,
        asks="separable_depthwise_conv2_d.~.depthwise_conv2_d.w",
    ),
    "embed": Case(lambda x: hk.Embed(5, 3)(x), np.arange(5)),
    "attention": Case(lambda x: hk.MultiHeadAttention(2, 4, w_init=jnp.ones)(x, x, x), draw(5, 6)),
    "lstm": Case(lambda x: hk.LSTM(4)(x, hk.LSTMState(*carry(1, 4))), draw(1, 3)),
    "vanilla rnn": Case(lambda x: hk.VanillaRNN(4)(x, draw(1, 4)), draw(1, 3)),
    "conv lstm": Case(
        lambda x: hk.Conv2DLSTM((3, 3), 2, 2)(x, hk.LSTMState(*carry(1, 3, 3, 2))),
        draw(1, 3, 3, 3),
    ),
}


@pytest.mark.parametrize("name", HAIKU)
def test_haiku(name: str) -> None:
    forward, x, _, asks = HAIKU[name]
    net = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(net.init, jax.random.key(0), x))

    def outputs(params: Any) -> Any:
        kept = {}

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            kept[canonical_name(f"{context.module.module_name}.")] = result = call(*args, **kwargs)
            return result

        with hk.intercept_methods(keep):
            net.apply(params, x)
        return {path: value for path, value in kept.items() if value is not None}

    found = found_units(per_token(outputs, name), params)
    compare(agc_jax.units(params), found, asks=asks)
