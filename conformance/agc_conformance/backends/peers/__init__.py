"""Other people's implementations as subjects: the same vectors, and a report of what each meets.

A subject is looked at, not held to the specification. It gets the arrays and does with them what it does
for its users; units are its own guess, so those that a vector declares are not handed over. An option
that it has no argument for is *unsupported*.
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
        """Return the clipping threshold, if that and ``eps`` are all that a rule asks for.

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
        """Return rho, if that, ``adaptive`` and ``eps`` are all that a rule asks for.

        The scope does not matter: a peer is asked in one process, where both are the same.

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
