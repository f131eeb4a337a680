"""TensorFlow's devices, dtypes and versions."""

from __future__ import annotations

from typing import ClassVar, Literal

import keras
import numpy as np
import tensorflow as tf

from agc_conformance.backend import Backend, Unavailable

__all__ = ["Device"]


class Device(Backend):
    """TensorFlow on the CPU or on a CUDA device."""

    name: ClassVar[str] = "tensorflow"
    layout: ClassVar[Literal["torch", "flax", "keras"]] = "keras"
    dtypes: ClassVar[frozenset[str]] = frozenset(
        {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
    )

    def __init__(self, device: str = "cpu") -> None:
        kinds = {"cpu": "CPU", "cuda": "GPU"}
        if device not in kinds:
            raise Unavailable(f"tensorflow runs on cpu and cuda here, not on {device!r}")
        if not tf.config.list_physical_devices(kinds[device]):
            raise Unavailable(f"TensorFlow {tf.__version__} sees no {device} device")
        if device == "cpu":
            _split_cpu()
        self.device = device
        self._place = f"/{kinds[device]}:0"

    def versions(self) -> dict[str, str]:
        """Return package name to version."""
        return {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}

    def device_name(self) -> str:
        """Return the hardware's own name."""
        if self.device == "cpu":
            return "cpu"
        details = tf.config.experimental.get_device_details(
            tf.config.list_physical_devices("GPU")[0]
        )
        return str(details.get("device_name", "gpu"))


def _split_cpu() -> None:
    """Split the CPU into two logical devices for replicas, unless TensorFlow is initialized."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    except RuntimeError as error:
        if "initialized" not in str(error):
            raise
