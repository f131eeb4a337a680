"""A probe that tells whether a training step is sharpness-aware minimization (SAM-14)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from agc.verification import Verification
from agc_torch.passes import forget_weights

__all__ = ["Verification", "verify_sam"]


def verify_sam(
    step: Callable[[], Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[], Any],
) -> Verification:
    """Tell whether a training step really takes its gradient at the perturbed weights (SAM-14).

    Works on any implementation, since it only watches the model and the optimizer. One step is
    taken and undone on the weights; the optimizer's own state is left advanced, so probe a scratch
    copy or before training.

    Parameters
    ----------
    step : callable
        Performs one complete training step of the SAM under test on ``model`` with ``optimizer``.
    model : nn.Module
        The model; deterministic, or with the same random numbers in every pass.
    optimizer : torch.optim.Optimizer
        The optimizer that moves the weights (for a wrapper, the one inside).
    gradient : callable
        Computes the plain gradients of the same batch at the current weights.

    Returns
    -------
    Verification
        ``.ok``, and the numbers behind it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    visited: list[list[Tensor]] = []
    received: list[list[Tensor]] = []
    seen: list[list[Tensor]] = []

    def snapshot() -> list[Tensor]:
        return [p.detach().clone() for p in parameters]

    def at_step(*_: Any) -> None:
        received.append([_gradient_or_zero(p) for p in parameters])
        seen.append(snapshot())

    with ExitStack() as hooks:
        for handle in (
            model.register_forward_pre_hook(lambda *_: visited.append(snapshot())),
            optimizer.register_step_pre_hook(at_step),
        ):
            hooks.callback(handle.remove)
        start = snapshot()
        step()
    passes = list(visited)

    def gradient_at(point: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(parameters, point, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        forget_weights(model)  # the probe may stand inside autocast
        gradient()
        return _flatten([_gradient_or_zero(p) for p in parameters])

    last = passes[-1] if passes else start
    uphill = gradient_at(start)
    wanted = gradient_at(last)
    gradient_at(start)
    moved = _flatten(last) - _flatten(start)
    got = _flatten(received[-1]) if received else torch.zeros_like(wanted)
    length = float(moved.norm() * uphill.norm())
    return Verification(
        passes=len(passes),
        perturbation=float(moved.norm()),
        cosine=float(moved @ uphill) / length if length else 0.0,
        gradient_error=float((got - wanted).norm() / wanted.norm().clamp_min(1e-300)),
        restored=bool(seen)
        and all(torch.equal(a, b) for a, b in zip(seen[-1], start, strict=True)),
    )


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _gradient_or_zero(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
