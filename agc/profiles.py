"""Published configurations as plain data, for those who must continue an old run.

``paper`` and ``deepmind`` are about *what is left out*: the paper excludes the final linear layer,
DeepMind's code only that layer's weight. ``deepmind``, ``optax``, ``timm`` and
``pytorch_optimizer`` also bring the *unit rule* of that code (:mod:`agc.rank_rules`). ``dreamerv3``
takes whole tensors.

A profile reproduces finite arithmetic in float32 and float64. Where those implementations pass a
poisoned unit, or turn finite float16 gradients into zeros, the specification's policy (AGC-3,
AGC-4) holds instead. So does AGC-2 for a unit at or below its limit, always left as it is: where
the limit is less than ``div_eps`` (a small ``clipping * eps``), optax and timm shrink an exact tie,
and pytorch_optimizer every gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["PROFILES", "SAM_PROFILES"]

PROFILES: Final[Mapping[str, Mapping[str, Any]]] = {
    "paper": {"exclude": ["@head"]},
    "deepmind": {"exclude": ["@head.weight"], "unit_rule": "deepmind", "div_eps": 1e-6},
    "optax": {"unit_rule": "optax", "div_eps": 1e-6},
    "timm": {"unit_rule": "timm", "div_eps": 1e-6},
    "pytorch_optimizer": {"unit_rule": "pytorch_optimizer", "div_eps": 1e-6},
    "composer": {"unit_rule": "timm", "eps": 0.0},
    "dreamerv3": {"clipping": 0.3, "granularity": "tensor"},
}
"""Name to the arguments of :class:`agc.AGC` (AGC-6, AGC-12; arXiv:2102.06171, 4.1 and A.1)."""

SAM_PROFILES: Final[Mapping[str, Mapping[str, Any]]] = {
    "foret": {"rho": 0.05},
    "davda54": {"rho": 0.05, "scope": "global", "eps": 1e-12},
    "samsung": {"rho": 0.5, "adaptive": True, "eta": 0.01, "scope": "global", "eps": 1e-16},
    "nfnets": {"rho": 0.05, "fraction": 0.2},
}
"""Name to the arguments of :class:`agc.SAM`.

``foret``: arXiv:2010.01412, ascent gradients local to each replica. ``davda54``: the common PyTorch
code, as it behaves under data parallelism. ``samsung``: ASAM's authors' code. ``nfnets``:
arXiv:2102.06171 A.4, and rho of A.5, the only one that the paper states.
"""
