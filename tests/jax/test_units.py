"""Units by layer type and by leaf name, and the messages for what they do not settle.

``test_brute_force_units.py`` and the suite have the weights of single layers.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
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
)
from agc_jax.units import flatten
from tests.contract.units import UnitsContract
from tests.jax.driver import JaxDriver

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)


def abstract(build: Any) -> Any:
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def stack(build: Any, count: Any = 5, axis: int = 0) -> Any:
    """Stack layers as ``nnx.vmap`` and ``nnx.scan`` do."""
    return abstract(nnx.split_rngs(splits=count)(nnx.vmap(build, out_axes=axis)))


NNX = {
    "batch axis": (
        lambda r: nnx.LinearGeneral(3, 4, batch_axis={0: 5}, rngs=r),
        {"bias": "b o -> b"},
    ),
    "einsum, experts": (
        lambda r: nnx.Einsum("ebi,eio->ebo", (5, 3, 4), (5, 4), rngs=r),
        {"bias": "e o -> e"},
    ),
    "lora": (
        lambda r: nnx.LoRALinear(3, 4, lora_rank=2, rngs=r),
        {"kernel": "i o -> o", "lora.lora_a": "i r -> r", "lora.lora_b": "r o -> o"},
    ),
}
STACKED = {
    "dense": (lambda r: nnx.Linear(3, 4, rngs=r), {"bias": "l o -> l"}),
    "conv2d": (lambda r: nnx.Conv(3, 4, (3, 3), rngs=r), {"bias": "l o -> l"}),
    "attention": (
        lambda r: nnx.MultiHeadAttention(2, 6, 8, normalize_qk=True, rngs=r),
        {"query.bias": "l h d -> l", "query_ln.scale": "l d -> l"},
    ),
    "batch norm": (lambda r: nnx.BatchNorm(3, rngs=r), {"scale": "l c -> l", "bias": "l c -> l"}),
    "group norm": (lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r), {"scale": "l c -> l"}),
    "rms norm": (lambda r: nnx.RMSNorm(4, rngs=r), {"scale": "l c -> l"}),
    "lora": (NNX["lora"][0], {"lora.lora_a": "l i r -> l r"}),
}


class TestUnits(UnitsContract):
    driver = JaxDriver()
    unknown = "parameter 'table'"


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
        x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(2, qkv_features=8)(x, x))
        partitioned = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(2, kernel_init=partitioned)(scan()(x)[0])


def test_linen_leaf_names() -> None:
    params = jax.eval_shape(Linen().init, KEY, jnp.ones((1, 3, 5)))["params"]
    expected = {
        "LayerNorm_0.scale": "... ->",
        "MultiHeadDotProductAttention_0.query.kernel": "i h d -> h d",
        "MultiHeadDotProductAttention_0.query.bias": "... ->",
        "ScanScanned_0.Dense_0.kernel": "l i o -> l o",
        "ScanScanned_0.Dense_0.bias": "l o -> l",
        "Dense_0.kernel": "i o -> o",
    }
    check(agc_jax.plan(params, AGC()), expected)


def test_linen_modules_hold_no_parameters() -> None:
    with pytest.raises(
        ParameterError, match="Linen module Linen holds no parameters; give the tree"
    ):
        agc_jax.units(Linen())


EQUINOX = {
    "linear to scalar": (lambda: eqx.nn.Linear(3, "scalar", key=KEY), {"weight": "o i -> o"}),
    "layer norm": (lambda: eqx.nn.LayerNorm((3, 4)), {"weight": "... ->", "bias": "... ->"}),
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
    "dense 1->C": ({"up": kernel(1, 4)}, {"up.kernel": "i o -> o"}),
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
    "convolution 1x1": ({"conv": kernel(1, 1, 4, 8)}, {"conv.kernel": "h w i o -> o"}),
    "convolution 1x1 of one channel": (
        {"conv": kernel(1, 1, 1, 8)},
        {"conv.kernel": "a b i o -> o"},
    ),
    "convolution beside a norm": (
        {"block": {"conv": kernel(3, 3, 4, 8), "norm": {"scale": (8,), "bias": (8,)}}},
        {"block.conv.kernel": "h w i o -> o"},
    ),
    "GPT-2 of transformers": (
        {"c_attn": kernel(24, 8, bias=(24,))},
        {"c_attn.kernel": "o i -> o"},
    ),
    "LoRA": (
        {"q": {"kernel_lora_a": (16, 4), "kernel_lora_b": (4, 8), "lora_a": (5, 2)}},
        {"q.kernel_lora_a": "i r -> r", "q.kernel_lora_b": "r o -> o", "q.lora_a": "i r -> r"},
    ),
    "GRU, Haiku": (
        {"gru": {"w_i": (3, 12), "w_h": (4, 12), "b": (12,)}},
        {"gru.w_i": "i o -> o", "gru.w_h": "i o -> o"},
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
    "scan of a norm": {"layers": {"norm": {"scale": (3, 8)}}},
    "attention of which a part is missing": {
        "attn": {"query": kernel(16, 3, 4, 8), "key": kernel(16, 3, 4, 8)}
    },
    "attention, every size the same": heads(
        kernel(4, 4, 4, 4), kernel(4, 4, 4, 4), kernel(4, 4, 4, 4)
    ),
    "Gemma": {"qkv_einsum": {"w": (3, 4, 16, 8)}, "attn_vec_einsum": {"w": (4, 8, 16)}},
    "einsum of two axes": {"out_einsum": {"w": (5, 4)}},
    "ensemble of convolutions": {"conv": kernel(5, 3, 4, 6)},
    "ensemble under the name of vmap": {"VmapConv_0": kernel(3, 3, 4, 6)},
    "scan under the name of scan": {"ScanBlock_0": {"Conv_0": kernel(3, 3, 4, 6)}},
    "Haiku's layer stack": {"__layer_stack_no_per_layer": {"conv1_d": {"w": (3, 3, 4, 6)}}},
    "scan of a convolution beside its norm": {
        "layers": {"Conv_0": kernel(3, 3, 4, 6), "BatchNorm_0": {"scale": (3, 6)}}
    },
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
    "kernel of no layer": {"kernel": (3, 4, 5)},
    "stacked, or to heads": kernel(4, 4, 8, bias=(4, 8)),
    "bias that fits no output": kernel(3, 3, 4, 5, bias=(7,)),
    "transposed or not": kernel(3, 4, 4, bias=(4,)),
    "a name that no JAX library gives this layout": {"weight": (5, 4)},
    "a norm of two axes": {"scale": (3, 4)},
    "tables": {"block": {"embedding": (2, 7, 3)}},
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
    assert {e.count for e in agc_jax.plan(tree, AGC(units={"*": "... ->"}))} == {1}
    agc_jax.plan(tree, AGC(exclude=["*"]))


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


def test_units_tell_the_head_to_trees() -> None:
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    model.agc_head = "layers.1"
    rule = AGC(exclude=["@head.weight"])
    plan = agc_jax.plan(nnx.state(model), rule, units=agc_jax.units(model))
    assert [entry.name for entry in plan if entry.excluded] == ["layers.1.kernel"]
    with pytest.raises(SelectorError, match="needs the name of the classifier layer"):
        agc_jax.plan(nnx.state(model), rule)


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


def test_shared_parameters_go_by_their_first_name() -> None:
    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(k)) for k in range(2)]
    layers[1].kernel = layers[0].kernel
    model = nnx.Sequential(*layers, layers[0])
    assert len(agc_jax.plan(model, AGC())) == 3
    ties = r"first name: 'layers\.2' is 'layers\.0', 'layers\.1\.kernel' is 'layers\.0\.kernel'$"
    with pytest.raises(SelectorError, match=ties):
        agc_jax.plan(model, AGC(exclude=["layers.1.kernel"]))
    with pytest.raises(SelectorError, match=ties):
        agc_jax.plan(nnx.state(model), AGC(exclude=["layers.2.*"]), units=agc_jax.units(model))


def test_what_is_no_units_is_said_in_one_line() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ParameterError, match=r"returns, got Linear\(.{0,40}$"):
        agc_jax.adaptive_grad_clip(AGC(), units=model)  # type: ignore[arg-type]


def test_units_of_another_model() -> None:
    units = agc_jax.units({"kernel": jnp.zeros((2, 3))})
    assert dict(units) == {"kernel": Units("i o -> o")}
    with pytest.raises(
        ParameterError, match=r"'params\.kernel' is not in the units given; .* take its units anew"
    ):
        agc_jax.plan({"params": {"kernel": jnp.zeros((2, 3))}}, AGC(), units=units)
    with pytest.raises(
        ShapeError, match=r"'kernel' has shape \(1, 3\), the units .* take its units anew"
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
