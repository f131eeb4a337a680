"""NFNet-F0, ours and timm's: forward, a training step, AGC, SAM; time and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import agc_torch
from agc import AGC, SAM
from agc.nfnet import WsDtype
from agc_conformance.backends.peers import timm as timm_peer
from agc_torch.nfnet import WSConv2d
from agc_torch.sam import SharpnessAware
from benchmarks import nfnet_torch
from benchmarks.gpu.race import Contestant, DoesNotApply, Entry, Outcome, relative
from benchmarks.gpu.results import Job, Results
from benchmarks.gpu.sharpness_torch import Parts
from benchmarks.gpu.tensors import clock_of, use_triton

__all__ = ["measure"]

_BATCH: Final = (64, 192)
"""Images, and pixels of their edge: the resolution that F0 is trained at."""
_FRACTION: Final = 0.2
"""Part of the batch that the cheaper SAM ascends on."""


class _Mode(NamedTuple):
    """How numbers are computed, and how images and filters lie in memory.

    ``agreement`` is the largest difference of the two models' logits, relative to the largest.
    """

    precision: Literal["float32", "tf32", "bfloat16"]
    layout: Literal["contiguous", "channels_last"]
    agreement: float


_MODES: Final = (
    _Mode("bfloat16", "channels_last", 0.1),
    _Mode("tf32", "contiguous", 0.02),
    _Mode("bfloat16", "contiguous", 0.1),
    _Mode("float32", "contiguous", 1e-3),
)
_REHEARSED: Final = _Mode("float32", "contiguous", 1e-3)


def measure(job: Job, results: Results) -> None:
    """Race both models through everything, in each mode; the most usual comes first."""
    clock = clock_of(job)
    for mode in (_REHEARSED,) if job.tiny else _MODES:
        torch.backends.cuda.matmul.allow_tf32 = mode.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = mode.precision == "tf32"
        training = _Training(mode, job)
        outcomes = results.race(training.entries(), clock, job.effort(3, 3))
        results.add(
            model="nfnet-f0",
            precision=mode.precision,
            layout=mode.layout,
            images=list(training.images.shape),
            base="step",
            contestants={
                name: outcome | {"relative": relative(outcome, outcomes["step"])}
                for name, outcome in outcomes.items()
            },
        )


class _Training:
    """Both models on the same images; the optimizers of ours share its weights."""

    def __init__(self, mode: _Mode, job: Job) -> None:
        self._mode, self._job = mode, job
        layout = torch.channels_last if mode.layout == "channels_last" else torch.contiguous_format
        ours, theirs = _models(job.tiny)
        self._ours = deepcopy(ours).to(job.device, memory_format=layout)
        self._theirs = theirs
        if isinstance(theirs, nn.Module):
            self._theirs = deepcopy(theirs).to(job.device, memory_format=layout)
            self._peer = torch.optim.SGD(self._theirs.parameters(), **nfnet_torch.SGD)
        images, labels = nfnet_torch.batch(*((2, 32) if job.tiny else _BATCH))
        self.images = images.to(job.device, memory_format=layout)
        self._labels = labels.to(job.device) % (10 if job.tiny else 1000)
        self._plain, self._clipping = (
            torch.optim.SGD(self._ours.parameters(), **nfnet_torch.SGD) for _ in range(2)
        )
        self._rule = AGC.profile("deepmind")
        agc_torch.attach(self._clipping, self._ours, self._rule)
        self._gradients: list[Tensor] = []

    def entries(self) -> dict[str, Entry]:
        ours = self._ours
        runs: dict[str, Callable[[], Any]] = {
            "step": lambda: self._step(ours, self._plain),
            "step with AGC": lambda: self._step(ours, self._clipping),
            "step with AGC and SAM": self._sharp_step(1.0),
            f"step with AGC and SAM, fraction {_FRACTION}": self._sharp_step(_FRACTION),
        }
        peers = {
            "forward of timm": lambda peer: lambda: self._forward(peer),
            "step of timm": lambda peer: lambda: self._step(peer, self._peer),
            "step with AGC of timm": self._clipped_step,
        }
        parts = Parts(SharpnessAware(ours, SAM(rho=0.05)))
        alone = {
            "AGC alone": lambda: agc_torch.adaptive_clip_grad_(ours, self._rule),
            "norm of SAM alone": parts.norm,
        }
        ways: dict[str, dict[str, Any]] = {
            "step without Triton": {"triton": False},
            "step, standardised in bfloat16": {"ws_dtype": "bfloat16"},
        }
        forward = Contestant(lambda: self._forward(ours), self._clear, self._check)
        return {
            "forward": lambda: forward,
            **{name: _entry(run, self._clear) for name, run in runs.items()},
            **{name: partial(self._of_timm, make) for name, make in peers.items()},
            **{name: _entry(run, self._differentiated) for name, run in alone.items()},
            **{name: partial(self._another_step, how) for name, how in ways.items()},
        }

    def _autocast(self) -> torch.autocast:
        enabled = self._mode.precision == "bfloat16"
        return torch.autocast(self._job.device, torch.bfloat16, enabled=enabled)

    def _forward(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), self._autocast():
            return model(self.images)

    def _backward(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        model.zero_grad()
        with self._autocast():
            loss = cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        return loss

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._backward(model, self.images, self._labels)
        optimizer.step()

    def _of_timm(self, make: Callable[[nn.Module], Callable[[], Any]]) -> Contestant:
        if not isinstance(self._theirs, nn.Module):
            raise RuntimeError(f"timm's model cannot be made: {self._theirs}")
        return Contestant(make(self._theirs), self._clear)

    def _clipped_step(self, peer: nn.Module) -> Callable[[], None]:
        clip = timm_peer.load().adaptive_clip_grad
        clipped = nfnet_torch.clipped_by_timm(peer)

        def step() -> None:
            self._backward(peer, self.images, self._labels)
            clip(clipped, clip_factor=0.01)
            self._peer.step()

        return step

    def _sharp_step(self, fraction: float) -> Callable[[], Tensor]:
        sam = SharpnessAware(self._ours, SAM(rho=0.05, fraction=fraction))

        def closure(images: Tensor, labels: Tensor) -> Tensor:
            return self._backward(self._ours, images, labels)

        return lambda: sam.step(self._clipping, closure, batch=(self.images, self._labels))

    def _another_step(self, how: dict[str, Any]) -> Contestant:
        """Take a plain step of ours in a way that :meth:`_clear` is told."""
        if self._job.device != "cuda":
            raise DoesNotApply("weights are standardised by kernels on a GPU alone")
        if "ws_dtype" in how and self._mode.precision != how["ws_dtype"]:
            raise DoesNotApply(f"convolutions compute in {self._mode.precision}")
        return Contestant(lambda: self._step(self._ours, self._plain), partial(self._clear, **how))

    def _clear(self, *, triton: bool = True, ws_dtype: WsDtype = "float32") -> None:
        """Drop all gradients, and choose how our weights are standardised."""
        use_triton(self._job, wanted=triton)
        for module in self._ours.modules():
            if isinstance(module, WSConv2d):
                module.ws_dtype = ws_dtype
        for model in (self._ours, self._theirs):
            if isinstance(model, nn.Module):
                model.zero_grad()

    def _differentiated(self) -> None:
        """Give our model the same gradients each time."""
        self._clear()
        if not self._gradients:
            self._backward(self._ours, self.images, self._labels)
            self._gradients = [parameter.grad.clone() for parameter in self._ours.parameters()]
        for parameter, gradient in zip(self._ours.parameters(), self._gradients, strict=True):
            parameter.grad = gradient.clone()

    def _check(self) -> Outcome:
        """Compare the logits of both models, which have the same weights at first."""
        if self._job.tiny or not isinstance(self._theirs, nn.Module):
            return {}
        ours, theirs = (self._forward(model).float() for model in (self._ours, self._theirs))
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        return {"difference": difference, "right": difference <= self._mode.agreement}


@cache
def _models(tiny: bool) -> tuple[nn.Module, nn.Module | Exception]:
    """Return both models; in the place of timm's, why it is not to be had."""
    ours = nfnet_torch.ours("tiny" if tiny else "F0")
    try:
        return ours, nfnet_torch.tiny_timm() if tiny else nfnet_torch.like(ours)
    except Exception as error:  # whatever another version of timm has to say
        return ours, error


def _entry(run: Callable[[], Any], prepare: Callable[[], None]) -> Entry:
    return lambda: Contestant(run, prepare)
