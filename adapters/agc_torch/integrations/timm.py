"""AGC for models of timm, in place of ``--clip-mode agc``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from agc import AGC
from agc.errors import SelectorError
from agc_torch.optimizer import Handle, attach
from agc_torch.units import unwrap

__all__ = ["attach_agc", "classifier"]


def attach_agc(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    clipping: float = 0.01,
    *,
    max_norm: float | None = None,
    **options: Any,
) -> Handle:
    """Clip inside every step as ``--clip-mode agc --clip-grad 0.01`` does, with the units of AGC.

    The classifier is left out by its name, not by its place among the parameters, and each layer's
    type says what a unit is. Leave ``--clip-grad`` out: timm would clip before the step as well.

    Parameters
    ----------
    optimizer, model, max_norm
        As in :func:`agc_torch.attach`.
    clipping : float
        What ``--clip-grad`` was.
    **options
        Of :class:`agc.AGC`; ``exclude`` adds to the classifier.

    Returns
    -------
    Handle
        Save its ``state_dict()`` beside the optimizer's if ``clipping`` is a schedule.

    Raises
    ------
    ConfigError, SelectorError, ParameterError
        As :func:`agc_torch.attach`.
    """
    heads = [f"{name}.*" for name in classifier(model)]
    exclude = [*options.pop("exclude", ()), *heads]
    rule = AGC(clipping=clipping, exclude=exclude, **options)
    return attach(optimizer, model, rule, max_norm=max_norm)


def classifier(model: nn.Module) -> list[str]:
    """Return the names of a model's classifying layers that have parameters.

    They are those in ``pretrained_cfg["classifier"]``, or what ``get_classifier()`` returns.

    Raises
    ------
    SelectorError
        If the model says neither.
    """
    model = unwrap(model)
    config = getattr(model, "pretrained_cfg", None)
    names = config.get("classifier") if isinstance(config, Mapping) else None
    layers = dict(model.named_modules())
    if names is None and callable(getattr(model, "get_classifier", None)):
        heads = model.get_classifier()
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        names = [name for name, layer in layers.items() if any(layer is head for head in heads)]
    if names is None:
        raise SelectorError(
            f"{type(model).__name__} has neither pretrained_cfg['classifier'] nor get_classifier(), as models of "
            "timm do; use agc_torch.attach(optimizer, model, AGC(exclude=[...]))"
        )
    names = [names] if isinstance(names, str) else list(names)
    chosen = {name: layers[name] for name in names if name in layers}
    return [name for name, layer in chosen.items() if next(layer.parameters(), None) is not None]
