"""Where code runs: compiled by XLA or not, on the CPU or on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import tensorflow as tf

__all__ = ["has_accelerators", "in_xla", "outside_graphs", "splits_groups"]


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


@contextmanager
def outside_graphs() -> Iterator[None]:
    """Create variables as if no function were being traced, which would be traced again for them.

    Replicas create them together, which they can only do inside.
    """
    if tf.distribute.has_strategy():
        yield
        return
    with tf.variable_creator_scope(_create_outside):
        yield


def _create_outside(create: Callable[..., Any], **options: Any) -> Any:
    if tf.is_symbolic_tensor(options["initial_value"]):  # only the graph has it
        return create(**options)
    with tf.init_scope():
        return create(**{**options, "experimental_enable_variable_lifting": False})
