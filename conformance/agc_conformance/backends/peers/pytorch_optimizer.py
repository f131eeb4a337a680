"""pytorch_optimizer's ``agc`` (kozistr), called by its Ranger21 and Ranger25, and its ``SAM``.

``SAM`` has davda54's formula.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

from agc import AGC
from agc_conformance.backend import (
    Array,
    Examples,
    Outcome,
    Problem,
    SharpnessOutcome,
    SharpnessProblem,
    SharpnessTask,
    Unavailable,
    Unsupported,
)
from agc_conformance.backends.peers import Peer

__all__ = ["PytorchOptimizerPeer", "backend"]


class PytorchOptimizerPeer(Peer):
    """Clips one tensor after another, out of place; SAM wraps an optimizer's class.

    SAM has a fixed epsilon, 1e-12, even if a rule asks for none. Its ``adaptive`` has no eta and
    scales vectors too.
    """

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

        from agc_conformance.backends.torch.arrays import to_gradient, to_tensor

        threshold = self.threshold(problem.rule)
        return Outcome(
            {
                name: None
                if gradient is None
                else to_gradient(
                    agc(
                        to_tensor(problem.parameters[name]),
                        to_tensor(gradient),
                        agc_eps=problem.rule.eps,
                        agc_clip_val=threshold,
                    )
                )
                for name, gradient in problem.gradients.items()
            }
        )

    def sharpen(self, problem: SharpnessProblem) -> SharpnessOutcome:
        """Take one step with an optimizer that records the gradients and moves nothing."""
        from agc_conformance.backends.torch.arrays import Recorder, to_array

        parameters = _parameters(problem)
        sam = self._sam(problem, parameters, Recorder)
        _step(sam, parameters, problem.examples)
        received = sam.base_optimizer.received
        return SharpnessOutcome(
            dict(zip(parameters, received, strict=True)),
            {name: to_array(p) for name, p in parameters.items()},
        )

    def sharpness_trajectory(self, task: SharpnessTask) -> list[Mapping[str, Array]]:
        """Wrap ``torch.optim.SGD``, with ``agc`` in front of it if that is asked for."""
        import torch

        from agc_conformance.backends.torch.arrays import to_array

        problem, optimizer = task.problem, task.optimizer
        if optimizer.decoupled:
            raise Unsupported("torch.optim.SGD has no decoupled weight decay")

        def start() -> tuple[dict[str, Any], Any]:
            parameters = _parameters(problem)
            sam = self._sam(
                problem,
                parameters,
                torch.optim.SGD,
                lr=optimizer.lr,
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
                weight_decay=optimizer.weight_decay,
            )
            if problem.clipping is not None:
                self._clip_before(sam.base_optimizer, problem.clipping)
            return parameters, sam

        parameters, sam = start()
        trajectory: list[Mapping[str, Array]] = []
        for index, examples in enumerate(task.batches):
            if index == task.restart:
                file = io.BytesIO()
                torch.save((parameters, sam.state_dict()), file)
                saved, state = torch.load(io.BytesIO(file.getvalue()))
                parameters, sam = start()
                for name, parameter in parameters.items():
                    parameter.data.copy_(saved[name])
                sam.load_state_dict(state)
            _step(sam, parameters, examples)
            trajectory.append({n: to_array(p) for n, p in parameters.items()})
        return trajectory

    def _sam(
        self, problem: SharpnessProblem, parameters: Mapping[str, Any], base: Any, **options: Any
    ) -> Any:
        from pytorch_optimizer import SAM

        rho, rule = self.radius(problem.rule), problem.rule
        epsilon = {"perturb_eps": rule.eps} if rule.eps else {}
        return SAM(
            list(parameters.values()), base, rho=rho, adaptive=rule.adaptive, **epsilon, **options
        )

    def _clip_before(self, optimizer: Any, rule: AGC) -> None:
        """Clip by ``agc`` before every step of an optimizer."""
        from pytorch_optimizer.optimizer.agc import agc

        threshold = self.threshold(rule)

        def clip(*_: Any) -> None:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = agc(
                    parameter.detach(), parameter.grad, agc_eps=rule.eps, agc_clip_val=threshold
                )

        optimizer.register_step_pre_hook(clip)


def _parameters(problem: SharpnessProblem) -> dict[str, Any]:
    import torch

    from agc_conformance.backends.torch.arrays import to_tensor

    return {name: torch.nn.Parameter(to_tensor(w)) for name, w in problem.parameters.items()}


def _step(sam: Any, parameters: Mapping[str, Any], examples: Examples) -> None:
    """Take a step as its documentation says: the caller computes the first gradients."""
    from agc_conformance.backends.torch.arrays import mean_loss, to_tensor

    curvatures = {name: to_tensor(array) for name, array in examples.curvatures.items()}
    centers = {name: to_tensor(array) for name, array in examples.centers.items()}

    def closure() -> Any:
        sam.zero_grad()
        loss = mean_loss(parameters, curvatures, centers)
        loss.backward()
        return loss

    closure()
    sam.step(closure)


backend = PytorchOptimizerPeer
