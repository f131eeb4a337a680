"""Third-party implementations as subjects: the report says which vectors each of them passes.

A subject is not held to the specification. It gets the arrays and does what it does for its users.
It guesses the units itself, so those that a vector declares are not handed over. An option for
which it has no argument is *unsupported*.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import ClassVar

from agc import AGC, SAM
from agc_conformance.backend import Backend, Unsupported

__all__ = ["Peer"]


class Peer(Backend):
    """Base class of subjects.

    Attributes
    ----------
    role : str
        ``"subject"``.
    packages : tuple of str
        Distributions whose versions the report shows.
    """

    role: ClassVar[str] = "subject"
    packages: ClassVar[tuple[str, ...]] = ()

    def versions(self) -> dict[str, str]:
        """Return package name to version, for the report."""
        return {name: version(name) for name in self.packages}

    def threshold(self, rule: AGC) -> float:
        """Return the clipping threshold, if a rule asks only for that and ``eps``.

        Raises
        ------
        Unsupported
            If the rule asks for more.
        """
        asked = {
            "clipping that is not one number": not isinstance(rule.clipping, float),
            "exclude": bool(rule.exclude),
            f"nonfinite={rule.nonfinite!r}": rule.nonfinite != "propagate",
            f"granularity={rule.granularity!r}": rule.granularity != "unit",
            f"unit_rule={rule.unit_rule!r}": rule.unit_rule not in ("declared", self.name),
        }
        self.lacks(asked)
        return rule.clipping  # type: ignore[return-value]

    def radius(self, rule: SAM) -> float:
        """Return rho, if a rule asks only for that, ``adaptive`` and ``eps``.

        The scope does not matter: a peer runs in one process, where both scopes are the same.

        Raises
        ------
        Unsupported
            If the rule asks for more.
        """
        asked = {
            "rho that is not one number": callable(rule.rho),
            f"fraction={rule.fraction}": rule.fraction != 1,
            f"microbatches={rule.microbatches}": rule.microbatches != 1,
            f"every={rule.every}": rule.every != 1,
            "only and exclude": bool(rule.only or rule.exclude),
            f"nonfinite={rule.nonfinite!r}": rule.nonfinite != "skip_step",
        }
        self.lacks(asked)
        return rule.rho  # type: ignore[return-value]

    def lacks(self, asked: Mapping[str, bool]) -> None:
        """Raise Unsupported for the first option that is asked for."""
        for option, there in asked.items():
            if there:
                raise Unsupported(f"{self.name} has no argument for {option}")
