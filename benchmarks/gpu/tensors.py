"""Parameters and gradients in PyTorch, and what its stages share."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agc_torch import fused
from benchmarks.gpu.conditions import COPIED, drawn, louder, samples, shapes_of
from benchmarks.gpu.race import Clock, Contestant, CudaClock, DoesNotApply, HostClock
from benchmarks.gpu.results import Job
from benchmarks.shapes import parameters

__all__ = ["Tensors", "clock_of", "copy", "module_of", "numbers", "use_triton"]


def clock_of(job: Job) -> Clock:
    """Return the device's clock, and let a fall-back from Triton be an error.

    Raises
    ------
    DoesNotApply
        If PyTorch sees no GPU, and one is asked for.
    """
    warnings.filterwarnings("error", message=fused.DO_NOT_COMPILE)
    if job.device == "cpu":
        return HostClock()
    if not torch.cuda.is_available():
        raise DoesNotApply(f"PyTorch {torch.__version__} sees no GPU")
    return CudaClock()


def use_triton(job: Job, *, wanted: bool) -> None:
    """Turn the kernels of AGC and SAM on or off.

    Raises
    ------
    RuntimeError
        If they are wanted on a GPU, and PyTorch came without Triton.
    """
    os.environ["AGC_TORCH_TRITON"] = "1" if wanted else "0"
    if job.device == "cuda" and wanted and not fused.available(torch.device("cuda")):
        raise RuntimeError("PyTorch came without Triton")


def numbers(tensor: Tensor) -> npt.NDArray[np.float64]:
    """Return a tensor's values in float64."""
    return np.asarray(tensor.detach().double().cpu())


def module_of(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return a module that has nothing but parameters, under their names."""
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, leaf = name.split(".")
        module = root
        for key in path:
            if key not in module._modules:
                module.add_module(key, nn.Module())
            module = module.get_submodule(key)
        module.register_parameter(leaf, parameter)
    return root


def copy(job: Job) -> Contestant:
    """Copy a tensor much larger than any cache."""
    source, target = _copied(job)
    size = source.numel() * source.itemsize
    return Contestant(lambda: target.copy_(source), check=lambda: {"copied_bytes": size})


@cache
def _copied(job: Job) -> tuple[Tensor, Tensor]:
    source = torch.ones((1 << 16 if job.tiny else COPIED) // 4, device=job.device)
    return source, torch.empty_like(source)


class Tensors:
    """Parameters of a model's shapes, with gradients that are put back before every call.

    Parameters
    ----------
    model : str
        A name in :data:`benchmarks.shapes.MODELS`.
    dtype : str
        Of weights and gradients.
    job : Job
        Where, and how large.

    Attributes
    ----------
    parameters : dict of name to Parameter
        Their ``grad`` are the same tensors all the time, as a CUDA graph needs it.
    gradients : list of Tensor
        Those tensors.
    clipped : float
        Share of the elements whose units are clipped.
    """

    def __init__(self, model: str, dtype: str, job: Job) -> None:
        self.shapes = shapes_of(model, tiny=job.tiny)
        self.parameters: dict[str, nn.Parameter] = {}
        self._loud: list[Tensor] = []
        for name, arrays in drawn(tuple(self.shapes.items())).items():
            weight, gradient = (torch.from_numpy(array).to(job.device) for array in arrays)
            self.parameters[name] = nn.Parameter(weight.to(getattr(torch, dtype)))
            self._loud.append(gradient)
        self.set_condition("all")
        self.gradients = [gradient.clone() for gradient in self._given]
        self.put_back()

    @property
    def size(self) -> int:
        """Bytes of the weights, and of the gradients."""
        return sum(p.numel() * p.itemsize for p in self.parameters.values())

    def set_condition(self, condition: str) -> None:
        """Choose which units are clipped from now on."""
        clipped = 0.0
        self._given: list[Tensor] = []
        for seed, (name, loud) in enumerate(zip(self.shapes, self._loud, strict=True)):
            factor = louder(self.shapes[name], 0, condition, seed)
            clipped += float((factor == 1).mean()) * math.prod(self.shapes[name])
            given = loud * torch.from_numpy(np.asarray(factor)).to(loud.device)
            self._given.append(given.to(self.parameters[name].dtype))
        self.clipped: float = clipped / parameters(self.shapes)

    def put_back(self) -> None:
        """Give every parameter its gradient as it was."""
        torch._foreach_copy_(self.gradients, self._given)
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient

    def sampled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return weight and gradient, as it was, of the tensors that are compared in detail."""
        given = dict(zip(self.parameters, self._given, strict=True))
        return {name: (self.parameters[name], given[name]) for name in samples(self.shapes)}
