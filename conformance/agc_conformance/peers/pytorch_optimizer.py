"""pytorch_optimizer's ``agc`` (kozistr), which its Ranger21 and Ranger25 call."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

from agc.backend import Outcome, Problem, Unavailable
from agc_conformance.peers import Peer

__all__ = ["PytorchOptimizerPeer", "backend"]


class PytorchOptimizerPeer(Peer):
    """Clips one tensor after another, out of place."""

    name: ClassVar[str] = "pytorch_optimizer"
    layout: ClassVar[Any] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )
    packages: ClassVar[tuple[str, ...]] = ("pytorch_optimizer", "torch")

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        if find_spec("pytorch_optimizer") is None:
            raise Unavailable("pytorch_optimizer is not installed")

    def clip(self, problem: Problem) -> Outcome:
        """Clip a problem's gradients."""
        from pytorch_optimizer.optimizer.agc import agc

        from agc_conformance.peers._torch import to_numpy, to_torch

        threshold = self.threshold(problem.rule)
        return Outcome(
            {
                name: None
                if gradient is None
                else to_numpy(
                    agc(
                        to_torch(problem.parameters[name]),
                        to_torch(gradient),
                        agc_eps=problem.rule.eps,
                        agc_clip_val=threshold,
                    )
                )
                for name, gradient in problem.gradients.items()
            }
        )


backend = PytorchOptimizerPeer
