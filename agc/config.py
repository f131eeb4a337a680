"""Hyper-parameters: frozen, validated, hashable, and equal after a round trip through a dict."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Final, Literal, TypeVar, get_args

from agc.errors import ConfigError, UnitsError
from agc.units import Units

__all__ = [
    "AGC",
    "SAM",
    "Clipping",
    "FrozenMap",
    "Granularity",
    "Nonfinite",
    "Rho",
    "Schedule",
    "Scope",
    "SkipPolicy",
    "UnitRule",
]

V = TypeVar("V")

Nonfinite = Literal["propagate", "zero", "raise"]
Granularity = Literal["unit", "tensor"]
UnitRule = Literal["declared", "deepmind", "optax", "timm", "pytorch_optimizer"]
Clipping = float | Callable[[Any], Any] | None
Rho = float | Callable[[Any], Any]
Scope = Literal["local", "global"]
SkipPolicy = Literal["skip_step", "skip_perturb", "raise"]


class FrozenMap(Mapping[str, V]):
    """A read-only, ordered, hashable mapping: what a configuration holds where a user gives a dict."""

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


@dataclass(frozen=True)
class Schedule:
    """A value that changes with the optimizer step: straight lines between the points given.

    Parameters
    ----------
    points : sequence of (int, float)
        Steps, strictly ascending from 0 or later, and the value at each. Before the first and after
        the last point the value stays what it is there.

    Raises
    ------
    ConfigError
        If there is no point, a step is not an ascending non-negative integer, or a value is not a
        finite number above 0.

    Notes
    -----
    Unlike an arbitrary callable, a schedule can be written to a file and is evaluated inside the
    compiled step by every adapter (AGC-10).

    Examples
    --------
    >>> warm_up = Schedule([(0, 0.04), (1000, 0.01)])
    >>> warm_up(500)
    0.025
    """

    points: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        try:
            points = tuple((step, value) for step, value in self.points)
        except (TypeError, ValueError):
            raise ConfigError(
                f"Schedule points must be pairs (step, value), got {self.points!r}"
            ) from None
        if not points:
            raise ConfigError("Schedule needs at least one point, for example [(0, 0.01)]")
        last = -1
        for step, value in points:
            if isinstance(step, bool) or not isinstance(step, Integral) or step <= last:
                raise ConfigError(
                    "Schedule steps must be ascending integers from 0 on, "
                    f"got {[step for step, _ in points]}"
                )
            last = int(step)
            _positive("Schedule value", value)
        points = tuple((int(step), float(value)) for step, value in points)
        object.__setattr__(self, "points", points)

    def __call__(self, step: int) -> float:
        """Return the value at a step (a Python integer)."""
        steps = [point for point, _ in self.points]
        right = bisect_right(steps, step)
        if right == 0:
            return self.points[0][1]
        start, low = self.points[right - 1]
        if right == len(steps):
            return low
        end, high = self.points[right]
        return low + (high - low) * ((step - start) / (end - start))


@dataclass(frozen=True, kw_only=True)
class AGC:
    r"""Adaptive gradient clipping: every hyper-parameter, validated.

    Parameters
    ----------
    clipping : float, None, callable, or mapping of name pattern to one of these, default 0.01
        Largest allowed ratio of a unit's gradient norm to its weight norm (dimensionless). ``None``
        switches AGC off. A callable (or a :class:`Schedule`) is given the step, counted from 0. In a
        mapping the first pattern that matches a parameter's name decides, and every parameter must
        match one: end with ``"*"``. (AGC-1, AGC-10)
    eps : float, default 1e-3
        Floor of the weight norm, so that a unit whose weights are zero can start to learn. (AGC-1)
    exclude : sequence of str, default ()
        Name patterns of parameters that are not clipped. (AGC-6)
    units : mapping of str to str or Units, default {}
        Name pattern to units pattern, for what the layer types do not settle: ``{"pos_embed": "n d -> n"}``.
        The first pattern that matches decides. (AGC-5)
    nonfinite : {"propagate", "zero", "raise"}, default "propagate"
        What becomes of a unit whose gradient or weight norm is not finite. ``"raise"`` has to wait for
        the device at every step. (AGC-4)
    granularity : {"unit", "tensor"}, default "unit"
        ``"tensor"`` takes every parameter as one unit, as DreamerV3 does. (AGC-12)
    head : str, optional
        Name (or name pattern) of the classifier layer, for the selectors ``"@head"`` (all of its
        parameters) and ``"@head.weight"`` (its matrix). Models that declare their head need not give it.
    unit_rule : str, default "declared"
        ``"declared"`` follows the layer types. Any other value is a published guess by rank, kept for
        the profiles that continue an old run; see :mod:`agc.profiles`.
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

    Name patterns are shell-style globs (``*``, ``?``, ``[a-z]``) matched case-sensitively against the
    whole dotted name; ``/`` in a name or pattern counts as ``.``. A pattern that is literally a
    parameter's name means that parameter alone. A pattern that matches no parameter is an error when the
    plan is made.

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
            if _SCHEDULE in self.clipping:
                raise ConfigError(
                    f"clipping: the pattern {_SCHEDULE!r} is reserved for schedules written as data; "
                    "give clipping=agc.Schedule([(step, value), ...])"
                )
            clipping = FrozenMap(
                {
                    _pattern("clipping", pattern): _clipping(f"clipping[{pattern!r}]", value)
                    for pattern, value in self.clipping.items()
                }
            )
        else:
            clipping = _clipping("clipping", self.clipping)
        object.__setattr__(self, "clipping", clipping)
        object.__setattr__(self, "eps", _not_negative("eps", self.eps))
        object.__setattr__(self, "div_eps", _not_negative("div_eps", self.div_eps))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        if not isinstance(self.units, Mapping):
            raise ConfigError(
                "units must map name patterns to units patterns, for example "
                f"{{'pos_embed': 'n d -> n'}}, got {self.units!r}"
            )
        units = {
            _pattern("units", pattern): _units(f"units[{pattern!r}]", value)
            for pattern, value in self.units.items()
        }
        object.__setattr__(self, "units", FrozenMap(units))
        _choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        _choice("granularity", self.granularity, get_args(Granularity))
        _choice("unit_rule", self.unit_rule, get_args(UnitRule))
        if self.head is not None:
            _pattern("head", self.head)

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
        from agc.profiles import profile  # the profiles are instances of this class

        return profile(name, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data.

        Raises
        ------
        ConfigError
            If ``clipping`` holds a callable that is not a :class:`Schedule`.
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
        if isinstance(clipping, Mapping) and set(clipping) != {_SCHEDULE}:
            values["clipping"] = {
                k: clipping_from_data(v, f"clipping[{k!r}]") for k, v in clipping.items()
            }
        elif "clipping" in values:
            values["clipping"] = clipping_from_data(clipping)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SAM:
    r"""Sharpness-aware minimization: every hyper-parameter, validated.

    Parameters
    ----------
    rho : float or callable, default 0.05
        Radius of the perturbation, in the units of the weights (L2). A callable (or a
        :class:`Schedule`) is given the optimizer step, counted from 0. (SAM-1, SAM-11)
    adaptive : bool, default False
        ASAM: measure the radius relative to the weights; rho is then about ten times as large. (SAM-10)
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
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"adaptive must be True or False, got {self.adaptive!r}")
        object.__setattr__(self, "eta", _not_negative("eta", self.eta))
        object.__setattr__(self, "eps", _not_negative("eps", self.eps))
        fraction = _number("fraction", self.fraction, "a number above 0 and at most 1")
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction must be a number above 0 and at most 1, got {fraction!r}")
        object.__setattr__(self, "fraction", fraction)
        for name in ("microbatches", "every"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        _choice("scope", self.scope, get_args(Scope))
        _choice("nonfinite", self.nonfinite, get_args(SkipPolicy))
        object.__setattr__(self, "only", _patterns("only", self.only))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))

    def radius(self, step: int) -> float:
        """Return rho at a step (a Python integer); raise ConfigError if a schedule returns nonsense."""
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
        from agc.profiles import sam_profile  # the profiles are instances of this class

        return sam_profile(name, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON data; raise ConfigError for a rho that is an anonymous callable."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        return data | {
            "rho": _schedule_to_data("rho", self.rho),
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
            values["rho"] = _schedule_from_data(values["rho"])
        return cls(**values)


_SCHEDULE: Final = "@schedule"


def clipping_to_data(value: Clipping) -> Any:
    """Return one clipping value as JSON data; raise ConfigError for an anonymous callable."""
    return _schedule_to_data("clipping", value)


def clipping_from_data(data: Any, name: str = "clipping") -> Clipping:
    """Read one clipping value back from :func:`clipping_to_data`'s data; ``name`` is for messages."""
    if isinstance(data, Mapping) and set(data) == {_SCHEDULE}:
        return _schedule_from_data(data)
    return _clipping(name, data)


def _schedule_to_data(name: str, value: Any) -> Any:
    if isinstance(value, Schedule):
        return {_SCHEDULE: [list(point) for point in value.points]}
    if callable(value):
        raise ConfigError(
            f"{name} is the callable {value!r}, which cannot be written as data; "
            "use agc.Schedule([(step, value), ...]) instead"
        )
    return value


def _schedule_from_data(data: Mapping[str, Any]) -> Schedule:
    if set(data) != {_SCHEDULE}:
        raise ConfigError(f"a schedule is written as {{{_SCHEDULE!r}: points}}, got {data!r}")
    return Schedule(data[_SCHEDULE])


def _known_fields(cls: type[AGC] | type[SAM], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data as keyword arguments, after checking that they are fields of the class."""
    name = cls.__name__
    if not isinstance(data, Mapping):
        raise ConfigError(f"a configuration of {name} is a mapping, got {type(data).__name__}")
    known = [item.name for item in fields(cls)]
    unknown = sorted(set(data) - set(known), key=repr)
    if unknown:
        raise ConfigError(f"unknown {name} field {unknown[0]!r}; the fields are {', '.join(known)}")
    return dict(data)


def check_rule(rule: object, kind: type[AGC] | type[SAM]) -> None:
    """Raise ConfigError unless a rule is a configuration of the right kind."""
    if not isinstance(rule, kind):
        raise ConfigError(f"rule must be an agc.{kind.__name__}, got {rule!r}")


def check_step(step: Any) -> int:
    """Return a step as a Python integer; raise ConfigError if it is not an integer from 0 on."""
    return _integer("step", step, 0)


def check_count(name: str, value: Any) -> int:
    """Return a number of things as a Python integer; raise ConfigError if it is not one from 1 on."""
    return _integer(name, value, 1)


def schedule_value(name: str, schedule: Callable[[Any], Any], step: Any) -> float:
    """Return what a schedule says of a step; raise ConfigError unless it is a finite number above 0."""
    step = check_step(step)
    value = schedule(step)
    try:
        # What is not a number may still convert to one: an array of one element does, and so does text.
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"{name}: the schedule returned {value!r} at step {step}; it must return a finite number > 0"
        )
    return number


def _clipping(name: str, value: Any) -> Clipping:
    if value is None:
        return None
    return _number_or_schedule(name, value, " (None switches clipping off)")


def _number_or_schedule(name: str, value: Any, hint: str = "") -> float | Callable[[Any], Any]:
    if isinstance(value, type):
        raise ConfigError(f"{name} is the class {value.__name__}; give a number or an instance")
    return value if callable(value) else _positive(name, value, hint)


def _units(name: str, value: Any) -> Units:
    try:
        return value if isinstance(value, Units) else Units(value)
    except UnitsError as error:
        raise UnitsError(f"{name}: {error}") from None


def _number(name: str, value: Any, requirement: str) -> float:
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if real else math.nan
    except OverflowError:
        raise ConfigError(f"{name} must be {requirement}, got one beyond float64") from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be {requirement}, got {value!r}")
    return number


def _positive(name: str, value: Any, hint: str = "") -> float:
    requirement = f"a finite number > 0{hint}"
    number = _number(name, value, requirement)
    if number <= 0:
        raise ConfigError(f"{name} must be {requirement}, got {value!r}")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(name, value, "a finite number >= 0")
    if number < 0:
        raise ConfigError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
    return number


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence):
        raise ConfigError(f"{name} must be a list of name patterns, got {value!r}")
    return tuple(_pattern(name, item) for item in patterns)


def _pattern(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} needs non-empty strings as name patterns, got {value!r}")
    return value
