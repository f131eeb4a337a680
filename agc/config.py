"""Hyper-parameters: frozen, validated, hashable, and equal after a round trip through a dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Final, Literal, Self, TypeVar, get_args

from agc.checks import (
    check_choice,
    check_count,
    check_flag,
    check_not_negative,
    check_number,
    check_pattern,
    check_patterns,
    check_positive,
    short_repr,
)
from agc.errors import ConfigError, UnitsError
from agc.profiles import PROFILES, SAM_PROFILES
from agc.schedule import SCHEDULE, schedule_from_data, schedule_to_data, schedule_value
from agc.units import Units

__all__ = [
    "AGC",
    "SAM",
    "Clipping",
    "FrozenMap",
    "Granularity",
    "Nonfinite",
    "Rho",
    "Scope",
    "SkipPolicy",
    "UnitRule",
]

C = TypeVar("C", "AGC", "SAM")
V = TypeVar("V")

Nonfinite = Literal["propagate", "zero", "raise"]
Granularity = Literal["unit", "tensor"]
UnitRule = Literal["declared", "deepmind", "optax", "timm", "pytorch_optimizer"]
Clipping = float | Callable[[Any], Any] | None
Rho = float | Callable[[Any], Any]
Scope = Literal["local", "global"]
SkipPolicy = Literal["skip_step", "skip_perturb", "raise"]

_ELSEWHERE: Final = {
    "agc_clip_val": "clipping",
    "clip": "clipping",
    "clip_factor": "clipping",
    "clipping_threshold": "clipping",
    "agc_eps": "eps",
    "pmin": "eps",
}
"""What other implementations call a field; see docs/migration.md."""


class FrozenMap(Mapping[str, V]):
    """Read-only, ordered, hashable mapping: how a configuration holds a dictionary."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._items: dict[str, V] = dict(items or {})

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        # The order of the patterns decides which one wins, so it is part of the value.
        if isinstance(other, Mapping):
            return list(self._items.items()) == list(other.items())
        return NotImplemented

    def __repr__(self) -> str:
        return repr(self._items)


class _Checked:
    """A class whose constructor says which field was meant by an unknown one, or by none."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __new__(cls, *unnamed: Any, **values: Any) -> Self:
        if unnamed:
            name, first = cls.__name__, next(iter(cls.__dataclass_fields__))
            raise ConfigError(
                f"{name} takes its fields by name, such as {name}({first}={short_repr(unnamed[0])})"
            )
        # Not fields(cls): torch.compile, which may trace this, does not know it.
        if not all(name in cls.__dataclass_fields__ for name in values):
            _check_fields(cls, values)
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class AGC(_Checked):
    r"""Adaptive gradient clipping: every hyper-parameter, validated.

    Parameters
    ----------
    clipping : float, None, callable, or mapping of name pattern to one of these, default 0.01
        Largest allowed ratio of a unit's gradient norm to its weight norm (dimensionless). ``None``
        switches AGC off. A callable (or a :class:`agc.Schedule`) is given the step, counted from 0.
        In a mapping the first pattern that matches a parameter's name decides, and every parameter
        must match one: end with ``"*"``. (AGC-1, AGC-10)
    eps : float, default 1e-3
        Floor of the weight norm, so that a unit whose weights are zero can start to learn. (AGC-1)
    exclude : sequence of str, default ()
        Name patterns of parameters that are not clipped. (AGC-6)
    units : mapping of str to str or Units, default {}
        Name pattern to units pattern, for what the layer types do not settle:
        ``{"pos_embed": "n d -> n"}``. The first pattern that matches decides. (AGC-5)
    nonfinite : {"propagate", "zero", "raise"}, default "propagate"
        What becomes of a unit whose gradient or weight norm is not finite. ``"raise"`` has to wait
        for the device at every step. (AGC-4)
    granularity : {"unit", "tensor"}, default "unit"
        ``"tensor"`` takes every parameter as one unit, as DreamerV3 does. (AGC-12)
    head : str, optional
        Name (or name pattern) of the classifier layer, for the selectors ``"@head"`` (all of its
        parameters) and ``"@head.weight"`` (its matrix). Models that declare their head need not
        give it.
    unit_rule : str, default "declared"
        ``"declared"`` follows the layer types. Any other value is a published guess by rank, kept
        for the profiles that continue an old run; see :mod:`agc.rank_rules`.
    div_eps : float, default 0
        Floor of the gradient norm in the division. The specification has none; profiles do.

    Raises
    ------
    ConfigError
        If any value is outside what the specification defines; the message names the parameter.

    Notes
    -----
    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \epsilon)}{\|G_i\|} G_i
        \quad\text{if}\quad \|G_i\| > \lambda \max(\|W_i\|, \epsilon)

    Name patterns are shell-style globs (``*``, ``?``, ``[a-z]``) matched case-sensitively against
    the whole dotted name; ``/`` in a name or pattern counts as ``.``. A pattern that is literally a
    parameter's name means that parameter alone. A pattern that matches no parameter is an error
    when the plan is made.

    References
    ----------
    Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", arXiv:2102.06171, Eq. 3 and section 4.1.

    Examples
    --------
    >>> rule = AGC(clipping={"stem.*": 0.02, "*": 0.01}, exclude=["head.*"])
    >>> AGC.from_dict(rule.to_dict()) == rule
    True
    """

    clipping: Clipping | Mapping[str, Clipping] = 0.01
    eps: float = 1e-3
    exclude: Sequence[str] = ()
    units: Mapping[str, str | Units] = field(default_factory=dict)
    nonfinite: Nonfinite = "propagate"
    granularity: Granularity = "unit"
    head: str | None = None
    unit_rule: UnitRule = "declared"
    div_eps: float = 0.0

    def __post_init__(self) -> None:
        clipping: Clipping | FrozenMap[Clipping]
        if isinstance(self.clipping, Mapping):
            if not self.clipping:
                raise ConfigError("clipping is an empty mapping; give {'*': 0.01}, or None")
            if SCHEDULE in self.clipping:
                raise ConfigError(
                    f"clipping: the pattern {SCHEDULE!r} is reserved for schedules written as data; "
                    "give clipping=agc.Schedule([(step, value), ...])"
                )
            clipping = FrozenMap(
                {
                    check_pattern("clipping", pattern): _clipping(f"clipping[{pattern!r}]", value)
                    for pattern, value in self.clipping.items()
                }
            )
        else:
            clipping = _clipping("clipping", self.clipping)
        object.__setattr__(self, "clipping", clipping)
        object.__setattr__(self, "eps", check_not_negative("eps", self.eps))
        object.__setattr__(self, "div_eps", check_not_negative("div_eps", self.div_eps))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        if not isinstance(self.units, Mapping):
            raise ConfigError(
                "units must map name patterns to units patterns, for example "
                f"{{'pos_embed': 'n d -> n'}}, got {self.units!r}"
            )
        units = {
            check_pattern("units", pattern): _units(f"units[{pattern!r}]", value)
            for pattern, value in self.units.items()
        }
        object.__setattr__(self, "units", FrozenMap(units))
        check_choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("unit_rule", self.unit_rule, get_args(UnitRule))
        if self.head is not None:
            check_pattern("head", self.head)

    @classmethod
    def profile(cls, name: str, /, **changes: Any) -> AGC:
        """Return a named configuration, optionally with some fields changed.

        Parameters
        ----------
        name : str
            A name in :data:`agc.profiles.PROFILES`, for example ``"paper"`` or ``"optax"``.
        **changes
            Fields that replace the profile's, for example ``head="fc"``.

        Raises
        ------
        ConfigError
            If there is no profile of that name.
        """
        return _from_profile(cls, PROFILES, name, changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data.

        Raises
        ------
        ConfigError
            If ``clipping`` holds a callable that is not a :class:`agc.Schedule`.
        """
        clipping: Any
        if isinstance(self.clipping, Mapping):
            clipping = {
                pattern: clipping_to_data(value) for pattern, value in self.clipping.items()
            }
        else:
            clipping = clipping_to_data(self.clipping)
        return {
            "clipping": clipping,
            "eps": self.eps,
            "exclude": list(self.exclude),
            "units": {pattern: str(units) for pattern, units in self.units.items()},
            "nonfinite": self.nonfinite,
            "granularity": self.granularity,
            "head": self.head,
            "unit_rule": self.unit_rule,
            "div_eps": self.div_eps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AGC:
        """Build a configuration from :meth:`to_dict`'s data; missing fields keep their defaults.

        Raises
        ------
        ConfigError
            If a field is unknown or its value is not valid.
        """
        values = _known_fields(cls, data)
        clipping = values.get("clipping")
        if isinstance(clipping, Mapping) and set(clipping) != {SCHEDULE}:
            values["clipping"] = {
                k: clipping_from_data(v, f"clipping[{k!r}]") for k, v in clipping.items()
            }
        elif "clipping" in values:
            values["clipping"] = clipping_from_data(clipping)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SAM(_Checked):
    r"""Sharpness-aware minimization: every hyper-parameter, validated.

    Parameters
    ----------
    rho : float or callable, default 0.05
        Radius of the perturbation, in the units of the weights (L2). A callable (or a
        :class:`agc.Schedule`) is given the optimizer step, counted from 0. (SAM-1, SAM-11)
    adaptive : bool, default False
        ASAM: measure the radius relative to the weights; rho is then about ten times as large.
        (SAM-10)
    eta : float, default 0.01
        What ASAM adds to a weight's magnitude, so that a zero weight can be perturbed. (SAM-10)
    fraction : float, default 1
        Part of each batch, above 0 and at most 1, whose gradient is the ascent direction: the first
        ``ceil(fraction * examples)`` examples. NFNets use 0.2. (SAM-7)
    microbatches : int, default 1
        m-SAM: split the batch into this many parts, each with a perturbation of its own. (SAM-8)
    every : int, default 1
        Perturb at every k-th step only; the others are plain. (SAM-11)
    scope : {"local", "global"}, default "local"
        Whether the ascent gradient is each replica's own or the mean over all replicas. The descent
        gradient always is the mean. (SAM-9)
    only, exclude : sequence of str, default ()
        Name patterns, as in :class:`AGC`, of the parameters that are perturbed (all, if ``only`` is
        empty) and that are not. What is not perturbed is not in the norm either. (SAM-11)
    nonfinite : {"skip_step", "skip_perturb", "raise"}, default "skip_step"
        What happens if the norm of the ascent gradient is not finite. (SAM-5)
    eps : float, default 0
        Added to the norm of the ascent gradient. The specification has none; profiles do. (SAM-2)

    Raises
    ------
    ConfigError
        If any value is outside what the specification defines; the message names the parameter.

    Notes
    -----
    .. math:: e = \rho \frac{g}{\|g\|}, \qquad g = \nabla L(w), \qquad
        G = \nabla L(w + e)

    The optimizer receives *G*; the weights are restored bit for bit before it acts.

    References
    ----------
    Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", arXiv:2010.01412, Eq. 2; Kwon et al., "ASAM", arXiv:2102.11600; Brock et al.,
    arXiv:2102.06171, appendix A.4 (ascent on a fraction of the batch).

    Examples
    --------
    >>> rule = SAM.profile("nfnets", exclude=["head.*"])
    >>> rule.fraction
    0.2
    >>> SAM.from_dict(rule.to_dict()) == rule
    True
    """

    rho: Rho = 0.05
    adaptive: bool = False
    eta: float = 0.01
    fraction: float = 1.0
    microbatches: int = 1
    every: int = 1
    scope: Scope = "local"
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    nonfinite: SkipPolicy = "skip_step"
    eps: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", _number_or_schedule("rho", self.rho))
        check_flag("adaptive", self.adaptive)
        object.__setattr__(self, "eta", check_not_negative("eta", self.eta))
        object.__setattr__(self, "eps", check_not_negative("eps", self.eps))
        requirement = "a number above 0 and at most 1"
        fraction = check_number("fraction", self.fraction, requirement, lambda part: 0 < part <= 1)
        object.__setattr__(self, "fraction", fraction)
        for name in ("microbatches", "every"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("nonfinite", self.nonfinite, get_args(SkipPolicy))
        object.__setattr__(self, "only", check_patterns("only", self.only))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))

    def radius(self, step: int) -> float:
        """Return rho at a step, a Python integer; raise ConfigError as :func:`schedule_value`."""
        return schedule_value("rho", self.rho, step) if callable(self.rho) else self.rho

    def perturbs(self, step: int) -> bool:
        """Tell whether a step (a Python integer) is one of every k-th that perturb (SAM-11)."""
        return step % self.every == 0

    @classmethod
    def profile(cls, name: str, /, **changes: Any) -> SAM:
        """Return a named configuration, optionally with some fields changed.

        Parameters
        ----------
        name : str
            A name in :data:`agc.profiles.SAM_PROFILES`, for example ``"nfnets"``.
        **changes
            Fields that replace the profile's.

        Raises
        ------
        ConfigError
            If there is no profile of that name.
        """
        return _from_profile(cls, SAM_PROFILES, name, changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data; raise ConfigError for an anonymous callable."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        return data | {
            "rho": schedule_to_data("rho", self.rho),
            "only": list(self.only),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SAM:
        """Build a configuration from :meth:`to_dict`'s data; missing fields keep their defaults.

        Raises
        ------
        ConfigError
            If a field is unknown or its value is not valid.
        """
        values = _known_fields(cls, data)
        if isinstance(values.get("rho"), Mapping):
            values["rho"] = schedule_from_data(values["rho"])
        return cls(**values)


def clipping_to_data(value: Clipping) -> Any:
    """Return one clipping value as JSON data; raise ConfigError for an anonymous callable."""
    return schedule_to_data("clipping", value)


def clipping_from_data(data: Any, name: str = "clipping") -> Clipping:
    """Read a clipping value back from :func:`clipping_to_data`; ``name`` is for messages."""
    if isinstance(data, Mapping) and set(data) == {SCHEDULE}:
        return schedule_from_data(data)
    return _clipping(name, data)


def _from_profile(
    cls: type[C], profiles: Mapping[str, Mapping[str, Any]], name: str, changes: Mapping[str, Any]
) -> C:
    """Build a configuration from published arguments and changes to them."""
    if not isinstance(name, str) or name not in profiles:
        raise ConfigError(f"unknown profile {name!r}; the profiles are {', '.join(profiles)}")
    try:
        return cls(**{**profiles[name], **changes})
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}.profile({name!r}, ...): {error}") from None


def _known_fields(cls: type[AGC] | type[SAM], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data as keyword arguments, after checking that they are fields of the class."""
    name = cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"a configuration of {name} is a mapping, got {type(data).__name__}")
    _check_fields(cls, data)
    return dict(data)


def _check_fields(cls: Any, data: Mapping[Any, Any]) -> None:
    """Raise ConfigError unless all keys are fields of a class."""
    known = [item.name for item in fields(cls)]
    unknown = sorted(set(data) - set(known), key=repr)
    if unknown:
        name = str(unknown[0])
        near = [_ELSEWHERE.get(name, ""), *get_close_matches(name, known, 1)]
        meant = next((field for field in near if field in known), None)
        hint = f"did you mean {meant}?" if meant else f"the fields are {', '.join(known)}"
        raise ConfigError(f"unknown {cls.__name__} field {unknown[0]!r}; {hint}")


def _clipping(name: str, value: Any) -> Clipping:
    if value is None:
        return None
    return _number_or_schedule(name, value, " (None switches clipping off)")


def _number_or_schedule(name: str, value: Any, hint: str = "") -> float | Callable[[Any], Any]:
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}; give a number or an instance")
    return value if callable(value) else check_positive(name, value, hint)


def _units(name: str, value: Any) -> Units:
    try:
        return value if isinstance(value, Units) else Units(value)
    except UnitsError as error:
        raise UnitsError(f"{name}: {error}") from None
