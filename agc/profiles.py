"""Named configurations that reproduce published code, for those who must continue an old run.

``paper`` and ``deepmind`` are about *what is left out*: the paper excludes the final linear layer,
DeepMind's code only that layer's weight. ``deepmind``, ``optax``, ``timm`` and ``pytorch_optimizer``
also bring the *unit rule* of that code: a guess from the rank of an array, wrong for several common
layers and reproduced as it is. ``dreamerv3`` takes whole tensors.

A profile reproduces finite arithmetic in float32 and float64. Where those implementations pass a
poisoned unit, or turn finite float16 gradients into zeros, the specification's policy (AGC-3, AGC-4)
holds instead. So does AGC-2 for a unit at or below its limit, always left as it is: where the limit is
less than ``div_eps`` (a small ``clipping * eps``), optax and timm shrink an exact tie, and
pytorch_optimizer every gradient.

A rank rule reads an array in the layout its own framework has. When the adapter's layout is the other
one, the weights of dense layers and ordinary convolutions are read as if permuted, so that a run can
be ported between stacks; every other array is read as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from agc.config import AGC, SAM
from agc.errors import ConfigError, UnitsError
from agc.units import Units

__all__ = [
    "PROFILES",
    "RANK_RULES",
    "SAM_PROFILES",
    "Layout",
    "RankRule",
    "profile",
    "rank_units",
    "sam_profile",
]

Layout = Literal["out-first", "out-last"]

_HEAD: Final = "@head"
_HEAD_WEIGHT: Final = "@head.weight"

PROFILES: Final[dict[str, AGC]] = {
    "paper": AGC(exclude=[_HEAD]),
    "deepmind": AGC(exclude=[_HEAD_WEIGHT], unit_rule="deepmind", div_eps=1e-6),
    "optax": AGC(unit_rule="optax", div_eps=1e-6),
    "timm": AGC(unit_rule="timm", div_eps=1e-6),
    "pytorch_optimizer": AGC(unit_rule="pytorch_optimizer", div_eps=1e-6),
    "composer": AGC(unit_rule="timm", eps=0.0),
    "dreamerv3": AGC(clipping=0.3, granularity="tensor"),
}
"""Name to configuration. (AGC-6, AGC-12; arXiv:2102.06171 sections 4.1 and A.1)"""


SAM_PROFILES: Final[dict[str, SAM]] = {
    "foret": SAM(rho=0.05),
    "davda54": SAM(rho=0.05, scope="global", eps=1e-12),
    "samsung": SAM(rho=0.5, adaptive=True, eta=0.01, scope="global", eps=1e-16),
    "nfnets": SAM(rho=0.05, fraction=0.2),
}
"""Name to configuration of SAM.

``foret``: arXiv:2010.01412, ascent gradients local to each replica. ``davda54``: the common PyTorch code, as
it behaves under data parallelism. ``samsung``: ASAM's authors' code. ``nfnets``: arXiv:2102.06171 A.4, and rho of
A.5, the only one that the paper states.
"""


def profile(name: str, /, **changes: Any) -> AGC:
    """Return the profile ``name`` with the fields in ``changes`` replaced (see :meth:`AGC.profile`)."""
    if not isinstance(name, str) or name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}; the profiles are {', '.join(PROFILES)}")
    try:
        return replace(PROFILES[name], **changes)
    except TypeError as error:
        raise ConfigError(f"AGC.profile({name!r}, ...): {error}") from None


def sam_profile(name: str, /, **changes: Any) -> SAM:
    """Return the SAM profile ``name`` with the fields in ``changes`` replaced."""
    if not isinstance(name, str) or name not in SAM_PROFILES:
        raise ConfigError(f"unknown profile {name!r}; the profiles are {', '.join(SAM_PROFILES)}")
    try:
        return replace(SAM_PROFILES[name], **changes)
    except TypeError as error:
        raise ConfigError(f"SAM.profile({name!r}, ...): {error}") from None


@dataclass(frozen=True)
class RankRule:
    """A published guess of the reduced axes from an array's shape.

    Attributes
    ----------
    layout : {"out-first", "out-last"}
        How the framework it was written for stores dense and convolution weights.
    reduce : callable
        Shape to the axes that are reduced, or None where that code raises.
    """

    layout: Layout
    reduce: Callable[[tuple[int, ...]], tuple[int, ...] | None]


def _all(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _deepmind(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """``nfnets/optim.py:446``: squeezes to decide on "vector", then looks at the unsqueezed rank."""
    if sum(size != 1 for size in shape) <= 1:
        return _all(shape)
    return {2: (0,), 3: (0,), 4: (0, 1, 2)}.get(len(shape))


def _optax(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """``optax/transforms/_clipping.py``: DeepMind's, and rank 5 since 0.2.7."""
    if len(shape) == 5 and sum(size != 1 for size in shape) > 1:
        return (0, 1, 2, 3)
    return _deepmind(shape)


def _timm(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``timm/utils/agc.py``: everything but the first axis."""
    return _all(shape) if len(shape) <= 1 else tuple(range(1, len(shape)))


def _pytorch_optimizer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``pytorch_optimizer/optimizer/agc.py``: like timm, but rank 3 reduces only axis 1."""
    return (1,) if len(shape) == 3 else _timm(shape)


RANK_RULES: Final[dict[str, RankRule]] = {
    "deepmind": RankRule("out-last", _deepmind),
    "optax": RankRule("out-last", _optax),
    "timm": RankRule("out-first", _timm),
    "pytorch_optimizer": RankRule("out-first", _pytorch_optimizer),
}
"""Name of a unit rule other than "declared" to what it reduces."""

_PLAIN: Final[dict[Layout, Units]] = {
    "out-first": Units("o i ... -> o"),
    "out-last": Units("... i o -> o"),
}


def rank_units(
    rule: str, shape: tuple[int, ...], layout: Layout | None, declared: Units | None
) -> Units:
    """Units that a published rank rule gives an array.

    Parameters
    ----------
    rule : str
        A name in :data:`RANK_RULES`.
    shape : tuple of int
        Shape of the parameter as stored.
    layout : {"out-first", "out-last"} or None
        How the framework at hand stores dense and convolution weights, if there is one convention.
    declared : Units or None
        What the layer type says, used only to tell whether this is a dense or convolution weight.

    Raises
    ------
    UnitsError
        If the published code raises for this rank.
    """
    found = RANK_RULES[rule]
    rank = len(shape)
    order = list(range(rank))
    if rank >= 2 and layout not in (None, found.layout) and _is_plain(declared, rank, layout):
        spatial = range(2, rank) if layout == "out-first" else range(rank - 2)
        order = (
            [*spatial, 1, 0] if layout == "out-first" else [rank - 1, rank - 2, *spatial]
        )  # order[k]: the stored axis that stands at place k in the rule's own layout
    reduced = found.reduce(tuple(shape[axis] for axis in order))
    if reduced is None:
        raise UnitsError(
            f"the unit rule {rule!r} is not defined for the shape {shape}; "
            "declare units for this parameter, or use unit_rule='declared'"
        )
    stored = {order[axis] for axis in reduced}
    names = [f"a{axis}" for axis in range(rank)]
    kept = [name for axis, name in enumerate(names) if axis not in stored]
    return Units(f"{' '.join(names) if kept else '...'} -> {' '.join(kept)}")


def _is_plain(declared: Units | None, rank: int, layout: Layout | None) -> bool:
    """Tell whether a parameter is the weight of a dense layer or ordinary convolution."""
    if layout is None:
        return False
    if declared is None:
        return rank in (2, 4, 5)
    probe = tuple(range(2, rank + 2))
    try:
        return declared.bind(probe).reduce == _PLAIN[layout].bind(probe).reduce
    except UnitsError:
        return False
