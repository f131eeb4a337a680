"""Units of every layer type and leaf name, plans, and the messages for what they do not settle."""

from __future__ import annotations

import argparse
import copy
import doctest
import importlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import agc_jax
from agc import AGC, Plan, Units
from agc.errors import (
    AmbiguousUnitsError,
    ParameterError,
    SelectorError,
    ShapeError,
    UnitsError,
)
from agc_jax.units import flatten

KEY = jax.random.key(0)


def abstract(build: Any) -> Any:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def stack(build: Any, count: Any = 5, axis: int = 0) -> Any:
    """Stack layers as ``nnx.vmap`` and ``nnx.scan`` do."""
    return abstract(nnx.split_rngs(splits=count)(nnx.vmap(build, out_axes=axis)))


def attention(**options: Any) -> Any:
    return lambda r: nnx.MultiHeadAttention(2, 6, 8, rngs=r, **options)


def depthwise(r: nnx.Rngs) -> Any:
    return nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=r)


NNX = {
    "dense": (lambda r: nnx.Linear(3, 4, rngs=r), {"kernel": "i o -> o", "bias": "... ->"}),
    "dense 1->C": (lambda r: nnx.Linear(1, 4, rngs=r), {"kernel": "i o -> o"}),
    "conv1d": (lambda r: nnx.Conv(3, 4, (5,), rngs=r), {"kernel": "w i o -> o"}),
    "conv2d": (lambda r: nnx.Conv(3, 4, (3, 3), rngs=r), {"kernel": "h w i o -> o"}),
    "conv3d": (lambda r: nnx.Conv(3, 4, (3, 2, 2), rngs=r), {"kernel": "t h w i o -> o"}),
    "grouped": (
        lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r),
        {"kernel": "h w i o -> o"},
    ),
    "depthwise": (depthwise, {"kernel": "h w one o -> o"}),
    "transposed": (
        lambda r: nnx.ConvTranspose(3, 4, (2, 2), rngs=r),
        {"kernel": "h w i o -> o"},
    ),
    "transposed kernel": (
        lambda r: nnx.ConvTranspose(3, 4, (2, 2), transpose_kernel=True, rngs=r),
        {"kernel": "h w o i -> o", "bias": "... ->"},
    ),
    "transposed square kernel": (
        lambda r: nnx.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, rngs=r),
        {"kernel": "h w o i -> o"},
    ),
    "embedding": (lambda r: nnx.Embed(7, 3, rngs=r), {"embedding": "v d -> v"}),
    "attention": (
        attention(normalize_qk=True),
        {
            "query.kernel": "i h d -> h d",
            "query.bias": "... ->",
            "key.kernel": "i h d -> h d",
            "value.kernel": "i h d -> h d",
            "out.kernel": "h d o -> o",
            "out.bias": "... ->",
            "query_ln.scale": "... ->",
        },
    ),
    "grouped queries": (
        lambda r: nnx.MultiHeadAttention(4, 6, 8, num_kv_heads=2, rngs=r),
        {"key.kernel": "i h d -> h d"},
    ),
    "linear general": (
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r),
        {"kernel": "a b c d -> c d", "bias": "... ->"},
    ),
    "linear general, batch axis": (
        lambda r: nnx.LinearGeneral(3, 4, batch_axis={0: 5}, rngs=r),
        {"kernel": "b i o -> b o", "bias": "b o -> b"},
    ),
    "einsum": (
        lambda r: nnx.Einsum("...i,ihd->...hd", (3, 2, 4), (2, 4), rngs=r),
        {"kernel": "i h d -> h d", "bias": "... ->"},
    ),
    "einsum, out first": (
        lambda r: nnx.Einsum("bi,oi->bo", (4, 3), (4,), rngs=r),
        {"kernel": "o i -> o"},
    ),
    "einsum, experts": (
        lambda r: nnx.Einsum("ebi,eio->ebo", (5, 3, 4), (5, 4), rngs=r),
        {"kernel": "e i o -> e o", "bias": "e o -> e"},
    ),
    "lstm": (
        lambda r: nnx.OptimizedLSTMCell(3, 4, rngs=r),
        {"dense_i.kernel": "i o -> o", "dense_h.kernel": "i o -> o", "dense_h.bias": "... ->"},
    ),
    "gru": (lambda r: nnx.GRUCell(3, 4, rngs=r), {"dense_i.kernel": "i o -> o"}),
    "rnn": (
        lambda r: nnx.RNN(nnx.SimpleCell(3, 4, rngs=r)),
        {"cell.dense_i.kernel": "i o -> o", "cell.dense_h.kernel": "i o -> o"},
    ),
    "batch norm": (lambda r: nnx.BatchNorm(3, rngs=r), {"scale": "... ->", "bias": "... ->"}),
    "group norm": (lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r), {"scale": "... ->"}),
    "rms norm": (lambda r: nnx.RMSNorm(4, rngs=r), {"scale": "... ->"}),
    "lora": (
        lambda r: nnx.LoRALinear(3, 4, lora_rank=2, rngs=r),
        {"kernel": "i o -> o", "lora.lora_a": "i r -> r", "lora.lora_b": "r o -> o"},
    ),
}
STACKED = {
    "dense": (NNX["dense"][0], {"kernel": "l i o -> l o", "bias": "l o -> l"}),
    "conv2d": (NNX["conv2d"][0], {"kernel": "l h w i o -> l o", "bias": "l o -> l"}),
    "transposed kernel": (NNX["transposed kernel"][0], {"kernel": "l h w o i -> l o"}),
    "attention": (
        NNX["attention"][0],
        {
            "query.kernel": "l i h d -> l h d",
            "query.bias": "l h d -> l",
            "out.kernel": "l h d o -> l o",
        },
    ),
    "embedding": (NNX["embedding"][0], {"embedding": "l v d -> l v"}),
    "batch norm": (NNX["batch norm"][0], {"scale": "l c -> l"}),
    "lora": (NNX["lora"][0], {"lora.lora_a": "l i r -> l r"}),
}


def check(plan: Plan, expected: dict[str, str]) -> None:
    """Compare what the units mean for the shape at hand; spellings may differ."""
    for name, pattern in expected.items():
        entry = plan[name]
        assert entry.axes.keep == Units(pattern).bind(entry.shape).keep, f"{name}: {entry.units}"


@pytest.mark.parametrize("layer", NNX)
def test_nnx_layer(layer: str) -> None:
    build, expected = NNX[layer]
    check(agc_jax.plan(abstract(build), AGC()), expected)


@pytest.mark.parametrize("layer", STACKED)
def test_stacked_nnx_layer(layer: str) -> None:
    build, expected = STACKED[layer]
    check(agc_jax.plan(stack(build), AGC()), expected)


def test_layers_stacked_twice() -> None:
    build = nnx.vmap(lambda r: nnx.Linear(3, 4, rngs=r))
    model = stack(build, (6, 2))
    check(agc_jax.plan(model, AGC()), {"kernel": "a b i o -> a b o", "bias": "a b o -> a b"})


def test_layers_stacked_on_another_axis_have_to_be_declared() -> None:
    model = stack(lambda r: nnx.Linear(3, 4, rngs=r), axis=1)
    with pytest.raises(AmbiguousUnitsError, match=r"'kernel' of Linear with shape \(3, 5, 4\)"):
        agc_jax.plan(model, AGC(exclude=["bias"]))
    check(
        agc_jax.plan(model, AGC(units={"kernel": "i l o -> l o", "bias": "o l -> l"})),
        {"kernel": "i l o -> l o", "bias": "o l -> l"},
    )


def test_names_are_those_of_the_tree() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)])
            self.table = nnx.Dict(one=nnx.Linear(2, 2, use_bias=False, rngs=rngs))
            self.tied = self.layers[0]
            self.running = nnx.BatchStat(jnp.zeros((3, 3)))

    model = Model(nnx.Rngs(0))
    plan = agc_jax.plan(model, AGC())
    assert [entry.name for entry in plan] == [
        "layers.0.bias",
        "layers.0.kernel",
        "layers.1.bias",
        "layers.1.kernel",
        "table.one.kernel",
    ]
    state = nnx.state(model, nnx.Param)
    units = agc_jax.units(model)
    for tree in (state, nnx.to_pure_dict(state), jax.eval_shape(lambda: state)):
        assert agc_jax.plan(tree, AGC(), units=units) == plan
    assert "running" in agc_jax.units(model, wrt=nnx.BatchStat)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(5)(x), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = nn.Embed(7, 6)(x)
        x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(2, qkv_features=8)(x, x))
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=False)(x, x)
        x = nn.Conv(5, (3,))(x)
        x = scan()(x)[0]
        x = nn.ConvTranspose(4, (3,), transpose_kernel=True)(x)
        x = nn.ConvTranspose(6, (3,))(x)
        x = nn.DenseGeneral(4, axis=(-2, -1))(nn.DenseGeneral((2, 3))(x))
        partitioned = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(2, kernel_init=partitioned)(x)


LINEN = {
    "Embed_0.embedding": "v d -> v",
    "LayerNorm_0.scale": "... ->",
    "MultiHeadDotProductAttention_0.query.kernel": "i h d -> h d",
    "MultiHeadDotProductAttention_0.query.bias": "... ->",
    "MultiHeadDotProductAttention_0.out.kernel": "h d o -> o",
    "MultiHeadDotProductAttention_1.key.kernel": "i h d -> h d",
    "MultiHeadDotProductAttention_1.out.kernel": "h d o -> o",
    "Conv_0.kernel": "w i o -> o",
    "ScanScanned_0.Dense_0.kernel": "l i o -> l o",
    "ScanScanned_0.Dense_0.bias": "l o -> l",
    "ConvTranspose_0.kernel": "w o i -> o",
    "ConvTranspose_1.kernel": "w i o -> o",
    "DenseGeneral_1.kernel": "i a b -> a b",
    "DenseGeneral_1.bias": "... ->",
    "DenseGeneral_0.kernel": "a b o -> o",
    "Dense_0.kernel": "i o -> o",
}


@pytest.fixture(scope="module")
def linen_params() -> Any:
    return jax.eval_shape(Linen().init, KEY, jnp.ones((1, 3), int))["params"]


def test_linen_leaf_names(linen_params: Any) -> None:
    check(agc_jax.plan(linen_params, AGC()), LINEN)


def test_linen_modules_hold_no_parameters() -> None:
    with pytest.raises(
        ParameterError, match="Linen module Linen holds no parameters; give the tree"
    ):
        agc_jax.units(Linen())


def test_haiku_leaf_names() -> None:
    def forward(x: Any) -> Any:
        x = hk.Conv2D(4, 3)(x)
        x = hk.Conv2DTranspose(5, 3)(x)  # its bias tells
        x = hk.Conv2DTranspose(5, 3)(x)  # as many inputs as outputs: its name tells
        x = hk.DepthwiseConv2D(2, 3)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, True)
        x = hk.LayerNorm(-1, True, True)(hk.Linear(3)(x))
        return hk.GRU(4)(x[:, 0, 0], jnp.zeros((1, 4)))[0] + hk.Embed(7, 4)(jnp.zeros(1, int))

    transformed = hk.transform_with_state(forward)
    params = jax.eval_shape(transformed.init, KEY, jnp.ones((1, 6, 6, 3)))[0]
    expected = {
        "conv2_d.w": "h w i o -> o",
        "conv2_d.b": "... ->",
        "conv2_d_transpose.w": "h w o i -> o",
        "conv2_d_transpose_1.w": "h w o i -> o",
        "depthwise_conv2_d.w": "h w one o -> o",
        "batch_norm.scale": "... ->",
        "batch_norm.offset": "... ->",
        "layer_norm.scale": "... ->",
        "linear.w": "i o -> o",
        "gru.w_i": "i o -> o",
        "gru.w_h": "i o -> o",
        "embed.embeddings": "v d -> v",
    }
    check(agc_jax.plan(params, AGC()), expected)


EQUINOX = {
    "linear": (lambda: eqx.nn.Linear(3, 4, key=KEY), {"weight": "o i -> o", "bias": "... ->"}),
    "linear to scalar": (lambda: eqx.nn.Linear(3, "scalar", key=KEY), {"weight": "o i -> o"}),
    "conv1d": (lambda: eqx.nn.Conv1d(3, 4, 2, key=KEY), {"weight": "o i w -> o", "bias": "... ->"}),
    "grouped conv2d": (
        lambda: eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY),
        {"weight": "o i h w -> o", "bias": "... ->"},
    ),
    "transposed": (
        lambda: eqx.nn.ConvTranspose2d(4, 6, 2, groups=2, key=KEY),
        {"weight": "o i h w -> o"},
    ),
    "embedding": (lambda: eqx.nn.Embedding(7, 4, key=KEY), {"weight": "v d -> v"}),
    "attention": (
        lambda: eqx.nn.MultiheadAttention(2, 6, key=KEY),
        {"query_proj.weight": "o i -> o", "output_proj.weight": "o i -> o"},
    ),
    "layer norm": (lambda: eqx.nn.LayerNorm((3, 4)), {"weight": "... ->", "bias": "... ->"}),
    "lstm": (
        lambda: eqx.nn.LSTMCell(3, 4, key=KEY),
        {"weight_ih": "o i -> o", "weight_hh": "o i -> o", "bias": "... ->"},
    ),
    "mlp": (
        lambda: eqx.nn.MLP(3, 4, 5, 1, key=KEY),
        {"layers.0.weight": "o i -> o", "layers.1.bias": "... ->"},
    ),
    "ensemble": (
        lambda: eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 4, 2, key=key))(
            jax.random.split(KEY, 5)
        ),
        {"weight": "l o i h w -> l o", "bias": "l a b c -> l"},
    ),
}


@pytest.mark.parametrize("layer", EQUINOX)
def test_equinox_layer(layer: str) -> None:
    build, expected = EQUINOX[layer]
    model = eqx.filter_eval_shape(build)
    check(agc_jax.plan(model, AGC()), expected)
    arrays = eqx.filter(model, lambda leaf: hasattr(leaf, "dtype"))
    assert agc_jax.plan(arrays, AGC(), units=agc_jax.units(model)) == agc_jax.plan(model, AGC())


class Weird(nnx.Module):
    def __init__(self, shape: tuple[int, ...] = (2, 3, 4)) -> None:
        self.kernel = nnx.Param(jnp.zeros(shape))
        self.table = nnx.Param(jnp.zeros((2, 3)))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = importlib.import_module("agc_jax.layers")
    monkeypatch.setattr(layers, "TABLE", copy.deepcopy(layers.TABLE))


def test_an_own_layer_is_registered(registry: None) -> None:
    with pytest.raises(AmbiguousUnitsError, match=r"parameter 'kernel' with shape \(2, 3, 4\)"):
        agc_jax.plan(Weird(), AGC(exclude=["table"]))
    agc_jax.register_units(Weird, {"kernel": "n h d -> n", "t*": Units("o i -> o")})

    class Child(Weird):
        pass

    for model in (Weird(), Child()):
        check(agc_jax.plan(model, AGC()), {"kernel": "n h d -> n", "table": "o i -> o"})
    path = f"{Child.__module__}.{Child.__qualname__}"
    agc_jax.register_units(path, lambda layer: {"*": "... -> " if layer else "x ->"})
    assert agc_jax.plan(Child(), AGC())["table"].count == 1
    assert agc_jax.plan(Weird(), AGC())["table"].count == 2


def test_a_registry_entry_is_checked() -> None:
    with pytest.raises(ParameterError, match="must be a mapping such as"):
        agc_jax.register_units(Weird, 3)  # type: ignore[arg-type]
    with pytest.raises(UnitsError, match="'->' is missing"):
        agc_jax.register_units(Weird, {"kernel": "o i"})


def kernel(*shape: int, bias: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"kernel": shape} if bias is None else {"kernel": shape, "bias": bias}


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def heads(query: Any, key: Any, out: Any, names: str = "query key value out") -> Any:
    return {"attn": dict(zip(names.split(), (query, key, key, out), strict=True))}


LLAMA = "q_proj k_proj v_proj o_proj"
SETTLED = {
    "dense": ({"lm_head": kernel(3, 4)}, {"lm_head.kernel": "i o -> o"}),
    "dense 1->C": ({"up": kernel(1, 4)}, {"up.kernel": "i o -> o"}),
    "attention": (
        heads(kernel(16, 4, 8), kernel(16, 2, 8), kernel(4, 8, 16)),
        {"attn.key.kernel": "i h d -> h d", "attn.out.kernel": "h d o -> o"},
    ),
    "attention, scan on axis 0": (
        heads(kernel(3, 16, 4, 8), kernel(3, 16, 2, 8), kernel(3, 4, 8, 16), LLAMA),
        {"attn.k_proj.kernel": "l i h d -> l h d", "attn.o_proj.kernel": "l h d o -> l o"},
    ),
    "attention, scan on axis 1": (
        heads(kernel(16, 3, 4, 8), kernel(16, 3, 2, 8), kernel(4, 3, 8, 16)),
        {"attn.query.kernel": "i l h d -> l h d", "attn.out.kernel": "h l d o -> l o"},
    ),
    "attention, scan on axis 1, as many layers as heads": (
        heads(kernel(16, 4, 4, 8), kernel(16, 4, 4, 8), kernel(4, 4, 8, 16)),
        {"attn.query.kernel": "i l h d -> l h d", "attn.out.kernel": "h l d o -> l o"},
    ),
    "attention, scan on axis 0, as many layers as heads": (
        heads(kernel(4, 16, 4, 8), kernel(4, 16, 4, 8), kernel(4, 4, 8, 16), LLAMA),
        {"attn.q_proj.kernel": "l i h d -> l h d", "attn.o_proj.kernel": "l h d o -> l o"},
    ),
    "attention in two axes, scan": (
        heads(kernel(3, 16, 32), kernel(3, 16, 8), kernel(3, 32, 16), LLAMA),
        {"attn.q_proj.kernel": "l i o -> l o", "attn.o_proj.kernel": "l i o -> l o"},
    ),
    "fused, with a bias": (
        {"qkv": kernel(16, 3, 4, 8, bias=(3, 4, 8))},
        {"qkv.kernel": "i a h d -> a h d", "qkv.bias": "a h d ->"},
    ),
    "scan on axis 1, with a bias": (
        {"wi": kernel(5, 3, 4, bias=(4, 3))},
        {"wi.kernel": "i l o -> l o", "wi.bias": "o l -> l"},
    ),
    "convolution": ({"Conv_0": kernel(3, 3, 4, 8)}, {"Conv_0.kernel": "h w i o -> o"}),
    "convolution 1x1": ({"conv": kernel(1, 1, 4, 8)}, {"conv.kernel": "h w i o -> o"}),
    "convolution 1-D": ({"conv1": kernel(5, 4, 8)}, {"conv1.kernel": "w i o -> o"}),
    "convolution 1x1 of one channel": (
        {"conv": kernel(1, 1, 1, 8)},
        {"conv.kernel": "a b i o -> o"},
    ),
    "convolution beside a norm": (
        {"block": {"conv": kernel(3, 3, 4, 8), "norm": {"scale": (8,), "bias": (8,)}}},
        {"block.conv.kernel": "h w i o -> o"},
    ),
    "square convolution with a bias": (
        {"Conv_0": kernel(3, 3, 4, 4, bias=(4,))},
        {"Conv_0.kernel": "h w i o -> o"},
    ),
    "convolution in 3-D, with a bias": (
        {"conv": kernel(3, 3, 3, 4, 4, bias=(4,))},
        {"conv.kernel": "t h w i o -> o"},
    ),
    "transposed, Haiku": (
        {"conv2_d_transpose": {"w": (3, 3, 5, 4)}},
        {"conv2_d_transpose.w": "h w o i -> o"},
    ),
    "GPT-2 of transformers": (
        {"c_attn": kernel(24, 8, bias=(24,))},
        {"c_attn.kernel": "o i -> o"},
    ),
    "LoRA": (
        {"q": {"kernel_lora_a": (16, 4), "kernel_lora_b": (4, 8), "lora_a": (5, 2)}},
        {"q.kernel_lora_a": "i r -> r", "q.kernel_lora_b": "r o -> o", "q.lora_a": "i r -> r"},
    ),
    "LoRA, Haiku": ({"linear": {"w_lora_a": (6, 2)}}, {"linear.w_lora_a": "i r -> r"}),
    "code book": (
        {"vector_quantizer": {"embeddings": (3, 7)}, "embed": {"embeddings": (7, 3)}},
        {"vector_quantizer.embeddings": "d v -> v", "embed.embeddings": "v d -> v"},
    ),
    "Gemma's table": (
        {"embedder": {"input_embedding": (9, 4)}},
        {"embedder.input_embedding": "v d -> v"},
    ),
    "vectors": (
        {
            "cls": (1, 1, 8),
            "probe": (1, 1, 8),
            "batch_norm": {"scale": (1, 1, 1, 8)},
            "gamma": (8,),
        },
        {"cls": "... ->", "probe": "... ->", "batch_norm.scale": "... ->", "gamma": "... ->"},
    ),
    "keys that are tuples": (
        {("a", "kernel"): (3, 4), ("a", "bias"): (4,)},
        {"a.kernel": "i o -> o", "a.bias": "... ->"},
    ),
}


@pytest.mark.parametrize("case", SETTLED)
def test_what_names_settle(case: str) -> None:
    tree, expected = SETTLED[case]
    plan = agc_jax.plan(shapes_of(tree), AGC())
    check(plan, expected)
    kernels = [entry for entry in plan if sum(size > 1 for size in entry.shape) > 1]
    assert {entry.source for entry in kernels} <= {"name"}
    # What was a guess from the rank alone is taken as the published rule has it, whatever the name.
    assert len(agc_jax.plan(shapes_of(tree), AGC.profile("timm"))) == len(plan)


ASKED = {
    "scan on axis 0": {"q_proj": kernel(3, 16, 4, 8)},
    "scan on axis 0, from heads": {"o_proj": kernel(3, 4, 8, 16)},
    "scan of a dense layer": {"layers": {"mlp": kernel(3, 4, 8)}},
    "scan of a norm": {"layers": {"norm": {"scale": (3, 8)}}},
    "attention of which a part is missing": {
        "attn": {"query": kernel(16, 3, 4, 8), "key": kernel(16, 3, 4, 8)}
    },
    "attention, every size the same": heads(
        kernel(4, 4, 4, 4), kernel(4, 4, 4, 4), kernel(4, 4, 4, 4)
    ),
    "fused": {"qkv": kernel(16, 3, 4, 8)},
    "Gemma": {"qkv_einsum": {"w": (3, 4, 16, 8)}, "attn_vec_einsum": {"w": (4, 8, 16)}},
    "einsum of two axes": {"out_einsum": {"w": (5, 4)}},
    "scan of a convolution": {"Conv_0": kernel(3, 3, 3, 4, 4)},
    "ensemble of convolutions": {"conv": kernel(5, 3, 4, 6)},
    "ensemble under the name of vmap": {"VmapConv_0": kernel(3, 3, 4, 6)},
    "scan under the name of scan": {"ScanBlock_0": {"Conv_0": kernel(3, 3, 4, 6)}},
    "Haiku's layer stack": {"__layer_stack_no_per_layer": {"conv1_d": {"w": (3, 3, 4, 6)}}},
    "scan of a convolution beside its norm": {
        "layers": {"Conv_0": kernel(3, 3, 4, 6), "BatchNorm_0": {"scale": (3, 6)}}
    },
    "convolution in 3-D": {"conv": kernel(3, 3, 3, 4, 8)},
    "transposed": {"ConvTranspose_0": kernel(3, 3, 5, 4)},
    "transposed, upwards": {"upconv": kernel(3, 3, 5, 4), "DeconvBlock": kernel(3, 3, 5, 4)},
    "transposed or not, as many inputs": {"up": kernel(3, 3, 4, 4, bias=(4,))},
    "any layer of four axes": {"stem": kernel(3, 3, 4, 8)},
    "GPT-2 of transformers, square": {"c_proj": kernel(8, 8, bias=(8,))},
    "dense layer with a bias of its inputs": {"dense": kernel(5, 4, bias=(5,))},
    "LoRA, transposed": {"q": {"lora_a": (4, 16), "lora_b": (8, 4)}},
    "LoRA, stacked": {"q": {"kernel_lora_a": (3, 16, 4), "kernel_lora_b": (3, 4, 8)}},
    "code book of another name": {"vq": {"embeddings": (3, 7)}},
    "names of AlphaFold": {"attention": {"query_w": (6, 2, 4), "output_w": (2, 4, 6)}},
    "positions": {"pos_embedding": (1, 9, 4), "posembed_input": {"pos": (9, 4)}},
}


@pytest.mark.parametrize("case", ASKED)
def test_what_names_leave_open_is_asked_for_all_at_once(case: str) -> None:
    tree = shapes_of(ASKED[case])
    found = agc_jax.units(tree)
    with pytest.raises(AmbiguousUnitsError) as caught:
        agc_jax.plan(tree, AGC())
    for name in found:
        if len(found.shape(name)) > 1:
            assert found[name] is None
            assert f"'{name}'" in str(caught.value)
    assert "For a Flax NNX or Equinox model give units=agc_jax.units(model)" in str(caught.value)


TABLE = {
    "mlp": ("io", "o"),
    "Dense_0": ("io", "o"),
    "DenseGeneral_0": ("ihd", "hd"),
    "qkv": ("iahd", "ahd"),
    "o_proj": ("hdo", "o"),
    "stem": ("vwio", "o"),
    "Conv_0": ("vwio", "o"),
    "conv1d": ("wio", "o"),
    "ConvTranspose_0": ("vwoi", "o"),
    "up": ("woi", "o"),
    "Einsum_0": ("hid", "hd"),
}
STACKS: dict[str, Callable[[str], str]] = {
    "one layer": lambda axes: axes,
    "on axis 0": lambda axes: f"l{axes}",
    "on axis 1": lambda axes: f"{axes[:1]}l{axes[1:]}",
    "twice": lambda axes: f"lm{axes}",
}


def right_or_none(units: Any, name: str, axes: str, outputs: str) -> bool:
    """Check that the units of an array, if there are any, are the outputs and what stacks the
    layer.
    """
    shape = units.shape(name)
    right = {
        axis for axis, letter in enumerate(axes) if letter in f"{outputs}lm" and shape[axis] > 1
    }
    if units[name] is None:
        return False
    assert {axis for axis in units[name].bind(shape).keep if shape[axis] > 1} == right, (
        f"{name} {shape}, axes {axes}: {units[name]}"
    )
    return True


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("layer", TABLE)
def test_no_layer_of_any_size_is_taken_for_another(layer: str, stack: str) -> None:
    axes, outputs = TABLE[layer]
    kernel_axes, bias_axes = STACKS[stack](axes), STACKS[stack](outputs)
    letters = sorted({*kernel_axes})
    settled = 0
    for sizes in product((1, 2, 3), repeat=len(letters)):
        size = dict(zip(letters, sizes, strict=True))
        if layer == "conv1d" and stack in ("on axis 0", "on axis 1") and size["l"] == size["w"]:
            continue  # a square window, and a name that says it is one
        shapes = {
            f"a.{layer}.kernel": tuple(size[axis] for axis in kernel_axes),
            f"b.{layer}.kernel": tuple(size[axis] for axis in kernel_axes),
            f"b.{layer}.bias": tuple(size[axis] for axis in bias_axes),
        }
        units = agc_jax.units(shapes_of(shapes))
        settled += right_or_none(units, f"a.{layer}.kernel", kernel_axes, outputs)
        settled += right_or_none(units, f"b.{layer}.kernel", kernel_axes, outputs)
        if units[f"b.{layer}.bias"] is not None:
            right_or_none(units, f"b.{layer}.bias", bias_axes, "")
    assert settled > 0


PROJECTIONS = [("ihd", "hd", "hdo"), ("ie", "e", "eo")]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    ("names", "inward", "heads", "outward"),
    [("query key value out", *PROJECTIONS[0]), *((LLAMA, *axes) for axes in PROJECTIONS)],
    ids=["linen", "llama", "llama, heads in one axis"],
)
def test_no_attention_of_any_size_is_taken_for_another(
    names: str, inward: str, heads: str, outward: str, stack: str
) -> None:
    axes = {name: STACKS[stack](inward) for name in names.split()[:3]}
    axes[names.split()[3]] = STACKS[stack](outward)
    letters = sorted({*"".join(axes.values())})
    settled = 0
    for sizes in product((1, 2, 3), repeat=len(letters)):
        size = dict(zip(letters, sizes, strict=True))
        tree = {
            f"{name}.kernel": tuple(size[axis] for axis in found) for name, found in axes.items()
        }
        units = agc_jax.units(shapes_of(tree))
        for name, found in axes.items():
            settled += right_or_none(units, f"{name}.kernel", found, "o" if "o" in found else heads)
    assert settled > 0


def test_layers_of_a_container_whatever_their_keys() -> None:
    keys = ["values", "keys", "items", "get", "copy", "pop", "update", "index", "count"]

    def linear(rngs: nnx.Rngs) -> Any:
        return nnx.LinearGeneral(6, (2, 3, 2), use_bias=False, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.plain = nnx.data({key: linear(rngs) for key in keys})
            self.own = nnx.Dict({key: linear(rngs) for key in keys[:3]})
            self.list = nnx.List([linear(rngs)])
            self.nested = nnx.data([(linear(rngs),), {1: linear(rngs)}])

    plan = agc_jax.plan(abstract(Model), AGC())
    assert len(plan) == len(keys) + 6
    assert {entry.source for entry in plan} == {"layer"}
    assert {entry.count for entry in plan} == {12}


class Pair(NamedTuple):
    count: Any
    index: Any


@jax.tree_util.register_dataclass
@dataclass
class Values:
    values: Any
    items: Any


class Bag(argparse.Namespace):
    """A node of attributes that JAX flattens without keys."""


jax.tree_util.register_pytree_node(
    Bag,
    lambda bag: (list(vars(bag).values()), tuple(vars(bag))),
    lambda names, values: Bag(**dict(zip(names, values, strict=True))),
)


@pytest.mark.parametrize(
    "contain",
    [
        lambda a, b: {"values": a, "items": b},
        lambda a, b: FrozenDict({"keys": a, "copy": b}),
        lambda a, b: OrderedDict(pop=a, update=b),
        lambda a, b: Pair(a, b),
        lambda a, b: Values(a, b),
        lambda a, b: Bag(values=a, index=b),
        lambda a, b: [a, (b,)],
    ],
)
def test_layers_of_equinox_in_any_container(contain: Any) -> None:
    class Model(eqx.Module):
        inside: Any

    layers = [eqx.filter_eval_shape(lambda: eqx.nn.Linear(3, 4, key=KEY)) for _ in range(2)]
    plan = agc_jax.plan(Model(contain(*layers)), AGC())
    assert [entry.count for entry in plan] == [4, 1, 4, 1]
    assert {entry.source for entry in plan} == {"layer"}


@pytest.mark.parametrize("axis", [0, 1])
def test_as_many_layers_as_inputs(axis: int) -> None:
    """Either axis could be the one that stacks; another parameter tells."""

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, norm: bool) -> None:
            self.dense = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs) if norm else None

    def stacks(norm: bool) -> Any:
        return stack(lambda rngs: Block(rngs, norm), 3, axis)

    with pytest.raises(
        AmbiguousUnitsError, match=r"'dense\.kernel' of Linear with shape \(3, 3, 4\)"
    ):
        agc_jax.plan(stacks(norm=False), AGC())
    if axis == 0:
        check(agc_jax.plan(stacks(norm=True), AGC()), {"dense.kernel": "l i o -> l o"})
    else:
        assert agc_jax.units(stacks(norm=True))["dense.kernel"] is None


def test_a_tied_variable_is_what_the_layer_that_is_known_says() -> None:
    class Head(nnx.Module):
        def __init__(self, table: Any) -> None:
            self.kernel = table

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(7, 6, rngs=rngs)
            self.a_head = Head(self.embed.embedding)  # sorts first

    plan = agc_jax.plan(Model(nnx.Rngs(0)), AGC())
    assert plan.decisions() == {"a_head.kernel": (7, 0.01, False)}


@pytest.mark.parametrize(
    "clip",
    [
        lambda rule, tree: optax.flatten(agc_jax.adaptive_grad_clip(rule)).init(tree),
        lambda rule, tree: agc_jax.plan(jnp.ones(5), rule),
        lambda rule, tree: agc_jax.plan(nnx.Param(jnp.ones((1, 5))), rule),
    ],
)
def test_one_array_without_a_name_has_to_be_declared(clip: Any) -> None:
    tree = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(AmbiguousUnitsError, match=r"one array without a name.*optax\.flatten"):
        clip(AGC(), tree)
    for rule in (AGC(units={"*": "... ->"}), AGC(granularity="tensor"), AGC(exclude=["*"])):
        clip(rule, tree)
    assert agc_jax.plan(jnp.ones(()), AGC()).count == 1


def test_nodes_that_check_their_leaves() -> None:
    @jax.tree_util.register_pytree_node_class
    class Strict:
        def __init__(self, kernel: Any) -> None:
            assert hasattr(kernel, "shape"), "a leaf must be an array"
            self.kernel = kernel

        def tree_flatten(self) -> tuple[tuple[Any], None]:
            return (self.kernel,), None

        @classmethod
        def tree_unflatten(cls, _: None, leaves: Any) -> Any:
            return cls(*leaves)

    tree = {"kernel": Strict(jnp.ones((3, 2)))}
    rule = AGC(units={"*": "i o -> o"})
    clipped, _ = agc_jax.adaptive_clip_gradients(tree, tree, rule)
    assert clipped["kernel"].kernel.shape == (3, 2)
    transformation = agc_jax.adaptive_grad_clip(rule)
    transformation.update(tree, transformation.init(tree), tree)


def test_boxes_and_tuples_are_no_part_of_a_name() -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    boxed = {"bias": nn.Partitioned(jnp.ones(3), (None,)), "kernel": jnp.ones((2, 3))}
    tuples = {(name,): leaf for name, leaf in nnx.to_pure_dict(state).items()}
    for tree in (state, boxed, tuples):
        assert flatten(tree)[0] == ("bias", "kernel")


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"kernel": (3, 4, 5)}, "kernel"),
        ({"kernel": (4, 4, 8), "bias": (4, 8)}, "bias"),  # stacked, or to heads: both fit
        ({"kernel": (3, 3, 4, 5), "bias": (7,)}, "kernel"),  # no output of it has that bias
        ({"pos_embed": (1, 5, 4)}, "pos_embed"),
        ({"kernel": (3, 4, 4), "bias": (4,)}, "kernel"),  # transposed or not: both fit
        (
            {"weight": (5, 4)},
            "weight",
        ),  # out first or last? a name that no JAX library gives this layout
        ({"scale": (3, 4)}, "scale"),
        ({"block": {"embedding": (2, 7, 3)}}, "block.embedding"),
    ],
    ids=lambda value: str(value),
)
def test_what_names_do_not_settle_has_to_be_declared(tree: Any, name: str) -> None:
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    with pytest.raises(AmbiguousUnitsError, match=f"parameter '{name}'.*declare them"):
        agc_jax.plan(shapes, AGC())
    assert agc_jax.plan(shapes, AGC(units={"*": "... ->"}))[name].count == 1
    agc_jax.plan(shapes, AGC(exclude=["*"]))


def test_plain_trees_by_declaration() -> None:
    tree = {
        "net": [{"a": jnp.zeros((3, 4))}, (jnp.zeros(()), jnp.zeros(5))],
        "step": jnp.zeros((2, 2), int),
    }
    plan = agc_jax.plan(tree, AGC(units={"net.*.a": "i o -> o"}))
    assert plan.decisions() == {
        "net.0.a": (4, 0.01, False),
        "net.1.0": (1, 0.01, False),
        "net.1.1": (1, 0.01, False),
    }


def test_the_head_that_a_model_declares() -> None:
    class Model(nnx.Module):
        agc_head = "fc"

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.body, self.fc = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

    model = Model(nnx.Rngs(0))
    excluded = {e.name for e in agc_jax.plan(model, AGC(exclude=["@head"])) if e.excluded}
    assert excluded == {"fc.kernel", "fc.bias"}
    state = nnx.state(model)
    plan = agc_jax.plan(state, AGC(exclude=["@head.weight"]), units=agc_jax.units(model))
    assert {e.name for e in plan if e.excluded} == {"fc.kernel"}
    with pytest.raises(SelectorError, match="needs the name of the classifier layer"):
        agc_jax.plan(state, AGC(exclude=["@head"]))


def test_patterns_are_verified() -> None:
    with pytest.raises(
        SelectorError, match=r"pattern 'fc\.\*' matches no parameter; the names are: bias"
    ):
        agc_jax.plan(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), AGC(exclude=["fc.*"]))


@pytest.mark.parametrize("model", [None, 5.0, "x"])
def test_what_is_no_model(model: Any) -> None:
    for function in (agc_jax.units, lambda model: agc_jax.plan(model, AGC())):
        with pytest.raises(ParameterError, match="model must be a model or a tree of arrays, got"):
            function(model)


def test_python_numbers_in_an_equinox_module_are_settings() -> None:
    dropout = eqx.nn.Dropout(0.5)
    assert list(agc_jax.units({"net": dropout, "scale": 1.0})) == ["scale"]
    assert len(agc_jax.plan(dropout, AGC())) == 0
    with pytest.raises(ParameterError, match="'p' has a gradient, but is a setting"):
        agc_jax.adaptive_clip_gradients(dropout, dropout, AGC())


def test_units_of_another_model() -> None:
    units = agc_jax.units({"kernel": jnp.zeros((2, 3))})
    assert dict(units) == {"kernel": Units("i o -> o")}
    with pytest.raises(
        ParameterError, match=r"'params\.kernel' is not in the units given; the names"
    ):
        agc_jax.plan({"params": {"kernel": jnp.zeros((2, 3))}}, AGC(), units=units)
    with pytest.raises(
        ShapeError, match=r"'kernel' has shape \(1, 3\), the units given are for the"
    ):
        agc_jax.plan({"kernel": jnp.zeros((1, 3))}, AGC(), units=units)
    with pytest.raises(ParameterError, match=r"units= takes what agc_jax.units\(model\) returns"):
        agc_jax.plan({"kernel": jnp.zeros((2, 3))}, AGC(), units={"kernel": "i o -> o"})  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["optax", "timm", "deepmind"])
def test_profiles_read_flax_layouts(profile: str) -> None:
    """A dense kernel 1->4 is one unit for optax, which squeezes, and four for timm, whose layout
    differs.
    """
    model = nnx.Linear(1, 4, rngs=nnx.Rngs(0))
    rule = AGC.profile(profile, exclude=[])
    assert agc_jax.plan(model, rule)["kernel"].count == (4 if profile == "timm" else 1)


@pytest.mark.parametrize(
    "module",
    [
        "agc_jax",
        "agc_jax.units",
        "agc_jax.layers",
        "agc_jax.clip",
        "agc_jax.nfnet",
        "agc_jax.optimizer",
        "agc_jax.recipe",
        "agc_jax.weights",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0
