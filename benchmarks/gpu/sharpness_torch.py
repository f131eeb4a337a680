"""SAM in PyTorch: the norm, the perturbation, the restoration, and a whole step.

The whole step belongs to a model whose forward and backward pass do nothing but write gradients, so
the share of SAM is the largest that it can be.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from agc import SAM
from agc.reference import perturbation
from agc_conformance.verdict import LIMITS, ulp_error
from agc_torch.sam import SharpnessAware
from benchmarks.gpu.conditions import DTYPES, with_ratios
from benchmarks.gpu.race import Contestant, DoesNotApply, Entry, Outcome
from benchmarks.gpu.results import Job, Results
from benchmarks.gpu.tensors import Tensors, clock_of, copy, module_of, numbers, use_triton
from benchmarks.shapes import MODELS

__all__ = ["Parts", "measure"]

_PASSES: Final = {"norm": 1, "perturb": 4, "restore": 2}
"""How often a part must go through memory; the norm of ASAM reads the weights too."""


def measure(job: Job, results: Results) -> None:
    """Time SAM's parts, for every model and dtype, without and with adaptive scaling."""
    clock = clock_of(job)
    for dtype in DTYPES:
        for model in MODELS:
            tensors = Tensors(model, dtype, job)
            for adaptive in (False, True):
                sharpness = _Sharpness(tensors, dtype, SAM(rho=0.05, adaptive=adaptive), job)
                outcomes = results.race(sharpness.entries(), clock, job.effort(5, 8))
                sharpness.finish()
                results.add(
                    model=model,
                    dtype=dtype,
                    adaptive=adaptive,
                    base="plain step",
                    contestants=with_ratios(outcomes, sharpness.least_bytes(), "plain step"),
                )


class Parts:
    """The parts of one step of SAM, which :class:`SharpnessAware` keeps to itself.

    Parameters
    ----------
    sam : SharpnessAware
        Its model's parameters have gradients.
    """

    def __init__(self, sam: SharpnessAware) -> None:
        self._sam = sam
        self._reach = sam._reach(())
        self._ascent: Any = None

    def norm(self) -> None:
        """Take the norm of the gradients that are there."""
        self._ascent = self._sam._ascent(self._reach)

    def perturb(self) -> None:
        """Move the weights, after :meth:`norm`."""
        self._sam._perturb(self._ascent)

    def restore(self) -> None:
        """Move them back, if they were moved."""
        self._sam._restore()


class _Sharpness:
    """The contestants, on the same parameters."""

    def __init__(self, tensors: Tensors, dtype: str, rule: SAM, job: Job) -> None:
        self._tensors, self._dtype, self._rule, self._job = tensors, dtype, rule, job
        parameters = list(tensors.parameters.values())
        self._sam = SharpnessAware(module_of(tensors.parameters), rule)
        self._parts = Parts(self._sam)
        self._optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def entries(self) -> dict[str, Entry]:
        return {
            "plain step": lambda: Contestant(self._plain, self._ready),
            "SAM step": lambda: Contestant(self._step, self._ready),
            "norm": lambda: Contestant(self._parts.norm, self._ready),
            "perturb": lambda: Contestant(self._parts.perturb, self._measured, self._check),
            "perturb without Triton": self._perturb_without_triton,
            "restore": lambda: Contestant(self._parts.restore, self._perturbed),
            "copy": lambda: copy(self._job),
        }

    def least_bytes(self) -> dict[str, float]:
        passes = dict(_PASSES)
        if self._rule.adaptive:
            passes["norm"] += 1
        passes["perturb without Triton"] = passes["perturb"]
        return {part: float(count * self._tensors.size) for part, count in passes.items()}

    def finish(self) -> None:
        self._parts.restore()

    def _closure(self) -> Tensor:
        self._tensors.put_back()
        return torch.zeros((), device=self._job.device)

    def _plain(self) -> None:
        self._closure()
        self._optimizer.step()

    def _step(self) -> None:
        self._sam.step(self._optimizer, self._closure)

    def _ready(self, *, triton: bool = True) -> None:
        use_triton(self._job, wanted=triton)
        self._parts.restore()
        self._tensors.put_back()

    def _measured(self, *, triton: bool = True) -> None:
        self._ready(triton=triton)
        self._parts.norm()

    def _perturbed(self) -> None:
        self._measured()
        self._parts.perturb()

    def _perturb_without_triton(self) -> Contestant:
        if self._job.device != "cuda":
            raise DoesNotApply("Triton's kernels need a GPU, and are off anyway")
        return Contestant(
            self._parts.perturb,
            lambda: self._measured(triton=False),
            lambda: self._check(triton=False),
        )

    def _check(self, *, triton: bool = True) -> Outcome:
        """Compare some tensors, perturbed by themselves, with the float64 reference (SAM-1).

        Rho is such that every weight moves by some percent, which half precision shows.
        """
        self._ready(triton=triton)
        weights = {name: weight.detach() for name, (weight, _) in self._tensors.sampled().items()}
        gradients = {name: gradient for name, (_, gradient) in self._tensors.sampled().items()}
        parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        before = {name: numbers(weight) for name, weight in weights.items()}
        rule = replace(self._rule, rho=0.05 * math.sqrt(sum(w.size for w in before.values())))
        moves, _ = perturbation(
            {name: numbers(gradient) for name, gradient in gradients.items()}, before, rule
        )
        parts = Parts(SharpnessAware(module_of(parameters), rule))
        parts.norm()
        parts.perturb()
        worst = max(
            float(ulp_error(numbers(parameter), before[name] + moves[name], self._dtype).max())
            for name, parameter in parameters.items()
        )
        parts.restore()
        restored = all(torch.equal(parameters[name], weights[name]) for name in weights)
        return {"max_ulp": worst, "right": worst <= LIMITS[self._dtype] and restored}
