"""Units of every layer type and leaf name, plans, and the messages for what they do not settle."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import agc_jax
from agc import AGC, Plan, Units
from agc.errors import (
    AmbiguousUnitsError,
    ParameterError,
    SelectorError,
    ShapeError,
    UnitsError,
)

KEY = jax.random.key(0)


def abstract(build: Any) -> Any:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def stack(build: Any, count: int = 5) -> Any:
    """Stack layers as ``nnx.vmap`` and ``nnx.scan`` do."""
    return abstract(lambda rngs: nnx.vmap(build)(rngs.split(count)))


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
    model = abstract(lambda r: nnx.vmap(build)(r.split((6, 2))))
    check(agc_jax.plan(model, AGC()), {"kernel": "a b i o -> a b o", "bias": "a b o -> a b"})


def test_layers_stacked_on_another_axis_have_to_be_declared() -> None:
    build = nnx.vmap(lambda r: nnx.Linear(3, 4, rngs=r), out_axes=1)
    model = abstract(lambda r: build(r.split(5)))
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
        x = nn.ConvTranspose(4, (3,))(x)
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
    monkeypatch.setattr(layers, "_REGISTRY", dict(layers._REGISTRY))


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


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"kernel": (3, 4, 5)}, "kernel"),
        ({"kernel": (4, 4, 8), "bias": (4, 8)}, "bias"),  # stacked, or to heads: both fit
        ({"kernel": (3, 3, 4, 5), "bias": (7,)}, "kernel"),  # no output of it has that bias
        ({"pos_embed": (1, 5, 4)}, "pos_embed"),
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
    with pytest.raises(AmbiguousUnitsError, match=f"parameter '{name}'.*Declare them"):
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
    assert dict(units) == {"kernel": None}
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
    """A dense kernel 1->4 is one unit for optax, which squeezes, and four for timm, whose layout differs."""
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
