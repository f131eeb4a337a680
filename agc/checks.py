"""Checks of values, and the messages of failures, that the core and every adapter share.

Each function returns the checked value, if a caller wants it, and raises one error with one
wording: the same mistake reads the same in every framework.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

from agc.errors import ConfigError, DTypeError, ParameterError, ShapeError, UnitsError

__all__ = [
    "NO_GRADIENT",
    "check_batch",
    "check_batch_given",
    "check_choice",
    "check_count",
    "check_distinct",
    "check_flag",
    "check_inexact",
    "check_microbatches",
    "check_not_negative",
    "check_number",
    "check_pattern",
    "check_patterns",
    "check_positive",
    "check_rule",
    "check_shapes",
    "check_step",
    "rows_are_not_units",
    "short_repr",
]

# --- hyper-parameters -----------------------------------------------------------------------------


def check_number(
    name: str, value: Any, requirement: str, valid: Callable[[float], bool] = math.isfinite
) -> float:
    """Return a number as a float.

    Parameters
    ----------
    name : str
        The hyper-parameter, for the message.
    value : object
        What was given: any real number but a bool passes, also NumPy's.
    requirement : str
        What it must be, for the message: ``"a finite number > 0"``.
    valid : callable, optional
        Whether a finite number meets the requirement.

    Raises
    ------
    ConfigError
        If it is no finite real number, or is not valid.
    """
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if real else math.nan
    except OverflowError:
        raise ConfigError(f"{name} must be {requirement}, got one beyond float64") from None
    if not (math.isfinite(number) and valid(number)):
        raise ConfigError(f"{name} must be {requirement}, got {value!r}")
    return number


def check_positive(name: str, value: Any, hint: str = "") -> float:
    """Return a finite number above 0 as a float; raise ConfigError otherwise."""
    return check_number(name, value, f"a finite number > 0{hint}", lambda number: number > 0)


def check_not_negative(name: str, value: Any) -> float:
    """Return a finite number from 0 on as a float; raise ConfigError otherwise."""
    return check_number(name, value, "a finite number >= 0", lambda number: number >= 0)


def check_step(step: Any) -> int:
    """Return a step as a Python integer; raise ConfigError if it is not an integer from 0 on."""
    return _integer("step", step, 0)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return a count as a Python integer; raise ConfigError unless it is an integer >= least."""
    return _integer(name, value, least)


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
    return number


def check_flag(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless a value is one of those that are allowed."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_patterns(name: str, value: Any) -> tuple[str, ...]:
    """Return a name pattern, or a list of them, as a tuple; raise ConfigError for anything else."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence):
        raise ConfigError(f"{name} must be a list of name patterns, got {value!r}")
    return tuple(check_pattern(name, pattern) for pattern in patterns)


def check_pattern(name: str, value: Any) -> str:
    """Return a name pattern; raise ConfigError unless it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} needs non-empty strings as name patterns, got {value!r}")
    return value


def check_rule(rule: object, kind: type) -> None:
    """Raise ConfigError unless a rule is a configuration of the right class, AGC or SAM."""
    if not isinstance(rule, kind):
        raise ConfigError(
            f"rule must be an agc.{kind.__name__}, got {short_repr(rule)}; for example "
            f"{_RULES.get(kind.__name__, kind.__name__)}"
        )


_RULES: Final = {"AGC": "AGC(clipping=0.01)", "SAM": "SAM(rho=0.05)"}


def short_repr(value: object) -> str:
    """Return what a message says of a value, in one short line: a model's repr has hundreds."""
    return " ".join(reprlib.repr(value).split())


# --- parameters and gradients ---------------------------------------------------------------------

NO_GRADIENT: Final = "no parameter has a gradient; compute gradients before clipping them"
"""Message of the MissingGradientError of a call by hand that finds no gradient at all (AGC-5)."""


def check_distinct(names: Iterable[str]) -> None:
    """Raise ParameterError if two parameters have the same name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ParameterError(f"two parameters are called {name!r}")
        seen.add(name)


def check_shapes(
    name: str, *, weight: Sequence[int], gradient: Sequence[int], plan: Sequence[int]
) -> None:
    """Raise ShapeError unless a parameter and its gradient have the shape that the plan says."""
    if not tuple(weight) == tuple(gradient) == tuple(plan):
        raise ShapeError(
            f"parameter {name!r} has shape {tuple(weight)}, its gradient {tuple(gradient)}, "
            f"and the plan says {tuple(plan)}"
        )


def check_inexact(what: str, dtype: object, *, inexact: bool) -> None:
    """Raise DTypeError unless a dtype is floating point or complex.

    Parameters
    ----------
    what : str
        Subject of the message: ``"the gradient"``, or ``"parameter 'head.weight': the gradient"``.
    dtype : object
        The dtype, as the message shows it.
    inexact : bool
        Whether it is floating point or complex: each framework knows its own dtypes.
    """
    if not inexact:
        raise DTypeError(f"{what} has dtype {dtype}; AGC needs floating point or complex")


def rows_are_not_units(
    what: str, shape: Sequence[int], units: object, cure: str = ""
) -> UnitsError:
    """Return the error for a row-sparse gradient whose rows are not units (AGC-9).

    Parameters
    ----------
    what : str
        Subject of the message: ``"the gradient"``, or ``"parameter 'embedding': the gradient"``.
    shape : sequence of int
        Shape of the whole gradient.
    units : Units
        Units of the parameter.
    cure : str, optional
        What else could be done in this framework, ending in ``", "``.
    """
    return UnitsError(
        f"{what} of shape {tuple(shape)} is row-sparse, but the rows are not units of {units}; "
        f"{cure}declare row units such as 'v d -> v', or make the gradient dense"
    )


# --- batches of sharpness-aware minimization ------------------------------------------------------


def check_batch_given(fraction: float, microbatches: int, *, given: bool, cure: str) -> None:
    """Raise ConfigError if SAM takes parts of a batch that was not given (SAM-7, SAM-8).

    ``cure`` says how the batch is given in this framework.
    """
    if (fraction != 1 or microbatches != 1) and not given:
        raise ConfigError(
            f"fraction={fraction} and microbatches={microbatches} take parts of the batch: {cure}"
        )


def check_batch(batch: Any) -> None:
    """Raise ConfigError unless a batch is a sequence of arrays that have a first axis (SAM-7)."""
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        cure = "batch=(inputs, targets), and batch=(inputs,) of one alone"
        if isinstance(batch, Mapping):
            cure = "batch=tuple(batch.values()), and a function of as many arguments"
        raise ConfigError(
            f"batch must be a sequence of tensors, got {type(batch).__name__}; give {cure}"
        )
    for index, part in enumerate(batch):
        if not hasattr(part, "__len__") or getattr(part, "ndim", None) == 0:
            raise ConfigError(
                f"batch[{index}] has no first axis to take examples from; leave out of the batch "
                "what every part of it sees whole"
            )


def check_microbatches(microbatches: int, examples: int, of: str = "") -> None:
    """Raise ConfigError if a micro-batch would be empty (SAM-8); ``of`` follows "examples"."""
    if examples < microbatches:
        raise ConfigError(f"microbatches={microbatches} is more than the {examples} examples{of}")
