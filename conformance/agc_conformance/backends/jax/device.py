"""JAX's devices, dtypes and versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar, Final, Literal

import jax
import numpy as np

from agc_conformance.backend import Backend, Unavailable

__all__ = ["Device"]

_WIDE: Final = tuple(np.dtype(name) for name in ("float64", "complex128", "int64"))


class Device(Backend):
    """JAX on the CPU, a GPU or a TPU."""

    name: ClassVar[str] = "jax"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "flax"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        # Eight devices for shards and replicas. A process that has already used JAX keeps its
        # number of devices; if there are too few, the scenario reports that.
        try:
            jax.config.update("jax_num_cpu_devices", 8)
        except RuntimeError as error:
            if "initialized" not in str(error):
                raise
        try:
            self._devices = jax.devices(device)
        except RuntimeError as error:
            raise Unavailable(f"JAX {jax.__version__} sees no {device} device: {error}") from None
        self.device = device

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {name: version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        return "cpu" if self.device == "cpu" else str(self._devices[0].device_kind)

    @contextmanager
    def place(self, arrays: Iterable[Any]) -> Iterator[None]:
        """Compute on this device, with 64-bit types enabled if an array has one.

        Otherwise JAX would cast the array to 32 bits.
        """
        wide = any(getattr(array, "dtype", None) in _WIDE for array in arrays)
        with jax.default_device(self._devices[0]), jax.enable_x64(wide):
            yield
