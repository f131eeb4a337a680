"""The conformance backend, and that it hides no mistake of the adapter."""

from __future__ import annotations

import pytest
import torch

from agc import AGC
from agc_conformance.backend import Unavailable
from agc_conformance.backends.torch.backend import TorchBackend
from agc_conformance.training.ask import run_task
from agc_torch import SharpnessAware, adaptive_clip_grad_
from tests.contract.suite import BackendContract

BACKEND = TorchBackend()


class TestBackend(BackendContract):
    backend = BACKEND
    absent = (
        ("einsum", "PyTorch has no einsum"),
        ("stacked_dense", "PyTorch stacks no layers"),
        ("perceptron", "PyTorch has no layer 'perceptron'"),
    )


def restore_nearly(self):
    """Restore to one unit in the last place, as subtracting ``e`` does."""
    for weight, copy in self._backup or ():
        copy.copy_(torch.nextafter(copy, weight))
    RESTORE(self)


def clip_twice(self, reach):
    """Clip the ascent gradient as well, as a clipper inside the closure does."""
    adaptive_clip_grad_(self.model, AGC(clipping=0.05))
    return ASCENT(self, reach)


ASCENT, RESTORE = SharpnessAware._ascent, SharpnessAware._restore


@pytest.mark.parametrize(
    ("part", "mistake", "noticed"),
    [("_restore", restore_nearly, "descent"), ("_ascent", clip_twice, "perturb")],
)
def test_training_with_sam_notices(monkeypatch, part, mistake, noticed):
    monkeypatch.setattr(SharpnessAware, part, mistake)
    records = [*run_task(BACKEND, "sam-digits", steps=4)]
    (result,) = (record for record in records if record.get("id") == f"real-sam-digits-{noticed}")
    assert result["status"] == "failed"


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="sees no CUDA device"):
        TorchBackend("cuda")
    assert set(BACKEND.versions()) == {"torch", "numpy"}
