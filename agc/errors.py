"""Every error this project raises on purpose, under one base class."""

from __future__ import annotations

__all__ = [
    "AGCError",
    "AmbiguousUnitsError",
    "ConfigError",
    "DTypeError",
    "FormatError",
    "MissingGradientError",
    "MissingPackageError",
    "NonFiniteError",
    "OrderError",
    "ParameterError",
    "SelectorError",
    "ShapeError",
    "UnitsError",
    "UnitsWarning",
    "WeightsWarning",
]


class AGCError(Exception):
    """Base class of every error raised on purpose by this project."""


class ConfigError(AGCError, ValueError):
    """A hyper-parameter has a value that the specification does not define."""


class SelectorError(ConfigError):
    """A parameter-name pattern matches no parameter, or a parameter matches none."""


class UnitsError(AGCError, ValueError):
    """A units pattern cannot be parsed, or does not fit the shape it is used on."""


class AmbiguousUnitsError(UnitsError):
    """Nothing says which axes of some parameters name units; the message lists the parameters."""


class UnitsWarning(UserWarning):
    """The units of some parameters follow the framework's layout convention, not a layer's type."""


class WeightsWarning(UserWarning):
    """A file of weights leaves open what they are for; the message has what was assumed."""


class ShapeError(AGCError, ValueError):
    """An array has the wrong shape: a gradient, for example, not that of its parameter."""


class DTypeError(AGCError, TypeError):
    """A gradient or parameter is neither floating point nor complex."""


class NonFiniteError(AGCError, ArithmeticError):
    """A norm under the policy ``"raise"`` (AGC-4), or a model's output, is NaN or infinite."""


class MissingGradientError(AGCError, ValueError):
    """No parameter has a gradient, so there is nothing to clip."""


class OrderError(AGCError, RuntimeError):
    """Something was called at a moment when it cannot be done, such as saving perturbed weights."""


class MissingPackageError(AGCError, ImportError):
    """An optional package that a feature needs is not installed."""


class ParameterError(AGCError, ValueError):
    """An optimizer's, plan's or caller's parameters are not those of the model."""


class FormatError(AGCError, ValueError):
    """A file or document is truncated, of another version, or not what it claims to be."""
