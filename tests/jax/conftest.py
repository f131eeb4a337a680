"""Set-up of JAX for tests: eight CPU devices, so that arrays can be sharded."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
