"""The training recipe of NFNets, from PyTorch's own parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from agc import AGC
from agc.nfnet import MOMENTUM, WEIGHT_DECAY, check_recipe, decays
from agc_torch.optimizer import attach
from agc_torch.shards import is_dtensor
from agc_torch.units import named_parameters

__all__ = ["sgd_nfnet"]


def sgd_nfnet(
    model: nn.Module,
    lr: float | torch.Tensor,
    *,
    momentum: float = MOMENTUM,
    weight_decay: float = WEIGHT_DECAY,
    rule: AGC | None = None,
    max_norm: float | None = None,
    **options: Any,
) -> torch.optim.SGD:
    """Return DeepMind's optimizer for NFNets: ``torch.optim.SGD`` with AGC attached (AGC-7).

    In each step, gradients are clipped, then weight decay is added to those of matrices and kernels
    (not of gains and biases), then comes Nesterov's momentum, whose buffer does not contain the
    learning rate.

    Parameters
    ----------
    model : Module
        An NFNet, or any model that declares its classifier by ``agc_head``.
    lr : float or Tensor
        Learning rate; the recipe has 0.1 for each 256 images of a batch.
    momentum : float
        0 switches momentum off.
    weight_decay : float
        Coupled, as in the paper. Parameters of rank 0 and 1 are not decayed.
    rule : AGC, optional
        ``AGC.profile("deepmind")`` if None: clipping 0.01, and all but the classifier's weight is
        clipped.
    max_norm : float, optional
        As in :func:`agc_torch.attach`.
    **options
        Of ``torch.optim.SGD``, such as ``fused=True``.

    Returns
    -------
    torch.optim.SGD
        Two parameter groups: what is decayed, and what is not; each twice if some parameters are
        ``DTensor``. :func:`agc_torch.attached` returns the handle, with the plan and the telemetry.

    Raises
    ------
    SelectorError
        If the model does not declare its classifier.
    ConfigError
        If ``momentum``, ``weight_decay`` or ``max_norm`` is not allowed.

    Examples
    --------
    >>> from agc_torch import attached, nfnet
    >>> attached(sgd_nfnet(nfnet("tiny"), lr=0.1)).plan.count
    4855
    """
    check_recipe(momentum, weight_decay)
    tensors = [tensor for tensor in named_parameters(model).values() if tensor.requires_grad]
    groups: list[dict[str, Any]] = []
    # PyTorch's operations on many tensors take DTensors or others, not both.
    for sharded in sorted({is_dtensor(p) for p in tensors}) or [False]:
        mine = [p for p in tensors if is_dtensor(p) == sharded]
        groups += [
            {"params": [p for p in mine if decays(p.dim())], "weight_decay": weight_decay},
            {"params": [p for p in mine if not decays(p.dim())], "weight_decay": 0.0},
        ]
    settings = {"nesterov": momentum > 0, **options}
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, **settings)
    rule = AGC.profile("deepmind") if rule is None else rule
    attach(optimizer, model, rule, max_norm=max_norm)
    return optimizer
