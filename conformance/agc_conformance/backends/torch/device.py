"""PyTorch's devices, dtypes and versions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from agc_conformance.backend import Backend, Unavailable

__all__ = ["Device"]


class Device(Backend):
    """PyTorch on the CPU or on a CUDA device."""

    name: ClassVar[str] = "torch"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "torch"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        if device not in ("cpu", "cuda"):
            raise Unavailable(f"torch runs on cpu and cuda here, not on {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(f"PyTorch {torch.__version__} sees no CUDA device")
        self.device = device

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {"torch": str(torch.__version__), "numpy": np.__version__}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        return "cpu" if self.device == "cpu" else str(torch.cuda.get_device_name())

    def exact(self) -> AbstractContextManager[Any]:
        """Switch off TF32, which cuDNN uses for float32 by default."""
        if self.device == "cuda":
            return torch.backends.cudnn.flags(allow_tf32=False)  # type: ignore[no-any-return]
        return nullcontext()
