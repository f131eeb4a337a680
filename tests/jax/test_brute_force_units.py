"""Units of every layer with weights, found by differentiating what the layer computes.

A unit is the set of weights that feed one output. So two weights are in one unit if there is an
output that both feed, and which weights feed an output is read off a Jacobian: no table of layers
is needed, and none is asked. What the plan says of every weight with two or more axes is compared
with that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

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

BATCH = 2
QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def filled(shapes: Any) -> Any:
    """Draw all values: no weight may be without effect because another is 0."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes
    )


def thrice(tree: Any, axis: int = 0) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf], axis), tree)


def found_units(outputs: Callable[[Any], Any], params: Any) -> dict[str, Any]:
    """Label every weight of two or more axes with the number of its unit.

    ``outputs`` returns arrays by the dotted name of the layer that computes them; each layer's own
    parameters are judged by its own outputs, as those of the layers behind it mix them.
    """
    jacobians = jax.jit(jax.jacrev(outputs), compiler_options=QUICK)(params)
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


def labels(units: Units, shape: tuple[int, ...]) -> Any:
    axes = units.bind(shape)
    numbers = np.arange(axes.count).reshape(axes.unit_shape)
    return np.broadcast_to(numbers, axes.view).reshape(shape)


def compare(units: Any, found: dict[str, Any], gates: int = 1, asks: str = "") -> None:
    """Compare units with what was found; ``asks`` lists what has to be declared.

    ``gates`` outputs of a recurrent cell's weights are one output of the cell.
    """
    undecided = [name for name in found if units[name] is None]
    assert undecided == asks.split(), f"undecided: {undecided}"
    assert found
    for name in found.keys() - undecided:
        said = labels(units[name], found[name].shape).ravel()
        right = found[name].ravel()
        both = len({*zip(said.tolist(), right.tolist(), strict=True)})
        assert both == len({*said}) == gates * len({*right}), f"{name}: {units[name]}"


# --- Flax NNX: by type ---------------------------------------------------------------------------


def on(*shape: int) -> Callable[[Any], Any]:
    """Call a layer with a random input."""
    return lambda layer: layer(draw(*shape))


def _nnx_attention(m: Any) -> Any:
    return {
        "query.": m.query(draw(BATCH, 5, 6)),
        "key.": m.key(draw(BATCH, 5, 6)),
        "value.": m.value(draw(BATCH, 5, 6)),
        "out.": m.out(draw(BATCH, 5, 2, 4)),
    }


NNX: dict[str, tuple[Any, Any, int]] = {
    "linear": (lambda r: nnx.Linear(3, 4, rngs=r), on(BATCH, 3), 1),
    "general": (
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r),
        on(BATCH, 2, 3),
        1,
    ),
    "batch axis": (lambda r: nnx.LinearGeneral(3, 4, batch_axis={0: 5}, rngs=r), on(5, 3), 1),
    "einsum to heads": (lambda r: nnx.Einsum("bi,ihd->bhd", (3, 2, 4), rngs=r), on(BATCH, 3), 1),
    "einsum, heads first": (
        lambda r: nnx.Einsum("bi,hid->bhd", (2, 3, 4), rngs=r),
        on(BATCH, 3),
        1,
    ),
    "einsum, out first": (lambda r: nnx.Einsum("bi,oi->bo", (4, 3), rngs=r), on(BATCH, 3), 1),
    "einsum, experts": (
        lambda r: nnx.Einsum("ebi,eio->ebo", (5, 3, 4), rngs=r),
        on(5, BATCH, 3),
        1,
    ),
    "conv1d": (lambda r: nnx.Conv(3, 4, (3,), rngs=r), on(BATCH, 5, 3), 1),
    "conv2d": (lambda r: nnx.Conv(3, 4, (3, 2), rngs=r), on(BATCH, 4, 4, 3), 1),
    "conv3d": (lambda r: nnx.Conv(2, 3, (2, 2, 2), rngs=r), on(1, 3, 3, 3, 2), 1),
    "grouped": (
        lambda r: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=r),
        on(BATCH, 5, 4),
        1,
    ),
    "depthwise": (
        lambda r: nnx.Conv(4, 8, (3,), feature_group_count=4, rngs=r),
        on(BATCH, 5, 4),
        1,
    ),
    "transposed": (lambda r: nnx.ConvTranspose(3, 4, (3, 3), rngs=r), on(1, 4, 4, 3), 1),
    "transposed kernel": (
        lambda r: nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=r),
        on(1, 4, 4, 4),
        1,
    ),
    "embed": (lambda r: nnx.Embed(5, 3, rngs=r), lambda m: m(jnp.arange(5)).sum(-1), 1),
    "attention": (lambda r: nnx.MultiHeadAttention(2, 6, 8, rngs=r), _nnx_attention, 1),
    "attention, fewer keys": (
        lambda r: nnx.MultiHeadAttention(2, 6, 8, use_bias=False, rngs=r),
        _nnx_attention,
        1,
    ),
    "lstm": (
        lambda r: nnx.LSTMCell(3, 4, rngs=r),
        lambda m: m((draw(2, 4), draw(1, 4)), draw(1, 3))[1],
        1,
    ),
    "optimized lstm": (
        lambda r: nnx.OptimizedLSTMCell(3, 4, rngs=r),
        lambda m: m((draw(2, 4), draw(1, 4)), draw(1, 3))[1],
        4,
    ),
    "gru": (lambda r: nnx.GRUCell(3, 4, rngs=r), lambda m: m(draw(1, 4), draw(1, 3))[1], 3),
    "simple cell": (
        lambda r: nnx.SimpleCell(3, 4, rngs=r),
        lambda m: m(draw(1, 4), draw(1, 3))[1],
        1,
    ),
    "weight norm": (
        lambda r: nnx.WeightNorm(nnx.Linear(3, 4, rngs=r), use_scale=False, rngs=r),
        on(BATCH, 3),
        1,
    ),
}


def by_layer(outputs: Any) -> Any:
    return outputs if isinstance(outputs, dict) else {"": outputs}


STACKED = (
    "linear",
    "general",
    "batch axis",
    "conv2d",
    "transposed kernel",
    "embed",
    "attention",
    "gru",
)


@pytest.mark.parametrize(
    ("layer", "stacked"), [*product(NNX, [False]), *product(STACKED, [True])], ids=str
)
def test_nnx(layer: str, stacked: bool) -> None:
    build, call, gates = NNX[layer]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    params = thrice(filled(shapes)) if stacked else filled(shapes)

    def one(state: Any) -> Any:
        outputs = call(nnx.merge(graph, state))
        return outputs if isinstance(outputs, dict) else {"": outputs}

    found = found_units(jax.vmap(one) if stacked else one, params)
    compare(agc_jax.units(nnx.merge(graph, params)), found, gates)


# --- Equinox: by type ----------------------------------------------------------------------------


def _eqx_attention(m: Any) -> Any:
    return {
        "query_proj.": jax.vmap(m.query_proj)(draw(BATCH, 6)),
        "key_proj.": jax.vmap(m.key_proj)(draw(BATCH, 6)),
        "value_proj.": jax.vmap(m.value_proj)(draw(BATCH, 6)),
        "output_proj.": jax.vmap(m.output_proj)(draw(BATCH, 6)),
    }


EQUINOX: dict[str, tuple[Any, Any, int]] = {
    "linear": (lambda k: eqx.nn.Linear(3, 4, key=k), on(3), 1),
    "conv1d": (lambda k: eqx.nn.Conv1d(3, 4, 2, key=k), on(3, 5), 1),
    "conv2d": (lambda k: eqx.nn.Conv2d(3, 4, (3, 2), key=k), on(3, 4, 4), 1),
    "conv3d": (lambda k: eqx.nn.Conv3d(2, 3, 2, key=k), on(2, 3, 3, 3), 1),
    "grouped": (lambda k: eqx.nn.Conv1d(4, 6, 3, groups=2, key=k), on(4, 5), 1),
    "transposed": (lambda k: eqx.nn.ConvTranspose2d(3, 4, 3, key=k), on(3, 4, 4), 1),
    "transposed, grouped": (
        lambda k: eqx.nn.ConvTranspose1d(4, 6, 3, groups=2, key=k),
        on(4, 5),
        1,
    ),
    "embedding": (
        lambda k: eqx.nn.Embedding(5, 3, key=k),
        lambda m: jax.vmap(m)(jnp.arange(5)).sum(-1),
        1,
    ),
    "attention": (lambda k: eqx.nn.MultiheadAttention(2, 6, key=k), _eqx_attention, 1),
    "gru": (lambda k: eqx.nn.GRUCell(3, 4, key=k), lambda m: m(draw(3), draw(4)), 3),
    "lstm": (lambda k: eqx.nn.LSTMCell(3, 4, key=k), lambda m: m(draw(3), draw(2, 4)), 4),
    "weight norm": (lambda k: eqx.nn.WeightNorm(eqx.nn.Conv1d(3, 4, 2, key=k)), on(3, 5), 1),
}
EQX_STACKED = ("linear", "conv2d", "transposed", "embedding", "lstm")


@pytest.mark.parametrize(
    ("layer", "stacked"), [*product(EQUINOX, [False]), *product(EQX_STACKED, [True])], ids=str
)
def test_equinox(layer: str, stacked: bool) -> None:
    build, call, gates = EQUINOX[layer]
    shapes, rest = eqx.partition(
        eqx.filter_eval_shape(build, jax.random.key(0)), lambda leaf: hasattr(leaf, "dtype")
    )
    params = thrice(filled(shapes)) if stacked else filled(shapes)

    def one(arrays: Any) -> Any:
        outputs = call(eqx.combine(arrays, rest))
        return outputs if isinstance(outputs, dict) else {"": outputs}

    found = found_units(jax.vmap(one) if stacked else one, params)
    compare(agc_jax.units(params), found, gates)


# --- Flax Linen: by leaf names -------------------------------------------------------------------


class Net(nn.Module):
    """A layer under the name that Flax gives it, or another one."""

    build: Any
    name_of_layer: str | None = None

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.build(name=self.name_of_layer)(*inputs)


def layer(kind: Any, *given: Any, **options: Any) -> Any:
    return lambda name: kind(*given, name=name, **options)


def carry(*shape: int) -> tuple[Any, ...]:
    return (draw(*shape), draw(*shape))


bare = {"use_bias": False}
attend: Any = {"num_heads": 2, "qkv_features": 8, "out_features": 5}
TOKENS = draw(BATCH, 5, 6)
LINEN: dict[str, tuple[Any, tuple[Any, ...], int, str]] = {
    "dense": (layer(nn.Dense, 4), (draw(BATCH, 5),), 1, ""),
    "dense, no bias": (layer(nn.Dense, 4, **bare), (draw(BATCH, 3),), 1, ""),
    "to heads": (layer(nn.DenseGeneral, (2, 4)), (draw(BATCH, 5),), 1, ""),
    "fused": (layer(nn.DenseGeneral, (3, 2, 4)), (draw(BATCH, 5),), 1, ""),
    "fused, no bias": (
        layer(nn.DenseGeneral, (3, 2, 4), **bare),
        (draw(BATCH, 5),),
        1,
        "DenseGeneral_0.kernel",
    ),
    "from heads": (layer(nn.DenseGeneral, 5, axis=(-2, -1)), (draw(BATCH, 2, 4),), 1, ""),
    "einsum": (
        layer(nn.Einsum, (3, 2, 4), "...a,abc->...bc"),
        (draw(BATCH, 3),),
        1,
        "",
    ),
    "einsum, heads first": (
        layer(nn.Einsum, (2, 3, 4), "...a,bac->...bc"),
        (draw(BATCH, 3),),
        1,
        "",
    ),
    "einsum, no bias": (
        layer(nn.Einsum, (2, 3, 4), "...a,bac->...bc", **bare),
        (draw(BATCH, 3),),
        1,
        "Einsum_0.kernel",
    ),
    "conv1d": (layer(nn.Conv, 4, (3,)), (draw(1, 5, 3),), 1, ""),
    "conv1d, no bias": (layer(nn.Conv, 4, (3,), **bare), (draw(1, 5, 3),), 1, ""),
    "conv2d": (layer(nn.Conv, 4, (3, 2)), (draw(1, 4, 4, 3),), 1, ""),
    "conv2d, as many inputs": (layer(nn.Conv, 3, (2, 2)), (draw(1, 4, 4, 3),), 1, ""),
    "conv2d, no bias": (layer(nn.Conv, 4, (3, 3), **bare), (draw(1, 4, 4, 3),), 1, ""),
    "conv2d, no bias, oblong": (
        layer(nn.Conv, 4, (3, 2), **bare),
        (draw(1, 4, 4, 3),),
        1,
        "Conv_0.kernel",
    ),
    "conv3d": (layer(nn.Conv, 3, (2, 2, 2)), (draw(1, 3, 3, 3, 2),), 1, ""),
    "conv3d, no bias": (
        layer(nn.Conv, 3, (2, 2, 2), **bare),
        (draw(1, 3, 3, 3, 2),),
        1,
        "Conv_0.kernel",
    ),
    "grouped": (layer(nn.Conv, 6, (3,), feature_group_count=2), (draw(1, 5, 4),), 1, ""),
    "transposed": (layer(nn.ConvTranspose, 4, (3, 3)), (draw(1, 4, 4, 3),), 1, ""),
    "transposed kernel": (
        layer(nn.ConvTranspose, 4, (3, 3), transpose_kernel=True),
        (draw(1, 4, 4, 3),),
        1,
        "",
    ),
    "transposed kernel, as many inputs": (
        layer(nn.ConvTranspose, 3, (3, 3), transpose_kernel=True),
        (draw(1, 4, 4, 3),),
        1,
        "ConvTranspose_0.kernel",
    ),
    "transposed kernel, no bias": (
        layer(nn.ConvTranspose, 4, (3, 3), transpose_kernel=True, **bare),
        (draw(1, 4, 4, 3),),
        1,
        "ConvTranspose_0.kernel",
    ),
    "local": (layer(nn.ConvLocal, 4, (2,), padding="VALID"), (draw(1, 6, 3),), 1, ""),
    "embed": (layer(nn.Embed, 5, 3), (np.arange(5),), 1, ""),
    "attention": (layer(nn.MultiHeadDotProductAttention, **attend), (TOKENS,), 1, ""),
    "attention, no bias": (
        layer(nn.MultiHeadDotProductAttention, **attend, **bare),
        (TOKENS, draw(BATCH, 5, 7)),
        1,
        "",
    ),
    "lstm": (layer(nn.LSTMCell, 4), (carry(1, 4), draw(1, 3)), 1, ""),
    "gru": (layer(nn.GRUCell, 4), (draw(1, 4), draw(1, 3)), 1, ""),
    "mgu": (layer(nn.MGUCell, 4), (draw(1, 4), draw(1, 3)), 1, ""),
    "conv lstm": (layer(nn.ConvLSTMCell, 2, (2, 2)), (carry(1, 3, 3, 2), draw(1, 3, 3, 3)), 4, ""),
}


def _is_layer(module: Any, _: str) -> bool:
    return not isinstance(module.parent, nn.RNNCellBase)  # a cell is cheaper than its parts


def linen_outputs(net: Any, inputs: Any) -> Callable[[Any], Any]:
    """Return a function of the parameters that returns what each layer computes."""

    def outputs(params: Any) -> Any:
        kept = net.apply({"params": params}, *inputs, capture_intermediates=_is_layer)[1]
        flat = traverse_util.flatten_dict(kept["intermediates"])
        return {"".join(f"{one}." for one in path[:-1]): value for path, value in flat.items()}

    return outputs


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
    build, inputs, gates, asks = LINEN[name]
    net = Net(build)
    params = filled(jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"])
    found = found_units(per_token(linen_outputs(net, inputs), name), params)
    compare(agc_jax.units(params), found, gates, asks)


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
    build, inputs, gates, _ = LINEN[name]
    net = Net(build)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    params = thrice(filled(shapes), axis)
    found = found_units(jax.vmap(linen_outputs(net, inputs), axis), params)
    compare(agc_jax.units(params), found, gates, asks)


# --- Haiku: by leaf names ------------------------------------------------------------------------

HAIKU: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "linear": (lambda x: hk.Linear(4)(x), (draw(BATCH, 3),), ""),
    "conv1d": (lambda x: hk.Conv1D(4, 3)(x), (draw(1, 5, 3),), ""),
    "conv2d": (lambda x: hk.Conv2D(4, (3, 2))(x), (draw(1, 4, 4, 3),), ""),
    "conv2d, no bias": (lambda x: hk.Conv2D(4, 3, with_bias=False)(x), (draw(1, 4, 4, 3),), ""),
    "conv3d": (lambda x: hk.Conv3D(3, 2)(x), (draw(1, 3, 3, 3, 2),), ""),
    "transposed 1d": (lambda x: hk.Conv1DTranspose(4, 3)(x), (draw(1, 5, 3),), ""),
    "transposed 2d": (lambda x: hk.Conv2DTranspose(3, 3)(x), (draw(1, 4, 4, 3),), ""),
    "transposed, no bias": (
        lambda x: hk.Conv2DTranspose(4, 3, with_bias=False)(x),
        (draw(1, 4, 4, 3),),
        "",
    ),
    "depthwise": (lambda x: hk.DepthwiseConv2D(2, 3)(x), (draw(1, 4, 4, 3),), ""),
    "separable": (
        lambda x: hk.SeparableDepthwiseConv2D(2, 3)(x),
        (draw(1, 4, 4, 3),),
        "separable_depthwise_conv2_d.~.depthwise_conv2_d.w",
    ),
    "embed": (lambda x: hk.Embed(5, 3)(x), (np.arange(5),), ""),
    "attention": (
        lambda x: hk.MultiHeadAttention(2, 4, w_init=jnp.ones)(x, x, x),
        (draw(5, 6),),
        "",
    ),
    "lstm": (lambda x: hk.LSTM(4)(x, hk.LSTMState(*carry(1, 4))), (draw(1, 3),), ""),
    "vanilla rnn": (lambda x: hk.VanillaRNN(4)(x, draw(1, 4)), (draw(1, 3),), ""),
    "conv lstm": (
        lambda x: hk.Conv2DLSTM((3, 3), 2, 2)(x, hk.LSTMState(*carry(1, 3, 3, 2))),
        (draw(1, 3, 3, 3),),
        "",
    ),
}


@pytest.mark.parametrize("name", HAIKU)
def test_haiku(name: str) -> None:
    forward, inputs, asks = HAIKU[name]
    net = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(net.init, jax.random.key(0), *inputs))

    def outputs(params: Any) -> Any:
        kept = {}

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            kept[canonical_name(f"{context.module.module_name}.")] = result = call(*args, **kwargs)
            return result

        with hk.intercept_methods(keep):
            net.apply(params, *inputs)
        return {path: value for path, value in kept.items() if value is not None}

    found = found_units(per_token(outputs, name), params)
    compare(agc_jax.units(params), found, asks=asks)
