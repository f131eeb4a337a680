"""NFNets: forward, gradients, training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from agc.config import AGC
from agc_conformance.backend import (
    ModelForward,
    ModelGradients,
    ModelProblem,
    ModelRecipe,
    ModelStep,
)
from agc_conformance.backends.torch.arrays import to_array, to_tensor
from agc_conformance.backends.torch.device import Device
from agc_torch.clip import adaptive_clip_grad_
from agc_torch.nfnet import NFBlock, NFNet, nfnet
from agc_torch.optimizer import attach
from agc_torch.recipe import sgd_nfnet
from agc_torch.units import plan
from agc_torch.weights import from_neutral, to_neutral

__all__ = ["NFNets"]

Array = npt.NDArray[Any]


class NFNets(Device):
    """:func:`agc_torch.nfnet`."""

    def model_forward(self, problem: ModelProblem) -> ModelForward:
        """Run the model, with a hook on every block."""
        model, images = _model(problem, self.device), _images(problem, self.device)
        outputs: dict[str, Array] = {}
        for name, module in model.named_modules():
            if problem.outputs and (name == "stem" or isinstance(module, NFBlock)):
                module.register_forward_hook(
                    lambda _, __, out, name=name: outputs.update({name: _channels_last(out)})
                )
        with torch.no_grad(), torch.random.fork_rng(), self.exact():
            torch.manual_seed(0)
            logits = to_array(model(images))
            signals = model.signals(images) if problem.outputs else {}
        arrays = {kind: to_array(value) for kind, value in signals.items()}
        return ModelForward(logits, outputs, arrays)

    def model_gradients(self, problem: ModelProblem) -> ModelGradients:
        """Run the model forward and backward, and clip by :func:`agc_torch.adaptive_clip_grad_`."""
        model, rule = _model(problem, self.device), AGC.profile("deepmind")
        with self.exact():
            loss = _backward(model, _images(problem, self.device), problem)
            raw = _gradients(model)
            adaptive_clip_grad_(model, rule)
        return ModelGradients(loss, raw, _gradients(model), plan(model, rule))

    def model_training(self, problem: ModelProblem, recipe: ModelRecipe) -> Iterator[ModelStep]:
        """Step :func:`agc_torch.sgd_nfnet`, or ``torch.optim.SGD`` with AGC attached."""
        model, images = _model(problem, self.device), _images(problem, self.device)
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "nfnet":
            optimizer = sgd_nfnet(model, recipe.rates[0])
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), recipe.rates[0], momentum=recipe.momentum
            )
            attach(optimizer, model, AGC.profile("deepmind"))
        for rate in recipe.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            with self.exact():
                optimizer.zero_grad()
                loss = _backward(model, images, problem)
                optimizer.step()
            yield ModelStep(loss, to_neutral(model))


def _model(problem: ModelProblem, device: str) -> NFNet:
    model = nfnet(
        problem.variant,
        len(problem.parameters["head.bias"]),
        dropout=0.0,
        stochastic_depth=problem.stochastic_depth,
        in_channels=problem.images.shape[3],
        device=device,
        dtype=getattr(torch, problem.dtype),
    )
    from_neutral(model, problem.parameters)
    model.train(problem.stochastic_depth is not None)
    return model


def _images(problem: ModelProblem, device: str) -> Tensor:
    images: Tensor = to_tensor(problem.images, device)
    return images.permute(0, 3, 1, 2)


def _backward(model: NFNet, images: Tensor, problem: ModelProblem) -> float:
    labels = torch.from_numpy(problem.labels).to(images.device)
    loss = F.cross_entropy(model(images), labels, label_smoothing=problem.smoothing)
    loss.backward()
    return float(loss.detach())


def _gradients(model: NFNet) -> dict[str, Array]:
    """Return gradients in the neutral layout: HWIO and IO, where PyTorch has OIHW and OI."""
    arrays = {}
    for name, parameter in model.named_parameters():
        gradient = to_array(parameter.grad)
        axes = (2, 3, 1, 0) if gradient.ndim == 4 else None  # None reverses the axes
        arrays[name] = np.array(gradient.transpose(axes), order="C")
    return arrays


def _channels_last(images: Tensor) -> Array:
    return to_array(images.permute(0, 2, 3, 1))
