"""The frameworks that commands run in: the modules of the entry-point group ``agc.frameworks``.

The commands know no framework. Each adapter registers one module, which has the functions of
:class:`Framework`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Final, NamedTuple, Protocol

import numpy.typing as npt

from agc.errors import ConfigError
from agc.nfnet import Options
from agc.packages import missing
from agc.recipe import Recipe
from agc.training import Launch, Trainer

__all__ = ["Contest", "Framework", "framework_names", "load_framework"]

Array = npt.NDArray[Any]

_GROUP: Final = "agc.frameworks"


class Contest(NamedTuple):
    """Steps whose times are compared.

    Attributes
    ----------
    facts : mapping of str to JSON data
        Framework, versions and device.
    steps : mapping of str to callable
        Each makes a step on the same batch, forward, backward and optimizer, and returns the loss
        when all is computed: ``"clipped"`` of an NFNet with AGC, ``"plain"`` of one without, and
        ``"twin"`` of its batch-normalised twin without AGC. All have the same initial weights.
    """

    facts: Mapping[str, Any]
    steps: Mapping[str, Callable[[], float]]


class Framework(Protocol):
    """What a framework's module provides."""

    def classifier(self, options: Options, arrays: Mapping[str, Array]) -> Callable[[Array], Array]:
        """Return a function from images, shape (n, h, w, 3), to logits in evaluation mode.

        Parameters
        ----------
        options : Options
            Which NFNet.
        arrays : mapping of str to array
            Its parameters in the neutral form.

        Raises
        ------
        ParameterError
            If the arrays are not the model's.
        """
        ...

    def trainer(self, recipe: Recipe, launch: Launch) -> Trainer:
        """Return a training of a recipe; absent where that is not offered as yet.

        Raises
        ------
        ConfigError
            If the recipe asks for what the framework cannot do, or there is no such device.
        """
        ...

    def contest(self, options: Options, images: Array, labels: Array) -> Contest:
        """Return steps of an NFNet and its twin; absent where there is no twin as yet.

        Parameters
        ----------
        options : Options
            Which NFNet.
        images : float32 array, shape (n, h, w, c)
        labels : integer array, shape (n,)
        """
        ...


def framework_names() -> list[str]:
    """Return the names of all frameworks that are registered, installed or not."""
    return sorted(point.name for point in entry_points(group=_GROUP))


def load_framework(name: str, what: str, extra: str) -> Framework:
    """Import a framework's module.

    Parameters
    ----------
    name : str
        A registered name.
    what : str
        Who needs the framework, for the message.
    extra : str
        Extra of this distribution, or several with commas, that installs what is needed.

    Raises
    ------
    ConfigError
        If no framework is registered under this name.
    MissingPackageError
        If the framework is not installed; the message names the extra.
    """
    points = list(entry_points(group=_GROUP, name=name))
    if not points:
        raise ConfigError(
            f"unknown framework {name!r}; the frameworks are {', '.join(framework_names())}"
        )
    try:
        module: Framework = points[0].load()
    except ImportError as error:
        raise missing(what, error, extra) from error
    return module
