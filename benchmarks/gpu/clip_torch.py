"""AGC in PyTorch: ours, timm's, pytorch_optimizer's, norms of all gradients, and a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import agc_torch
from agc import AGC
from agc_conformance.backends.peers import timm as timm_peer
from agc_torch.clip import limit_norm_, whole
from agc_torch.units import resolve
from benchmarks.gpu.conditions import (
    CLIPPING,
    CONDITIONS,
    DTYPES,
    Truth,
    least_bytes,
    with_ratios,
)
from benchmarks.gpu.race import Contestant, Crash, DoesNotApply, Entry, Outcome
from benchmarks.gpu.results import Job, Results
from benchmarks.gpu.tensors import Tensors, clock_of, copy, module_of, numbers, use_triton
from benchmarks.shapes import MODELS, declared

__all__ = ["measure"]


def measure(job: Job, results: Results) -> None:
    """Time clipping alone, for every model, dtype and share of clipped units."""
    clock = clock_of(job)
    for dtype in DTYPES:
        for model in MODELS:
            tensors = Tensors(model, dtype, job)
            clipping = _Clipping(tensors, dtype, job)
            for condition in CONDITIONS:
                clipping.set_condition(condition)
                outcomes = results.race(clipping.entries(), clock, job.effort(5, 8))
                least = least_bytes(tensors.size, tensors.clipped)
                needs = dict.fromkeys(set(outcomes) - {"copy"}, least)
                # They read, then read and write.
                needs |= dict.fromkeys(("max_norm", "clip_grad_norm_"), 3 * tensors.size)
                results.add(
                    model=model,
                    dtype=dtype,
                    condition=condition,
                    clipped_share=tensors.clipped,
                    base="agc",
                    contestants=with_ratios(outcomes, needs, "agc"),
                )


class _Idle(torch.optim.Optimizer):  # type: ignore[misc]
    """Takes steps that do nothing, so that nothing but what is attached to it is timed."""

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class _Clipping:
    """The contestants, on the same parameters."""

    def __init__(self, tensors: Tensors, dtype: str, job: Job) -> None:
        self._tensors, self._dtype, self._job = tensors, dtype, job
        self._rule = AGC(clipping=CLIPPING, units=declared(tensors.shapes, "o ... -> o"))
        self._parameters = list(tensors.parameters.values())
        pairs = resolve(tensors.parameters, self._rule)[1]
        self._whole = [(whole(entry), tensor) for entry, tensor in pairs]
        self._places = {name: place for place, name in enumerate(tensors.parameters)}

    def set_condition(self, condition: str) -> None:
        """Choose which units are clipped from now on."""
        self._tensors.set_condition(condition)
        pairs = {
            name: (numbers(weight), numbers(gradient))
            for name, (weight, gradient) in self._tensors.sampled().items()
        }
        units = {n: "o ... -> o" if w.ndim > 1 else "... ->" for n, (w, _) in pairs.items()}
        self._truth = Truth(pairs, units, self._dtype)

    def entries(self) -> dict[str, Entry]:
        return {
            "agc": self._ours,
            "agc attached": self._attached,
            "agc without Triton": self._without_triton,
            "timm": self._timm,
            "pytorch_optimizer": self._pytorch_optimizer,
            "max_norm": self._max_norm,
            "clip_grad_norm_": self._clip_grad_norm,
            "copy": lambda: copy(self._job),
            "agc in a CUDA graph": self._graph,  # last: it is the one that may harm the others
        }

    def _clip(self) -> Callable[[], Any]:
        """Return the clipping of a module, which remembers what is the same from call to call."""
        module = module_of(self._tensors.parameters)
        return lambda: agc_torch.adaptive_clip_grad_(module, self._rule)

    def _put_back(self, *, triton: bool = True) -> None:
        use_triton(self._job, wanted=triton)
        self._tensors.put_back()

    def _check(self) -> Outcome:
        return self._truth.compare(lambda name: numbers(self._gradient(name)))

    def _gradient(self, name: str) -> Tensor:
        return self._tensors.gradients[self._places[name]]

    def _ours(self) -> Contestant:
        return Contestant(self._clip(), self._put_back, self._check)

    def _attached(self) -> Contestant:
        optimizer = _Idle(self._parameters, {})
        agc_torch.attach(optimizer, module_of(self._tensors.parameters), self._rule)
        return Contestant(optimizer.step, self._put_back, self._check)

    def _graph(self) -> Contestant:
        if self._job.device != "cuda":
            raise DoesNotApply("CUDA graphs need a GPU")
        self._put_back()
        clip, graph = self._clip(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and allocates
            clip()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                clip()
        except Exception as error:  # which leaves the allocator and the current stream in a graph
            raise Crash(f"{type(error).__name__}: {error}") from error
        return Contestant(graph.replay, self._put_back, self._check)

    def _without_triton(self) -> Contestant:
        if self._job.device != "cuda":
            raise DoesNotApply("Triton's kernels need a GPU, and are off anyway")
        return Contestant(self._clip(), lambda: self._put_back(triton=False), self._check)

    def _timm(self) -> Contestant:
        agc = timm_peer.load()
        return Contestant(
            lambda: agc.adaptive_clip_grad(self._parameters, clip_factor=CLIPPING),
            self._put_back,
            lambda: self._truth.deviation(lambda name: numbers(self._gradient(name))),
        )

    def _pytorch_optimizer(self) -> Contestant:
        from pytorch_optimizer.optimizer.agc import agc

        pairs = list(zip(self._parameters, self._tensors.gradients, strict=True))
        clipped: list[Tensor] = []

        def run() -> None:
            clipped[:] = [agc(parameter.detach(), gradient) for parameter, gradient in pairs]

        def check() -> Outcome:
            return self._truth.deviation(lambda name: numbers(clipped[self._places[name]]))

        return Contestant(run, self._put_back, check)

    def _max_norm(self) -> Contestant:
        return Contestant(lambda: limit_norm_(self._whole, 1.0, self._rule), self._put_back)

    def _clip_grad_norm(self) -> Contestant:
        clip = torch.nn.utils.clip_grad_norm_
        return Contestant(lambda: clip(self._parameters, 1.0), self._put_back)
