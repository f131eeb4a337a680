"""timm's ``adaptive_clip_grad`` (``timm/utils/agc.py``), the most used AGC in PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, ClassVar

from agc_conformance.backend import (
    Array,
    Gradient,
    Optimizer,
    Outcome,
    Problem,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.peers import Peer

__all__ = ["TimmPeer", "backend", "load"]


def load() -> Any:
    """Return the module ``timm/utils/agc.py`` of the installed timm, and nothing else of timm.

    ``import timm`` needs torchvision, which this file does not.

    Raises
    ------
    Unavailable
        If timm is not installed.
    """
    try:
        path = distribution("timm").locate_file("timm/utils/agc.py")
    except PackageNotFoundError:
        raise Unavailable("timm is not installed; install it with --no-deps") from None
    spec = importlib.util.spec_from_file_location("timm_utils_agc", str(path))
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TimmPeer(Peer):
    """Clips every parameter that has a gradient, in place, as ``--clip-mode agc`` does."""

    name: ClassVar[str] = "timm"
    layout: ClassVar[Any] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )
    packages: ClassVar[tuple[str, ...]] = ("timm", "torch")

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self._agc = load()

    def clip(self, problem: Problem) -> Outcome:
        """Clip a problem's gradients."""
        import torch

        from agc_conformance.backends.torch.arrays import gradient_arrays, to_tensor

        threshold = self.threshold(problem.rule)
        parameters = {}
        for name, weight in problem.parameters.items():
            gradient = problem.gradients.get(name)
            parameters[name] = torch.nn.Parameter(to_tensor(weight))
            parameters[name].grad_dtype = None  # accept a gradient of any dtype
            parameters[name].grad = None if gradient is None else to_tensor(gradient)
        self._agc.adaptive_clip_grad(
            list(parameters.values()), clip_factor=threshold, eps=problem.rule.eps
        )
        return Outcome(gradient_arrays(parameters))

    def trajectory(
        self, problem: Problem, optimizer: Optimizer, gradients: Sequence[Mapping[str, Gradient]]
    ) -> list[Mapping[str, Array]]:
        """Clip, then step ``torch.optim.SGD``, as timm's training script does."""
        import torch

        from agc_conformance.backends.torch.arrays import plain_sgd, to_array, to_tensor

        if optimizer.decoupled:
            raise Unsupported("torch.optim.SGD has no decoupled weight decay")
        threshold = self.threshold(problem.rule)
        parameters = {n: torch.nn.Parameter(to_tensor(w)) for n, w in problem.parameters.items()}
        sgd = plain_sgd(parameters, optimizer)
        trajectory: list[Mapping[str, Array]] = []
        for step in gradients:
            for name, parameter in parameters.items():
                gradient = step.get(name)
                parameter.grad = None if gradient is None else to_tensor(gradient)
            self._agc.adaptive_clip_grad(
                list(parameters.values()), clip_factor=threshold, eps=problem.rule.eps
            )
            sgd.step()
            trajectory.append({n: to_array(p) for n, p in parameters.items()})
        return trajectory


backend = TimmPeer
