"""Where code runs: compiled by XLA or not, on the CPU or on an accelerator."""

from __future__ import annotations

from functools import lru_cache

import tensorflow as tf

__all__ = ["has_accelerators", "in_xla", "splits_groups"]


def in_xla() -> bool:
    """Tell whether the code being traced will be compiled by XLA (``jit_compile=True``)."""
    from tensorflow.python.ops import control_flow_util  # TensorFlow has no public name for it

    return not tf.executing_eagerly() and bool(
        control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    )


@lru_cache(maxsize=1)
def has_accelerators() -> bool:
    """Tell whether TensorFlow sees any device but CPUs."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def splits_groups() -> bool:
    """Tell whether a grouped convolution has to be one convolution a group: on the CPU outside XLA.

    There TensorFlow has no gradient of grouped convolutions in float64 and float16, nor in float32
    and bfloat16 without oneDNN.
    """
    return not in_xla() and not has_accelerators()
