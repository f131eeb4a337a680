"""PyTorch's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from agc.nfnet import Options
from agc_torch.nfnet import NFNet
from agc_torch.train import trainer
from agc_torch.weights import from_neutral

__all__ = ["classifier", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = NFNet(options).eval()
    from_neutral(model, arrays)

    def logits(images: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    return logits
