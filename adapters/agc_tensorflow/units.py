"""Units by layer type: what every parameter of a Keras model means, and the plan made from it.

Keras stores weights out-last, so most rows of the table say ``... o -> o``. The table is a registry by layer
type, looked up along the class hierarchy; :func:`register_units` adds a layer of your own.

A parameter is called by the names of the layers it lies in, below the model itself, and its own name:
``conv2d.kernel``, ``backbone.dense.bias``, ``bidirectional.forward_lstm.lstm_cell.kernel``. This is Keras'
``variable.path`` with dots and without the model's own name in front. Layers that share a parent and a name
are told apart by ``_1``, ``_2`` behind it; in a ``tf.Module``, attribute names take the place of layer names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf

from agc import AGC, Plan, PlanEntry, Units
from agc.config import check_rule
from agc.errors import ParameterError
from agc.plan import WHOLE, Parameter, canonical_name, make_plan

__all__ = [
    "Model",
    "Variable",
    "named_variables",
    "plan",
    "register_units",
    "resolve",
    "units",
    "variable_key",
]

Variable: TypeAlias = Any
"""A ``keras.Variable`` or ``tf.Variable``."""
Model: TypeAlias = Any
"""A Keras layer or model, a ``tf.Module``, a mapping of name to variable, (name, variable) pairs, or variables."""
LayerUnits: TypeAlias = Mapping[str, str | Units]
LayerRule: TypeAlias = LayerUnits | Callable[[Any], LayerUnits]


def plan(model: Model, rule: AGC) -> Plan:
    """Say what will happen to every parameter, before any number is touched (AGC-5, AGC-6).

    Parameters
    ----------
    model : keras.Layer, tf.Module, mapping of name to variable, (name, variable) pairs, or variables
        The layer types of a model settle the units. Plain variables have no layer types: ranks 2, 4 and 5
        are taken as out-last, rank 3 has to be declared in the rule.
    rule : AGC
        The configuration.

    Returns
    -------
    Plan
        One entry a parameter in the model's order, frozen ones too, shared ones once.

    Raises
    ------
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`; the message names the parameter.
    ParameterError
        If the model is not built, or two parameters have one name.

    Notes
    -----
    A model declares its classifier by an attribute: ``model.agc_head = "fc"``. The selector ``"@head"`` then
    excludes it. Plain variables are called by their ``path``; a first part that all of them share, as the
    name of a Sequential model, is left out.

    Examples
    --------
    >>> inputs = keras.Input((8, 8, 3))
    >>> hidden = keras.layers.Conv2D(8, 3, name="conv")(inputs)
    >>> outputs = keras.layers.Conv2DTranspose(4, 2, use_bias=False, name="up")(hidden)
    >>> print(plan(keras.Model(inputs, outputs), AGC(exclude=["*.bias"])))
    parameter    shape    units         count  clipping
    -----------  -------  ------------  -----  --------
    conv.kernel  3x3x3x8  ... i o -> o      8  0.01
    conv.bias    8        ... ->            1  excluded
    up.kernel    2x2x4x8  ... o i -> o      4  0.01
    3 parameters, 2 clipped, 12 units
    """
    check_rule(rule, AGC)
    parameters = [
        Parameter(name, tuple(variable.shape), found, "out-last", owner)
        for name, variable, found, owner in _survey(model)
    ]
    return make_plan(parameters, rule, head=getattr(model, "agc_head", None))


def units(model: Model) -> dict[str, Units | None]:
    """Return the units that the layer types settle, by parameter name; None where they do not (AGC-5).

    Parameters
    ----------
    model : keras.Layer or tf.Module
        Any built model.

    Returns
    -------
    dict of str to Units or None
        In the model's order, shared parameters once.
    """
    return {name: found for name, _, found, _ in _survey(model)}


def register_units(layer: type | str, units: LayerRule) -> None:
    """Teach the table a layer type, or change what it says of one.

    Parameters
    ----------
    layer : type of keras.Layer or tf.Module, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string is the
        full path of a class that need not be imported, ``"package.module.Name"``.
    units : mapping of str to str or Units, or callable
        Variable name (a glob, the first that matches decides) to units; or a function of the layer that
        returns such a mapping, where the units depend on the layer. A variable that matches nothing is
        left to the layout convention.

    Raises
    ------
    ParameterError
        If ``units`` is neither a mapping nor callable.
    UnitsError
        If a pattern cannot be parsed.

    Examples
    --------
    >>> class Table(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.table = self.add_weight(shape=(2, 3, 4), name="table")
    >>> register_units(Table, {"table": "n h d -> n"})
    >>> layer = Table()
    >>> layer.build((None, 3))
    >>> plan(layer, AGC())["table"].count
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
    _RESOLVED.clear()


def named_variables(model: Model) -> dict[str, Variable]:
    """Return parameters by dotted name, frozen ones too, shared ones once."""
    return {name: variable for name, variable, _, _ in _survey(model)}


def resolve(
    variables: Sequence[Variable], rule: AGC, *, model: Model | None = None
) -> tuple[Plan, list[PlanEntry]]:
    """Pair variables with their entries in the plan; a model's plan is made once and remembered.

    Raises
    ------
    ParameterError
        If a variable is not a parameter of the model.
    """
    if model is None:
        made = plan(variables, rule)
        entries = {
            variable_key(variable): made[name]
            for name, variable in named_variables(variables).items()
        }
        return made, [entries[variable_key(variable)] for variable in variables]
    try:
        known = _RESOLVED.get(model)
    except TypeError:  # a mapping or list: nothing to remember it by
        known = None
    keys = [variable_key(variable) for variable in variables]
    check_rule(rule, AGC)
    if known is None or known[0] != rule or not set(keys) <= set(known[2]):
        made = plan(model, rule)
        found = {variable_key(v): made[name] for name, v in named_variables(model).items()}
        known = (rule, made, found)
        if isinstance(model, (keras.layers.Layer, tf.Module)):
            _RESOLVED[model] = known
    for key, variable in zip(keys, variables, strict=True):
        if key not in known[2]:
            raise ParameterError(
                f"variable {_variable_name(variable)!r} of shape {tuple(variable.shape)} is not a parameter "
                "of the model; give the model that the variables belong to, after it is built"
            )
    return known[1], [known[2][key] for key in keys]


def variable_key(variable: Variable) -> object:
    """Return what identifies a variable, be it seen through Keras, TensorFlow or a replica."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    container = getattr(variable, "_distributed_container", None)
    variable = container() if callable(container) else variable
    return getattr(variable, "_unique_id", id(variable))


_REGISTRY: Final[dict[str, LayerRule]] = {}
_RESOLVED: Final[WeakKeyDictionary[Any, tuple[AGC, Plan, dict[object, PlanEntry]]]] = (
    WeakKeyDictionary()
)

Found: TypeAlias = tuple[str, Variable, Units | None, str | None]


def _survey(model: Model) -> list[Found]:
    """List every parameter with its name, what its layer's type says, and which layer that is."""
    if isinstance(model, keras.layers.Layer) and not model.built:
        raise ParameterError(
            f"the model {model.name!r} is not built, so its parameters have no shapes yet; "
            "call model.build(input_shape), or run it once on an example batch"
        )
    if isinstance(model, (keras.layers.Layer, tf.Module)):
        return list(_walk(model, "", set(), set()))
    if isinstance(model, Mapping):
        named = list(model.items())
    elif isinstance(model, str) or not isinstance(model, Iterable):
        raise ParameterError(
            f"a model is a Keras layer, a tf.Module, a mapping of name to variable, or variables; got {model!r}"
        )
    else:
        items = list(model)
        pairs = all(isinstance(item, tuple) and len(item) == 2 for item in items)
        named = items if pairs else list(zip(_names(items), items, strict=True))
    found: dict[object, Found] = {}
    for name, variable in named:
        found.setdefault(variable_key(variable), (canonical_name(name), variable, None, None))
    return list(found.values())


def _walk(owner: Any, prefix: str, seen: set[object], names: set[str]) -> Iterator[Found]:
    """Go through a layer and the layers in it; each variable belongs to the layer that made it."""
    table = _layer_units(owner)
    used: set[str] = set()
    for name, child in _children(owner):
        variable = isinstance(child, (keras.Variable, tf.Variable))
        key = variable_key(child) if variable else id(child)
        if key in seen:
            continue
        seen.add(key)
        unique = _unused(name, used)
        if variable:
            full = _unused(prefix + unique, names)
            yield full, child, _match(table, name), f"{type(owner).__name__} {_label(owner)!r}"
        else:
            yield from _walk(child, f"{prefix}{unique}.", seen, names)


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a layer or module, then the layers in it, with their names."""
    if isinstance(owner, keras.layers.Layer):
        # A wrapper may hold a variable of the layer in it, which alone knows what it means.
        below = owner._flatten_layers(include_self=False)
        taken = {id(variable) for layer in below for variable in layer._trainable_variables}
        # Frozen parameters stay in this list; statistics and seeds are in another.
        for variable in owner._trainable_variables:
            # A scale of float8 training is overwritten by its gradient: no parameter.
            scale = getattr(variable, "overwrite_with_gradient", False)
            if id(variable) not in taken and not scale:
                yield variable.name, variable
        for layer in owner._flatten_layers(include_self=False, recursive=False):
            yield layer.name, layer
    else:
        for name, value in sorted(vars(owner).items()):
            if not name.startswith("_self_") and name not in owner._TF_MODULE_IGNORED_PROPERTIES:
                yield from _members(name, value)


def _members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Look for variables, modules and layers in an attribute of a ``tf.Module``."""
    if isinstance(value, (keras.Variable, tf.Variable)):
        if value.trainable:
            yield name, value
    elif isinstance(value, (keras.layers.Layer, tf.Module)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _members(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _members(f"{name}.{index}", item)


def _names(variables: Iterable[Variable]) -> list[str]:
    """Name variables by their paths, without a first part that all of them share."""
    paths = [_variable_name(variable).split("/") for variable in variables]
    if len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
        paths = [path[1:] for path in paths]
    names: dict[object, str] = {}
    used: set[str] = set()
    for path, variable in zip(paths, variables, strict=True):
        key = variable_key(variable)
        if key not in names:
            names[key] = _unused(".".join(path), used)
    return [names[variable_key(variable)] for variable in variables]


def _variable_name(variable: Variable) -> str:
    """Return Keras' path of a variable, or TensorFlow's name of it without ``:0``."""
    name = getattr(variable, "path", None) or getattr(variable, "name", None) or "variable"
    return str(name).split(":")[0]


def _label(owner: Any) -> str:
    return str(getattr(owner, "name", None) or type(owner).__name__)


def _unused(name: str, used: set[str]) -> str:
    """Return the name, with a number behind it if it is taken, and take it."""
    candidate, number = name, 0
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _layer_units(layer: Any) -> Mapping[str, Units]:
    for kind in type(layer).__mro__:
        rule = _REGISTRY.get(_path(kind))
        if rule is not None:
            table = rule if isinstance(rule, Mapping) else rule(layer)
            return {name: Units(str(pattern)) for name, pattern in table.items()}
    return {}


def _match(table: Mapping[str, Units], name: str) -> Units | None:
    return next((found for glob, found in table.items() if fnmatchcase(name, glob)), None)


def _einsum(layer: Any) -> LayerUnits:
    """Units of an einsum layer: the axes of its kernel that appear in the output."""
    inputs, output = layer.equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    kept = [axis for axis in kernel if axis in output]
    # An equation that sums over no axis of the kernel multiplies by a gain.
    pattern = f"{' '.join(kernel)} -> {' '.join(kept)}" if len(kept) < len(kernel) else WHOLE
    low_rank = f"{' '.join(kernel[:-1])} r_ -> {' '.join([*kept[:-1], 'r_'])}"
    return {
        "kernel": pattern,
        "lora_kernel_a": low_rank if kernel[-1] in output else WHOLE,
        "lora_kernel_b": "r o -> o",
        "bias": WHOLE,
    }


_IO: Final = "i o -> o"
_DENSE: Final = {"kernel": _IO, "lora_kernel_?": _IO}
_CONV: Final = {"kernel": "... i o -> o", "lora_kernel_?": "... i o -> o"}
_TRANSPOSED: Final = {"kernel": "... o i -> o"}
_DEPTHWISE: Final = {"kernel": "... c m -> c m"}
_SEPARABLE: Final = {"depthwise_kernel": "... c m -> c m", "pointwise_kernel": "... i o -> o"}
_EMBEDDING: Final = {
    "embeddings": "v d -> v",
    "reverse_embeddings": "d v -> v",
    "lora_embeddings_a": "v r -> v",
    "lora_embeddings_b": _IO,
}
_RECURRENT: Final = {"kernel": _IO, "recurrent_kernel": _IO}
_CONV_RECURRENT: Final = {"kernel": "... i o -> o", "recurrent_kernel": "... i o -> o"}
_ONE: Final = {"*": WHOLE}
_BUILT_IN: Final[dict[str, LayerRule]] = {
    "Dense": _DENSE,
    "EinsumDense": _einsum,
    "Conv1D": _CONV,
    "Conv2D": _CONV,
    "Conv3D": _CONV,
    "Conv1DTranspose": _TRANSPOSED,
    "Conv2DTranspose": _TRANSPOSED,
    "Conv3DTranspose": _TRANSPOSED,
    "DepthwiseConv1D": _DEPTHWISE,
    "DepthwiseConv2D": _DEPTHWISE,
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    "Embedding": _EMBEDDING,
    "LSTMCell": _RECURRENT,
    # With reset_after the bias is two vectors, one for the input and one for the state.
    "GRUCell": {**_RECURRENT, "bias": "... o -> ..."},
    "SimpleRNNCell": _RECURRENT,
    "BatchNormalization": _ONE,
    "GroupNormalization": _ONE,
    "LayerNormalization": _ONE,
    "RMSNormalization": _ONE,
    "PReLU": _ONE,
    "Attention": _ONE,
    "AdditiveAttention": _ONE,
}
for _name, _rule in _BUILT_IN.items():
    if hasattr(keras.layers, _name):  # a layer that an older Keras lacks
        register_units(getattr(keras.layers, _name), _rule)
# The cell of ConvLSTM1D to ConvLSTM3D is not public.
register_units("keras.src.layers.rnn.conv_lstm.ConvLSTMCell", _CONV_RECURRENT)
