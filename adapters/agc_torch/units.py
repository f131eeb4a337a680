"""Units of a PyTorch model: which layer every parameter belongs to, and the plan made from it.

:mod:`agc_torch.layers` says what a layer type's parameters mean. Names are those of the bare model:
the modules that wrappers put around it, at the top or anywhere inside, are left out of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from agc import AGC, Plan, Units
from agc.checks import check_distinct, check_rule
from agc.errors import ParameterError, SelectorError
from agc.layer_table import first_match
from agc.plan import WHOLE, Parameter, PlanEntry, make_plan
from agc.selectors import canonical_name, with_ties
from agc_torch.layers import TABLE, own_parameters, register_units

__all__ = [
    "Model",
    "named_parameters",
    "place_of",
    "plan",
    "register_units",
    "resolve",
    "ties",
    "units",
    "unwrap",
]

Model: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def plan(model: Model, rule: AGC) -> Plan:
    """Say what will happen to every parameter, before any number is touched (AGC-5, AGC-6).

    Parameters
    ----------
    model : Module, mapping of name to tensor, or iterable of (name, tensor)
        A module's layer types settle the units (see :mod:`agc_torch.layers`). Plain tensors have no
        layer types: ranks 2, 4 and 5 are taken as out-first, with one warning, and rank 3 has to be
        declared in the rule. Parameters stacked by ``torch.func.stack_module_state`` are such
        tensors: declare ``"e o i ... -> e o"`` for them.
    rule : AGC
        The configuration.

    Returns
    -------
    Plan
        One entry a parameter in the model's order, tied parameters once, under their first name.
        The names are those of the bare model, whatever wraps it or its parts (see :func:`unwrap`).
        Frozen parameters are marked, and not counted.

    Raises
    ------
    SelectorError, AmbiguousUnitsError, UnitsError
        As :func:`agc.plan.make_plan`; the message names the parameter.
    ConfigError
        If ``rule`` is not an AGC.
    ParameterError
        If ``model`` is none of these, a parameter is lazy and not yet initialised, or the model
        holds FSDP1's flat parameters.

    Warns
    -----
    UnitsWarning
        If units follow the layout convention, because no layer type settles them.

    Notes
    -----
    A model declares its classifier by an attribute: ``model.agc_head = "fc"``. The selector
    ``"@head"`` then excludes it. Of timm's models, ``model.pretrained_cfg["classifier"]`` is taken.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, bias=False))
    >>> print(plan(model, AGC(exclude=["*.bias"])))
    parameter  shape    units                 source  count  clipping
    ---------  -------  --------------------  ------  -----  --------
    0.weight   8x3x3x3  o i ... -> o          layer       8  0.01
    0.bias     8        ... ->                vector      1  excluded
    1.weight   8x4x2x2  (g=1 i) o ... -> g o  layer       4  0.01
    3 parameters, 2 clipped, 12 units
    """
    check_rule(rule, AGC)
    module = isinstance(model, nn.Module)
    survey = _survey(model) if isinstance(model, nn.Module) else {}
    parameters = []
    for name, tensor in named_parameters(model).items():
        if is_lazy(tensor):
            raise ParameterError(
                f"parameter {name!r} is not initialised yet, so it has no shape; "
                "run the model once on an example batch first"
            )
        declared, owner = survey.get(name, (None, None))
        inactive = "frozen" if _frozen(tensor) else None
        shape = tuple(tensor.shape)
        parameters.append(Parameter(name, shape, declared, "out-first", owner, inactive=inactive))
    head = _head(unwrap(model)) if isinstance(model, nn.Module) else None
    cure = "" if module else "give the module instead of its tensors"
    try:
        made = make_plan(parameters, rule, head=head, cure=cure)
    except SelectorError as error:
        raise with_ties(error, ties(model)) from None
    for entry in made:
        _ = entry.axes  # computed and kept now: torch.compile cannot trace it
    return made


def units(model: nn.Module) -> dict[str, Units | None]:
    """Return the units that layer types settle, by parameter name; None elsewhere (AGC-5).

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


def named_parameters(model: Model) -> dict[str, Tensor]:
    """Return parameters by dotted name, tied ones once, wrappers' prefixes removed.

    Raises
    ------
    ParameterError
        If ``model`` is neither a module nor named tensors, or holds flat parameters of FSDP1, whose
        units are cut apart (AGC-8).
    """
    if isinstance(model, nn.Module):
        named: Iterable[tuple[str, Tensor]] = (
            (name, tensor) for name, tensor, _ in _own_parameters(model)
        )
    else:
        named = _named_tensors(model)
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    seen: set[int] = set()
    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        name = canonical_name(name)
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise ParameterError(
                f"parameter {name!r} is flattened by FullyShardedDataParallel (FSDP1), which cuts units "
                "apart; shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        names.append(name)
        tensors[name] = tensor
    if len(names) > len(tensors):
        check_distinct(names)
    return tensors


def ties(model: Model) -> dict[str, str]:
    """Return the other names of tied parameters, each with the name that it goes by."""
    named = _own_parameters(model) if isinstance(model, nn.Module) else ()
    first: dict[int, str] = {}
    others: dict[str, str] = {}
    for name, tensor, _ in named:
        known = first.setdefault(id(tensor), canonical_name(name))
        if known != canonical_name(name):
            others[canonical_name(name)] = known
    return others


def place_of(model: Model, name: str) -> Tensor | list[Tensor]:
    """Return the parameter of a name as it is now; its layer's, if that has none so called.

    Parameters
    ----------
    model : Module or mapping of name to tensor
    name : str
        A parameter's name at some time before, as :func:`named_parameters` has it.
    """
    if not isinstance(model, nn.Module):
        return model.get(name, []) if isinstance(model, Mapping) else []
    *path, last = name.split(".")
    module = unwrap(model)
    for key in path:
        child = module._modules.get(key)
        if child is None:
            return []
        module = unwrap(child)
    tensor = module._parameters.get(last)
    return list(module.parameters()) if tensor is None else tensor


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare model inside wrappers.

    They are DDP, DataParallel, ``torch.compile``, activation checkpointing and Lightning Fabric's
    module. A module of one's own that merely calls a child ``module`` or ``_forward_module`` is
    none of them.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def resolve(
    model: Model, rule: AGC, plan_: Plan | None = None
) -> tuple[Plan, list[tuple[PlanEntry, Tensor]]]:
    """Pair every parameter with its entry in the plan; of a module, once, and remembered.

    Raises
    ------
    ConfigError
        If ``rule`` is not an AGC.
    ParameterError
        If the names of a plan that is given are not the model's.
    """
    check_rule(rule, AGC)
    named = named_parameters(model)
    if torch.compiler.is_compiling():
        if plan_ is None:
            raise ParameterError(
                "a plan cannot be made inside torch.compile; make it before, with "
                "plan = agc_torch.plan(model, rule), and give it as plan=plan"
            )
        return plan_, _pair(plan_, named)
    if not isinstance(model, nn.Module):
        plan_ = plan(named, rule) if plan_ is None else plan_
        return plan_, _pair(plan_, named)
    known = _RESOLVED.get(model)
    asked = (rule, TABLE.changes) if plan_ is None else plan_
    state = _state(named)
    if known is None or known[:2] != (asked, state):
        made = plan(model, rule) if plan_ is None else plan_
        known = _RESOLVED[model] = (asked, state, made, _pair(made, named))
    return known[2:]


Pairs: TypeAlias = list[tuple[PlanEntry, Tensor]]
_RESOLVED: Final[WeakKeyDictionary[nn.Module, tuple[object, list[object], Plan, Pairs]]] = (
    WeakKeyDictionary()
)
_WRAPPERS: Final = (  # the children that make a module a wrapper, the wrapped one first
    ("_orig_mod",),
    ("_checkpoint_wrapped_module",),
    ("_forward_module", "_original_module"),
)


def _named_tensors(model: object) -> list[tuple[str, Tensor]]:
    if isinstance(model, Mapping):
        model = model.items()
    named: list[Any] = [model]
    if isinstance(model, Iterable) and not isinstance(model, Tensor):
        named = list(model)
    for pair in named:
        shown = list(pair) if isinstance(pair, (tuple, list)) else [pair]
        if not (len(shown) == 2 and isinstance(shown[0], str) and isinstance(shown[1], Tensor)):
            types = ", ".join(type(item).__name__ for item in shown)
            raise ParameterError(
                f"model must be a module or pairs (name, tensor), got ({types}); "
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


def _state(named: Mapping[str, Tensor]) -> list[object]:
    """Return what a plan was made for, of parameters that are kept with it."""
    tensors = list(named.values())
    return [
        list(named),
        list(map(id, tensors)),
        [tensor.shape for tensor in tensors],
        [tensor.requires_grad for tensor in tensors],
    ]


def _frozen(tensor: Tensor) -> bool:
    return not tensor.requires_grad and isinstance(tensor, nn.Parameter)


def _inner(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper wraps; None for any other module."""
    children = module._modules
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return children["module"]
    if 0 < len(children) < 3 and not module._parameters:
        for names in _WRAPPERS:
            if children.keys() == set(names):
                return children[names[0]]
    return None


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield bare modules, each once and before what it contains, with prefixes such as "a.b."."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        module = unwrap(module)
        if module in seen:
            continue
        seen.add(module)
        yield prefix, module
        stack += [
            (f"{prefix}{name}.", child)
            for name, child in reversed(list(module._modules.items()))
            if child is not None
        ]


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Yield name, parameter and its module, in the model's order; tied ones repeatedly."""
    for prefix, module in _walk(model):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield prefix + name, tensor, module


def _head(model: nn.Module) -> str | None:
    """Return the classifier's name, as the model declares it or timm's configuration has it."""
    declared = getattr(model, "agc_head", None)
    if declared is not None:
        return str(declared)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    names = config.get("classifier") if isinstance(config, Mapping) else None
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (tuple, list)) or len(names) != 1:
        return None
    owners = {
        prefix for prefix, layer in _walk(model) if next(layer.parameters(), None) is not None
    }
    return str(names[0]) if f"{names[0]}." in owners else None


def _survey(model: nn.Module) -> dict[str, tuple[Units | None, str]]:
    """Return what the layer types say of every parameter, and which layer it belongs to."""
    survey: dict[str, tuple[Units | None, str]] = {}
    seen: set[int] = set()

    def add(name: str, tensor: Tensor, units: Units | None, layer: nn.Module) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            survey[name] = (units, type(layer).__name__)

    # A layer comes before what it contains, so it speaks for the tensors behind its parametrised
    # weights.
    for prefix, layer in _walk(model):
        table = TABLE.of(layer)
        for name, tensor in own_parameters(layer):
            add(f"{prefix}{name}", tensor, _units_of_weight(layer, table, name), layer)
        if parametrize.is_parametrized(layer):
            for name, chain in layer.parametrizations.items():
                for inner, tensor in chain.named_parameters(recurse=False):
                    behind = _units_behind_parametrization(tensor, chain, first_match(table, name))
                    add(f"{prefix}parametrizations.{name}.{inner}", tensor, behind, layer)
    return survey


def _units_of_weight(layer: nn.Module, table: Mapping[str, Units], name: str) -> Units | None:
    """Units of a layer's parameter, also of a weight that pruning or a hook moved aside."""
    base, _, suffix = name.rpartition("_")
    if suffix == "g" and hasattr(layer, f"{base}_v") and first_match(table, base) is not None:
        return WHOLE  # the gain of weight_norm
    if (suffix == "v" and hasattr(layer, f"{base}_g")) or (
        suffix == "orig" and hasattr(layer, base)
    ):
        return first_match(table, base)
    return first_match(table, name)


def _units_behind_parametrization(
    tensor: Tensor, chain: parametrize.ParametrizationList, weight: Units | None
) -> Units | None:
    """Units of a tensor that a parametrisation computes a weight from."""
    if weight is None or tensor.dim() <= 1:
        return None
    modes = {module: module.training for module in chain.modules()}
    chain.eval()  # computing the weight must not advance power iteration or dropout
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
