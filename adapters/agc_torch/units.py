"""Units by layer type: what every parameter of a PyTorch model means, and the plan made from it.

PyTorch stores weights out-first, so most rows of the table say ``o ... -> o``. The table is a registry by
layer type, looked up along the class hierarchy; :func:`register_units` adds a layer of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from agc import AGC, Plan, Units
from agc.config import check_rule
from agc.errors import ParameterError
from agc.plan import WHOLE, Parameter, PlanEntry, canonical_name, make_plan

__all__ = [
    "Model",
    "named_parameters",
    "plan",
    "register_units",
    "resolve",
    "units",
    "unwrap",
]

Model: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
LayerUnits: TypeAlias = Mapping[str, str | Units]
LayerRule: TypeAlias = LayerUnits | Callable[[nn.Module], LayerUnits]


def plan(model: Model, rule: AGC) -> Plan:
    """Say what will happen to every parameter, before any number is touched (AGC-5, AGC-6).

    Parameters
    ----------
    model : Module, mapping of name to tensor, or iterable of (name, tensor)
        A module's layer types settle the units. Plain tensors have no layer types: ranks 2, 4 and 5 are
        taken as out-first, rank 3 has to be declared in the rule.
    rule : AGC
        The configuration.

    Returns
    -------
    Plan
        One entry a parameter in the model's order, tied parameters once, under their first name. The names
        are those of the bare model, whether or not it is wrapped (``DistributedDataParallel``,
        ``torch.compile``, activation checkpointing).

    Raises
    ------
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`; the message names the parameter.
    ConfigError
        If ``rule`` is not an AGC.
    ParameterError
        If ``model`` is none of these, a parameter is lazy and not yet initialised, or the model holds FSDP1's
        flat parameters.

    Notes
    -----
    A model declares its classifier by an attribute: ``model.agc_head = "fc"``. The selector ``"@head"``
    then excludes it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, bias=False))
    >>> print(plan(model, AGC(exclude=["*.bias"])))
    parameter  shape    units                 count  clipping
    ---------  -------  --------------------  -----  --------
    0.weight   8x3x3x3  o i ... -> o              8  0.01
    0.bias     8        ... ->                    1  excluded
    1.weight   8x4x2x2  (g=1 i) o ... -> g o      4  0.01
    3 parameters, 2 clipped, 12 units
    """
    check_rule(rule, AGC)
    survey = _survey(model) if isinstance(model, nn.Module) else {}
    parameters = []
    for name, tensor in named_parameters(model).items():
        if is_lazy(tensor):
            raise ParameterError(
                f"parameter {name!r} is not initialised yet, so it has no shape; "
                "run the model once on an example batch first"
            )
        found, owner = survey.get(name, (None, None))
        parameters.append(Parameter(name, tuple(tensor.shape), found, "out-first", owner))
    head = getattr(unwrap(model), "agc_head", None) if isinstance(model, nn.Module) else None
    made = make_plan(parameters, rule, head=head)
    for entry in made:
        _ = entry.axes  # remembered, because torch.compile cannot work them out
    return made


def units(model: nn.Module) -> dict[str, Units | None]:
    """Return the units that the layer types settle, by parameter name; None where they do not (AGC-5).

    Parameters
    ----------
    model : Module
        Any model. Parametrised layers (``torch.nn.utils.parametrize``, weight and spectral
        normalisation, pruning) give the tensor behind a weight the units of that weight.

    Returns
    -------
    dict of str to Units or None
        In the model's order, tied parameters once.
    """
    survey = _survey(model)
    return {name: survey[name][0] for name in named_parameters(model)}


def register_units(layer: type[nn.Module] | str, units: LayerRule) -> None:
    """Teach the table a layer type, or change what it says of one.

    Parameters
    ----------
    layer : type of Module, or str
        The layer's class; its subclasses follow it unless they are registered themselves. A string is the
        full path of a class that need not be imported, ``"package.module.Name"``.
    units : mapping of str to str or Units, or callable
        Parameter name (a glob, the first that matches decides) to units; or a function of the layer that
        returns such a mapping, where the units depend on the layer's sizes. A parameter that matches
        nothing is left to the layout convention.

    Examples
    --------
    >>> class Dense(nn.Module):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.zeros(inputs, outputs))
    >>> register_units(Dense, {"kernel": "i o -> o"})
    >>> plan(Dense(3, 5), AGC())["kernel"].count
    5
    """
    if isinstance(units, Mapping):
        units = {name: Units(str(pattern)) for name, pattern in units.items()}
    elif not callable(units):
        raise ParameterError(
            f"units of {layer!r} must be a mapping such as {{'weight': 'o i -> o'}}, "
            f"or a function of the layer that returns one, got {units!r}"
        )
    _REGISTRY[_path(layer) if isinstance(layer, type) else layer] = units
    _RESOLVED.clear()


def named_parameters(model: Model) -> dict[str, Tensor]:
    """Return parameters by dotted name, tied ones once, wrappers' prefixes removed.

    Raises
    ------
    ParameterError
        If ``model`` is neither a module nor named tensors, or holds flat parameters of FSDP1, whose units are
        cut apart (AGC-8).
    """
    if isinstance(model, nn.Module):
        named: Iterable[tuple[str, Tensor]] = unwrap(model).named_parameters()
    else:
        named = _named_tensors(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named:
        name = canonical_name(_clean(name))
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise ParameterError(
                f"parameter {name!r} is flattened by FullyShardedDataParallel (FSDP1), which cuts units "
                "apart; shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        if name in found:
            raise ParameterError(f"two parameters are called {name!r}")
        found[name] = tensor
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare model inside DDP, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def resolve(
    model: Model, rule: AGC, plan_: Plan | None = None
) -> tuple[Plan, list[tuple[PlanEntry, Tensor]]]:
    """Pair every parameter with its entry in the plan; a module's plan is made once and remembered.

    Raises
    ------
    ConfigError
        If ``rule`` is not an AGC.
    ParameterError
        If the names of a plan that is given are not the model's.
    """
    check_rule(rule, AGC)
    named = named_parameters(model)
    if plan_ is not None:
        return plan_, _pair(plan_, named)
    if torch.compiler.is_compiling():
        raise ParameterError(
            "a plan cannot be made inside torch.compile; make it before, with "
            "plan = agc_torch.plan(model, rule), and give it as plan=plan"
        )
    if not isinstance(model, nn.Module):
        plan_ = plan(named, rule)
        return plan_, _pair(plan_, named)
    known = _RESOLVED.get(model)
    if known is None or known[0] != rule or not _same(known[2], named):
        made = plan(model, rule)
        known = _RESOLVED[model] = (rule, made, _pair(made, named))
    return known[1], known[2]


Pairs: TypeAlias = list[tuple[PlanEntry, Tensor]]
_RESOLVED: Final[WeakKeyDictionary[nn.Module, tuple[AGC, Plan, Pairs]]] = WeakKeyDictionary()
_WRAPPERS: Final = ("_orig_mod", "_checkpoint_wrapped_module")


def _named_tensors(model: object) -> list[tuple[str, Tensor]]:
    if isinstance(model, Mapping):
        model = model.items()
    named: list[Any] = [model]
    if isinstance(model, Iterable) and not isinstance(model, Tensor):
        named = list(model)
    for pair in named:
        shown = list(pair) if isinstance(pair, (tuple, list)) else [pair]
        if not (len(shown) == 2 and isinstance(shown[0], str) and isinstance(shown[1], Tensor)):
            kinds = ", ".join(type(part).__name__ for part in shown)
            raise ParameterError(
                f"model must be a module or pairs (name, tensor), got ({kinds}); "
                "give the module, or model.named_parameters()"
            )
    return named


def _pair(plan_: Plan, named: Mapping[str, Tensor]) -> Pairs:
    entries = {entry.name: entry for entry in plan_}
    for name in named:
        if name not in entries:
            raise ParameterError(f"parameter {name!r} is not in the plan; make a new plan")
    for name in entries:
        if name not in named:
            raise ParameterError(f"parameter {name!r} of the plan is missing from the model")
    return [(entries[name], tensor) for name, tensor in named.items()]


def _same(known: Pairs, named: Mapping[str, Tensor]) -> bool:
    """Tell whether these are still the parameters that the plan was made for."""
    return len(known) == len(named) and all(
        tensor is now and entry.name == name and entry.shape == now.shape
        for (entry, tensor), (name, now) in zip(known, named.items(), strict=True)
    )


def _clean(name: str) -> str:
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _survey(model: nn.Module) -> dict[str, tuple[Units | None, str]]:
    """Return what the layer types say of every parameter, and which layer it belongs to."""
    found: dict[str, tuple[Units | None, str]] = {}
    seen: set[int] = set()

    def add(name: str, tensor: Tensor, units: Units | None, layer: nn.Module) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[_clean(name.lstrip("."))] = (units, type(layer).__name__)

    # A layer comes before what it contains, so it speaks for the tensors behind its parametrised weights.
    for prefix, layer in unwrap(model).named_modules():
        table = _layer_units(layer)
        for name, tensor in layer.named_parameters(recurse=False):
            add(f"{prefix}.{name}", tensor, _of(layer, table, name), layer)
        if parametrize.is_parametrized(layer):
            for name, chain in layer.parametrizations.items():
                for part, tensor in chain.named_parameters(recurse=False):
                    behind = _behind(tensor, chain, _match(table, name))
                    add(f"{prefix}.parametrizations.{name}.{part}", tensor, behind, layer)
    return found


def _layer_units(layer: nn.Module) -> Mapping[str, Units]:
    for kind in type(layer).__mro__:
        rule = _REGISTRY.get(_path(kind))
        if rule is not None:
            table = rule if isinstance(rule, Mapping) else rule(layer)
            return {name: Units(str(pattern)) for name, pattern in table.items()}
    return {}


def _match(table: Mapping[str, Units], name: str) -> Units | None:
    return next((found for glob, found in table.items() if fnmatchcase(name, glob)), None)


def _of(layer: nn.Module, table: Mapping[str, Units], name: str) -> Units | None:
    """Units of a layer's parameter, also where pruning or an old-style hook moved the weight aside."""
    base, _, suffix = name.rpartition("_")
    if suffix == "g" and hasattr(layer, f"{base}_v") and _match(table, base):
        return WHOLE  # the gain of weight_norm
    if (suffix == "v" and hasattr(layer, f"{base}_g")) or (
        suffix == "orig" and hasattr(layer, base)
    ):
        return _match(table, base)
    return _match(table, name)


def _behind(
    tensor: Tensor, chain: parametrize.ParametrizationList, weight: Units | None
) -> Units | None:
    """Units of a tensor that a parametrisation computes a weight from."""
    if weight is None or tensor.dim() <= 1:
        return None
    modes = {module: module.training for module in chain.modules()}
    chain.eval()  # so that looking does not change what is looked at: no power iteration, no dropout
    try:
        with torch.no_grad():
            shape = chain().shape
    finally:
        for module, mode in modes.items():
            module.training = mode
    if tensor.shape == shape:
        return weight
    if tensor.dim() == len(shape) and all(
        size in (1, full) for size, full in zip(tensor.shape, shape, strict=True)
    ):
        return WHOLE  # a gain along some axes, as weight_norm's
    return None


def _transposed(layer: nn.Module) -> LayerUnits:
    return {"weight": Units("(g i) o ... -> g o", g=int(layer.groups))}


_REGISTRY: Final[dict[str, LayerRule]] = {}
_CONV: Final = {"weight": "o i ... -> o", "gain": "... ->"}  # subclasses of NFNets have a gain
_BUILT_IN: Final[dict[type[nn.Module] | str, LayerRule]] = {
    nn.Linear: {"weight": "o i -> o"},
    nn.Bilinear: {"weight": "o i j -> o"},
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    nn.Embedding: {"weight": "v d -> v"},
    nn.EmbeddingBag: {"weight": "v d -> v"},
    nn.MultiheadAttention: {"*_proj_weight": "o i -> o", "bias_?": WHOLE},
    nn.RNNBase: {"weight_*": "o i -> o"},
    nn.RNNCellBase: {"weight_*": "o i -> o"},
    nn.LayerNorm: {"*": WHOLE},
    nn.RMSNorm: {"*": WHOLE},
    "transformers.pytorch_utils.Conv1D": {"weight": "i o -> o"},
}
for _layer, _rule in _BUILT_IN.items():
    register_units(_layer, _rule)
