"""Units by layer type: what every parameter of a Keras model means, and the plan made from it.

The table of layer types is in :mod:`agc_tensorflow.layers`; :func:`register_units` adds a layer of
your own.

A parameter is called by the names of the layers it lies in, below the model itself, and its own
name: ``conv2d.kernel``, ``backbone.dense.bias``, ``bidirectional.forward_lstm.lstm_cell.kernel``.
This is Keras' ``variable.path`` with dots and without the model's own name in front. Layers that
share a parent and a name are told apart by ``_1``, ``_2`` behind it; in a ``tf.Module``, attribute
names take the place of layer names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf

from agc import AGC, Plan, PlanEntry, Units
from agc.checks import check_rule, short_repr
from agc.errors import ParameterError
from agc.layer_table import first_match
from agc.plan import Parameter, make_plan
from agc.selectors import canonical_name
from agc_tensorflow.layers import TABLE, register_units

__all__ = [
    "Model",
    "Variable",
    "named_variables",
    "plan",
    "refuse_keras_2",
    "register_units",
    "resolve",
    "units",
    "variable_key",
    "variable_path",
]

Variable: TypeAlias = Any
"""A ``keras.Variable`` or ``tf.Variable``."""
Model: TypeAlias = Any
"""A Keras layer, a ``tf.Module``, a mapping of name to variable, such pairs, or variables."""


def plan(model: Model, rule: AGC) -> Plan:
    """Say what will happen to every parameter, before any number is touched (AGC-5, AGC-6).

    Parameters
    ----------
    model : keras.Layer, tf.Module, mapping of name to variable, (name, variable) pairs, or
    variables
        The layer types of a model settle the units. Plain variables have no layer types: vectors
        are one unit, matrices are taken as out-last with a warning, the rest has to be declared in
        the rule.
    rule : AGC
        The configuration.

    Returns
    -------
    Plan
        One entry a parameter in the model's order, frozen ones too, marked so, shared ones once.

    Raises
    ------
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`; the message names the parameter.
    ParameterError
        If the model is not built or is one of Keras 2, or two parameters have one name.

    Warns
    -----
    UnitsWarning
        If the units of matrices follow the layout convention.

    Notes
    -----
    A model declares its classifier by an attribute: ``model.agc_head = "fc"``. The selector
    ``"@head"`` then excludes it. Plain variables are called by their ``path``; a first part that
    all of them share, as the name of a Sequential model, is left out.

    Examples
    --------
    >>> inputs = keras.Input((8, 8, 3))
    >>> hidden = keras.layers.Conv2D(8, 3, name="conv")(inputs)
    >>> outputs = keras.layers.Conv2DTranspose(4, 2, use_bias=False, name="up")(hidden)
    >>> print(plan(keras.Model(inputs, outputs), AGC(exclude=["*.bias"])))
    parameter    shape    units         source  count  clipping
    -----------  -------  ------------  ------  -----  --------
    conv.kernel  3x3x3x8  ... i o -> o  layer       8  0.01
    conv.bias    8        ... ->        vector      1  excluded
    up.kernel    2x2x4x8  ... o i -> o  layer       4  0.01
    3 parameters, 2 clipped, 12 units
    """
    layers = isinstance(model, (keras.layers.Layer, tf.Module))
    return _plan(model, rule, "" if layers else "give the model in place of its variables")


def units(model: Model) -> dict[str, Units | None]:
    """Return the units that layer types settle, by parameter name; None elsewhere (AGC-5).

    Parameters
    ----------
    model : keras.Layer or tf.Module
        Any built model.

    Returns
    -------
    dict of str to Units or None
        In the model's order, shared parameters once.
    """
    return {parameter.name: parameter.units for parameter, _ in _survey(model)}


def named_variables(model: Model) -> dict[str, Variable]:
    """Return parameters by dotted name, frozen ones too, shared ones once."""
    return {parameter.name: variable for parameter, variable in _survey(model)}


def resolve(
    variables: Sequence[Variable], rule: AGC, *, model: Model | None = None
) -> tuple[Plan, list[PlanEntry]]:
    """Pair variables with their entries in the plan; a model's plan is made once and remembered.

    Raises
    ------
    ParameterError
        If a variable is not a parameter of the model.
    """
    check_rule(rule, AGC)
    keys = [variable_key(variable) for variable in variables]
    if model is None:
        made = _plan(variables, rule, "give the model: model=model")
        entries = _by_key(variables, made)
        return made, [entries[key] for key in keys]
    try:
        known = _RESOLVED.get(model)
    except TypeError:  # a mapping or list: nothing to remember it by
        known = None
    if (
        known is None
        or (known.rule, known.changes) != (rule, TABLE.changes)
        or not set(keys) <= set(known.entries)
    ):
        made = plan(model, rule)
        known = _Known(rule, TABLE.changes, made, _by_key(model, made))
        if isinstance(model, (keras.layers.Layer, tf.Module)):
            _RESOLVED[model] = known
    for key, variable in zip(keys, variables, strict=True):
        if key not in known.entries:
            raise ParameterError(
                f"variable {variable_path(variable)!r} of shape {tuple(variable.shape)} is not a parameter "
                "of the model; give the model that the variables belong to, after it is built"
            )
    return known.plan, [known.entries[key] for key in keys]


def variable_key(variable: Variable) -> object:
    """Return what identifies a variable, be it seen through Keras, TensorFlow or a replica."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    container = getattr(variable, "_distributed_container", None)
    variable = container() if callable(container) else variable
    return getattr(variable, "_unique_id", id(variable))


def variable_path(variable: Variable) -> str:
    """Return Keras' path of a variable, or TensorFlow's name of it without ``:0``."""
    name = getattr(variable, "path", None) or getattr(variable, "name", None) or "variable"
    return str(name).split(":")[0]


def refuse_keras_2(given: Any) -> None:
    """Raise if something is made by Keras 2, which is only recognised, never imported.

    Parameters
    ----------
    given : object
        A model, layer or optimizer.

    Raises
    ------
    ParameterError
        If a class of the object is one of ``tf_keras``.
    """
    if any(kind.__module__.split(".")[0] == "tf_keras" for kind in type(given).__mro__):
        raise ParameterError(
            f"this {type(given).__name__} is made by Keras 2 (tf_keras), which this package does not support; "
            "use Keras 3: import keras, without TF_USE_LEGACY_KERAS=1 in the environment"
        )


class _Known(NamedTuple):
    """What was resolved of a model."""

    rule: AGC
    changes: int  # of the table of layer types, when this was made
    plan: Plan
    entries: dict[object, PlanEntry]


_RESOLVED: Final[WeakKeyDictionary[Any, _Known]] = WeakKeyDictionary()

Surveyed: TypeAlias = tuple[Parameter, Variable]


def _plan(model: Model, rule: AGC, cure: str) -> Plan:
    """Make a plan; ``cure`` says what could be done before units are declared."""
    check_rule(rule, AGC)
    parameters = [parameter for parameter, _ in _survey(model)]
    bare = getattr(model, "agc_bare", model)
    return make_plan(parameters, rule, head=getattr(bare, "agc_head", None), cure=cure)


def _by_key(model: Model, plan: Plan) -> dict[object, PlanEntry]:
    """Return the entries of a plan by the variables that they are for."""
    entries = {entry.name: entry for entry in plan}
    return {variable_key(v): entries[name] for name, v in named_variables(model).items()}


def _survey(model: Model) -> list[Surveyed]:
    """List every parameter: name, what its layer's type says, the layer, whether it is frozen."""
    refuse_keras_2(model)
    model = getattr(model, "agc_bare", model)
    if isinstance(model, keras.layers.Layer) and not model.built:
        raise ParameterError(
            f"the model {model.name!r} is not built, so its parameters have no shapes yet; "
            "call model.build(input_shape), or run it once on an example batch"
        )
    if isinstance(model, (keras.layers.Layer, tf.Module)):
        return list(_walk(model, "", set(), set(), frozen=False))
    if isinstance(model, Mapping):
        named = list(model.items())
    elif isinstance(model, str) or not isinstance(model, Iterable):
        raise ParameterError(
            f"a model is a Keras layer, a tf.Module, a mapping of name to variable, or variables; got {short_repr(model)}"
        )
    else:
        items = list(model)
        pairs = all(isinstance(item, tuple) and len(item) == 2 for item in items)
        named = items if pairs else list(zip(_names(items), items, strict=True))
    parameters: dict[object, Surveyed] = {}
    for name, variable in named:
        if not isinstance(variable, (keras.Variable, tf.Variable)):
            refuse_keras_2(variable)
        parameter = _parameter(canonical_name(name), variable, None, None, frozen=False)
        parameters.setdefault(variable_key(variable), (parameter, variable))
    return list(parameters.values())


def _walk(
    owner: Any, prefix: str, seen: set[object], names: set[str], *, frozen: bool
) -> Iterator[Surveyed]:
    """Go through a layer and the layers in it; each variable belongs to the layer that made it."""
    refuse_keras_2(owner)
    table = TABLE.of(owner)
    frozen = frozen or not getattr(owner, "trainable", True)
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
            owner_name = f"{type(owner).__name__} {_layer_name(owner)!r}"
            yield (
                _parameter(full, child, first_match(table, name), owner_name, frozen=frozen),
                child,
            )
        else:
            yield from _walk(child, f"{prefix}{unique}.", seen, names, frozen=frozen)


def _parameter(
    name: str, variable: Variable, units: Units | None, owner: str | None, *, frozen: bool
) -> Parameter:
    inactive = "frozen" if frozen or not getattr(variable, "trainable", True) else None
    return Parameter(name, tuple(variable.shape), units, "out-last", owner, inactive=inactive)


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a layer or module, then the layers in it, with their names."""
    if isinstance(owner, keras.layers.Layer):
        # A wrapper may list its inner layer's variables; the inner layer's table decides.
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
    paths = [variable_path(variable).split("/") for variable in variables]
    if len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
        paths = [path[1:] for path in paths]
    names: dict[object, str] = {}
    used: set[str] = set()
    for path, variable in zip(paths, variables, strict=True):
        key = variable_key(variable)
        if key not in names:
            names[key] = _unused(".".join(path), used)
    return [names[variable_key(variable)] for variable in variables]


def _layer_name(owner: Any) -> str:
    return str(getattr(owner, "name", None) or type(owner).__name__)


def _unused(name: str, used: set[str]) -> str:
    """Return the name, with a number behind it if it is taken, and take it."""
    candidate, number = name, 0
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate
