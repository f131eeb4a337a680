"""Units by layer type or leaf name: what every leaf of a tree means, and the plan of it.

JAX has no single layout: Flax and Haiku put the output last, Equinox first. So the units of a leaf
come from the module that owns it (Flax NNX, Equinox; :mod:`agc_jax.layers`), or from its name in
the tree (Flax Linen, Haiku: ``kernel``, ``w``, ``embedding``, ``bias``; :mod:`agc_jax.leaf_names`),
never from its rank alone. The types are a registry, looked up along the class hierarchy;
:func:`register_units` adds a layer of your own.

A parameter is called by the keys on its path with dots between them: ``conv1.kernel``,
``layers.0.weight``. The boxes that Flax puts around an array (``nnx.Variable``, ``nn.Partitioned``)
are not part of the name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from flax.core.meta import AxisMetadata

from agc import AGC, Plan, Units
from agc.checks import check_rule, short_repr
from agc.errors import AmbiguousUnitsError, ParameterError, SelectorError, ShapeError
from agc.plan import Parameter, PlanEntry, make_plan
from agc.selectors import canonical_name, matching_names, with_ties
from agc_jax.layers import Layers, dotted, path_key, register_units
from agc_jax.leaf_names import LeafNames

__all__ = [
    "ModelUnits",
    "PyTree",
    "check_options",
    "flatten",
    "is_absent",
    "plan",
    "plan_tree",
    "register_units",
    "units",
]

PyTree: TypeAlias = Any
"""A tree of arrays or of their shapes, or a model that is such a tree."""

_CURE: Final = "for a Flax NNX or Equinox model give units=agc_jax.units(model)"
_CHANGED: Final = (
    "If the model was changed since, take its units anew, and make the optimizer of them"
)


def plan(model: PyTree, rule: AGC, *, units: ModelUnits | None = None) -> Plan:
    """Say what will happen to every parameter, before any number is touched (AGC-5, AGC-6).

    Parameters
    ----------
    model : nnx.Module, equinox.Module, or tree of arrays
        A model whose module types settle the units, or parameters (Flax Linen, Haiku, a plain tree)
        whose names do. The results of ``jax.eval_shape`` and ``nnx.eval_shape`` do as well.
    rule : AGC
        The configuration.
    units : ModelUnits, optional
        What :func:`units` said of the model that these parameters belong to.

    Returns
    -------
    Plan
        One entry a floating-point or complex leaf, in the tree's order.

    Raises
    ------
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`; the message names the parameter. Also if the parameters are
        one array without a name, which is what ``optax.flatten`` makes of a model, and the rule
        declares nothing for it.
    ConfigError
        If ``rule`` is not an AGC.
    ParameterError, ShapeError
        If ``model`` is no model, or ``units`` lacks a parameter or has it with another shape.

    Notes
    -----
    A model declares its classifier by an attribute: ``model.agc_head = "fc"``. The selector
    ``"@head"`` then excludes it.

    Examples
    --------
    >>> up = dict(kernel_size=(2, 2), use_bias=False, transpose_kernel=True, rngs=nnx.Rngs(0))
    >>> conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> model = nnx.Sequential(conv, nnx.ConvTranspose(8, 4, **up))
    >>> print(plan(model, AGC(exclude=["*.bias"])))
    parameter        shape    units         source  count  clipping
    ---------------  -------  ------------  ------  -----  --------
    layers.0.bias    8        ... ->        layer       1  excluded
    layers.0.kernel  3x3x3x8  ... i o -> o  layer       8  0.01
    layers.1.kernel  2x2x4x8  ... o i -> o  layer       4  0.01
    3 parameters, 2 clipped, 12 units
    """
    _check_model(model)
    return plan_tree(model, rule, units)


def units(model: PyTree, *, wrt: Any = nnx.Param) -> ModelUnits:
    """Return what the module types or leaf names say of every parameter (AGC-5).

    Parameters
    ----------
    model : nnx.Module, equinox.Module, or tree of arrays
        A model, or parameters.
    wrt : filter, default nnx.Param
        Which variables of an NNX module are its parameters; the filter that ``nnx.Optimizer`` and
        ``nnx.grad`` are given.

    Returns
    -------
    ModelUnits
        A mapping of name to units, None where nothing settles them.

    Raises
    ------
    ParameterError
        If the model is none, or a Linen module, which holds no parameters.

    Notes
    -----
    NNX and Equinox layers that ``vmap`` or ``scan`` stacked are told by their sizes: the axes in
    front become unit axes. In Linen and Haiku trees the shape of a layer's bias tells stacked
    layers and transposed kernels from plain ones. Without a bias a ``kernel`` or ``w`` of two axes
    is a dense layer's, and one of three, or of four with a square window, a convolution's if the
    layer's name has ``conv`` in it. Where doubt is left there are no units, and the plan asks to
    declare them.

    Examples
    --------
    >>> model = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, 6)))
    >>> found = units(shapes["params"])
    >>> str(found["query.kernel"]), str(found["out.kernel"]), str(found["query.bias"])
    ('i o0 o1 -> o0 o1', '... i o -> o', '... ->')
    """
    _check_model(model)
    return _units(model, wrt)


def _check_model(model: PyTree) -> None:
    single = is_absent(model) or jax.tree_util.all_leaves([model])
    if single and not hasattr(model, "dtype") and not isinstance(model, linen.Module):
        raise ParameterError(f"model must be a model or a tree of arrays, got {short_repr(model)}")


def _units(model: PyTree, wrt: Any = nnx.Param) -> ModelUnits:
    if isinstance(model, linen.Module):
        raise ParameterError(
            f"the Linen module {type(model).__name__} holds no parameters; give the tree that its init "
            'returned, for example units(variables["params"])'
        )
    tree = nnx.state(model, wrt) if isinstance(model, nnx.Module) else model
    layers = Layers(model)
    named = [
        (name, keys, tuple(np.shape(leaf)))
        for name, keys, leaf in _named(tree)
        if _is_inexact(leaf) and (hasattr(leaf, "dtype") or not layers.in_equinox(keys))
    ]
    by_type = layers.parameters(named)
    by_name = LeafNames({name: shape for name, _, shape in named})
    parameters = tuple(by_type.get(name) or by_name.parameter(name) for name, _, _ in named)
    return ModelUnits(parameters, getattr(model, "agc_head", None), layers.ties())


class ModelUnits(Mapping[str, Units | None]):
    """Name to units of a model's parameters, as :func:`units` found them.

    Attributes
    ----------
    parameters : tuple of Parameter
        Name, shape, units and owner of every parameter, in the tree's order.
    head : str or None
        The classifier layer that the model declares in its attribute ``agc_head``.
    ties : mapping of str to str
        Other names of layers and parameters that an NNX model shares, each with the name that it
        goes by.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        head: str | None = None,
        ties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.parameters = parameters
        self.head = head
        self.ties = ties
        self._by_name = {parameter.name: parameter for parameter in parameters}

    def __getitem__(self, name: str) -> Units | None:
        return self._by_name[canonical_name(name)].units

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    # Identity equality: cache lookups must not compare whole models.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._by_name[name].shape

    def __repr__(self) -> str:
        return f"<units of {len(self)} parameters>"


def plan_tree(model: PyTree, rule: AGC, units: ModelUnits | None) -> Plan:
    """Make the plan of a model or of a tree of parameters, some of which may be masked out.

    With ``units``, the patterns of the rule are matched with all of the model's parameters. Without
    them, a pattern that can only mean what ``optax.masked`` left out is passed over.
    """
    check_options(rule, units)
    if units is None:
        units = _units(model)
        masked = [name for name, _, leaf in _named(model) if isinstance(leaf, optax.MaskedNode)]
        typed = any(parameter.source == "layer" for parameter in units.parameters)
        rule = _without(rule, masked, units)
        plan = _make_plan(units, rule, "" if typed else _CURE)
        for entry in plan:
            _check_name(entry)
        return plan
    shapes = _units(model)
    for name in shapes:
        if name not in units:
            listing = ", ".join(list(units)[:8]) + (", ..." if len(units) > 8 else "")
            raise ParameterError(
                f"parameter {name!r} is not in the units given; the names there are: {listing}. "
                f"{_CHANGED}"
            )
        if shapes.shape(name) != units.shape(name):
            raise ShapeError(
                f"parameter {name!r} has shape {shapes.shape(name)}, the units given are for the shape "
                f"{units.shape(name)}. {_CHANGED}. If this is one shard of it (shard_map, pmap), so would be "
                "its norms; clip where the whole parameter is seen, under jit"
            )
    whole = _make_plan(units, rule)
    return Plan(tuple(entry for entry in whole if entry.name in shapes))


def _make_plan(units: ModelUnits, rule: AGC, cure: str = "") -> Plan:
    try:
        return make_plan(units.parameters, rule, head=units.head, cure=cure)
    except SelectorError as error:
        raise with_ties(error, units.ties) from None


def _check_name(entry: PlanEntry) -> None:
    """Raise for an array without a name that nothing declares to be one parameter (AGC-5)."""
    if not entry.name and entry.clipped and entry.source == "vector" and math.prod(entry.shape) > 1:
        raise AmbiguousUnitsError(
            f"the parameters are one array without a name, of shape {entry.shape}. If optax.flatten or "
            "ravel_pytree made it of many, clip before they do: optax.chain(adaptive_grad_clip(rule), "
            "optax.flatten(...)). If it is one parameter, declare AGC(units={'*': '... ->'})"
        )


def check_options(rule: AGC, units: ModelUnits | None) -> None:
    """Raise unless these are a rule and the units of a model."""
    check_rule(rule, AGC)
    if units is not None and not isinstance(units, ModelUnits):
        raise ParameterError(
            f"units= takes what agc_jax.units(model) returns, got {short_repr(units)}"
        )


def flatten(tree: PyTree) -> tuple[tuple[str, ...], list[Any], Any]:
    """Return names, leaves and structure of a tree; None and ``MaskedNode`` are leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_absent)
    names = _NAMES.get(structure)
    if names is None:
        names = tuple(name for name, _, _ in _named(tree))
        if len(_NAMES) >= 256:
            _NAMES.clear()
        _NAMES[structure] = names
    return names, leaves, structure


def is_absent(leaf: Any) -> bool:
    """Tell whether a leaf stands for no array: None, or what ``optax.masked`` left out."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


_NAMES: Final[dict[Any, tuple[str, ...]]] = {}
"""Names of the leaves of the structures that came by."""


def _named(tree: PyTree) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Yield the name, the keys and the value of every leaf, the boxes around arrays taken off."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        inside = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=is_absent)[0]
        for inner, value in inside:
            keys = tuple(path_key(key) for key in (path if len(inside) == 1 else path + inner))
            yield canonical_name(dotted(keys)), keys, value


def _is_leaf(node: Any) -> bool:
    return is_absent(node) or isinstance(node, nnx.Variable | AxisMetadata)


def _is_inexact(leaf: Any) -> bool:
    """Tell whether a leaf is a parameter, as Python's floats are: arrays under ``jit``."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _without(rule: AGC, masked: list[str], known: ModelUnits) -> AGC:
    """Drop the patterns of a rule that match nothing but what was masked out."""
    if not masked:
        return rule
    head = rule.head or known.head

    def means_masked(pattern: str) -> bool:
        wanted = canonical_name(f"{head}.*" if pattern.startswith("@") and head else pattern)
        left = matching_names(wanted, known)
        if any(pattern != "@head.weight" or len(known.shape(name)) >= 2 for name in left):
            return False
        words = wanted.split(".")  # a whole subtree may be masked, under the name of its root
        return any(
            fnmatchcase(name, wanted) or fnmatchcase(name, ".".join(words[: name.count(".") + 1]))
            for name in masked
        )

    changes: dict[str, Any] = {
        "exclude": [pattern for pattern in rule.exclude if not means_masked(pattern)],
        "units": {key: value for key, value in rule.units.items() if not means_masked(key)},
    }
    if isinstance(rule.clipping, Mapping):
        kept = {key: value for key, value in rule.clipping.items() if not means_masked(key)}
        changes["clipping"] = kept or rule.clipping
    return replace(rule, **changes)
