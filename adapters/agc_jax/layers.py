"""What the layer types of Flax NNX and Equinox say of their parameters.

Equinox is only recognised, by the full names of its classes, never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias

from flax import nnx

from agc import Units
from agc.errors import ParameterError
from agc.plan import WHOLE, Parameter
from agc.profiles import Layout

__all__ = ["by_type", "register_units", "stacked"]

Shape: TypeAlias = tuple[int, ...]
LayerUnits: TypeAlias = Mapping[str, str | Units]
LayerRule: TypeAlias = LayerUnits | Callable[[Any], LayerUnits]


def register_units(layer: type | str, units: LayerRule) -> None:
    """Teach the table a layer type of NNX or Equinox, or change what it says of one.

    Parameters
    ----------
    layer : type, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string is the
        full path of a class that need not be imported, ``"package.module.Name"``.
    units : mapping of str to str or Units, or callable
        Name of the parameter below the layer (a glob, the first that matches decides) to units; or a
        function of the layer that returns such a mapping, where the units depend on its sizes. A parameter
        that matches nothing is taken by its name.

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
    if isinstance(units, Mapping):
        units = {name: Units(str(pattern)) for name, pattern in units.items()}
    elif not callable(units):
        raise ParameterError(
            f"units of {layer!r} must be a mapping such as {{'kernel': 'i o -> o'}}, "
            f"or a function of the layer that returns one, got {units!r}"
        )
    _REGISTRY[_path(layer) if isinstance(layer, type) else layer] = units


def by_type(model: Any, keys: tuple[Any, ...], name: str, shape: Shape) -> Parameter | None:
    """Return what the innermost registered layer on a leaf's path says of it; None if none speaks for it."""
    for owner, rest in reversed(_owners(model, keys)):
        below = ".".join(map(str, rest))
        for glob, declared in _table(owner).items():
            if fnmatchcase(below, glob):
                known = isinstance(declared, _Expected)
                found = declared.of(shape) if known else Units(str(declared))
                layout = None if found is None else _layout(owner)
                return Parameter(name, shape, found, layout, type(owner).__name__)
    return None


def in_equinox(model: Any, keys: tuple[Any, ...]) -> bool:
    """Tell whether a leaf on this path belongs to an Equinox module."""
    return any(
        _path(kind).startswith("equinox.")
        for owner, _ in _owners(model, keys)
        for kind in type(owner).__mro__
    )


def stacked(units: Units, extra: int) -> Units:
    """Return units with ``extra`` axes in front that are unit axes, as ``vmap`` and ``scan`` add them."""
    if extra == 0:
        return units
    left, _, right = str(units).partition("->")
    front = " ".join("l" if axis == 0 else f"l{axis}" for axis in range(extra))
    return Units(f"{front} {left}-> {front} {right}")


@dataclass(frozen=True)
class _Expected:
    """Units of a layer's parameter, and the shape that it has when nothing stacks the layer.

    None in the shape stands for any size.
    """

    units: Units
    shape: tuple[int | None, ...]

    def of(self, shape: Shape) -> Units | None:
        """Return the units of an array of this shape; None if the layer cannot explain it."""
        extra = len(shape) - len(self.shape)
        if extra < 0 or any(
            want not in (None, size) for size, want in zip(shape[extra:], self.shape, strict=True)
        ):
            return None
        return stacked(self.units, extra)


def _owners(model: Any, keys: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return what holds a leaf, outermost first, each with the keys that lead from there to the leaf."""
    owners = [(model, keys)]
    for place, key in enumerate(keys[:-1], start=1):
        owners.append((_child(owners[-1][0], key), keys[place:]))
    return owners


def _child(node: Any, key: Any) -> Any:
    """Follow one key of a path: an attribute, or an item of a container."""
    found = getattr(node, key, None) if isinstance(key, str) else None
    if found is None and hasattr(node, "__getitem__"):
        try:
            found = node[key]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def _table(layer: Any) -> Mapping[str, Any]:
    for kind in type(layer).__mro__:
        rule = _REGISTRY.get(_path(kind))
        if rule is not None:
            return rule if isinstance(rule, Mapping) else rule(layer)
    return {}


def _layout(layer: Any) -> Layout | None:
    """Which way round the framework of a layer stores dense and convolution weights."""
    if isinstance(layer, nnx.Module):
        return "out-last"
    return "out-first" if _path(type(layer)).startswith("equinox.") else None


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


# --- Flax NNX: out last ------------------------------------------------------------------------------


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
    """Take the kernel axes that are in the result as unit axes; a bias has them in the result's order."""
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


def _norm(_: Any) -> Mapping[str, Any]:
    vector = _Expected(WHOLE, (None,))
    return {"scale": vector, "bias": vector}


# --- Equinox: out first ------------------------------------------------------------------------------


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


def _eqx_cell(layer: Any) -> Mapping[str, Any]:
    return {
        "weight_ih": _Expected(Units("o i -> o"), (None, layer.input_size)),
        "weight_hh": _Expected(Units("o i -> o"), (None, layer.hidden_size)),
        "bias*": _Expected(WHOLE, (None,)),
    }


def _eqx_norm(layer: Any) -> Mapping[str, Any]:
    shape = getattr(layer, "shape", None) or (None,)
    return {"weight": _Expected(WHOLE, tuple(shape)), "bias": _Expected(WHOLE, tuple(shape))}


_REGISTRY: Final[dict[str, LayerRule]] = {}
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
    nnx.GroupNorm: _norm,
    nnx.InstanceNorm: _norm,
    "equinox.nn._linear.Linear": _eqx_linear,
    "equinox.nn._conv.Conv": _eqx_conv,
    "equinox.nn._conv.ConvTranspose": _eqx_conv,
    "equinox.nn._embedding.Embedding": _eqx_embedding,
    "equinox.nn._rnn.GRUCell": _eqx_cell,
    "equinox.nn._rnn.LSTMCell": _eqx_cell,
    "equinox.nn._normalisation.LayerNorm": _eqx_norm,
    "equinox.nn._normalisation.RMSNorm": _eqx_norm,
    "equinox.nn._normalisation.GroupNorm": _eqx_norm,
    "equinox.nn._batch_norm.BatchNorm": _eqx_norm,
}
for _layer, _rule in _BUILT_IN.items():
    register_units(_layer, _rule)
