"""PyTorch's part of ``agc classify`` and of what trains; see :mod:`agc.cli.frameworks`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from agc import AGC
from agc.cli.frameworks import Contest
from agc.nfnet import Options
from agc_torch.nfnet import NFNet
from agc_torch.recipe import sgd_nfnet
from agc_torch.train import trainer
from agc_torch.weights import from_neutral

__all__ = ["classifier", "contest", "trainer"]


def classifier(options: Options, arrays: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an NFNet as a function; see :meth:`agc.cli.frameworks.Framework.classifier`."""
    model = NFNet(options).eval()
    from_neutral(model, arrays)

    def logits(images: Any) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    return logits


def contest(options: Options, images: Any, labels: Any) -> Contest:
    """Return steps to be timed; see :meth:`agc.cli.frameworks.Framework.contest`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = (torch.from_numpy(array).to(device) for array in (images, labels))
    x = x.permute(0, 3, 1, 2)

    def step(model: NFNet, rule: AGC) -> Callable[[], float]:
        model.to(device, memory_format=torch.channels_last)
        optimizer = sgd_nfnet(model, lr=1e-3, rule=rule)

        def run() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return float(loss.detach())  # a GPU comes to this after the step

        return run

    facts = {"torch": str(torch.__version__), "device": str(device)}
    model, none = NFNet(options), AGC(clipping=None)
    return Contest(
        facts | {"threads": torch.get_num_threads()},
        {
            "twin": step(model.batch_normalised(), none),
            "plain": step(copy.deepcopy(model), none),
            "clipped": step(model, AGC.profile("deepmind")),
        },
    )
