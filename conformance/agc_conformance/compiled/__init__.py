"""AGC's JAX programs, compiled ahead of time for TPUs and GPUs that the machine need not have.

libtpu holds the whole TPU compiler, and JAX's CUDA plug-in that of XLA for GPUs. The status is
``compiled``, never ``passed``: nothing ran. It shows that every program lowers and fits, what it
moves in device memory beside the least possible, what it exchanges with other devices, and the same
of a peer, optax's clipping for example. A program that costs more than it may has ``failed``.

* ``programs`` says what is compiled, and what it may cost;
* ``hlo`` reads costs from the text of a compiled program;
* ``measure`` compiles, compares and writes records.

``python -m agc_conformance.compiled tpu --out tpu-aot.json``, in an environment with libtpu, or
``gpu`` in one with ``jax-cuda12-plugin`` and ``jax-cuda12-pjrt``.
"""
