"""What the layer types of Flax NNX and Equinox say of their parameters.

Equinox is only recognised, by the full names of its classes, never imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any, Final, TypeAlias

from flax import nnx
from jax.tree_util import tree_flatten_with_path

from agc import Units
from agc.layer_table import LayerRule, LayerTable, class_path, first_match
from agc.layouts import Layout
from agc.plan import WHOLE, Parameter

__all__ = ["TABLE", "Layers", "dotted", "path_key", "register_units"]

Shape: TypeAlias = tuple[int, ...]


def register_units(layer: type | str, units: LayerRule) -> None:
    """Teach the table a layer type of NNX or Equinox, or change what it says of one.

    Parameters
    ----------
    layer : type, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string
        is the full path of a class that need not be imported, ``"package.module.Name"``.
    units : mapping of str to str or Units, or callable
        Name of the parameter below the layer (a glob, the first that matches decides) to units; or
        a function of the layer that returns such a mapping, where the units depend on its sizes. A
        parameter that matches nothing is taken by its name.

    Raises
    ------
    ParameterError
        If ``units`` is neither a mapping nor callable.
    UnitsError
        If a pattern cannot be parsed.

    Examples
    --------
    >>> import agc, agc_jax, jax.numpy as jnp
    >>> class Table(nnx.Module):
    ...     def __init__(self):
    ...         self.table = nnx.Param(jnp.zeros((2, 3, 4)))
    >>> agc_jax.register_units(Table, {"table": "n h d -> n"})
    >>> agc_jax.plan(Table(), agc.AGC())["table"].count
    2
    """
    TABLE.register(layer, units)


class Layers:
    """The layers of a model, and what their types say of its parameters.

    Parameters
    ----------
    model : nnx.Module, equinox.Module, or any tree
        What holds the layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # By id of the holder: each is kept alive by its own holder's children.
        self._children: dict[int, dict[Any, Any]] = {}

    def parameters(
        self, leaves: Iterable[tuple[str, tuple[Any, ...], Shape]]
    ) -> dict[str, Parameter]:
        """Return what the layers say of the leaves that they speak for, by name.

        Parameters
        ----------
        leaves : iterable of (name, keys, shape)
            Dotted name, keys on the path from the model, and shape of each leaf.

        Notes
        -----
        Where the sizes allow several axes to be those that ``vmap`` or ``scan`` added, the axes in
        front are taken only if other parameters show that the model stacks in front.
        """
        spoken = [
            (name, shape, *known)
            for name, keys, shape in leaves
            if (known := self._declared(keys)) is not None
        ]
        placed = {
            name: declared.in_front(shape)
            for name, shape, _, declared in spoken
            if isinstance(declared, _Expected)
        }
        stacks = [
            placed[name]
            for name, shape, _, declared in spoken
            if isinstance(declared, _Expected) and len(shape) > len(declared.shape)
        ]
        usual = True in stacks and False not in stacks
        parameters = {}
        for name, shape, owner, declared in spoken:
            units: Units | None
            if isinstance(declared, _Expected):
                front = placed[name] if placed[name] is not None else usual
                units = declared.stacked(shape) if front else None
            else:
                units = declared
            layout = None if units is None else _layout(owner)
            parameters[name] = Parameter(name, shape, units, layout, type(owner).__name__)
        return parameters

    def ties(self) -> dict[str, str]:
        """Return the other names of what an NNX model shares, each with the name it goes by."""
        groups = nnx.find_duplicates(self._model) if isinstance(self._model, nnx.Module) else []
        return {dotted(other): dotted(first) for first, *others in groups for other in others}

    def in_equinox(self, keys: tuple[Any, ...]) -> bool:
        """Tell whether the leaf on this path belongs to an Equinox module."""
        return any(
            class_path(kind).startswith("equinox.")
            for owner, _ in self._owners(keys)
            for kind in type(owner).__mro__
        )

    def _declared(self, keys: tuple[Any, ...]) -> tuple[Any, _Expected | Units] | None:
        """Return the innermost registered layer that speaks for a leaf, and what it says.

        Of layers that share a variable, one that is registered speaks for one that is not.
        """
        for owner, rest in self._speakers(keys):
            declared = first_match(TABLE.of(owner), dotted(rest))
            if declared is not None:
                return owner, declared
        return None

    def _owners(self, keys: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
        """Return what holds a leaf, outermost first, each with the keys from there to the leaf."""
        owners = [(self._model, keys)]
        for place, key in enumerate(keys[:-1], start=1):
            owners.append((self._child(owners[-1][0], key), keys[place:]))
        return owners

    def _child(self, node: Any, key: Any) -> Any:
        """Follow one key of a path; None if it leads nowhere."""
        if isinstance(node, nnx.List):
            return node[key]
        if isinstance(node, nnx.Module):
            return getattr(node, str(key), None)
        if id(node) not in self._children:
            below, _ = tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
            self._children[id(node)] = {path_key(path[0]): child for path, child in below if path}
        return self._children[id(node)].get(key)

    def _speakers(self, keys: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Yield what holds a leaf, innermost first, then NNX modules that share its variable."""
        owners = self._owners(keys)
        yield from reversed(owners)
        if isinstance(self._model, nnx.Module):
            yield from self._holders.get(id(self._child(owners[-1][0], keys[-1])), [])

    @cached_property
    def _holders(self) -> dict[int, list[tuple[Any, tuple[Any, ...]]]]:
        holders: dict[int, list[tuple[Any, tuple[Any, ...]]]] = {}
        modules = (node for _, node in nnx.iter_graph(self._model) if isinstance(node, nnx.Module))
        for module in modules:
            for key, value in vars(module).items():
                if isinstance(value, nnx.Variable):
                    holders.setdefault(id(value), []).append((module, (key,)))
        return holders


def path_key(entry: Any) -> Any:
    """Return the key in one entry of a path of JAX's."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def dotted(keys: Iterable[Any]) -> str:
    """Return keys with dots between them; a key that is a tuple counts as its members."""
    flat = (word for key in keys for word in (key if isinstance(key, tuple) else (key,)))
    return ".".join(map(str, flat))


@dataclass(frozen=True)
class _Expected:
    """Units of a layer's parameter, and the shape that it has when nothing stacks the layer.

    None in the shape stands for any size.
    """

    units: Units
    shape: tuple[int | None, ...]

    def in_front(self, shape: Shape) -> bool | None:
        """Tell whether the axes in front are those that stack the layer; None if others could be.

        False also if the layer cannot explain the shape. Axes of length 1 make no difference.
        """
        front = tuple(range(len(shape) - len(self.shape)))
        ways = {}
        for extra in combinations(range(len(shape)), len(front)):
            own = [axis for axis in range(len(shape)) if axis not in extra]
            sizes = tuple(shape[axis] for axis in own)
            if len(own) == len(self.shape) and all(
                want in (None, size) for size, want in zip(sizes, self.shape, strict=True)
            ):
                units = {own[axis] for axis in self.units.bind(sizes).keep}.union(extra)
                ways[extra] = frozenset(axis for axis in units if shape[axis] != 1)
        if front not in ways:
            return False
        return True if len({*ways.values()}) == 1 else None

    def stacked(self, shape: Shape) -> Units:
        """Return the units of an array of this shape, with axes in front that stack the layer."""
        extra = len(shape) - len(self.shape)
        if extra == 0:
            return self.units
        left, _, right = str(self.units).partition("->")
        front = " ".join("l" if axis == 0 else f"l{axis}" for axis in range(extra))
        return Units(f"{front} {left}-> {front} {right}")


TABLE: Final = LayerTable({"kernel": "i o -> o"}, keep=_Expected)
"""Everything that is known of layer types."""


def _layout(layer: Any) -> Layout | None:
    """Which way round the framework of a layer stores dense and convolution weights."""
    if isinstance(layer, nnx.Module):
        return "out-last"
    return "out-first" if class_path(type(layer)).startswith("equinox.") else None


# --- Flax NNX: out last ---------------------------------------------------------------------------


def _linear(layer: nnx.Linear) -> Mapping[str, Any]:
    return {
        "kernel": _Expected(Units("i o -> o"), (layer.in_features, layer.out_features)),
        "bias": _Expected(WHOLE, (layer.out_features,)),
    }


def _linear_general(layer: nnx.LinearGeneral) -> Mapping[str, Any]:
    batch = tuple(layer.batch_axis.values())
    axes = [
        [letter] if len(sizes) == 1 else [f"{letter}{axis}" for axis in range(len(sizes))]
        for letter, sizes in (("b", batch), ("i", layer.in_features), ("o", layer.out_features))
    ]
    b, i, o = (" ".join(names) for names in axes)
    return {
        "kernel": _Expected(
            Units(f"{b} {i} {o} -> {b} {o}"), (*batch, *layer.in_features, *layer.out_features)
        ),
        "bias": _Expected(Units(f"{b} ... -> {b}"), (*batch, *layer.out_features)),
    }


def _conv(layer: nnx.Conv | nnx.ConvTranspose) -> Mapping[str, Any]:
    swapped = getattr(layer, "transpose_kernel", False)
    return {
        "kernel": _Expected(
            Units("... o i -> o" if swapped else "... i o -> o"), tuple(layer.kernel_shape)
        ),
        "bias": _Expected(WHOLE, (layer.out_features,)),
    }


def _einsum(layer: nnx.Einsum) -> Mapping[str, Any]:
    """Take the kernel's axes that are in the result as unit axes; a bias has the result's order."""
    if layer.einsum_str is None:
        return {"*": _Expected(WHOLE, (-1,))}  # decided at each call: nothing fits
    operands, _, result = layer.einsum_str.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    if "." in kernel or len(set(kernel)) < len(kernel):
        return {"*": _Expected(WHOLE, (-1,))}
    kept = [axis for axis in result if axis in kernel]
    shared = [axis for axis in kept if axis in inputs]  # each index of these is a layer of its own
    sizes = dict(zip(kernel, layer.kernel_shape, strict=True))
    table = {
        "kernel": _Expected(
            Units(f"{' '.join(kernel)} -> {' '.join(kept)}"), tuple(layer.kernel_shape)
        )
    }
    if not shared:
        table["bias"] = _Expected(WHOLE, tuple(layer.bias_shape or ()))
    elif layer.bias_shape and tuple(layer.bias_shape) == tuple(sizes[axis] for axis in kept):
        units = Units(f"{' '.join(kept)} -> {' '.join(shared)}")
        table["bias"] = _Expected(units, tuple(layer.bias_shape))
    return table


def _embed(layer: nnx.Embed) -> Mapping[str, Any]:
    return {"embedding": _Expected(Units("v d -> v"), (layer.num_embeddings, layer.features))}


def _lora(layer: nnx.LoRA) -> Mapping[str, Any]:
    return {
        "lora_a": _Expected(Units("i r -> r"), (layer.in_features, None)),
        "lora_b": _Expected(Units("r o -> o"), (None, layer.out_features)),
    }


def _norm(layer: Any) -> Mapping[str, Any]:
    vector = _Expected(WHOLE, (layer.num_features,))
    return {"scale": vector, "bias": vector}


def _group_norm(layer: nnx.GroupNorm) -> Mapping[str, Any]:
    vector = _Expected(WHOLE, (layer.num_groups * layer.group_size,))
    return {"scale": vector, "bias": vector}


# --- Equinox: out first ---------------------------------------------------------------------------


def _eqx_linear(layer: Any) -> Mapping[str, Any]:
    inputs, outputs = (
        1 if size == "scalar" else size for size in (layer.in_features, layer.out_features)
    )
    return {
        "weight": _Expected(Units("o i -> o"), (outputs, inputs)),
        "bias": _Expected(WHOLE, (outputs,)),
    }


def _eqx_conv(layer: Any) -> Mapping[str, Any]:
    outputs, inputs = layer.out_channels, layer.in_channels // layer.groups
    return {
        "weight": _Expected(Units("o i ... -> o"), (outputs, inputs, *layer.kernel_size)),
        "bias": _Expected(WHOLE, (outputs, *[1] * layer.num_spatial_dims)),
    }


def _eqx_embedding(layer: Any) -> Mapping[str, Any]:
    return {"weight": _Expected(Units("v d -> v"), (layer.num_embeddings, layer.embedding_size))}


def _eqx_cell(gates: int, layer: Any) -> Mapping[str, Any]:
    outputs = gates * layer.hidden_size
    return {
        "weight_ih": _Expected(Units("o i -> o"), (outputs, layer.input_size)),
        "weight_hh": _Expected(Units("o i -> o"), (outputs, layer.hidden_size)),
        "bias": _Expected(WHOLE, (outputs,)),
        "bias_n": _Expected(WHOLE, (layer.hidden_size,)),
    }


def _eqx_norm(size: str, layer: Any) -> Mapping[str, Any]:
    shape = getattr(layer, size)
    whole = _Expected(WHOLE, tuple(shape) if isinstance(shape, tuple) else (shape,))
    return {"weight": whole, "bias": whole}


def _eqx_weight_norm(layer: Any) -> Mapping[str, Any]:
    """Take the lengths as a gain; each has the size of the weight's axis that it is for."""
    weight = TABLE.of(layer.layer).get(layer.weight_name)
    if not isinstance(weight, _Expected):
        return {}
    kept = None if layer.axis is None else range(len(weight.shape))[layer.axis]
    shape = [size if axis == kept else 1 for axis, size in enumerate(weight.shape)]
    return {"g": _Expected(WHOLE, tuple(shape))}


_BUILT_IN: Final[dict[type | str, LayerRule]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
    nnx.LoRA: _lora,
    nnx.BatchNorm: _norm,
    nnx.LayerNorm: _norm,
    nnx.RMSNorm: _norm,
    nnx.GroupNorm: _group_norm,
    nnx.InstanceNorm: _norm,
    "equinox.nn._linear.Linear": _eqx_linear,
    "equinox.nn._conv.Conv": _eqx_conv,
    "equinox.nn._conv.ConvTranspose": _eqx_conv,
    "equinox.nn._embedding.Embedding": _eqx_embedding,
    "equinox.nn._rnn.GRUCell": partial(_eqx_cell, 3),
    "equinox.nn._rnn.LSTMCell": partial(_eqx_cell, 4),
    "equinox.nn._normalisation.LayerNorm": partial(_eqx_norm, "shape"),
    "equinox.nn._normalisation.RMSNorm": partial(_eqx_norm, "shape"),
    "equinox.nn._normalisation.GroupNorm": partial(_eqx_norm, "channels"),
    "equinox.nn._weight_norm.WeightNorm": _eqx_weight_norm,
    "equinox.nn._batch_norm.BatchNorm": partial(_eqx_norm, "input_size"),
}
for _layer, _rule in _BUILT_IN.items():
    register_units(_layer, _rule)
